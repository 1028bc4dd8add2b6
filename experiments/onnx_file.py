"""A finished network as an ONNX file, where it can be one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pruning.export import ExportError, export_onnx

from .progress import RunDisplay

ONNX_NAME = "model.onnx"
"""The file in the folder of a network."""


def write_onnx(
    network: nn.Module, name: str, example: Tensor | tuple[Tensor, ...], path: Path, images: Tensor, display: RunDisplay
) -> bool:
    """Write a network as ONNX, or say why it is not written: bits may be simulated only, an operator unknown to ONNX.

    Args:
        network: in any form that `pruning.export.export_onnx` takes.
        name: what the display calls it.
        example: inputs of the network, batch first.
        path: file to write.
        images: a batch of real images, on which integers are compared with PyTorch's simulation of them.
        display: told how many layers run in integers, and what went wrong.

    Returns:
        Whether the file was written.
    """
    try:
        integers = export_onnx(network, example, path, images=images)
    except ExportError as error:
        display.say(f"warning: {name} is not written as ONNX: {error}")
        return False
    if integers is not None:
        others = f" (and {integers.others} more, which the runtime quantizes by itself)" if integers.others else ""
        display.say(
            f"{name} as ONNX: {integers.fused_layers} of {integers.layers} 8-bit layers run in integers{others}; "
            f"the same class as in PyTorch for {integers.agreement:.1%} of {integers.images} images"
        )
        if integers.unfused:
            display.say(
                f"warning: {name} has 8-bit layers that ONNX Runtime computes in floats, as it has no integer kernel "
                f"where they stand: {', '.join(integers.unfused)}"
            )
    return True
