"""What users and scripts rely on, compared with files: the help of every command, the settings, the error codes.

A change that is meant: `UPDATE_SNAPSHOTS=1 python -m pytest tests/cli/test_help_is_pinned.py`, and look at the diff.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dicom_depot
from dicom_depot.config import PREFIX, Settings

SNAPSHOTS = Path(__file__).parent / "snapshots"

COMMANDS = (
    "",
    "serve",
    "import",
    "export",
    "operations",
    "operations list",
    "operations show",
    "operations watch",
    "operations cancel",
    "operations resume",
    "identity",
    "identity show",
    "identity enable",
    "identity disable",
    "identity check",
    "check",
    "settings",
    "migrate",
    "demo",
)

_PRINT_ALL = """
import json, sys
from typer.testing import CliRunner
from dicom_depot.cli import app
commands = json.loads(sys.argv[1])
runner = CliRunner()
results = {command: runner.invoke(app, [*command.split(), "--help"], catch_exceptions=False) for command in commands}
print(json.dumps({command: result.output for command, result in results.items()}))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of all commands, printed by one process whose environment says nothing of its own about a terminal."""
    environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, "-c", _PRINT_ALL, json.dumps(COMMANDS)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return dict(json.loads(done.stdout))


def compare(name: str, text: str) -> None:
    path = SNAPSHOTS / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_is_as_it_was(helps: dict[str, str], command: str) -> None:
    compare(f"help-{command.replace(' ', '-') or 'dicom-depot'}", helps[command])


def test_no_command_is_without_a_snapshot(helps: dict[str, str]) -> None:
    for group in ("", "operations", "identity"):
        listed = helps[group].partition("Commands")[2]
        names = [line.split()[1] for line in listed.splitlines() if line[:2] == "│ " and line[2] != " "]
        assert names
        assert {f"{group} {name}".strip() for name in names} <= set(COMMANDS)


def test_the_settings_are_as_they_were() -> None:
    lines = []
    for name, field in Settings.model_fields.items():
        default = "depends on the machine" if field.default_factory else repr(field.default)
        bounds = " ".join(map(str, field.metadata))
        lines.append(f"{PREFIX}{name.upper()}  default: {default}  bounds: {bounds or 'none'}")
    compare("settings", "\n".join(lines))


def test_the_error_codes_are_as_they_were() -> None:
    """Codes that stand in the source as such; those that a storage service gives are its own."""
    root = Path(dicom_depot.__file__).parent
    files = [path for path in root.rglob("*.py") if "testing" not in path.parts]
    compare("error-codes", "\n".join(sorted({code for path in files for code in codes_in(path)})))


def codes_in(path: Path) -> Iterator[str]:
    """`code = "X"` in a class, `code="X"` in a call, and the first argument of what makes a fault or a refusal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Assign(targets=[ast.Name(id="code")], value=ast.Constant(value=str(code))):
                yield code
            case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                yield code
            case ast.Call(
                func=ast.Name(id="SourceFault" | "DestinationFault" | "OperationError" | "_refused"), args=args
            ):
                if args and isinstance(args[0], ast.Constant) and isinstance(args[0].value, str):
                    yield args[0].value
            case _:
                pass


def test_the_version_is_printed_without_a_command() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "dicom_depot", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == dicom_depot.__version__
