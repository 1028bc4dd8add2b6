"""Calibration batches as the users of `secateur.compress` hand them over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from graph_encoder.batches import Batch, count_images, first_images, inputs_of
from graph_encoder.copies import copied
from graph_encoder.randomness import kept_randomness

from .config import ConfigError

CalibrationData = Iterable[Tensor | Sequence[Tensor]]
"""Batches of inputs; in a tuple or list, what follows the inputs of ``forward`` is left out: labels, as a rule."""


def read_calibration(
    calibration: CalibrationData, inputs: Sequence[Tensor], model: nn.Module, name: str = "calibration"
) -> list[Batch]:
    """The batches as a network takes them: tensors, or tuples where ``forward`` has several inputs.

    Args:
        calibration: read once, and held in memory.
        inputs: examples of what ``forward`` takes; each batch must begin with as many tensors, of the same types and
            numbers of dimensions, images with as many channels.
        model: the network, untouched; a copy is tried on batches of other sizes than the examples.
        name: of the argument, for messages.

    Raises:
        ConfigError: if it is no iterable of batches, or a batch is empty or not what ``forward`` takes.
    """
    if isinstance(calibration, Tensor):
        msg = (
            f"{name} is {_in_words(calibration)}; it must be a list or another iterable of batches: pass "
            f"[{name}] if the tensor is one batch, or {name}.split(250)"
        )
        raise ConfigError(msg)
    if not isinstance(calibration, Iterable):
        msg = f"{name} is {_in_words(calibration)}; it must be a list or another iterable of batches, or empty"
        raise ConfigError(msg)
    batches = [_leading(batch, inputs, f"batch {index} of {name}") for index, batch in enumerate(calibration)]
    _check_sizes(batches, inputs, model, name)
    return batches


def _check_sizes(batches: Sequence[Batch], inputs: Sequence[Tensor], model: nn.Module, name: str) -> None:
    """Refuse a batch of other sizes than the examples on which ``forward`` fails: some networks take any, some none."""
    taken = {_sizes(inputs)}
    for index, batch in enumerate(batches):
        given = inputs_of(batch)
        if _sizes(given) not in taken:
            (image,) = first_images([batch], 1)
            try:
                with kept_randomness(), torch.inference_mode():
                    copied(model).eval()(*inputs_of(image))
            except Exception as error:  # forward raises whatever the layer at fault raises
                raise _misfit(batch, inputs, f"batch {index} of {name}") from error
            taken.add(_sizes(given))


def _sizes(inputs: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    """Those of each input but the first, which is the number of images."""
    return tuple(x.shape[1:] for x in inputs)


def _leading(batch: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], what: str) -> Batch:
    given = inputs_of(batch) if isinstance(batch, Tensor | tuple | list) else ()
    taken = given[: len(inputs)]
    if len(taken) < len(inputs) or not all(map(_are_alike, taken, inputs)):
        raise _misfit(batch, inputs, what)
    if not count_images([taken]):
        msg = f"{what} is {_in_words(batch)}, which holds nothing; leave it out"
        raise ConfigError(msg)
    return taken if len(taken) > 1 else taken[0]


def _misfit(batch: Batch | Sequence[Tensor], inputs: Sequence[Tensor], what: str) -> ConfigError:
    wanted = _in_words(inputs[0] if len(inputs) == 1 else tuple(inputs))
    msg = (
        f"{what} is {_in_words(batch)}, but forward takes {wanted}, as example_inputs says; pass "
        "batches of that, of any number of images. In a tuple or list, what follows the inputs (labels) is left out"
    )
    if isinstance(batch, Mapping):
        msg += f"; of a mapping pass the tensors, such as (batch['{next(iter(batch), 'images')}'],)"
    return ConfigError(msg)


def _are_alike(given: object, wanted: Tensor) -> bool:
    if not isinstance(given, Tensor) or given.dtype != wanted.dtype or given.dim() != wanted.dim():
        return False
    # Images of any size have the channels of the others.
    return given.dim() != 4 or given.shape[1] == wanted.shape[1]


def _in_words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, tuple | list):
        return f"a {kind} of ({', '.join(map(_in_words, value))})"
    return f"an object of class '{kind}'"
