"""Batch-norm statistics of a network whose channels have just gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graph_encoder.batches import Batch, count_images, inputs_of
from graph_encoder.modes import evaluation_mode, mixed_precision


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of ``model`` that keep statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch], *, autocast: bool = False) -> None:
    """Replace the running statistics of all batch norms by averages over ``batches``, in place.

    Only batch norms run in training mode, so that dropout stays off, with a cumulative average in which each batch
    weighs as many as its images. Weights are not touched; modes and momenta are restored, and after an error the
    statistics too.

    Args:
        model: the network.
        batches: inputs on the model's device, of any batch size; tuples where forward takes several. A batch of a
            single image, as a loader's last may be, is joined to the one before: it may have no variance of its own.
        autocast: run the network in bfloat16 where PyTorch deems it safe and the device has it
            (`graph_encoder.modes.has_bfloat16`); statistics stay in float32.

    Raises:
        ValueError: if there is no batch.

    Source: EagleEye (Li et al. 2020), section 3.3, "adaptive batch normalization".
    """
    norms = batch_norms(model)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    n_images, n_batches = 0, 0
    seen: Counter[_BatchNorm] = Counter()
    is_done = False

    def weigh(norm: _BatchNorm, _: object) -> None:
        # Between batches of equal size this is the factor of momentum=None, 1 over the batches, to the last bit.
        seen[norm] += n_images
        norm.momentum = n_images / seen[norm]

    hooks = [norm.register_forward_pre_hook(weigh) for norm in norms]
    with evaluation_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None
            with torch.no_grad():  # tensors that forward keeps are for training too
                for batch in _without_singles(batches):
                    inputs, n_images = inputs_of(batch), count_images([batch])
                    with mixed_precision(inputs[0].device.type, autocast):
                        model(*inputs)
                    n_batches += 1
            is_done = True
        finally:
            for hook in hooks:
                hook.remove()
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                # One that did not run, as in a head for training alone, keeps what it had.
                if not is_done or not norm.num_batches_tracked:
                    for name, buffer in buffers.items():
                        norm.get_buffer(name).copy_(buffer)
    if not n_batches:
        msg = "batch-norm statistics were to be re-estimated on no batches; hand in at least one batch of images"
        raise ValueError(msg)


def _without_singles(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, with each of a single image joined to the one before where the shapes let it."""
    held: list[Batch] = []
    for drawn in batches:
        # What is not in a list may be written over when the next is drawn.
        batch = drawn if isinstance(batches, Sequence) else tuple(x.clone() for x in inputs_of(drawn))
        if held and count_images([batch]) == 1 < count_images(held) and _are_alike(held[0], batch):
            pairs = zip(inputs_of(held[0]), inputs_of(batch), strict=True)
            held = [tuple(torch.cat(pair) for pair in pairs)]
        else:
            yield from held
            held = [batch]
    yield from held


def _are_alike(one: Batch, other: Batch) -> bool:
    shapes, others = ([x.shape[1:] if x.dim() else None for x in inputs_of(batch)] for batch in (one, other))
    return shapes == others and None not in shapes
