from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments.config import MeasureConfig
from experiments.exported_files import write_exported
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


def test_layers_that_do_not_fuse_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = IntegerReport(3, ("body.2", "head"), 2, {"QLinearConv": 3}, 4, 0.01, 0.02, 0.99, 8)
    monkeypatch.setattr("experiments.exported_files.export_onnx", lambda *_args, **_options: report)
    x = torch.zeros(1, 1, 8, 8)
    said: list[str] = []
    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        assert write_exported(network(3, 1), "ppo", x, tmp_path, x, MeasureConfig(), display) == tmp_path / "model.onnx"

    assert said == [
        "ppo as ONNX: 1 of 3 8-bit layers run in integers (and 2 more, which the runtime quantizes by itself); the "
        "same class as in PyTorch for 99.0% of 8 images",
        "warning: ppo has 8-bit layers that ONNX Runtime computes in floats, as it has no integer kernel where they "
        "stand: body.2, head",
    ]
