from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from experiments import table_building
from experiments.run import locked
from experiments.timed_network import TimedNetwork
from latency.device import Device
from latency.table import LatencyTable

Command = Callable[..., Any]
TINY = ("--model", "tests.experiments.tiny:network", "--shape", "1,8,8", "--classes", "3")


def test_an_unknown_runtime_is_refused_before_anything_is_written(command: Command, tmp_path: Path) -> None:
    done = command("latency", "build", *TINY, "--runtime", "onnxrt", "--out", tmp_path / "table.json")
    assert done.code == 1
    assert done.err.startswith("error: unknown runtime 'onnxrt'; did you mean onnxruntime? Allowed: pytorch-eager, ")
    assert not list(tmp_path.iterdir())


def test_two_builds_of_one_table_are_refused(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    with locked(tmp_path / ".table.json.lock", "elsewhere"):
        done = command("latency", "build", *TINY, "--out", out)

    assert done.code == 1
    assert done.err == f"error: another process works on the table {out}; wait for it or stop it\n"
    assert not out.exists()


def test_another_machine_has_one_runtime_only(command: Command, tmp_path: Path) -> None:
    options = ("--host", "board", "--runtime", "pytorch-eager", "--out", tmp_path / "table.json")
    done = command("latency", "build", *TINY, *options)
    assert done.code == 1
    assert done.err == (
        "error: another machine is timed with onnxruntime only, not with 'pytorch-eager'; leave out one of them\n"
    )


@pytest.mark.parametrize("slower", [(1.3, 1.0), (1.0,), (1.6, 1.3), (1.3, 1.6)])
def test_whole_networks_that_fit_badly_are_timed_again_and_the_better_fit_is_kept(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: tuple[float, ...]
) -> None:
    out, left = tmp_path / "table.json", list(slower)
    saved: list[float] = []

    def ratios(__: Device, network: TimedNetwork, plans: Sequence[Mapping[str, int]], *_: Any) -> np.ndarray:
        table = LatencyTable.load(out)
        saved.extend(each.error for each in table.calibrations.values())
        cost = network.cost(table, integers=False)
        sums = [cost.sums([plan[name] for name in cost.names]).floats for plan in plans]
        return np.array([(0.4 + 0.8 * one) * by for one, by in zip(sums, cycle((1.0, left.pop(0))), strict=False)])

    monkeypatch.setattr(table_building, "plan_ratios", ratios)
    build = ("latency", "build", *TINY, "--runtime", "pytorch-eager", "--rounding", "4", "--out", out)
    built = command(*build)
    (found,) = LatencyTable.load(out).calibrations.values()

    assert (built.code, left) == (0, [])
    assert ("they are timed again, in case other programs kept" in built.err) == (slower[0] > 1)
    is_poor = min(slower) > 1
    assert ("warning: tests.experiments.tiny:network: half of the whole" in built.err) == is_poor
    assert (found.error > 0.05) == is_poor
    if not is_poor:
        return
    # A build that is stopped meanwhile has the first fit.
    (first,) = saved
    assert found.error == min(first, found.error)
    assert (found.error == first) == (slower[0] < slower[1])

    def error_after(*factors: float) -> float:
        left.extend(factors)
        command(*build, "--recalibrate")
        assert not left
        (calibration,) = LatencyTable.load(out).calibrations.values()
        return calibration.error

    command(*build)
    assert error_after(2.0, 1.9) == found.error
    assert error_after(1.0) < 0.01


class Upsampling(nn.Module):
    """A transposed convolution with a stride, between two others."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.up, self.last = nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last(self.up(self.stem(x).relu())).mean((2, 3)))
        return logits


def test_layers_that_cannot_be_timed_alone_are_named(command: Command, tmp_path: Path) -> None:
    shape = ("--model", f"{__name__}:Upsampling", "--shape", "1,8,8", "--classes", "3", "--networks", "2")

    done = command("latency", "build", *shape, "--out", tmp_path / "table.json")

    assert f"warning: {__name__}:Upsampling: 1 convolution (up) cannot be timed alone" in done.err
