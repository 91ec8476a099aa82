"""Settings: each value and its source can be seen, secrets cannot, and a bad value stops the start with a reason."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from dicom_depot.config import PREFIX, Settings
from tests.cli.conftest import Invoke

KEY = base64.b64encode(b"k" * 32).decode()


def rows(invoke: Invoke, *arguments: str, **settings: object) -> dict[str, tuple[str, str]]:
    """Value and source of each setting."""
    result = invoke("settings", "--json", *arguments, **settings)
    assert result.exit_code == 0, result.output
    return {
        row["name"].removeprefix(PREFIX).lower(): (row["value"], row["source"]) for row in json.loads(result.stdout)
    }


def settings_file(folder: Path, text: str) -> str:
    path = folder / "depot.toml"
    path.write_text(text)
    return str(path)


def test_all_settings_are_shown_with_their_defaults(invoke: Invoke) -> None:
    found = rows(invoke)
    assert set(found) == set(Settings.model_fields)
    assert {source for _, source in found.values()} == {"default"}
    assert found["port"] == ("8080", "default")


def test_a_flag_wins_over_the_environment_and_that_over_the_file(invoke: Invoke, tmp_path: Path) -> None:
    file = settings_file(tmp_path, 'port = 1\nhost = "file.example"\nchunk_instances = 7\nexport_root = "/exports"\n')
    found = rows(invoke, "--config", file, "--port", "3", port=2, host="environment.example")
    assert found["port"] == ("3", "flag")
    assert found["host"] == ("environment.example", "environment")
    assert found["chunk_instances"] == ("7", "file")
    assert found["export_root"] == ("/exports", "file")
    assert found["chunk_bytes"][1] == "default"
    assert rows(invoke, config=file)["port"] == ("1", "file")


def test_the_table_for_people_has_the_same(invoke: Invoke) -> None:
    result = invoke("settings", port=4711)
    assert result.exit_code == 0
    (line,) = [line for line in result.stdout.splitlines() if "DICOM_DEPOT_PORT" in line]
    assert line.split() == ["DICOM_DEPOT_PORT", "4711", "environment"]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_secrets_are_masked(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke("settings", *arguments, secret_keys=f"{KEY},{KEY}")
    assert result.exit_code == 0
    assert KEY not in result.output
    assert "2 keys (masked)" in result.stdout


def test_a_secret_is_no_flag(invoke: Invoke) -> None:
    assert invoke("settings", "--secret-keys", KEY).exit_code == 2


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("port", "70000", "less than or equal to 65535"),
        ("port", "http", "valid integer"),
        ("chunk_instances", "0", "greater than or equal to 1"),
        ("export_retry_seconds", "-1", "greater than or equal to 0"),
        ("log_level", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("public_url", "depot.example", "https://host[:port][/path]"),
        ("database_url", "postgresql://depot", "sqlite:///PATH"),
        ("export_allowed_endpoints", "127.0.0.1:10000", "http://host[:port][/account]"),
    ],
)
def test_a_bad_value_stops_serve_with_name_and_reason(
    invoke: Invoke, tmp_path: Path, name: str, value: str, reason: str
) -> None:
    data_dir = tmp_path / "data"
    result = invoke("serve", data_dir=data_dir, **{name: value})
    assert result.exit_code == 2
    assert f"{PREFIX}{name.upper()} (from environment)" in result.stderr
    assert reason in result.stderr
    assert not data_dir.exists()


def test_all_bad_values_are_told_at_once_with_their_sources(invoke: Invoke, tmp_path: Path) -> None:
    file = settings_file(tmp_path, "chunk_bytes = 0\n")
    result = invoke("serve", "--config", file, "--port", "-1", max_body_bytes="1")
    assert result.exit_code == 2
    for name, source in (("PORT", "flag"), ("MAX_BODY_BYTES", "environment"), ("CHUNK_BYTES", "file")):
        assert f"{PREFIX}{name} (from {source})" in result.stderr


def test_settings_that_contradict_each_other_are_told_together(invoke: Invoke) -> None:
    result = invoke("serve", export_stream_bytes=2 << 20, export_bytes_in_flight=1 << 20)
    assert result.exit_code == 2
    assert "DICOM_DEPOT_EXPORT_STREAM_BYTES must not exceed DICOM_DEPOT_EXPORT_BYTES_IN_FLIGHT" in result.stderr


def test_a_bad_secret_is_named_and_not_shown(invoke: Invoke, tmp_path: Path) -> None:
    file = settings_file(tmp_path, "secret_keys = 5\n")
    result = invoke("settings", "--config", file)
    assert result.exit_code == 2
    assert f"{PREFIX}SECRET_KEYS (from file)" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [("prot = 1\n", "unknown settings: prot"), ("port = \n", "not valid TOML"), (None, "No such file")],
)
def test_a_bad_file_is_told(invoke: Invoke, tmp_path: Path, text: str | None, said: str) -> None:
    file = str(tmp_path / "missing.toml") if text is None else settings_file(tmp_path, text)
    result = invoke("serve", "--config", file)
    assert result.exit_code == 2
    assert said in result.stderr
