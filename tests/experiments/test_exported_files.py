import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import secateur
from experiments.config import MeasureConfig
from experiments.data import DataRecipe, normalise
from experiments.exported_files import describe_images, write_exported
from experiments.progress import RunDisplay
from pruning.qdq import IntegerReport
from secateur import load_program

from .tiny import network

EXAMPLE = torch.zeros(2, 3)
PROGRAM_ALONE = MeasureConfig(onnx=False, program=True)


class Fixed(nn.Module):
    """Takes two images, and no other number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3)


def test_program_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    linear, images = nn.Linear(3, 2), torch.randn(5, 3)
    with RunDisplay(quiet=True) as display:
        write_exported(linear, "uniform", EXAMPLE, tmp_path / "with", EXAMPLE, PROGRAM_ALONE, display)
        write_exported(linear, "uniform", EXAMPLE, tmp_path / "without", EXAMPLE, MeasureConfig(onnx=False), display)

    torch.testing.assert_close(load_program(tmp_path / "with" / "model.pt2").module()(images), linear(images))
    assert not (tmp_path / "without").exists()


def test_network_that_is_no_program_is_passed_over_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDisplay() as display:
        write_exported(Fixed(), "uniform", EXAMPLE, tmp_path, EXAMPLE, PROGRAM_ALONE, display)

    assert (
        "warning: uniform is not written as an exported program: Fixed cannot be exported: " in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "saturated"), [(0.01, 0.04), (0.06, 0.1)])
def test_what_saturation_hardly_changes_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, saturated: float
) -> None:
    report = IntegerReport(3, (), 0, {"QLinearConv": 3}, 4, error, saturated, 0.02, 0.99, 8)
    monkeypatch.setattr("experiments.exported_files.export_onnx", lambda *_args, **_options: report)
    said: list[str] = []
    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        x = torch.zeros(1, 1, 8, 8)
        write_exported(network(3, 1), "ppo", x, tmp_path, x, MeasureConfig(), display)

    assert not [line for line in said if line.startswith("warning")]


def test_layers_that_do_not_fuse_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = IntegerReport(3, ("body.2", "head"), 2, {"QLinearConv": 3}, 4, 0.01, 0.1, 0.02, 0.99, 8)
    monkeypatch.setattr("experiments.exported_files.export_onnx", lambda *_args, **_options: report)
    x = torch.zeros(1, 1, 8, 8)
    said: list[str] = []
    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        assert write_exported(network(3, 1), "ppo", x, tmp_path, x, MeasureConfig(), display) == tmp_path / "model.onnx"

    assert said == [
        "ppo as ONNX: 1 of 3 8-bit layers run in integers (and 2 more, which the runtime quantizes by itself); the "
        "same class as in PyTorch for 99.0% of 8 images",
        "warning: ppo as ONNX differs from PyTorch by 10.0% of the outputs on this processor, as x86 without VNNI adds "
        "pairs of products in 16 bits: give its layers of 8 bits reduce_range (search.reduce_range), open the file "
        "with the session options {'session.x64quantprecision': '1'}, which is right and slower, or run it on another "
        "processor",
        "warning: ppo has 8-bit layers that ONNX Runtime computes in floats, as it has no integer kernel where they "
        "stand: body.2, head",
    ]


def test_an_onnx_file_tells_what_the_readme_reads_off_it(tmp_path: Path) -> None:
    recipe = DataRecipe(source="bundled", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model, values = network(3, 3).eval(), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    x = normalise(values, recipe)
    with RunDisplay(quiet=True) as display:
        metadata = describe_images(recipe, ("cat", "dog", "owl"))
        write_exported(model, "it", x[:2], tmp_path, x, MeasureConfig(), display, metadata)
    readme = (Path(secateur.__file__).parent / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "InferenceSession" in block)
    told: list[list[str]] = []
    names: dict[str, Any] = {
        "onnxruntime": onnxruntime,
        "json": json,
        "np": np,
        "images": values.numpy(),
        "print": told.append,
    }

    exec(code.replace("runs/mine/methods/ppo/model", str(tmp_path)), names)

    with torch.no_grad():
        assert told == [[("cat", "dog", "owl")[i] for i in model(x).argmax(1)]]
    torch.testing.assert_close(torch.from_numpy(names["logits"]), model(x).detach(), rtol=1e-3, atol=1e-4)
