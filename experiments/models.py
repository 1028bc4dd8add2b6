"""Networks by name, and trained weights for them."""

import difflib
import functools
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from graph_encoder.copies import copied
from graph_encoder.errors import SecateurError
from graph_encoder.randomness import kept_randomness
from pruning.export import describe_misfit, names_of_tensors

from .mobilenet import mobilenet_v2_cifar
from .resnet import CifarResNet, resnet18_cifar
from .user_function import call_function, is_reference

_log = logging.getLogger(__name__)

_BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    # For the bundled 28x28 digits: after a stem of stride 2 the stages see 14, 7 and 4 pixels, so training is quick.
    "small_resnet": functools.partial(CifarResNet, 3, stem_stride=2),
    **{f"resnet{6 * n + 2}": functools.partial(CifarResNet, n) for n in (3, 5, 7, 9, 18)},
    "resnet18_cifar": resnet18_cifar,
    "mobilenet_v2_cifar": mobilenet_v2_cifar,
}
_SAVED = (b"PK", b"\x80")
"""What a file of torch.save begins with: an archive, or the pickle that it was before PyTorch 1.6."""
_WRAPPERS = ("state_dict", "model_state_dict", "model")
ONE_TENSOR = "a search scores one tensor (images, classes): wrap the network in a module that returns the logits alone"
"""What to do about a network that returns several tensors, or one inside something else."""


class ModelError(SecateurError, ValueError):
    """A network that cannot be built, or weights that do not fit it."""


class UnknownModelError(ModelError):
    """A name that no network has."""


def model_names() -> list[str]:
    """Every name that `build_model` knows: the networks for small images, then torchvision's classifiers."""
    return [*_BUILT_IN, *torchvision.models.list_models(module=torchvision.models)]


def input_sizes(name: str, shape: str | None) -> tuple[int, ...]:
    """Channels of an input and its size in each dimension of space, from a text such as ``3,224,224``.

    Args:
        name: of the network; without a shape the bundled ones read 32 pixels, and all others 224.
        shape: the text, one to four numbers apart by commas or an x: a signal has two.

    Raises:
        ModelError: if the text is anything else.
    """
    if shape is None:
        side = 32 if name in _BUILT_IN else 224
        return 3, side, side
    parts = shape.replace("x", ",").split(",")
    if len(parts) > 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        msg = (
            f"shape '{shape}' is not understood; give channels, height and width, for example 3,224,224 (of a signal "
            "channels and length)"
        )
        raise ModelError(msg)
    return tuple(map(int, parts))


def build_model(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: one of `model_names`, or ``package.module:function``: that function is called with ``num_classes`` and
            ``in_channels`` if it has parameters of these names, and returns the network. One that takes any keywords,
            as timm's do, is told of channels only where they are not 3.
        num_classes: outputs.
        in_channels: channels of the images; torchvision's networks read 3.

    Raises:
        ModelError: if the name is unknown (with the nearest ones), the network does not read that many channels, or
            the function returns something else.
        UserFunctionError: if the function cannot be called so, or raises.
    """
    if is_reference(name):
        return _from_function(name, num_classes, in_channels)
    if name in _BUILT_IN:
        return _BUILT_IN[name](num_classes=num_classes, in_channels=in_channels)
    if name not in model_names():
        nearest = difflib.get_close_matches(name, model_names(), n=3)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "."
        msg = (
            f"unknown model '{name}'{hint} Allowed: {', '.join(_BUILT_IN)}, a classification model of torchvision, or "
            f"package.module:function"
        )
        raise UnknownModelError(msg)
    if in_channels != 3:
        msg = (
            f"torchvision's '{name}' reads images of 3 channels, the data has {in_channels}; use one of "
            f"{', '.join(_BUILT_IN)}, or package.module:function"
        )
        raise ModelError(msg)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return model


def _from_function(reference: str, num_classes: int, in_channels: int) -> nn.Module:
    outputs, inputs = {"num_classes": num_classes}, {"in_channels": in_channels}
    # How keywords are called where they are passed on to is not known, and networks read 3 channels unless told.
    model = call_function(reference, outputs | inputs, outputs if in_channels == 3 else outputs | inputs)
    if not isinstance(model, nn.Module):
        msg = f"'{reference}' returned {type(model).__name__}; it must return a torch.nn.Module"
        raise ModelError(msg)
    return model


def check_outputs(model: nn.Module, images: Tensor, classes: Sequence[str]) -> None:
    """Check that ``model`` gives a score for each class.

    Args:
        model: in evaluation mode.
        images: a batch as it reads them, ``(N, C, H, W)``.
        classes: of the data.

    Raises:
        ModelError: if it returns something else, or fewer scores than there are classes.
    """
    with torch.inference_mode():
        scores = model(images)
    if not isinstance(scores, Tensor):
        msg = f"the network returns a {type(scores).__name__}; {ONE_TENSOR}"
        raise ModelError(msg)
    if scores.ndim == 2 and scores.shape[1] >= len(classes):
        return
    msg = (
        f"the network returns outputs {tuple(scores.shape)} for {len(images)} images, the data has {len(classes)} "
        f"classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}); a tensor (images, classes) is "
        "needed, so build the network for these classes, or name the data that it was trained on"
    )
    raise ModelError(msg)


def check_trains(model: nn.Module, images: Tensor) -> None:
    """Check that ``model`` returns scores in training mode too, as one with auxiliary heads does not.

    Args:
        model: is not changed.
        images: a batch as it reads them, ``(N, C, H, W)``.

    Raises:
        ModelError: if it returns something else.
    """
    with torch.no_grad(), kept_randomness():
        scores = copied(model).train()(images)
    if not isinstance(scores, Tensor):
        msg = (
            f"in training mode the network returns a {type(scores).__name__}; wrap it in a module that returns the "
            "logits alone, or pass its weights and do not fine-tune it (finetune.epochs 0)"
        )
        raise ModelError(msg)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load trained weights into ``model``, all of them or none.

    A prefix ``module.`` (left by DataParallel) is stripped with a notice in the log. No file is unpickled beyond
    tensors and plain containers.

    Args:
        model: network to fill, in place.
        path: .safetensors, or .pt/.pth with a state dict, alone or under the key state_dict, model_state_dict or model.

    Raises:
        ModelError: if the file is missing, cannot be read, would run code, or holds other names or shapes.
    """
    weights = _read_weights(path)
    if weights and all(name.startswith("module.") for name in weights):
        _log.warning("weights '%s': the prefix 'module.' of every name was stripped", path)
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    # Files from before PyTorch 0.4.1 and some converters lack the counters, which evaluation does not use, and what
    # was written as safetensors has one name for each tensor.
    state = model.state_dict()
    own = {
        name: state[name]
        for names in names_of_tensors(state)
        for name in names
        if name in weights or not (name.endswith(".num_batches_tracked") or weights.keys() & set(names))
    }
    if misfit := describe_misfit(own, weights):
        msg = (
            f"weights '{path}' do not fit {type(model).__name__}: {misfit}; name the model that they were trained "
            f"with, and the data with the same classes"
        )
        raise ModelError(msg)
    model.load_state_dict(weights, strict=False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        msg = f"no weights file '{path}'"
        raise ModelError(msg)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            msg = f"cannot read the weights '{path}': {error}; the file is not safetensors, or was cut short"
            raise ModelError(msg) from error
    if path.suffix not in (".pt", ".pth"):
        msg = f"weights '{path}' have the suffix '{path.suffix}'; expected .safetensors, .pt or .pth"
        raise ModelError(msg)
    with path.open("rb") as file:
        start = file.read(20)
    if not start.startswith(_SAVED):
        found = f"begins with {start!r}" if start else "is empty"
        msg = (
            f"cannot read the weights '{path}': the file {found}, so it was not written by torch.save; is it a web "
            "page or a pointer in place of the weights?"
        )
        raise ModelError(msg)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = (
            f"weights '{path}' are refused: they hold Python objects, and loading those may run any code; save the "
            f"tensors alone, torch.save(model.state_dict(), ...), or as safetensors"
        )
        raise ModelError(msg) from error
    except Exception as error:  # on what is no pickle, the unpickler raises many types
        msg = (
            f"cannot read the weights '{path}': {type(error).__name__}: {error}; the file was not written by "
            "torch.save, or was cut short"
        )
        raise ModelError(msg) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        msg = f"weights '{path}' hold {type(content).__name__}, not a state dict (names to tensors)"
        raise ModelError(msg)
    return dict(content)
