"""`dicom-depot demo`: the whole way in one command, from files to an export, in a folder that vanishes at the end.

It goes the way of users: the `import` and `serve` commands in processes of their own, and the HTTP API.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import httpx
import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.tree import Tree

from dicom_depot.cli.client import OperationReport, ServiceClient
from dicom_depot.cli.common import ExitCode, fail, out
from dicom_depot.cli.export_command import export_body, parse_destination
from dicom_depot.cli.export_source import listed_source
from dicom_depot.cli.progress import OperationProgress
from dicom_depot.codec.part10 import read_header
from dicom_depot.config import PREFIX
from dicom_depot.domain.errors import DepotError, InvalidRequest
from dicom_depot.domain.export import LOG_NAME, instance_key, log_key
from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.domain.operation import OperationId
from dicom_depot.services.import_sources import Candidate, Opener, UnreadableError, find_files, read_blocks
from dicom_depot.testing.samples import ct_volume, multiframe, structured_report

FILES_MAX = 1000
BYTES_MAX = 1_000_000_000
"""How much of the given files is used: a demo is to be short."""

_IMPORT_SECONDS = 40.0
_START_SECONDS = 30.0
_EXPORT_SECONDS = 40.0
"""Two minutes in all, at most. Usually it takes ten seconds."""
_STOP_SECONDS = 10.0
_BLOCK_BYTES = 1 << 20
_SHOWN_FILES = 3
_SHOWN_STUDIES = 4
_FOLDER = "demo"
_NOT_STORED = "1.2.3.4.5.6.7.8.9"


def demo(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="DICOM files, folders or zip archives. Default: synthetic ones."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Work in this new folder, and keep it.", show_default=False)
    ] = None,
) -> None:
    """Import DICOM files, export them through the HTTP API, and show what arrived. Leaves nothing behind.

    Of given files at most 1,000 (or 1 GB) are used. They are only read.
    """
    with _work_folder(keep) as folder, _ended_on_signal():
        try:
            _Demo(folder).run(paths)
        except InvalidRequest as error:
            fail(error.message, ExitCode.USAGE)
        except (_DemoFailed, DepotError, OSError, subprocess.SubprocessError) as error:
            _give_up(str(error), folder)
    _tell_what_next(folder if keep is not None else None)


class _DemoFailed(Exception):
    """What should have worked did not."""


@dataclass(slots=True)
class _Given:
    """The instances that go in: what arrives must have one of these checksums. The paths are import's arguments."""

    checksums: dict[InstanceRef, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    paths: dict[str, None] = field(default_factory=dict)
    size: int = 0


@dataclass(slots=True)
class _Demo:
    folder: Path

    def run(self, paths: list[Path] | None) -> None:
        given = _read_given(paths) if paths else self._synthesize()
        self._import(given)
        with self._service() as url:
            report = self._export(url, given)
        self._show(report)
        self._verify(report, given)

    def _synthesize(self) -> _Given:
        files = self.folder / "files"
        files.mkdir()
        for sample in (*ct_volume(), multiframe(), structured_report()):
            (files / sample.file_name).write_bytes(sample.content)
        _step("Three synthetic studies: CT volume, multi-frame ultrasound, structured report")
        return _read_given([files], [str(files)])

    def _import(self, given: _Given) -> None:
        _step("Import")
        _shell(f"dicom-depot import {shlex.join(list(given.paths)[:3])}{' ...' if len(given.paths) > 3 else ''}")
        done = self._run("import", "--json", *given.paths)
        if done.returncode not in (ExitCode.OK, ExitCode.SOME_SKIPPED):
            raise _DemoFailed(f"The import ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
        summary = json.loads(done.stdout)
        others = ", ".join(
            f"{summary[name]:,} {text}"
            for name, text in (
                ("not_dicom", "not DICOM"),
                ("broken", "broken"),
                ("conflicting", "conflicting"),
                ("already_there", "more than once"),
            )
            if summary[name]
        )
        stored = f"{summary['stored']:,} instances stored, {decimal(summary['bytes_stored'])}"
        out.print(f"  {stored}{f' ({others})' if others else ''}", highlight=False)

    def _export(self, url: str, given: _Given) -> OperationReport:
        _step("Export through the HTTP API: each study, and one identifier that is not stored")
        studies = list(dict.fromkeys(ref.study_uid for ref in given.checksums))
        body = export_body(listed_source([*studies, _NOT_STORED]), parse_destination(f"file:{_FOLDER}", None))
        shown = [*studies[:_SHOWN_STUDIES], *(["..."] if len(studies) > _SHOWN_STUDIES else []), _NOT_STORED]
        shown_body = _json_lines(export_body(listed_source(shown), body["destination"]))
        _shell(f"curl {url}/v2/export -H 'Content-Type: application/json' -d '{shown_body}'")
        client = ServiceClient(url)
        try:
            operation = client.start(body)
            _plain(_json_lines(operation._asdict()))
            _shell(f"curl {operation.href}")
            deadline = time.monotonic() + _EXPORT_SECONDS
            with OperationProgress(out) as progress:

                def show(report: OperationReport) -> None:
                    progress.show(report)
                    if not report.is_ended and time.monotonic() > deadline:
                        raise _DemoFailed(f"The export did not end within {_EXPORT_SECONDS:.0f} seconds.")

                report = client.watch(operation.id, show, progress.say)
        finally:
            client.close()
        _plain(_json_lines(report.body))
        return report

    def _show(self, report: OperationReport) -> None:
        _step("What arrived (names shortened)")
        exported = self.folder / "exported" / _FOLDER
        root = exported / report.id
        tree = Tree(f"{_FOLDER}/{report.id}/")
        results = tree.add("results/")
        files = sorted(root.glob("results/*/*/*.dcm"))
        by_series: dict[Path, list[Path]] = defaultdict(list)
        for file in files:
            by_series[file.parent].append(file)
        by_study: dict[Path, list[Path]] = defaultdict(list)
        for series in by_series:
            by_study[series.parent].append(series)
        for study, its_series in list(by_study.items())[:_SHOWN_STUDIES]:
            branch = results.add(f"{_short(study.name)}/")
            for series in its_series[:_SHOWN_STUDIES]:
                leaves = branch.add(f"{_short(series.name)}/")
                for file in by_series[series][:_SHOWN_FILES]:
                    leaves.add(f"{_short(file.stem)}.dcm  [dim]{decimal(file.stat().st_size)}[/]")
                _add_rest(leaves, len(by_series[series]) - _SHOWN_FILES, "files")
            _add_rest(branch, len(its_series) - _SHOWN_STUDIES, "series")
        _add_rest(results, len(by_study) - _SHOWN_STUDIES, "studies")
        tree.add(f"{LOG_NAME}  [dim]{report.skipped} skipped[/]")
        out.print(tree, highlight=False)
        if files:
            out.print("One of these names in full:", highlight=False)
            _plain(str(files[0].relative_to(exported)))
        out.print(f"{LOG_NAME}, one line for each skip:", highlight=False)
        for line in (
            (exported / log_key(OperationId(report.id))).read_text(encoding="utf-8").splitlines()[:_SHOWN_FILES]
        ):
            _plain(line)

    def _verify(self, report: OperationReport, given: _Given) -> None:
        exported = self.folder / "exported" / _FOLDER
        wrong = []
        for ref, checksums in given.checksums.items():
            key = instance_key(OperationId(report.id), ref.study_uid, ref.series_uid, ref.sop_instance_uid)
            try:
                digest = hashlib.sha256((exported / key).read_bytes()).digest()
            except FileNotFoundError:
                digest = b""
            if digest not in checksums:
                wrong.append(str(ref))
        if wrong or (report.status, report.exported, report.skipped) != ("succeeded", len(given.checksums), 1):
            raise _DemoFailed(
                f"The export {report.status} with {report.exported} exported and {report.skipped} skipped; "
                f"{len(given.checksums)} and 1 were expected. Not identical: {', '.join(wrong[:3]) or 'none'}."
            )
        out.print(
            f"\n[bold green]All {len(given.checksums):,} exported files are byte for byte those that were imported[/] "
            "(SHA-256).",
            highlight=False,
        )

    @contextmanager
    def _service(self) -> Iterator[str]:
        """A `serve` process, ended with the block."""
        _step("Start the service")
        port = _free_port()
        _shell(f"{PREFIX}EXPORT_ROOT=exported dicom-depot serve --port {port}")
        url = f"http://127.0.0.1:{port}"
        with (self.folder / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                _command("serve", "--port", str(port)),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process only, which ends that one in order
            )
        try:
            _wait_until_healthy(url, process)
            out.print(f"  {url} is up", highlight=False)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            _command(*arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )

    def _environment(self) -> Mapping[str, str]:
        """This process's environment, with the demo's settings in place of all others."""
        root = self.folder / "exported"
        root.mkdir(exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
        settings = {"DATA_DIR": self.folder / "data", "EXPORT_ROOT": root, "MIN_FREE_BYTES": 0}
        return inherited | {PREFIX + name: str(value) for name, value in settings.items()}


def _read_given(paths: list[Path], import_paths: list[str] | None = None) -> _Given:
    """Checksums of the DICOM files below `paths`, as many as a demo takes.

    Raises InvalidRequest when a path does not exist.
    """
    given = _Given()
    opener = Opener()
    is_cut = False
    for number, candidate in enumerate(find_files(paths)):
        # An archive is imported whole, so it is also read whole.
        is_begun = candidate.archive is not None and candidate.archive in given.paths
        if (number >= FILES_MAX or given.size + candidate.size > BYTES_MAX) and not is_begun:
            is_cut = True
            break
        given.size += candidate.size
        given.paths[candidate.archive or candidate.path] = None
        _read_candidate(candidate, opener, given)
    opener.close()
    if is_cut:
        _plain(f"Of the files given, the first {len(given.paths):,} are used: a demo is to be short.")
    if not given.checksums:
        raise _DemoFailed(f"Among the {len(given.paths):,} files looked at is no DICOM instance.")
    if import_paths is not None:
        given.paths = dict.fromkeys(import_paths)
    return given


def _read_candidate(candidate: Candidate, opener: Opener, given: _Given) -> None:
    """What cannot be read or is not DICOM is left to the import, which counts it."""
    if candidate.problem is not None:
        return
    try:
        with opener.open(candidate) as stream:
            ref = read_header(stream, candidate.size).ref
        digest = hashlib.sha256()
        with opener.open(candidate) as stream:
            for block in read_blocks(stream, _BLOCK_BYTES):
                digest.update(block)
    except (UnreadableError, DepotError, OSError):
        return
    given.checksums[ref].add(digest.digest())


@contextmanager
def _work_folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="dicom-depot-demo-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        is_used = any(keep.iterdir())
    except OSError as error:
        fail(f"{keep} cannot be used: {error.strerror}.", ExitCode.USAGE)
    if is_used:
        fail(f"{keep} is not empty; --keep takes a new folder.", ExitCode.USAGE)
    yield keep.absolute()


@contextmanager
def _ended_on_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: its processes and its folder go with it."""

    def on_signal(number: int, _frame: FrameType | None) -> NoReturn:
        raise typer.Exit(128 + number)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health/check", timeout=2, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise _DemoFailed("The service did not start.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dicom_depot", *arguments]


def _step(text: str) -> None:
    out.print(f"\n[bold]{escape(text)}[/]", highlight=False)


def _shell(command: str) -> None:
    """A command as one would type it: never wrapped, so that it can be copied."""
    out.print(f"  [cyan]$ {escape(command)}[/]", highlight=False, soft_wrap=True)


def _plain(text: str) -> None:
    indented = "\n".join(f"  {line}" for line in text.splitlines())
    out.print(indented, highlight=False, markup=False, soft_wrap=True)


def _json_lines(value: Mapping[str, object]) -> str:
    """JSON with a line for each member, and for each item of a list: short, and still easy to read."""
    text = ",\n   ".join(f"{json.dumps(name)}: {json.dumps(content)}" for name, content in value.items())
    return (
        "{"
        + re.sub(r"\[.*?\]", lambda items: items[0].replace('"', '\n     "', 1).replace(", ", ",\n     "), text)
        + "}"
    )


def _short(uid: str) -> str:
    return uid if len(uid) <= 24 else f"{uid[:12]}…{uid[-8:]}"


def _add_rest(branch: Tree, count: int, what: str) -> None:
    if count > 0:
        branch.add(f"[dim]and {count:,} more {what}[/]")


def _give_up(message: str, folder: Path) -> NoReturn:
    log = folder / "serve.log"
    if log.is_file() and (lines := log.read_text(errors="replace").strip()):
        message += f"\nThe service's log ends:\n{lines[-2000:]}"
    fail(message, ExitCode.FAILED)


def _tell_what_next(kept: Path | None) -> None:
    _step("What to try next")
    if kept is not None:
        _plain(f"Look around in {kept}: data/ holds database and store, exported/ what arrived.")
    else:
        _plain("`dicom-depot demo --keep DIR` does the same in a folder that stays.")
    _plain("Your own files:")
    _shell("dicom-depot import ~/scans")
    _shell("mkdir exported; DICOM_DEPOT_EXPORT_ROOT=exported dicom-depot serve")
    _plain("In a second terminal, to a folder below exported/:")
    _shell("dicom-depot export --all --to file:first --wait")
    _plain("To Azure; this asks for the container's URL, so that its secret (SAS) stands in no history:")
    _shell("dicom-depot export --all --to - --wait")
    _plain("To Azurite, the emulator, when the service was started with its address allowed:")
    _shell("DICOM_DEPOT_EXPORT_ALLOWED_ENDPOINTS=http://127.0.0.1:10000/devstoreaccount1 dicom-depot serve")
    _shell("dicom-depot export --all --to UseDevelopmentStorage=true --container NAME --wait")
    _plain("All commands: dicom-depot --help. All settings: dicom-depot settings. More: README.md and docs/.")
