"""The exported program beside a saved network: the network without its Python code."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pruning.export import ExportError, export_program
from pruning.program_archive import ArchiveError

from .config import MeasureConfig
from .progress import RunDisplay

PROGRAM = "model.pt2"


def write_program(
    network: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    folder: Path,
    settings: MeasureConfig,
    name: str,
    display: RunDisplay,
) -> None:
    """Write ``network`` into ``folder`` as an exported program, where the settings ask for one.

    Args:
        network: to export; untouched.
        example_inputs: inputs, batch first.
        folder: of the saved network.
        settings: whether a program is asked for.
        name: of the network, for the warning where it cannot be exported.
        display: told the warning.

    Raises:
        FileWriteError: if the disk refuses.
    """
    if not settings.program:
        return
    try:
        export_program(network, example_inputs, folder / PROGRAM)
    except (ExportError, ArchiveError) as error:
        display.say(f"warning: {name} is not written as an exported program: {error}")
