import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latency import worker
from latency.worker import Processor, allowed_cpus, refusal_of_cpus

from .test_measure import relu_onnx


def answer_to(folder: Path, **job: object) -> subprocess.CompletedProcess:
    """What the worker says of a job in a process of its own, which sees nothing of this package."""
    (folder / "worker.py").write_bytes(Path(worker.__file__).read_bytes())
    (folder / "relu.onnx").write_bytes(relu_onnx())
    np.save(folder / "x.npy", np.zeros((1, 3, 4, 4), dtype=np.float32))
    network = {"model": "relu.onnx", "inputs": ["x.npy"]}
    settings = {"networks": [network], "threads": 1, "cpus": [], "n_runs": 3, "n_warmup": 0, "settled": True}
    (folder / "job.json").write_text(json.dumps(settings | job))
    return subprocess.run(
        [sys.executable, "-I", folder / "worker.py", folder], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
def test_stopwatches_leave_no_file_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(50):
        worker.Stopwatch().timer(lambda: None)()

    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


@pytest.mark.parametrize(("threads", "times"), [(1, [3, 7]), (2, [5, 7])])
def test_waiting_is_taken_off_where_one_thread_did_the_work(threads: int, times: list[int]) -> None:
    assert worker.without_waits([5, 7], [2, 0], threads) == times


def test_the_worker_alone_times_networks_and_tells_its_processor(tmp_path: Path) -> None:
    assert answer_to(tmp_path).returncode == 0
    answer = json.loads((tmp_path / "result.json").read_text())
    assert np.shape(answer["elapsed_ns"]) == np.shape(answer["waited_ns"]) == (1, 3)
    assert Processor.of_json(answer["processor"]) == Processor.here()


@pytest.mark.skipif(not allowed_cpus(), reason="the system does not let a process choose its processors")
def test_the_worker_stays_on_the_processors_of_the_job_or_says_why_not(tmp_path: Path) -> None:
    last = allowed_cpus()[-1]
    assert answer_to(tmp_path, cpus=[last]).returncode == 0
    assert json.loads((tmp_path / "result.json").read_text())["cpus"] == [last]

    refused = answer_to(tmp_path, cpus=[last, 4096])
    assert refused.returncode == 1
    reason = f"cpus [{last}, 4096] cannot be used: this process may run on {allowed_cpus()}"
    assert refused.stderr.splitlines()[-1] == f"ValueError: {reason}"


def test_processors_cannot_be_chosen_where_the_system_does_not_let_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(worker.os, "sched_getaffinity", raising=False)
    assert refusal_of_cpus([0]) == "cpus [0] cannot be used: this system does not let a process choose any"
