"""How fast the sparse kernels are, by layers and by whole networks, beside the best dense runtime for the same.

Run as ``python -m experiments.studies.bench_kernels``. All sides are called in turn in one process, so that what slows
the machine down slows them all; a ratio is one of medians, and its quartiles are those of the rounds. Beside it stands
the ratio of processor time: on a machine that others use, the clock counts their work too.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision.models import resnet18

from latency.cost import count_macs
from pruning.export import export_onnx
from pruning.kernels.formats import pack
from pruning.kernels.functional import sparse_conv2d
from pruning.kernels.lowering import lower
from pruning.kernels.native import Library
from pruning.kernels.operators import Convolution, Weighted
from pruning.kernels.plan import Plan
from pruning.sparse_network import SparseNetwork, sparsify

from ..pages import Table
from ..resnet import CifarResNet
from .bench_setup import (
    Reading,
    Scheme,
    fastest,
    geometric_mean,
    machine_line,
    processor_time_ratio,
    prune,
    random_network,
    ratio_with_quartiles,
    require_library,
    time_calls_in_turn,
    write_page,
)


@dataclass(frozen=True)
class Layer:
    """One convolution of a network at batch 1; ``count`` of them are alike."""

    in_channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    count: int = 1

    @property
    def flops(self) -> int:
        """Of the dense layer, without its bias."""
        return 2 * self.in_channels * self.out_channels * (self.kernel * -(-self.size // self.stride)) ** 2

    def __str__(self) -> str:
        side = f"{self.size}x{self.size}"
        return f"{self.in_channels} to {self.out_channels}, {self.kernel}x{self.kernel}/{self.stride}, {side}"


RESNET18 = (
    Layer(64, 64, 56, count=4),
    Layer(64, 128, 56, stride=2),
    Layer(64, 128, 56, 1, 2),
    Layer(128, 128, 28, count=3),
    Layer(128, 256, 28, stride=2),
    Layer(128, 256, 28, 1, 2),
    Layer(256, 256, 14, count=3),
    Layer(256, 512, 14, stride=2),
    Layer(256, 512, 14, 1, 2),
    Layer(512, 512, 7, count=3),
)
"""Convolutions at 224 pixels, without the stem."""

MOBILENET = (
    *(Layer(*sizes, 1) for sizes in ((32, 64, 112), (64, 128, 56), (128, 128, 56), (128, 256, 28), (256, 256, 28))),
    Layer(256, 512, 14, 1),
    Layer(512, 512, 14, 1, count=5),
    Layer(512, 1024, 7, 1),
    Layer(1024, 1024, 7, 1),
    Layer(16, 96, 112, 1),
    Layer(96, 24, 56, 1),
    Layer(24, 144, 56, 1, count=2),
    Layer(144, 32, 28, 1),
    Layer(32, 192, 28, 1, count=3),
    Layer(192, 32, 28, 1, count=2),
    Layer(64, 384, 14, 1, count=4),
    Layer(384, 64, 14, 1, count=3),
    Layer(96, 576, 14, 1, count=3),
    Layer(576, 96, 14, 1, count=2),
    Layer(160, 960, 7, 1, count=3),
    Layer(960, 160, 7, 1, count=2),
    Layer(320, 1280, 7, 1),
)
"""1x1 convolutions of versions 1 (first nine rows) and 2 at 224 pixels."""


SCHEMES = {
    "resnet18": (Scheme(16, 0.3), Scheme(16, 0.1), Scheme(1, 0.2), Scheme(1, 0.1)),
    "mobilenet": (Scheme(16, 0.3), Scheme(16, 0.2), Scheme(16, 0.1), Scheme(1, 0.1)),
}
NETWORK_SCHEMES = {
    "ResNet-18, 224x224": [
        *(Scheme(16, density) for density in (0.3, 0.1)),
        *(Scheme(1, density) for density in (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)),
    ],
    "ResNet-56 for CIFAR, 32x32": [Scheme(16, 0.2), Scheme(8, 0.2), Scheme(1, 0.1)],
}
LAYER_TARGETS = {
    ("resnet18", Scheme(16, 0.3)): (2.0, 2.8),
    ("resnet18", Scheme(16, 0.1)): (5.0, 7.0),
    ("resnet18", Scheme(1, 0.2)): (1.8, 2.2),
    ("resnet18", Scheme(1, 0.1)): (3.0, 4.0),
    ("mobilenet", Scheme(16, 0.3)): (1.5, 0.7 / 0.3),
    ("mobilenet", Scheme(16, 0.2)): (2.0, 0.7 / 0.2),
    ("mobilenet", Scheme(16, 0.1)): (4.0, 0.7 / 0.1),
    ("mobilenet", Scheme(1, 0.1)): (2.0, 2.8),
}
NETWORK_TARGETS: dict[tuple[str, Scheme], tuple[float, float | None]] = {
    ("ResNet-18, 224x224", Scheme(1, 0.1)): (2.2, 2.8),
    ("ResNet-18, 224x224", Scheme(16, 0.1)): (3.5, 4.5),
    ("ResNet-56 for CIFAR, 32x32", Scheme(16, 0.2)): (1.5, 2.0),
}
"""The ratio to reach at least, and the goal; of any other sparsity a network shall not be slower than dense."""
EXPLANATION = (
    "All sides of a table are called in turn in one process. A ratio is the median time of the best dense side over "
    "that of the sparse side, with the quartiles over the rounds; beside it stands the same ratio of the processor "
    "time of all threads together, which leaves out what other programs did meanwhile. The dense sides are eager "
    "PyTorch in both layouts, torch.compile (channels last, weights frozen) and ONNX Runtime. "
    "Ideal is 1 / density. The share of peak counts the multiply-adds of non-zero weights by direct sums, of which "
    "Winograd's filtering needs fewer; peak is a loop of multiply-adds. "
    "*Operator* is the PyTorch operator, *native* the same layer as a step of the plan of a network. Of whole "
    "networks, all convolutions but the first have the sparsity named; ideal takes into account what stays dense, and "
    "every sparse network chose sparse or dense layer by layer, by its own measurement. Batch 1, float32."
)
LAYERS = {"resnet18": RESNET18, "mobilenet": MOBILENET}


def dense_sides(layer: Layer, x: Tensor, threads: int, with_compile: bool) -> dict[str, Callable[[], object]]:
    """The same dense layer in every runtime."""
    padding = layer.kernel // 2
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel, layer.stride, padding).eval()
    last = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel, layer.stride, padding).eval()
    last = last.to(memory_format=torch.channels_last)
    session = onnx_session(conv, x, threads)
    return _sides(conv, last, x, session, with_compile)


def _sides(
    model: nn.Module, last: nn.Module, x: Tensor, session: onnxruntime.InferenceSession, with_compile: bool
) -> dict[str, Callable[[], object]]:
    """Calls of every dense side: ``model``, its channels-last copy ``last``, the session, and maybe a compiled one."""
    x_last, feed = x.contiguous(memory_format=torch.channels_last), {session.get_inputs()[0].name: x.numpy()}
    sides: dict[str, Callable[[], object]] = {
        "eager": lambda: model(x),
        "eager, channels last": lambda: last(x_last),
        "ONNX Runtime": lambda: session.run(None, feed),
    }
    if with_compile:
        torch.compiler.reset()
        compiled = torch.compile(last, options={"freezing": True})
        sides["torch.compile"] = lambda: compiled(x_last)
    return sides


def onnx_session(conv: nn.Conv2d, x: Tensor, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one convolution."""
    assert conv.bias is not None
    tensors = {"weight": conv.weight, "bias": conv.bias}
    size, stride, pads = list(conv.kernel_size), list(conv.stride), [conv.kernel_size[0] // 2] * 4
    node = helper.make_node("Conv", ["x", *tensors], ["y"], kernel_shape=size, strides=stride, pads=pads)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content, options = model.SerializeToString(), session_options(threads)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """So many threads, which do not wait busily."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its idle threads would spin on the cores that the next side is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def sparse_sides(
    native: Library, layer: Layer, scheme: Scheme, x: Tensor, generator: torch.Generator
) -> dict[str, Callable[[], object]]:
    """The sparse layer as a PyTorch operator, and as the native call that a plan of a network makes."""
    # Weights of its own for each side, or the second would find in the caches what the first has read.
    block, shape = scheme.block_of(layer.out_channels), (layer.out_channels, layer.in_channels, *[layer.kernel] * 2)
    masks = [scheme.mask(shape, generator) for _ in range(2)]
    weight, other = (pack(torch.randn(shape, generator=generator) * mask, block, mask) for mask in masks)
    bias = torch.randn(layer.out_channels, generator=generator)
    stride, padding = (layer.stride, layer.stride), (layer.kernel // 2, layer.kernel // 2)
    out_size = (1, layer.out_channels, *[-(-layer.size // layer.stride)] * 2)
    window = (stride, padding, (1, 1), 1)
    step = Convolution("layer", ("x",), "y", out_size, other.to_dense(), bias, "none", *window)
    form = "unstructured" if other.block == 1 else f"block {other.block}"
    plan = Plan(native, [step], {"x": tuple(x.shape)}, (), {"y": form}, holds_inputs=True)
    return {
        f"{scheme}: operator": lambda: sparse_conv2d(x, weight, bias, stride=stride, padding=padding),
        f"{scheme}: native": plan.run,
    }


def bench_layers(
    native: Library, network: str, rounds: int, threads: int, with_compile: bool
) -> tuple[str, list[Reading]]:
    """One row a layer, as Markdown, and the geometric means over the layers."""
    generator = torch.Generator().manual_seed(0)
    ratios: dict[str, list[tuple[float, float, int]]] = {}
    names = [f"{scheme}: native (share of peak)" for scheme in SCHEMES[network]]
    rows = []
    for layer in LAYERS[network]:
        x = torch.randn(1, layer.in_channels, layer.size, layer.size, generator=generator)
        dense, sparse = dense_sides(layer, x, threads, with_compile), {}
        for scheme in SCHEMES[network]:
            sparse.update(sparse_sides(native, layer, scheme, x, generator))
        with torch.inference_mode():
            seconds, _ = time_calls_in_turn(dense | sparse, rounds)
        best, eager = fastest(dense, seconds), fastest(EAGER, seconds)
        base, peak = float(np.median(seconds[best])), native.peak_flops() * threads
        row = [str(layer), str(layer.count), best, f"{base * 1e6:.0f}", f"{layer.flops / base / 1e9:.0f}"]
        for scheme in SCHEMES[network]:
            for kind in ("operator", "native"):
                side = f"{scheme}: {kind}"
                median = float(np.median(seconds[side]))
                found = (base / median, float(np.median(seconds[eager])) / median, layer.count)
                ratios.setdefault(side, []).append(found)
            share = layer.flops * scheme.density / median / peak
            row.append(f"{ratio_with_quartiles(seconds[best], seconds[side])}, {share:.0%}")
        rows.append(row)
    table = Table(["layer", "count", "best dense", "us", "GFLOP/s", *names], rows, words=("best dense",)).markdown()
    readings = []
    for scheme in SCHEMES[network]:
        for kind in ("native", "operator"):
            to_best, to_torch, counts = zip(*ratios[f"{scheme}: {kind}"], strict=True)
            means = (geometric_mean(to_best, counts), geometric_mean(to_torch, counts))
            what = f"layers of {network}, {scheme}, {kind}"
            wanted = LAYER_TARGETS[network, scheme] if kind == "native" else (None, None)
            readings.append(Reading(what, threads, *means, 1 / scheme.density, *wanted))
    return table, readings


def bench_network(name: str, rounds: int, threads: int, with_compile: bool) -> tuple[str, list[Reading]]:
    """The table of one whole network as Markdown, and its ratios."""
    model, x = NETWORKS[name]()
    generator = torch.Generator().manual_seed(0)
    dense = dense_network_sides(model, x, threads, with_compile)
    macs = count_macs(model, x)
    sparse: dict[Scheme, SparseNetwork] = {}
    shares: dict[Scheme, float] = {}
    for scheme in NETWORK_SCHEMES[name]:
        pruned = prune(model, scheme, generator)
        sparse[scheme] = sparsify(pruned, x)
        first = nn.Sequential(next(module for module in pruned.modules() if isinstance(module, nn.Conv2d)))
        shares[scheme] = scheme.density + (1 - scheme.density) * count_macs(first, x) / macs
    calls: dict[str, Callable[[], object]] = {str(scheme): partial(network, x) for scheme, network in sparse.items()}
    with torch.inference_mode():
        seconds, busy = time_calls_in_turn(dense | calls, rounds)
    dense_rows, sparse_rows = [], []
    for side in dense:
        low, median, high = np.percentile(seconds[side], [25, 50, 75])
        times = f"{median * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})"
        dense_rows.append([side, times, f"{2e-9 * macs / median:.0f}"])
    best, eager = fastest(dense, seconds), fastest(EAGER, seconds)
    peak, readings = require_library().peak_flops() * threads, []
    for scheme, network in sparse.items():
        side = str(scheme)
        median = float(np.median(seconds[side]))
        to_best, to_torch = (float(np.median(seconds[other])) / median for other in (best, eager))
        sparse_rows.append(
            [
                side,
                sparse_layers(network),
                str(network.report.native_calls),
                f"{median * 1e3:.2f}",
                ratio_with_quartiles(seconds[best], seconds[side]),
                f"{processor_time_ratio(busy, dense, side):.2f}",
                f"{1 / shares[scheme]:.1f}",
                f"{to_torch:.2f}",
                f"{2 * macs * shares[scheme] / median / peak:.0%}",
            ]
        )
        wanted = NETWORK_TARGETS.get((name, scheme), (1.0, None))
        readings.append(Reading(f"{name}, {side}", threads, to_best, to_torch, 1 / shares[scheme], *wanted))
    heads = ["scheme", "sparse layers", "native calls", "ms", "ratio to the best dense (quartiles)"]
    heads += ["of processor time", "ideal", "ratio to PyTorch's best layout", "share of peak"]
    tables = Table(["dense", "ms (quartiles)", "GFLOP/s"], dense_rows), Table(heads, sparse_rows, ("sparse layers",))
    return "\n\n".join(table.markdown() for table in tables), readings


def profile(native: Library, name: str, scheme: Scheme, form: str, rounds: int) -> str:
    """Processor time of every operator of a network on one thread, timed alone, as Markdown; alike ones in one row."""
    model, x = NETWORKS[name]()
    lowered = lower(prune(model, scheme, torch.Generator().manual_seed(0)), (x,))
    sizes = {lowered.inputs[0]: tuple(x.shape)} | {one.output: one.size for one in lowered.operators}
    rows: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for one in lowered.operators:
        is_pruned = isinstance(one, Weighted) and bool((one.weight == 0).any())
        forms = {one.output: form if is_pruned else "dense"}
        plan = Plan(native, [one], {source: sizes[source] for source in one.inputs}, (), forms, holds_inputs=True)
        _, busy = time_calls_in_turn({"step": plan.run}, rounds)
        seconds, added = float(np.median(busy["step"])), " + residual" if len(one.inputs) > 1 else ""
        before, after = ("x".join(map(str, size[1:])) for size in (sizes[one.inputs[0]], one.size))
        key = f"{type(one).__name__.lower()} {before} to {after}{added}{f', {form}' if is_pruned else ''}"
        rows.setdefault(key, []).append(seconds)
        if isinstance(one, Weighted):
            flops = 2 * int((one.weight != 0).sum()) * math.prod(one.size[2:])
            rates.setdefault(key, []).append(flops / seconds / native.peak_flops())
    total = sum(map(sum, rows.values()))
    lines = []
    for key, times in sorted(rows.items(), key=lambda row: -sum(row[1])):
        rate = f"{np.mean(rates[key]):.0%}" if key in rates else ""
        lines.append([key, str(len(times)), f"{sum(times) * 1e6:.0f}", f"{sum(times) / total:.0%}", rate])
    lines.append(["all", str(sum(map(len, rows.values()))), f"{total * 1e6:.0f}", "100%", ""])
    return Table(["operator", "count", "us, all of them", "share", "share of peak"], lines).markdown()


def sparse_layers(network: SparseNetwork) -> str:
    """How many layers run in each form but that of direct sums over all weights."""
    forms = [layer.form for layer in network.report.layers]
    counts = [f"{forms.count(form)} {form}" for form in dict.fromkeys(forms) if form != "dense"]
    return f"{', '.join(counts) or 'none'} of {len(forms)}"


def dense_network_sides(
    model: nn.Module, x: Tensor, threads: int, with_compile: bool
) -> dict[str, Callable[[], object]]:
    """The same dense network in every runtime."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(model, x, path)
        session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
    return _sides(model, last, x, session, with_compile)


EAGER = ("eager", "eager, channels last")
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ResNet-18, 224x224": lambda: random_network(resnet18, 224),
    "ResNet-56 for CIFAR, 32x32": lambda: random_network(lambda: CifarResNet(9), 32),
}


PROFILES = [
    ("ResNet-18, 224x224", Scheme(1, 1.0), "dense"),
    ("ResNet-18, 224x224", Scheme(1, 0.1), "unstructured"),
    ("ResNet-18, 224x224", Scheme(16, 0.1), "block 16"),
]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="*", choices=sorted(LAYERS), default=sorted(LAYERS, reverse=True))
    parser.add_argument("--networks", nargs="*", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each side")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes long to compile"
    )
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True, help="time each operator too")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/kernels.md"), help="page to write")
    options = parser.parse_args()
    native = require_library()
    left_out = (
        "torch.compile was left out." if options.no_compile else "torch.compile is left out of MobileNet's layers."
    )
    command = f"Command: `python -m experiments.studies.bench_kernels {' '.join(sys.argv[1:])}`. {left_out}"
    head = ["# Sparse kernels beside the best dense runtime", machine_line(native), EXPLANATION, command]
    write_page(options.page, head, measured_sections(native, options))


def measured_sections(native: Library, options: argparse.Namespace) -> Iterator[tuple[str, str, list[Reading]]]:
    """Title, table and ratios of everything that the options ask for, as it is measured."""
    with_compile, rounds = not options.no_compile, options.rounds
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.networks:
            yield f"{name}, {threads} thread(s)", *bench_network(name, rounds, threads, with_compile)
    torch.set_num_threads(1)
    for name, scheme, form in PROFILES if options.profile else ():
        title = f"Where the time of {name} goes: {scheme}, one thread, operators timed alone"
        yield title, profile(native, name, scheme, form, rounds), []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.layers:
            # Of 21 layers that are calls of one operator, compiling takes minutes and changes nothing.
            table = bench_layers(native, name, rounds, threads, with_compile and name == "resnet18")
            yield f"Layers of {name}, {threads} thread(s)", *table


if __name__ == "__main__":
    main()
