"""Every command in the README, the tutorial and the how-to pages is run, in order, page by page.

A `console` block is a list of commands: a line that begins with "$ " starts one, lines indented below continue it. A
block after a `<!-- skip: reason -->` comment is left out. `dicom-depot serve` is run in the background until the page
ends. Ports and the emulator's address are replaced by those of this test run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_depot.testing.samples import write_examples
from tests.support.azurite import Azurite
from tests.support.service import RunningService, environment, free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "docs/tutorial/first-export.md",
    "docs/how-to/run-azurite.md",
    "docs/how-to/export-to-azure.md",
    "docs/how-to/export-by-query.md",
    "docs/how-to/back-up-and-restore.md",
    "docs/how-to/sign-in-and-roles.md",
    "docs/how-to/behind-a-proxy.md",
    "docs/how-to/use-dicomweb.md",
]
COMMAND_SECONDS = 120

_BLOCK = re.compile(r"(?P<skip><!-- skip: [^>]+ -->\n)?```console\n(?P<body>.*?)```", re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """The commands of a page that are to be run."""
    for block in _BLOCK.finditer(page.read_text()):
        if block["skip"]:
            continue
        for command in re.split(r"^\$ ", block["body"], flags=re.MULTILINE)[1:]:
            first, _, rest = command.rstrip("\n").partition("\n")
            # A here-document is indented on the page; its content must not be.
            yield first + ("\n" + (textwrap.dedent(rest) if "<<" in first else rest) if rest else "")


def flags_as_settings(command: str) -> dict[str, object]:
    pairs = re.findall(r"--([a-z0-9-]+) (\S+)", command)
    return {name.replace("-", "_"): value for name, value in pairs}


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_work(name: str, tmp_path: Path, azurite: Azurite) -> None:
    port = free_port()
    write_examples(tmp_path / "archive")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    connection = azurite.connection_string
    replacements = {
        "127.0.0.1:8080": f"127.0.0.1:{port}",
        "http://127.0.0.1:10000/devstoreaccount1": azurite.account_url,
        '"UseDevelopmentStorage=true"': f'"{connection}"',
        "--to UseDevelopmentStorage=true": f"--to '{connection}'",
        ".venv/bin/": "",
        "make demo ": "dicom-depot demo ",
        "make test ": "true ",
        "/path/to/archive": "archive",
    }
    base = environment(tmp_path / "dicom-depot-data", {"port": port}) | {"PATH": path}
    service: RunningService | None = None
    if name == "docs/how-to/back-up-and-restore.md":
        subprocess.run(["dicom-depot", "import", "archive"], cwd=tmp_path, env=base, check=True, capture_output=True)
    if name == "docs/how-to/run-azurite.md":
        subprocess.run(["dicom-depot", "import", "archive"], cwd=tmp_path, env=base, check=True, capture_output=True)
    try:
        for original in commands(ROOT / name):
            command = original
            for text, replacement in replacements.items():
                command = command.replace(text, replacement)
            if command.startswith("dicom-depot serve"):
                settings = flags_as_settings(command)
                if "export_root" in settings:
                    settings["export_root"] = tmp_path / str(settings["export_root"])
                service = RunningService(tmp_path / "dicom-depot-data", settings, port)
                service.start()
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=tmp_path,
                env=base,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
            )
            assert done.returncode == 0, f"{original}\n{done.stdout}\n{done.stderr}"
    finally:
        if service is not None:
            service.stop()


def test_every_link_between_pages_leads_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "SECURITY.md",
        ROOT / "benchmarks/README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_fits_one_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 240
