import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import latency.runtimes
from latency.measure import Variant, measure
from latency.runtimes import (
    COMPILED,
    CUDA,
    ONNXRUNTIME,
    OPENVINO,
    PYTORCH,
    LatencyError,
    find_runtime,
    runtime_names,
)

from .test_measure import relu_onnx

PLUGIN = """
from latency.runtimes import Runtime

class Counting(Runtime):
    name = "counting"
    takes = "module"

    def load(self, artifact, inputs, threads):
        return lambda: artifact(*inputs)

def broken():
    raise OSError("the licence server is away")

def a_number():
    return 7

class Renamed(Counting):
    name = "another"

class Unversioned(Counting):
    name = "unversioned"
    module = "fakeplugin"

class Missing(Counting):
    name = "missing"
    module = "no_such_package.of.runtimes"
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on the path that offers runtimes, as an installed package would."""
    (tmp_path / "fakeplugin.py").write_text(PLUGIN)
    folder = tmp_path / "fakeplugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fakeplugin\nVersion: 1.0\n")
    entries = "counting = fakeplugin:Counting\nbroken = fakeplugin:broken\nnumber = fakeplugin:a_number\n"
    entries += "renamed = fakeplugin:Renamed\nunversioned = fakeplugin:Unversioned\nmissing = fakeplugin:Missing\n"
    (folder / "entry_points.txt").write_text(f"[secateur.runtimes]\n{entries}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fakeplugin", raising=False)


def test_a_runtime_of_another_package_is_found_and_measures(plugin: None) -> None:
    assert "counting" in runtime_names()
    report = measure([Variant("net", "counting", nn.ReLU())], torch.zeros(1), n_runs=5)
    assert report.entry("net", "counting").n_runs == 5
    assert report.versions == {"counting": torch.__version__}


def test_a_runtime_of_another_package_that_does_not_load_is_named(plugin: None) -> None:
    message = "the runtime 'broken' of 'fakeplugin:broken' cannot be loaded: the licence server is away"
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        find_runtime("broken")
    message = "the runtime 'number' of 'fakeplugin:a_number' is a int; it must derive from latency.runtimes.Runtime"
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        find_runtime("number")


def test_a_runtime_of_another_package_that_cannot_be_told_or_used_is_named(plugin: None) -> None:
    with pytest.raises(LatencyError, match="the runtime 'renamed' of 'fakeplugin:Renamed' has the name 'another'"):
        find_runtime("renamed")
    with pytest.raises(LatencyError, match="'unversioned': 'fakeplugin' has no __version__; give the class a version"):
        find_runtime("unversioned").version()
    with pytest.raises(
        LatencyError, match=r"'missing' needs the package 'no_such_package\.of\.runtimes', which is not"
    ):
        find_runtime("missing")


def test_an_unknown_runtime_is_answered_with_the_nearest_name() -> None:
    message = (
        "unknown runtime 'onnx-runtime'; did you mean onnxruntime? Allowed: pytorch-eager, pytorch-compile, "
        "pytorch-cuda, onnxruntime, openvino, sparse"
    )
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}"):
        find_runtime("onnx-runtime")


def test_a_runtime_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.runtimes, "find_spec", lambda name: None)
    message = (
        "the runtime 'openvino' needs the package 'openvino', which is not installed; pip install 'secateur[openvino]'"
    )
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        find_runtime(OPENVINO)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    message = "the runtime 'pytorch-cuda' needs a CUDA device that PyTorch can use, and there is none"
    with pytest.raises(LatencyError, match=f"^{message}$"):
        find_runtime(CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_waits_for_the_device() -> None:
    big, small = torch.nn.Linear(8192, 8192), torch.nn.Linear(64, 8192)
    wide = measure([Variant("net", CUDA, big)], torch.zeros(4096, 8192)).entry("net", CUDA)
    narrow = measure([Variant("net", CUDA, small)], torch.zeros(4096, 64)).entry("net", CUDA)
    assert wide.median_ms > 5 * narrow.median_ms


@pytest.mark.parametrize(
    ("runtime", "artifact", "message"),
    [
        (PYTORCH, b"onnx", "the runtime 'pytorch-eager' takes a torch.nn.Module, got bytes"),
        (
            ONNXRUNTIME,
            nn.ReLU(),
            "the runtime 'onnxruntime' takes an ONNX file (bytes or path), got ReLU; export it first",
        ),
    ],
)
def test_an_artifact_of_the_wrong_kind_is_refused(runtime: str, artifact: nn.Module | bytes, message: str) -> None:
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        measure([Variant("net", runtime, artifact)], torch.zeros(1, 3, 4, 4))


def test_onnxruntime_computes_on_the_inputs_given(tmp_path: Path) -> None:
    x = torch.tensor([-1.0, 2.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)[:, [0, 1, 1]]
    path = tmp_path / "relu.onnx"
    path.write_bytes(relu_onnx())
    for source in (path, path.read_bytes()):
        (out,) = find_runtime(ONNXRUNTIME).load(source, (x,), 1)()  # type: ignore[misc]
        torch.testing.assert_close(torch.from_numpy(out), x.relu())


def test_openvino_computes_what_onnxruntime_computes() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = find_runtime(OPENVINO).load(relu_onnx(), (x,), 1)()
    torch.testing.assert_close(torch.from_numpy(out[0]), x.relu())  # type: ignore[index]


@pytest.mark.slow
def test_a_compiled_network_computes_what_it_did() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(find_runtime(COMPILED).load(model, (x,), 1)(), model(x))


def test_networks_of_one_class_are_compiled_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler keeps no more than eight results of one piece of code.
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    networks, x = [nn.Linear(3, n) for n in range(1, 4)], (torch.ones(1, 3),)

    calls = [find_runtime("pytorch-compile").load(network, x, 1) for network in networks]

    assert len({function.__code__ for function in compiled}) == 3
    assert [tuple(call().shape) for call in calls] == [(1, 1), (1, 2), (1, 3)]


@pytest.mark.slow
def test_more_networks_are_compiled_than_the_compiler_keeps_of_one_class() -> None:
    torch._dynamo.reset()
    counters["stats"].clear()
    runtime, x = find_runtime("pytorch-compile"), (torch.ones(1, 3),)

    calls = [runtime.load(nn.Sequential(nn.Linear(3, n), nn.ReLU()), x, 1) for n in range(1, 11)]
    with torch.inference_mode():
        for call in calls:
            call()

    assert counters["stats"]["unique_graphs"] == 10
