"""What bits cost and save: accuracy and latency of trained networks with 8-bit and 4-bit layers.

Run as ``python -m experiments.studies.bench_bits``; what an earlier sitting measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latency.measure import cpu_name
from latency.worker import Timer, interleave, onnx_call
from pruning.calibration import RangeMethod
from pruning.export import export_onnx
from pruning.files import write_atomic
from pruning.finetune import finetune
from pruning.layer_policy import LayerPolicy
from pruning.qdq import EXACT_SUMS, saturates
from pruning.quantize import quantize_layers

from ..data import DataRecipe, ImageData, SplitRecipe, TrainBatches, make_evaluate, normalise
from ..image_folder import write_split_lists
from ..models import build_model, load_weights
from ..pages import Table

NETWORKS = {
    "resnet18_cifar": "resnet18-cifar10.safetensors",
    "resnet56": "resnet56-cifar10.safetensors",
    "resnet20": "resnet20-cifar10.safetensors",
}
METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "entropy", "mse")
ALL_LEVELS = "-127 to 127"
LEVELS = {ALL_LEVELS: False, "-63 to 63": True}
"""Of 8-bit weights, and whether that is a reduced range."""
N_CALIBRATION = 256
CALLS_OF_A_TURN = 5
EXAMPLE = torch.zeros(1, 3, 32, 32)
EXPLANATION = """Accuracies are on the even-numbered test images. Latencies are of single images in ONNX Runtime, all
files in turn in one process, five calls a turn: what slows the machine down slows all. A ratio is one of medians, with
the quartiles of the ratios turn by turn. Processor time, which one thread has, leaves out the time in which other
processes ran. Differences to PyTorch's simulation are by sums that do not saturate, and as ONNX Runtime computes here
by default, which is also what the file's accuracy and class are of."""


def uniform_bits(model: nn.Module, bits: int, *, reduce_range: bool = False) -> dict[str, LayerPolicy]:
    """So many bits for every convolution and linear layer; at least 8 for the first and the last, as is usual."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    outer = {names[0], names[-1]}
    own = {name: max(bits, 8) if name in outer else bits for name in names}
    return {name: LayerPolicy(weight_bits=n, act_bits=n, reduce_range=reduce_range) for name, n in own.items()}


def accuracies(model: nn.Module, data: ImageData, options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """What measures the accuracy in full precision, in 8 bits by calibration method, and in 4 bits."""
    evaluate = make_evaluate(data.validation, data.recipe)

    def calibrated(bits: int, method: RangeMethod) -> nn.Module:
        return quantize_layers(
            model, uniform_bits(model, bits), [calibration_images(data, options.seed)], method=method
        )

    def trained() -> float:
        network = calibrated(4, "mse")
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(options.seed))
        split = data.train.take(chosen[: options.train_images])
        batches = TrainBatches(split, data.recipe, batch_size=128, seed=options.seed)
        finetune(network, batches, epochs=1, learning_rate=options.learning_rate, seed=options.seed)
        return evaluate(network)

    measured = {"fp32": lambda: evaluate(model), "4 bits mse": lambda: evaluate(calibrated(4, "mse"))}
    measured |= {f"int8 {method}": lambda m=method: evaluate(calibrated(8, m)) for method in METHODS}  # type: ignore[misc]
    return measured | {"4 bits trained": trained}


def calibration_images(data: ImageData, seed: int) -> Tensor:
    """Training images without augmentation, as the network will see images in use."""
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:N_CALIBRATION]
    return normalise(data.train.images[chosen], data.recipe)


def export_all(model: nn.Module, data: ImageData, folder: Path, name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Write the network in single precision and in integers; what the integers are worth, by the levels of weights."""
    export_onnx(model, EXAMPLE, folder / f"{name}-fp32.onnx")
    images = normalise(data.validation.images[:N_CALIBRATION], data.recipe).contiguous()
    evaluate, found = make_evaluate(data.validation, data.recipe), {}
    for levels, reduce_range in LEVELS.items():
        path, bits = folder / f"{name}, {levels}.onnx", uniform_bits(model, 8, reduce_range=reduce_range)
        quantized = quantize_layers(model, bits, [calibration_images(data, seed)])
        report = export_onnx(quantized, EXAMPLE, path, images=images)
        assert report is not None
        scored = {"simulated": evaluate(quantized), "accuracy": onnx_accuracy(path, data)}
        found[levels] = asdict(report) | {"fused_layers": report.fused_layers} | scored
    return found


def onnx_accuracy(path: Path, data: ImageData, batch_size: int = 50) -> float:
    """Share of the validation images that the network in the file classifies rightly."""
    session, n_right = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), 0
    for images, labels in zip(
        data.validation.images.split(batch_size), data.validation.labels.split(batch_size), strict=True
    ):
        x = normalise(images, data.recipe).contiguous().numpy()
        (logits,) = session.run(None, {session.get_inputs()[0].name: x})
        n_right += int((np.asarray(logits).argmax(axis=1) == labels.numpy()).sum())
    return n_right / len(data.validation)


def latency_ratios(folder: Path, name: str, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """How many times faster than floats integers are, by the clock and, with one thread, by processor time."""
    files: dict[str, tuple[str, dict[str, str]]] = {"fp32": (f"{name}-fp32.onnx", {})}
    files |= {levels: (f"{name}, {levels}.onnx", {}) for levels in LEVELS}
    if saturates():
        files[f"{ALL_LEVELS}, exact sums"] = (f"{name}, {ALL_LEVELS}.onnx", EXACT_SUMS)
    turns = [
        _turn(onnx_call(str(folder / file), [EXAMPLE.numpy()], threads, settings)) for file, settings in files.values()
    ]
    wall, processor = np.array(interleave(turns, rounds, n_warmup=5)) / 1e6 / CALLS_OF_A_TURN
    found = {}
    for row, what in enumerate(files):
        own = {"ms": np.median(wall[row]), **_ratio(wall, row, "clock")}
        found[what] = own | (_ratio(processor, row, "processor") if threads == 1 else {})
    return {what: {key: float(value) for key, value in own.items()} for what, own in found.items()}


def _ratio(times: NDArray[np.float64], row: int, clock: str) -> dict[str, np.floating]:
    lower, upper = np.percentile(times[0] / times[row], [25, 75])
    medians = np.median(times, axis=1)
    return {clock: medians[0] / medians[row], f"{clock}_lower": lower, f"{clock}_upper": upper}


def _turn(call: Callable[[], object]) -> Timer:
    """Several calls, by the clock and by this thread's processor time."""

    def timed() -> tuple[int, int]:
        wall, processor = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(CALLS_OF_A_TURN):
            call()
        return time.perf_counter_ns() - wall, time.thread_time_ns() - processor

    return timed


def read_data(options: argparse.Namespace) -> ImageData:
    """CIFAR-10 with the even-numbered test images as validation."""
    even, odd = write_split_lists(options.data, "test", options.out / "lists")
    recipe = DataRecipe(
        source=str(options.data),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        validation=SplitRecipe(folder="test", list_file=even),
        test=SplitRecipe(folder="test", list_file=odd),
    )
    return ImageData(recipe)


def page(found: Sequence[tuple[str, dict[str, Any]]], options: argparse.Namespace) -> str:
    """The tables, in Markdown."""
    scored = [
        [row, *(f"{100 * facts[row]:.2f}" if row in facts else "" for _, facts in found)]
        for row in ("fp32", *(f"int8 {method}" for method in METHODS), "4 bits mse", "4 bits trained")
    ]
    scored = [[row, *values] for row, *values in scored if any(values)]
    integers, latencies = [], []
    for name, facts in found:
        for levels, export in facts["files"].items():
            kernels = ", ".join(f"{n} {kind}" for kind, n in export["kernels"].items())
            layers, left = f"{export['layers']}, {export['fused_layers']}", str(export["conversions"])
            shares = (f"{100 * export[key]:.1f} %" for key in ("error", "saturated", "agreement"))
            worth = (f"{100 * export[key]:.2f}" for key in ("simulated", "accuracy"))
            integers.append([name, levels, *worth, *shares, layers, left, kernels])
        for threads, entries in facts["ratios"].items():
            for what, entry in list(entries.items())[1:]:
                clocks = [_in_quartiles(entry, clock) for clock in ("clock", "processor")]
                latencies.append([name, what, threads, *clocks, f"{entry['ms']:.2f}"])
    compared = ("difference to PyTorch", "as computed here", "same class")
    heads = ["integers", "weights", "simulated, %", "file, %", *compared, "layers, fused", "Q/DQ left", "kernels"]
    clock = ["by the clock: medians (quartiles)", "by processor time", "int8, ms"]
    tables = [
        Table(["accuracy, %", *(name for name, _ in found)], scored),
        Table(heads, integers, words=("weights", "kernels")),
        Table(["fp32 : int8", "weights", "threads", *clock], latencies, words=("weights",)),
    ]
    versions = f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}"
    head = [
        "# Bits, measured",
        f"{cpu_name()}, {versions}. 8-bit products saturate here: {'yes' if saturates() else 'no'}.",
        EXPLANATION,
        f"Calibrated on {N_CALIBRATION} training images without augmentation, seed {options.seed}. 4 bits: the "
        f"first and the last layer have 8; trained: on {options.train_images} images, learning rate "
        f"{options.learning_rate:g}.",
        f"Command: `python -m experiments.studies.bench_bits {' '.join(sys.argv[1:])}`.",
    ]
    return "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"


def _in_quartiles(entry: Mapping[str, float], clock: str) -> str:
    if clock not in entry:
        return ""
    return f"{entry[clock]:.2f} ({entry[f'{clock}_lower']:.2f} to {entry[f'{clock}_upper']:.2f})"


def measure(name: str, data: ImageData, options: argparse.Namespace, *, timing: bool) -> dict[str, Any]:
    """Files and latencies of one network, or its accuracies; what an earlier sitting measured is read from its file."""
    path = options.out / f"{name}.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model = build_model(name, num_classes=10).eval()
    load_weights(model, options.models / NETWORKS[name])
    steps: dict[str, Callable[[], Any]] = {
        "files": lambda: export_all(model, data, options.out, name, options.seed),
        "ratios": lambda: {str(n): latency_ratios(options.out, name, n, options.rounds) for n in (1, 2)},
    }
    if not timing:
        steps = {**accuracies(model, data, options)}
        if options.no_accuracy:
            steps = {"fp32": steps["fp32"]}
        if name not in options.train:
            steps.pop("4 bits trained", None)
    for step, measured in steps.items():
        if step not in facts:
            facts[step] = measured()
            write_atomic(path, json.dumps(facts, indent=1).encode())
    return facts


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10-jpeg.tar.gz"))
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--out", type=Path, default=Path("runs/bits"), help="ONNX files, and what was measured before")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/bits.md"), help="page to write")
    parser.add_argument("--train", nargs="*", default=["resnet20"], help="networks to train with 4 bits as well")
    parser.add_argument("--train-images", type=int, default=12_800, help="of that training, each seen once")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=200, help="turns of each network when it is timed")
    parser.add_argument("--no-accuracy", action="store_true", help="only of floats and of the integers' files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = read_data(options)
    for name in options.networks:
        measure(name, data, options, timing=True)
    found = [(name, measure(name, data, options, timing=False)) for name in options.networks]
    write_atomic(options.page, page(found, options).encode())


if __name__ == "__main__":
    main()
