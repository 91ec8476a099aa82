"""Our DICOMweb routes side by side with Debian's Orthanc: the same files, the same machine, in turns.

`python -m benchmarks.dicomweb [--quick] [--rounds N] [--only depot|orthanc] [--json PATH]` prints a table and writes
all figures as JSON, by default into benchmarks/results. Orthanc comes from the Debian packages orthanc and
orthanc-dicomweb. Clients are dicomweb_load.py, one process each.

**Orthanc's settings** are those of a fair production server. Its defaults, and why they matter here: SQLite index
(no PostgreSQL: ours is SQLite too), SyncStorageArea true (each file is flushed to disk before it answers),
HttpThreadsCount 50, HttpCompressionEnabled true (our clients do not ask for it), StoreMD5ForAttachments true,
MaximumStorageCacheSize 128 MB, OverwriteInstances false, StudiesMetadata "Full" (every attribute, as ours; read from
the files). Set: StorageCompression false, KeepAlive true (both are defaults too), HttpPort, the folders, and
RemoteAccessAllowed and AuthenticationEnabled false, DicomServerEnabled false, WADO-URI off, the DICOMweb plugin only.
Logs are not verbose. **Ours** has its default settings, as `dicom-depot serve` starts it.

**Method.** Both servers run all the time, their folders on the same disk. In each round each of the two is measured,
and they swap places from round to round. Each client of a store round has a study of its own, of new UIDs, and stores
one instance a request over a connection that stays open; dirty pages are flushed before the clock starts; after it,
the study's metadata must name exactly the instances that were stored (NO ROW WAS LOST), and the study is deleted. What
is retrieved is one study, after one unmeasured request. What is reported is the median of the rounds, of a ratio the
median of the rounds' ratios. CPU is of all processes of a server within the measured span. Memory is the sum of the
peaks (VmHWM) of all processes of a server at the end of the run; what they share is counted in each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks import dicomweb_load
from benchmarks.run import BUILD, HERE, _busy_seconds, _circumstances, _cpu_seconds
from tests.support.orthanc import running_orthanc
from tests.support.service import running_service

AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
FRAME_AS_STORED = 'multipart/related; type="application/octet-stream"; transfer-syntax=*'
METADATA = "application/dicom+json"
REQUEST_SECONDS = 120.0
SIDES = ("depot", "orthanc")
METADATA_OF_STUDY = "metadata of the study"

STORE_RATIO_GOAL = 1.0
METADATA_RATIO_GOAL = 5.0
QUIET_CORES = 0.1
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """Files of one size, and how many of them one round stores."""

    name: str
    size_bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call measures. The study that is retrieved has `study_files` instances of the first workload's size."""

    workloads: Sequence[Workload]
    clients: Sequence[int]
    rounds: int
    study_files: int
    metadata_requests: int
    study_requests: int
    instance_requests: int


def full_plan() -> Plan:
    """About five minutes on two cores."""
    return Plan((Workload("34 KB", 34_000, 500), Workload("520 KB", 520_000, 500)), (1, 4), 5, 500, 5, 5, 300)


def quick_plan() -> Plan:
    """Enough to see that everything works; its figures mean nothing."""
    return Plan((Workload("34 KB", 34_000, 20), Workload("520 KB", 520_000, 20)), (1, 4), 1, 20, 2, 2, 10)


@dataclass(frozen=True, slots=True)
class Side:
    """A running server: where its DICOMweb routes are, its process, and how a study of it is deleted."""

    name: str
    port: int
    root: str
    process_id: int
    delete_study: Callable[[str], None]

    def process_ids(self) -> list[int]:
        found = [self.process_id]
        for pid in found:  # it grows while it is read: children, and theirs
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found.extend(int(child) for child in children.read_text(encoding="ascii").split())
        return found

    def cpu_seconds(self) -> float:
        """Of all its processes that live. None ends while it is measured."""
        return sum(_cpu_seconds(Path(f"/proc/{pid}/stat")) for pid in self.process_ids())

    def peak_memory_bytes(self) -> int:
        return sum(_peak_memory_bytes(pid) for pid in self.process_ids())

    def metadata(self, study_uid: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.port}{self.root}/studies/{study_uid}/metadata"
        answer = httpx.get(url, headers={"Accept": METADATA}, timeout=REQUEST_SECONDS, trust_env=False)
        return list(answer.raise_for_status().json())


@contextmanager
def running_sides(folder: Path, names: Sequence[str]) -> Iterator[list[Side]]:
    with contextlib.ExitStack() as stack:
        sides = []
        if "depot" in names:
            service = stack.enter_context(running_service(folder / "depot"))
            assert service.process is not None

            def delete(study_uid: str) -> None:
                url = f"{service.url}/v2/studies/{study_uid}"
                httpx.delete(url, timeout=REQUEST_SECONDS, trust_env=False).raise_for_status()

            sides.append(Side("depot", service.port, "/v2", service.process.pid, delete))
        if "orthanc" in names:
            orthanc = stack.enter_context(running_orthanc(parent_folder=folder))
            pid = orthanc.process.pid
            sides.append(Side("orthanc", orthanc.port, "/dicom-web", pid, orthanc.delete_study))
        yield sides


def measure(side: Side, requests: Sequence[dicomweb_load.Request]) -> dict[str, Any]:
    """Run one client process for each request, all at once; what they answered, and what CPU it took."""
    with dicomweb_load.waiting_clients(requests) as clients:
        os.sync()
        server_before, busy_before, asked = side.cpu_seconds(), _busy_seconds(), time.monotonic()
        answers = dicomweb_load.run_clients(clients)
        elapsed, busy = time.monotonic() - asked, _busy_seconds() - busy_before
        server_seconds = side.cpu_seconds() - server_before
    client_seconds = sum(answer["cpu_seconds"] for answer in answers)
    return {
        "answers": answers,
        "wall_seconds": round(max(each["ended"] for each in answers) - min(each["began"] for each in answers), 4),
        "server_cpu_seconds": round(server_seconds, 2),
        "client_cpu_seconds": round(client_seconds, 3),
        "client_cpu_share": round(client_seconds / max(1e-9, client_seconds + server_seconds), 3),
        "cores_busy_with_other_things": round(max(0.0, busy - server_seconds - client_seconds) / elapsed, 2),
    }


def store(side: Side, seed: str, size_bytes: int, files: int, clients: int) -> tuple[dict[str, Any], list[str]]:
    """Store, see that no row was lost, and return what was measured and the studies that are there now."""
    shares = [files // clients + (number < files % clients) for number in range(clients)]
    requests = [
        dicomweb_load.Request(side.port, side.root, share, f"{seed} {number}", size_bytes)
        for number, share in enumerate(shares)
    ]
    measured = measure(side, requests)
    answers = measured.pop("answers")
    for answer in answers:
        stored = {uid for _, uid in answer["places"]}
        named = [each["00080018"]["Value"][0] for each in side.metadata(answer["study_uid"])]
        if len(named) != len(stored) or set(named) != stored:
            raise RuntimeError(f"{side.name} LOST ROWS: {len(stored)} stored, {len(set(named) & stored)} of them found")
    seconds = sorted(each for answer in answers for each in answer["seconds"])
    return {
        **measured,
        "files": files,
        "file_bytes": answers[0]["file_bytes"],
        "files_per_second": round(files / measured["wall_seconds"], 1),
        "server_cpu_seconds_per_1000_files": round(1000 * measured["server_cpu_seconds"] / files, 3),
        "median_milliseconds": round(1000 * median(seconds), 3),
        "slowest_milliseconds": round(1000 * seconds[-1], 3),
        "connections_opened": sum(answer["connections_opened"] for answer in answers),
        "rows_found": files,
    }, [answer["study_uid"] for answer in answers]


def retrieve(side: Side, paths: Sequence[str], accept: str, count: int, parts: int) -> dict[str, Any]:
    """Ask for paths in turn, one client; `parts` is how many parts the answer must have (0: it is not multipart)."""
    measured = measure(side, [dicomweb_load.Request(side.port, side.root, count, paths=tuple(paths), accept=accept)])
    (answer,) = measured.pop("answers")
    if answer["parts"] != parts:
        raise RuntimeError(f"{side.name} answered {paths[0]} with {answer['parts']} parts instead of {parts}")
    return {
        **measured,
        "requests": count,
        "milliseconds": round(1000 * median(answer["seconds"]), 3),
        "slowest_milliseconds": round(1000 * max(answer["seconds"]), 3),
        "body_bytes": answer["body_bytes"],
        "server_cpu_milliseconds": round(1000 * measured["server_cpu_seconds"] / (count + 1), 3),
        "connections_opened": answer["connections_opened"],
    }


def measure_stores(sides: Sequence[Side], plan: Plan) -> list[dict[str, Any]]:
    found = []
    for workload in plan.workloads:
        for clients in plan.clients:
            rounds = []
            for number in range(plan.rounds):
                each: dict[str, Any] = {}
                for side in sides if number % 2 == 0 else sides[::-1]:
                    seed = f"{workload.name} {clients} {number}"
                    each[side.name], studies = store(side, seed, workload.size_bytes, workload.files, clients)
                    for study_uid in studies:
                        side.delete_study(study_uid)
                rounds.append(each)
                _say(f"store {workload.name}, clients: {clients}, round {number + 1}", each, "files_per_second")
            found.append({**asdict(workload), "clients": clients, "rounds": rounds})
    return found


def measure_retrieval(sides: Sequence[Side], plan: Plan) -> list[dict[str, Any]]:
    """Metadata, all of a study, its instances and their frames one by one: of a study that is stored first."""
    size_bytes = plan.workloads[0].size_bytes
    for side in sides:
        store(side, "retrieval", size_bytes, plan.study_files, clients=1)
    template = dicomweb_load.Template("retrieval 0", size_bytes)
    for _ in range(plan.study_files):
        template.next_body()
    study = f"/studies/{template.study_uid}"
    instances = [f"{study}/series/{series}/instances/{instance}" for series, instance in template.places]
    frames = [f"{path}/frames/1" for path in instances]
    whole: list[tuple[str, list[str], str, int, int]] = [
        (METADATA_OF_STUDY, [f"{study}/metadata"], METADATA, plan.metadata_requests, 0),
        ("the study as stored", [study], AS_STORED, plan.study_requests, plan.study_files),
        ("an instance as stored", instances, AS_STORED, plan.instance_requests, 1),
        ("a frame", frames, FRAME_AS_STORED, plan.instance_requests, 1),
    ]
    found = []
    for name, paths, accept, count, parts in whole:
        rounds = []
        for number in range(plan.rounds):
            order = sides if number % 2 == 0 else sides[::-1]
            each = {side.name: retrieve(side, paths, accept, count, parts) for side in order}
            rounds.append(each)
            _say(f"{name}, round {number + 1}", each, "milliseconds")
        found.append({"what": name, "instances": plan.study_files, "rounds": rounds})
    return found


def run(plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as name:
        with running_sides(Path(name), names) as sides:
            idle = {side.name: side.peak_memory_bytes() for side in sides}
            stores = measure_stores(sides, plan)
            retrieval = measure_retrieval(sides, plan)
            memory = {
                side.name: {
                    "idle_bytes": idle[side.name],
                    "peak_bytes": side.peak_memory_bytes(),
                    "processes": len(side.process_ids()),
                }
                for side in sides
            }
    circumstances = _circumstances() | {"method": "benchmarks/dicomweb.py"}
    return {**circumstances, "orthanc": _orthanc_packages(), "store": stores, "retrieval": retrieval, "memory": memory}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. `ratio` is above 1 where ours is better, also of times; None: it was not measured."""

    what: str
    unit: str
    depot: float | None
    orthanc: float | None
    ratio: float | None
    goal: float | None = None

    @property
    def verdict(self) -> str:
        if self.goal is None or self.ratio is None:
            return ""
        return f"{'met' if self.ratio >= self.goal else 'NOT met'} ({self.goal:.1f})"


def tabulate(result: Mapping[str, Any]) -> list[Row]:
    """The table of a run's figures: medians of the rounds, and of ratios the median of the rounds' ratios."""
    rows = []
    for each in result["store"]:
        what = f"store {each['name']}, {each['clients']} client{'s' if each['clients'] > 1 else ''}"
        rows.append(_row(what, "files/s", each["rounds"], "files_per_second", STORE_RATIO_GOAL))
        rows.append(_row("  CPU for 1,000 files", "s", each["rounds"], "server_cpu_seconds_per_1000_files"))
    for each in result["retrieval"]:
        goal = METADATA_RATIO_GOAL if each["what"] == METADATA_OF_STUDY else None
        rows.append(_row(each["what"], "ms", each["rounds"], "milliseconds", goal))
    memory = {side: {"mib": figures["peak_bytes"] / MIB} for side, figures in result["memory"].items()}
    return [*rows, _row("peak memory", "MiB", [memory], "mib")]


def _row(what: str, unit: str, rounds: Sequence[Mapping[str, Any]], figure: str, goal: float | None = None) -> Row:
    is_rate = unit == "files/s"
    of_side = {side: [each[side][figure] for each in rounds if side in each] for side in SIDES}
    depot, orthanc = (median(found) if found else None for found in of_side.values())
    ratios = [
        ours / theirs if is_rate else theirs / ours for ours, theirs in zip(*of_side.values(), strict=False) if ours > 0
    ]
    return Row(what, unit, depot, orthanc, median(ratios) if ratios else None, goal)


def print_table(result: Mapping[str, Any]) -> None:
    print(f"{'':<32} {'':>7} {'ours':>10} {'Orthanc':>10} {'ratio':>7}  goal")
    for row in tabulate(result):
        ours, theirs = (f"{value:,.1f}" if value is not None else "-" for value in (row.depot, row.orthanc))
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else "-"
        print(f"{row.what:<32} {row.unit:>7} {ours:>10} {theirs:>10} {ratio:>7}  {row.verdict}".rstrip())
    measured = [
        of_side
        for each in (*result["store"], *result["retrieval"])
        for one in each["rounds"]
        for of_side in one.values()
    ]
    shares = [each["client_cpu_share"] for each in measured]
    print(f"A ratio above 1 is in our favour. The clients' share of the CPU: median {median(shares):.0%}.")
    busiest = max(each["cores_busy_with_other_things"] for each in measured)
    if busiest > QUIET_CORES:
        print(f"The machine was not quiet: up to {busiest:.2f} cores were busy with other things during a round.")


def _peak_memory_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _orthanc_packages() -> dict[str, str]:
    names = ("orthanc", "orthanc-dicomweb")
    try:
        answer = subprocess.run(
            ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\n", *names],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(line.split(" ", 1) for line in answer.splitlines())


def _say(what: str, each: Mapping[str, Any], figure: str) -> None:
    text = ", ".join(f"{side} {each[side][figure]:,.1f}" for side in SIDES if side in each)
    print(f"{what}: {text} {figure.replace('_', ' ')}", file=sys.stderr, flush=True)


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only show that it works, in seconds")
    parser.add_argument("--rounds", type=int, help="rounds of each pair")
    parser.add_argument("--only", choices=SIDES, help="measure one side alone")
    parser.add_argument("--json", type=Path, help="where to write the figures (--quick and --only alone write none)")
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    plan = quick_plan() if arguments.quick else full_plan()
    return replace(plan, rounds=arguments.rounds) if arguments.rounds else plan


def json_path_of(arguments: argparse.Namespace, result: Mapping[str, Any]) -> Path | None:
    if arguments.json is not None or arguments.quick or arguments.only:
        return Path(arguments.json) if arguments.json is not None else None
    return HERE / "results" / f"dicomweb-{result['date'][:10]}-{(result['commit'] or 'unknown')[:10]}.json"


def main() -> None:
    arguments = arguments_parser().parse_args()
    result = run(plan_of(arguments), (arguments.only,) if arguments.only else SIDES)
    print_table(result)
    if arguments.quick:
        print("This was a quick run, which shows that everything works: its figures mean nothing.")
    path = json_path_of(arguments, result)
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"All figures are in {path}")


if __name__ == "__main__":
    main()
