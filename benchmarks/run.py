"""Export through the service side by side with a bare loop: the same files, the same sink, as many threads.

`python benchmarks/run.py [--quick] [--rounds N] [--json PATH]` prints a table and writes all figures as JSON, by
default into benchmarks/results. benchmarks/README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / ".build"
PACKAGES = ("dicom-depot", "obstore", "dbos", "sqlalchemy", "xxhash")

RATIO_GOAL = 0.80
MEMORY_GOAL_BYTES = 100_000_000
FEW = 100
SIDES = ("bare", "export")
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """Files of one size, and how many of them one round sends."""

    name: str
    size_bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call measures."""

    workloads: Sequence[Workload]
    concurrencies: Sequence[int]
    rounds: int
    fixed_cost_runs: int
    memory_files: int
    memory_rounds: int


def full_plan() -> Plan:
    """Rounds of 10 s and more on two cores; about 15 minutes."""
    default = min(64, 8 * (os.cpu_count() or 1))
    return Plan(
        workloads=(Workload("50 KB", 50 * 1024, 120_000), Workload("512 KB", 512 * 1024, 60_000)),
        concurrencies=(default, 4),
        rounds=5,
        fixed_cost_runs=9,
        memory_files=100_000,
        memory_rounds=3,
    )


def quick_plan() -> Plan:
    """Enough to see that everything works; its figures mean nothing."""
    return Plan(
        workloads=(Workload("50 KB", 50 * 1024, 1000), Workload("512 KB", 512 * 1024, 200)),
        concurrencies=(4,),
        rounds=1,
        fixed_cost_runs=2,
        memory_files=1000,
        memory_rounds=1,
    )


class Sink:
    """The process that takes the bytes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "sink.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def cpu_seconds(self) -> float:
        return _cpu_seconds(Path(f"/proc/{self._process.pid}/stat"))

    def close(self) -> None:
        self._process.communicate()


def measure(side: str, data_dir: Path, sink: Sink, concurrency: int, count: int = 0, runs: int = 1) -> dict[str, Any]:
    """One fresh process that does the runs; its answer, with the CPU that the sink and all others used meanwhile."""
    request = {
        "side": side,
        "data_dir": str(data_dir),
        "port": sink.port,
        "concurrency": concurrency,
        "count": count,
        "runs": runs,
    }
    before_all, before_sink, before_children, started = _busy_seconds(), sink.cpu_seconds(), _children_seconds(), _now()
    answer = subprocess.run(
        [sys.executable, str(HERE / "side.py"), json.dumps(request)],
        env={name: value for name, value in os.environ.items() if not name.startswith("DICOM_DEPOT_")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    seconds, children, of_sink = _now() - started, _children_seconds() - before_children, sink.cpu_seconds()
    of_sink -= before_sink
    others = max(0.0, _busy_seconds() - before_all - children - of_sink)
    return {
        **json.loads(answer.splitlines()[-1]),
        "sink_cpu_seconds": round(of_sink, 2),
        "cores_busy_with_other_things": round(others / seconds, 2),
    }


def measure_throughput(workload: Workload, data_dir: Path, sink: Sink, plan: Plan) -> Iterator[dict[str, Any]]:
    """Both sides in turn, round by round; one result for each concurrency."""
    rounds: dict[int, list[dict[str, Any]]] = {concurrency: [] for concurrency in plan.concurrencies}
    for number in range(plan.rounds):
        for concurrency in plan.concurrencies:
            found: dict[str, Any] = {}
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                found[side] = _flat(measure(side, data_dir, sink, concurrency))
            found["ratio"] = round(found["export"]["files_per_second"] / found["bare"]["files_per_second"], 3)
            _say(
                f"{workload.name}, {concurrency} threads, round {number + 1}: "
                + ", ".join(f"{side} {found[side]['files_per_second']:,.0f} files/s" for side in SIDES)
                + f", ratio {found['ratio']:.2f}"
            )
            rounds[concurrency].append(found)
    for concurrency in plan.concurrencies:
        alone = measure("export", data_dir, sink, concurrency, count=1, runs=plan.fixed_cost_runs)
        fixed_cost = median(run["wall_seconds"] for run in alone["runs"])
        yield _throughput(workload, concurrency, rounds[concurrency], fixed_cost)


def _flat(measured: dict[str, Any]) -> dict[str, Any]:
    (run,) = measured.pop("runs")
    return {**run, **measured, "files_per_second": round(run["files"] / run["wall_seconds"], 1)}


def _throughput(
    workload: Workload, concurrency: int, rounds: list[dict[str, Any]], fixed_cost: float
) -> dict[str, Any]:
    for each in rounds:
        assert all(each[side]["files"] == workload.files for side in SIDES), "a side sent another number of files"
        assert each["bare"]["bytes"] == each["export"]["bytes"]
        export = each["export"]
        export["steady_files_per_second"] = round(workload.files / max(1e-9, export["wall_seconds"] - fixed_cost), 1)
        each["steady_ratio"] = round(export["steady_files_per_second"] / each["bare"]["files_per_second"], 3)

    def of_side(side: str) -> dict[str, float]:
        return {
            "files_per_second": median(each[side]["files_per_second"] for each in rounds),
            "seconds_of_a_round": median(each[side]["wall_seconds"] for each in rounds),
            "cpu_seconds_per_1000_files": _per_1000(each[side]["cpu_seconds"] for each in rounds),
            "sink_cpu_seconds_per_1000_files": _per_1000(each[side]["sink_cpu_seconds"] for each in rounds),
            "peak_memory_bytes": median(each[side]["peak_memory_bytes"] for each in rounds),
        }

    def _per_1000(seconds: Iterator[float]) -> float:
        return round(1000 * median(seconds) / workload.files, 4)

    ratio = median(each["ratio"] for each in rounds)
    return {
        "workload": workload.name,
        "size_bytes": workload.size_bytes,
        "files": workload.files,
        "concurrency": concurrency,
        "bare": of_side("bare"),
        "export": {
            **of_side("export"),
            "steady_files_per_second": median(each["export"]["steady_files_per_second"] for each in rounds),
        },
        "fixed_cost_seconds": round(fixed_cost, 4),
        "ratio": ratio,
        "steady_ratio": median(each["steady_ratio"] for each in rounds),
        "goal": RATIO_GOAL,
        "is_met": ratio >= RATIO_GOAL,
        "rounds": rounds,
    }


def measure_memory(workload: Workload, data_dir: Path, sink: Sink, plan: Plan) -> dict[str, Any]:
    """Peak memory of an export process for few and for many instances, at the default concurrency."""
    peaks: dict[int, list[int]] = {FEW: [], plan.memory_files: []}
    for _ in range(plan.memory_rounds):
        for count, found in peaks.items():
            measured = measure("export", data_dir, sink, plan.concurrencies[0], count=count)
            assert measured["runs"][0]["files"] == count
            found.append(measured["peak_memory_bytes"])
    few, many = (median(found) for found in peaks.values())
    return {
        "size_bytes": workload.size_bytes,
        "few": {"files": FEW, "peak_memory_bytes": few},
        "many": {"files": plan.memory_files, "peak_memory_bytes": many},
        "difference_bytes": many - few,
        "goal_bytes": MEMORY_GOAL_BYTES,
        "is_met": many - few <= MEMORY_GOAL_BYTES,
        "rounds": {str(count): found for count, found in peaks.items()},
    }


def run(plan: Plan) -> dict[str, Any]:
    throughput: list[dict[str, Any]] = []
    memory: dict[str, Any] = {}
    sink = Sink()
    try:
        for workload in plan.workloads:
            with _filled_folder(workload) as data_dir:
                throughput.extend(measure_throughput(workload, data_dir, sink, plan))
                if not memory:
                    memory = measure_memory(workload, data_dir, sink, plan)
    finally:
        sink.close()
    return {**_circumstances(), "throughput": throughput, "memory": memory}


@contextmanager
def _filled_folder(workload: Workload) -> Iterator[Path]:
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as folder:
        _say(f"making {workload.files:,} files of {workload.name}")
        data_dir = Path(folder) / "data"
        arguments = [str(data_dir), str(workload.files), str(workload.size_bytes)]
        subprocess.run(
            [sys.executable, str(HERE / "data_folder.py"), *arguments], stdout=subprocess.DEVNULL, check=True
        )
        yield data_dir


def print_table(result: dict[str, Any]) -> None:
    head = ("", "threads", "bare files/s", "export files/s", "ratio", "steady ratio", "CPU/1000", "fixed", "goal")
    print("{:>7} {:>7} {:>13} {:>15} {:>6} {:>13} {:>16} {:>8} {:>8}".format(*head))
    for each in result["throughput"]:
        bare, export = each["bare"], each["export"]
        cpu = f"{bare['cpu_seconds_per_1000_files']:.3f} / {export['cpu_seconds_per_1000_files']:.3f} s"
        print(
            f"{each['workload']:>7} {each['concurrency']:>7} {bare['files_per_second']:>13,.0f} "
            f"{export['files_per_second']:>15,.0f} {each['ratio']:>6.2f} {each['steady_ratio']:>13.2f} {cpu:>16} "
            f"{each['fixed_cost_seconds']:>6.2f} s {_verdict(each):>8}"
        )
    memory = result["memory"]
    few, many = memory["few"], memory["many"]
    print(
        f"Peak memory: {few['peak_memory_bytes'] / MIB:.0f} MiB for {few['files']:,} instances, "
        f"{many['peak_memory_bytes'] / MIB:.0f} MiB for {many['files']:,}: "
        f"{memory['difference_bytes'] / 1e6:+.0f} MB, {_verdict(memory)} (at most {memory['goal_bytes'] / 1e6:.0f} MB)"
    )
    print(f"The goal is a ratio of {RATIO_GOAL:.2f}. CPU: client seconds per 1,000 files, bare / export.")
    busiest = max(
        each[side]["cores_busy_with_other_things"]
        for row in result["throughput"]
        for each in row["rounds"]
        for side in SIDES
    )
    if busiest > 0.1:
        print(f"The machine was not quiet: up to {busiest:.2f} cores were busy with other things during a round.")


def _verdict(measured: dict[str, Any]) -> str:
    return "met" if measured["is_met"] else "NOT met"


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain")),
        "machine": {
            "cores": os.cpu_count(),
            "processor": _first_value(Path("/proc/cpuinfo"), "model name"),
            "memory": _first_value(Path("/proc/meminfo"), "MemTotal"),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
        },
        "method": "benchmarks/README.md",
    }


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _first_value(path: Path, name: str) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return "unknown"


def _now() -> float:
    return time.monotonic()


def _busy_seconds() -> float:
    """CPU seconds that the whole machine has spent on anything."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    idle, waiting = fields[3], fields[4]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(stat: Path) -> float:
    fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = os.times()
    return used.children_user + used.children_system


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only show that it works, in half a minute")
    parser.add_argument("--rounds", type=int, help="rounds of each pair")
    parser.add_argument("--json", type=Path, help="where to write the figures (--quick alone writes none)")
    arguments = parser.parse_args()
    plan = quick_plan() if arguments.quick else full_plan()
    if arguments.rounds:
        plan = replace(plan, rounds=arguments.rounds)
    result = run(plan)
    print_table(result)
    path = arguments.json
    if path is None and not arguments.quick:
        path = HERE / "results" / f"{result['date'][:10]}-{(result['commit'] or 'unknown')[:10]}.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _say(f"figures written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
