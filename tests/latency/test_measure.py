import time

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from latency.measure import ONNXRUNTIME, measure_latency


class Sleep(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def relu_onnx() -> bytes:
    shape = ["n", 3, 4, 4]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_a_sleep_is_timed_as_long_as_it_sleeps() -> None:
    report = measure_latency(
        {"short": Sleep(0.002), "long": Sleep(0.008)}, torch.zeros(1, 3, 4, 4), n_runs=9, n_warmup=1
    )
    assert 2 <= report.entry("short").median_ms < 6
    assert 8 <= report.entry("long").median_ms < 14
    assert report.speedup("short", "long") == pytest.approx(4, rel=0.5)


def test_report_says_where_and_how_it_was_measured() -> None:
    threads = torch.get_num_threads()
    report = measure_latency(
        {"eager": nn.ReLU()}, torch.zeros(2, 3, 4, 4), onnx={"eager": relu_onnx()}, n_runs=5, n_warmup=0, threads=1
    )
    assert (report.batch_size, report.threads, report.torch_version) == (2, 1, torch.__version__)
    assert report.cpu
    entry = report.entry("eager", ONNXRUNTIME)
    assert 0 < entry.lower_quartile_ms <= entry.median_ms <= entry.upper_quartile_ms
    assert entry.n_runs == 5
    assert torch.get_num_threads() == threads


def test_the_network_keeps_its_mode_and_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).train()
    measure_latency({"net": model}, torch.zeros(1, 3, 8, 8), n_runs=5, n_warmup=0)
    assert model.training and model[1].training
    assert model[0].weight.is_contiguous()


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^n_runs is 4; quartiles need at least 5 timed calls$"):
        measure_latency({"net": nn.ReLU()}, torch.zeros(1), n_runs=4)
