"""The benchmark runs and writes its figures. What they are is not tested: a busy machine would fail it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


@pytest.mark.long
def test_a_quick_run_prints_the_table_and_writes_every_figure(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(RUN), "--quick", "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "steady ratio" in done.stdout
    assert "Peak memory" in done.stdout

    result = json.loads(figures.read_text())
    assert result.keys() == {
        "date",
        "commit",
        "has_uncommitted_changes",
        "machine",
        "method",
        "throughput",
        "memory",
    }
    assert result["machine"].keys() == {"cores", "processor", "memory", "kernel", "python", "packages"}
    assert [each["workload"] for each in result["throughput"]] == ["50 KB", "512 KB"]
    for each in result["throughput"]:
        assert each["ratio"] > 0
        assert each["steady_ratio"] > 0
        assert each["fixed_cost_seconds"] > 0
        assert each["is_met"] is (each["ratio"] >= each["goal"])
        for side in ("bare", "export"):
            assert each[side]["files_per_second"] > 0
            assert each[side]["cpu_seconds_per_1000_files"] > 0
            assert all(one[side]["files"] == each["files"] for one in each["rounds"])
    memory = result["memory"]
    assert memory["few"]["files"] < memory["many"]["files"]
    assert memory["difference_bytes"] == memory["many"]["peak_memory_bytes"] - memory["few"]["peak_memory_bytes"]
