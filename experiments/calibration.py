"""Calibration batches as the users of `secateur.compress` hand them over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from graph_encoder.batches import Batch, inputs_of

from .config import ConfigError

CalibrationData = Iterable[Tensor | Sequence[Tensor]]
"""Batches of inputs; in a tuple or list, what follows the inputs of ``forward`` is left out: labels, as a rule."""


def read_calibration(calibration: CalibrationData, example_inputs: Tensor | Sequence[Tensor]) -> list[Batch]:
    """The batches as a network takes them: tensors, or tuples where ``forward`` has several inputs.

    Args:
        calibration: read once, and held in memory.
        example_inputs: what ``forward`` takes; each batch must begin with as many tensors, of the same types and
            numbers of dimensions, images with as many channels.

    Raises:
        ConfigError: if it is no iterable of batches, or a batch is not what ``forward`` takes.
    """
    inputs = inputs_of(example_inputs)
    if isinstance(calibration, Tensor):
        msg = (
            f"calibration is {_in_words(calibration)}; it must be a list or another iterable of batches: pass "
            "[calibration] if the tensor is one batch, or calibration.split(250)"
        )
        raise ConfigError(msg)
    if not isinstance(calibration, Iterable):
        msg = f"calibration is {_in_words(calibration)}; it must be a list or another iterable of batches, or empty"
        raise ConfigError(msg)
    return [_leading(batch, inputs, index) for index, batch in enumerate(calibration)]


def _leading(batch: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], index: int) -> Batch:
    given = inputs_of(batch) if isinstance(batch, Tensor | tuple | list) else ()
    taken = given[: len(inputs)]
    if len(taken) < len(inputs) or not all(map(_are_alike, taken, inputs)):
        wanted = _in_words(inputs[0] if len(inputs) == 1 else tuple(inputs))
        msg = (
            f"batch {index} of calibration is {_in_words(batch)}, but forward takes {wanted}, as example_inputs "
            "says; pass batches of that, of any size. In a tuple or list, what follows the inputs (labels) is left out"
        )
        if isinstance(batch, Mapping):
            msg += f"; of a mapping pass the tensors, such as (batch['{next(iter(batch), 'images')}'],)"
        raise ConfigError(msg)
    return taken if len(taken) > 1 else taken[0]


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
