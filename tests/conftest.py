"""What all tests share: one Azurite for the whole run, and the folder of real DICOM files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.azurite import Azurite

CORPUS_VARIABLE = "DICOM_DEPOT_TEST_CORPUS"
_TESTS = Path(__file__).parent
_SLOWEST = {folder: place for place, folder in enumerate(("durability", "docs", "cli", "http", "corpus", "access"))}
REQUIRED_VARIABLE = "DICOM_DEPOT_TEST_CORPUS_REQUIRED"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Tests of the corpus are left out, and that is said, where the corpus is not; they never skip silently."""
    if collection_path.name == "corpus" and corpus_folder() is None:
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders whose files take longest come first, so that at the end no worker has a long one all to itself."""
    items.sort(key=lambda item: _SLOWEST.get(item.path.relative_to(_TESTS).parts[0], len(_SLOWEST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if corpus_folder() is None:
        terminalreporter.write_line(f"The tests on real DICOM files were left out: {CORPUS_VARIABLE} is not set.")


def corpus_folder() -> Path | None:
    named = os.environ.get(CORPUS_VARIABLE)
    if named is None:
        if os.environ.get(REQUIRED_VARIABLE):
            pytest.exit(f"{CORPUS_VARIABLE} is required here and not set", returncode=4)
        return None
    folder = Path(named)
    if not (folder / "index.csv").is_file():
        pytest.exit(f"{CORPUS_VARIABLE} names {folder}, which has no index.csv", returncode=4)
    return folder


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    with Azurite() as running:
        yield running


@pytest.fixture(scope="session")
def corpus() -> Path:
    folder = corpus_folder()
    assert folder is not None
    return folder
