import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from experiments.models import build_model
from experiments.studies.schemes import SchemesError, Sitting, channel_policy, main, schedule, sparse_layers
from experiments.studies.schemes_cells import Cell, matrix
from experiments.studies.schemes_page import (
    Point,
    curve_of,
    difference,
    equal_latency_table,
    judged_at,
    winners,
    write_page,
)
from graph_encoder.capture import capture
from latency.cost import predict_cost
from pruning.kernels.native import library
from pruning.policy import CompressionPolicy


def point(cell: Cell, judged: str, onnx_ms: float, plan_ms: float) -> Point:
    """A network of which the verdicts on the test images and the times are known; dense takes 1 ms."""
    times = {name: {"median_ms": ms} for name, ms in (("onnxruntime", onnx_ms), ("sparse", plan_ms))}
    return Point(cell, [{"test_judged": judged}], {"runtimes": times}, 1.0)


DENSE = point(Cell("net", "dense"), "1111", 1.0, 1.2)
CHANNELS = point(Cell("net", "channels", macs=0.5), "1100", 0.6, 0.7)
BLOCKS = point(Cell("net", "block8", pattern="block8", density=0.2), "1110", 0.9, 0.4)


def test_cells_have_folders_of_their_own_and_a_dense_network_before_each_set() -> None:
    cells = list(matrix(2))
    assert len({cell.folder for cell in cells}) == len(cells) == 42
    assert [cell.scheme for cell in cells if cell.strength == "everything"] == ["dense"] * 4
    assert cells[0].folder == Path("resnet20/dense-100-100-seed0")


def test_the_faster_runtime_counts() -> None:
    assert (BLOCKS.runtime, BLOCKS.latency) == ("sparse", 0.4)
    assert (CHANNELS.runtime, CHANNELS.latency) == ("onnxruntime", 0.6)


def test_accuracy_between_two_strengths_is_on_the_line_between_them() -> None:
    curve = curve_of([DENSE, CHANNELS, BLOCKS], "channels")
    assert [each.latency for each in curve] == [0.6, 1.0]
    # A quarter of the way from 0.6 to 1.0: the two images that channels lost are a quarter right.
    found = judged_at(curve, 0.7)
    assert found is not None
    assert found.tolist() == pytest.approx([1, 1, 0.25, 0.25])
    assert judged_at(curve, 0.59) is None
    assert judged_at(curve, 1.01) is None


def test_latencies_that_fewer_than_two_curves_reach_are_left_out_and_differences_are_by_image() -> None:
    lines = equal_latency_table([DENSE, CHANNELS, BLOCKS]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 90%", "| 80%", "| 70%", "| 60%"]
    # At 60 % blocks are a third of the way from 1110 to 1111, so the differences are 0, 0, 1, 1/3.
    mean, half = difference(np.array([1, 1, 1, 1 / 3]), np.array([1.0, 1, 0, 0]))
    assert mean == pytest.approx(1 / 3)
    assert half == pytest.approx(1.96 * np.std([0, 0, 1, 1 / 3], ddof=1) / 2)
    assert lines[-1] == f"| 60% | 1.67 | 50.00 % | 83.33 % [+33.33 ± {100 * half:.2f}] |"


def test_a_difference_within_its_interval_is_no_win() -> None:
    text = winners([DENSE, CHANNELS, BLOCKS]).splitlines()
    assert text[-1] == "- 60%: block8 cannot be told from channels (+33.33 ± 46.20)"


def test_schemes_leave_what_they_say_of_the_network() -> None:
    model = build_model("resnet20", 10).eval()
    graph = capture(model, torch.zeros(2, 3, 32, 32))
    dense = predict_cost(graph, CompressionPolicy())

    channels = channel_policy(Cell("resnet20", "channels", macs=0.4), model, graph)
    layers = sparse_layers(Cell("resnet20", "block8", pattern="block8", density=0.25), graph)

    assert "conv1" in channels.kept
    assert 0.39 < predict_cost(graph, channels) / dense <= 0.4
    # 19 convolutions and one linear layer; the first and the last are left alone.
    assert len(layers) == 18
    assert {"conv1", "linear"}.isdisjoint(layers)
    # By hand: the first convolution is 442,368 of 40,812,544 multiply-adds, the linear layer 640.
    share = (442_368 + 640 + 0.25 * (40_813_184 - 442_368 - 640)) / 40_813_184
    assert predict_cost(graph, CompressionPolicy(layers=layers)) / dense == pytest.approx(share, rel=2e-3)


def test_zeros_have_their_final_density_before_the_last_steps() -> None:
    plan = schedule(100)
    assert [plan.density(0.1, step) for step in (0, 59, 60, 99)] == pytest.approx([1.0, 0.1, 0.1, 0.1], abs=1e-3)
    assert schedule(1).density(0.1, 1) == 0.1


def photographs(root: Path) -> Path:
    """Noise of two classes and 32x32 pixels, some for training and some for the test."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 160), ("test", 12)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(n):
                pixels = rng.integers(0, 128, (32, 32, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:04d}.png")
    return root


def run(tmp_path: Path, **changes: object) -> None:
    options: Mapping[str, object] = {
        "data": tmp_path / "data",
        "models": tmp_path / "models",
        "root": tmp_path / "cells",
        "page": tmp_path / "schemes.md",
        "seeds": 1,
        "only": "resnet20/(dense|channels-20|block8-100-10)",
        "minutes": 0.0,
        "epochs": 2,
        "images": 0,
        "rounds": 5,
        "threads": [1],
        "render": False,
    }
    main(**{**options, **changes})


@pytest.mark.slow
@pytest.mark.skipif(library() is None, reason="the kernels are not compiled")
def test_a_sitting_trains_times_and_writes_and_the_next_one_does_nothing_again(tmp_path: Path) -> None:
    photographs(tmp_path / "data")
    weights = build_model("resnet20", 2).state_dict()
    (tmp_path / "models").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "models" / "resnet20-cifar10.safetensors")

    run(tmp_path)
    page = (tmp_path / "schemes.md").read_text()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    run(tmp_path)

    assert (tmp_path / "schemes.md").read_text() == page
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")} == written
    assert "3 of 21 networks are done." in page
    assert "## resnet20, 1 thread" in page
    facts = json.loads((tmp_path / "cells" / "resnet20" / "block8-100-10-seed0" / "cell.json").read_text())
    assert len(facts["test_judged"]) == 12
    assert facts["params"] == pytest.approx(0.108, abs=0.002)
    sitting = Sitting(tmp_path / "cells", tmp_path / "data", tmp_path / "models", epochs=1, images=0, rounds=5)
    message = (
        r"^'.*/dense-100-100-seed0' was made by another recipe: epochs 2, now 1; ask for the same one, or name "
        r"another --root$"
    )
    with pytest.raises(SchemesError, match=message):
        sitting.is_done(Cell("resnet20", "dense"))


def test_a_page_can_be_written_before_anything_was_timed(tmp_path: Path) -> None:
    write_page(tmp_path / "page.md", tmp_path, [], 21)
    assert "0 of 21 networks are done." in (tmp_path / "page.md").read_text()


def test_fine_tuning_is_the_same_for_every_scheme(tmp_path: Path) -> None:
    sitting = Sitting(tmp_path, tmp_path, tmp_path, None, 0, 5)
    recipes = {cell.model: sitting.recipe(cell) for cell in matrix()}
    assert all(sitting.recipe(cell) == recipes[cell.model] for cell in matrix())
