from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments.config import MeasureConfig
from experiments.program import write_program
from experiments.progress import RunDisplay
from secateur import load_program

EXAMPLE = torch.zeros(2, 3)


class Fixed(nn.Module):
    """Takes two images, and no other number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3)


def test_program_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    network, images = nn.Linear(3, 2), torch.randn(5, 3)
    with RunDisplay(quiet=True) as display:
        write_program(network, EXAMPLE, tmp_path / "with", MeasureConfig(program=True), "uniform", display)
        write_program(network, EXAMPLE, tmp_path / "without", MeasureConfig(), "uniform", display)

    torch.testing.assert_close(load_program(tmp_path / "with" / "model.pt2").module()(images), network(images))
    assert not (tmp_path / "without").exists()


def test_network_that_is_no_program_is_passed_over_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDisplay() as display:
        write_program(Fixed(), EXAMPLE, tmp_path, MeasureConfig(program=True), "uniform", display)

    assert (
        "warning: uniform is not written as an exported program: Fixed cannot be exported: " in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
