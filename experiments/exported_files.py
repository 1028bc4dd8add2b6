"""A finished network as files, where it can be as such that need none of its Python code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from pruning.export import ExportError, export_onnx, export_program, save_compressed
from pruning.policy import CompressionPolicy
from pruning.program_archive import ArchiveError
from pruning.qdq import EXACT_SUMS, IntegerReport

from .config import MeasureConfig
from .data import DataRecipe
from .progress import RunDisplay
from .subject import Subject

ONNX_NAME, PROGRAM_NAME = "model.onnx", "model.pt2"
"""The files in the folder of a network."""
NOTICED_SATURATION = 0.05
"""Difference of an integer file's outputs, by sums that saturate, that is told."""


def save_network(
    network: nn.Module, policy: CompressionPolicy, name: str, subject: Subject, folder: Path, display: RunDisplay
) -> Path | None:
    """Write the network that a policy left of a subject's, in all its forms; the arguments are `write_exported`'s.

    Returns:
        The ONNX file, None if it was not written.
    """
    example, config = subject.example(2), subject.config
    images, metadata = subject.range_images()[0], describe_images(config.data, subject.data.classes)
    onnx = write_exported(network, name, example, folder, images, config.measure, display, metadata)
    # Last: it makes the folder one of a network.
    save_compressed(network, policy, folder, constructor=config.model.name, example_inputs=example)
    return onnx


def write_exported(
    network: nn.Module,
    name: str,
    example: Tensor | tuple[Tensor, ...],
    folder: Path,
    images: Tensor,
    settings: MeasureConfig,
    display: RunDisplay,
    metadata: Mapping[str, str] | None = None,
) -> Path | None:
    """Write a network as ONNX and as an exported program, each where the settings ask for it.

    What cannot be written is said and left out: bits may be simulated only, an operator unknown to the exporter.

    Args:
        network: in any form that `pruning.export.export_onnx` takes; untouched.
        name: what the display calls it.
        example: inputs of the network, batch first.
        folder: of the saved network.
        images: a batch of real images, on which integers are compared with PyTorch's simulation of them.
        settings: which files are asked for.
        display: told how many layers run in integers, and what went wrong.
        metadata: what `describe_images` says.

    Returns:
        The ONNX file, None if it was not written.

    Raises:
        FileWriteError: if the disk refuses.
    """
    onnx: Path | None = None
    if settings.onnx:
        try:
            integers = export_onnx(network, example, folder / ONNX_NAME, images=images, metadata=metadata)
        except ExportError as error:
            display.say(f"warning: {name} is not written as ONNX: {error}")
        else:
            onnx = folder / ONNX_NAME
            if integers is not None:
                _tell_integers(integers, name, display)
    if settings.program:
        try:
            export_program(network, example, folder / PROGRAM_NAME)
        except (ExportError, ArchiveError) as error:
            display.say(f"warning: {name} is not written as an exported program: {error}")
    return onnx


def describe_images(data: DataRecipe, classes: Sequence[str]) -> dict[str, str]:
    """What whoever runs the ONNX file has to know of images and classes, as properties of the file."""
    return {
        "secateur.images": "float32 (N, C, H, W): values from 0 to 1, less mean, over std, channel by channel",
        "secateur.mean": json.dumps(data.mean),
        "secateur.std": json.dumps(data.std),
        "secateur.classes": json.dumps(list(classes)),
    }


def _tell_integers(integers: IntegerReport, name: str, display: RunDisplay) -> None:
    others = f" (and {integers.others} more, which the runtime quantizes by itself)" if integers.others else ""
    display.say(
        f"{name} as ONNX: {integers.fused_layers} of {integers.layers} 8-bit layers run in integers{others}; "
        f"the same class as in PyTorch for {integers.agreement:.1%} of {integers.images} images"
    )
    if integers.saturated > max(NOTICED_SATURATION, 2 * integers.error):
        display.say(
            f"warning: {name} as ONNX differs from PyTorch by {integers.saturated:.1%} of the outputs on this "
            "processor, as x86 without VNNI adds pairs of products in 16 bits: give its layers of 8 bits "
            f"reduce_range (search.reduce_range), open the file with the session options {EXACT_SUMS}, which is right "
            "and slower, or run it on another processor"
        )
    if integers.unfused:
        display.say(
            f"warning: {name} has 8-bit layers that ONNX Runtime computes in floats, as it has no integer kernel "
            f"where they stand: {', '.join(integers.unfused)}"
        )
