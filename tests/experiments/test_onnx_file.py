from pathlib import Path

import pytest
import torch

from experiments.onnx_file import write_onnx
from experiments.progress import RunDisplay
from pruning.qdq import IntegerReport

from .tiny import network


def test_layers_that_do_not_fuse_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = IntegerReport(3, ("body.2", "head"), 2, {"QLinearConv": 3}, 4, 0.01, 0.02, 0.99, 8)
    monkeypatch.setattr("experiments.onnx_file.export_onnx", lambda *_args, **_options: report)
    x = torch.zeros(1, 1, 8, 8)
    said: list[str] = []
    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        assert write_onnx(network(3, 1), "ppo", x, tmp_path / "model.onnx", x, display)

    assert said == [
        "ppo as ONNX: 1 of 3 8-bit layers run in integers (and 2 more, which the runtime quantizes by itself); the "
        "same class as in PyTorch for 99.0% of 8 images",
        "warning: ppo has 8-bit layers that ONNX Runtime computes in floats, as it has no integer kernel where they "
        "stand: body.2, head",
    ]
