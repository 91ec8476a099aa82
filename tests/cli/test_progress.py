"""How a running export is shown: rates, time left, lines where no terminal is, a bar where one is."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from dicom_depot.cli import progress as module
from dicom_depot.cli.progress import OperationProgress, RateMeter, progress_text
from tests.cli.conftest import RUNNING


def test_rates_are_those_of_the_last_minute() -> None:
    now = 0.0
    meter = RateMeter(lambda: now)
    assert meter.measure(replace(RUNNING, exported=0, bytes_exported=0)).seconds_left is None
    now = 10.0
    rates = meter.measure(replace(RUNNING, exported=900, skipped=100, bytes_exported=50_000_000, total=5000))
    assert rates == (100.0, 5_000_000.0, 40.0)
    now = 70.0
    meter.measure(replace(RUNNING, exported=900, skipped=100, bytes_exported=50_000_000, total=5000))
    now = 130.0
    rates = meter.measure(replace(RUNNING, exported=900, skipped=100, bytes_exported=50_000_000, total=5000))
    assert rates == (0.0, 0.0, None)


def test_no_time_left_is_told_while_the_total_still_grows() -> None:
    now = 0.0
    meter = RateMeter(lambda: now)
    meter.measure(replace(RUNNING, exported=0))
    now = 1.0
    rates = meter.measure(replace(RUNNING, percent_complete=0))
    assert rates.seconds_left is None
    assert progress_text(replace(RUNNING, percent_complete=0), rates).startswith("1,000 instances  ")


def test_the_line_has_all_that_one_wants_to_know() -> None:
    text = progress_text(replace(RUNNING, skipped=3), module.Rates(123.4, 4_560_000.0, 3725.0))
    assert text == "1,000 of 2,000 instances  5.0 MB  123/s  4.6 MB/s  1:02:05 left  3 skipped"


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(module, "PLAIN_LINE_SECONDS", 0.0)
    with OperationProgress(Console(file=output)) as shown:
        shown.show(RUNNING)
        shown.say("The service [x] answers again.")
        shown.show(replace(RUNNING, status="succeeded"))
    assert [line[:11] for line in output.getvalue().splitlines()] == ["1,000 of 2,", "The service"]


@pytest.mark.parametrize(("width", "has_bar"), [(80, False), (120, True)])
def test_a_terminal_gets_one_line_that_fits(width: int, has_bar: bool) -> None:
    output = io.StringIO()
    with OperationProgress(Console(file=output, force_terminal=True, width=width, color_system=None)) as shown:
        shown.show(replace(RUNNING, exported=1_234_567, total=9_999_999))
    assert ("━" in output.getvalue()) is has_bar
    assert "1,234,567 of 9,999,999 instances  5.0 MB" in output.getvalue()
