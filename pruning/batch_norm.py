"""Batch-norm statistics of a network whose channels have just gone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graph_encoder.batches import Batch, inputs_of
from graph_encoder.modes import evaluation_mode, mixed_precision


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of ``model`` that keep statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch], *, autocast: bool = False) -> None:
    """Replace the running statistics of all batch norms by averages over ``batches``, in place.

    Only batch norms run in training mode, with a cumulative average, so that dropout stays off and every image counts
    the same. Weights are not touched; modes and momenta are restored, and after an error the statistics too.

    Args:
        model: the network.
        batches: inputs on the model's device, of equal batch size; tuples where forward takes several.
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
    n_batches = 0
    is_done = False
    with evaluation_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None
            with torch.no_grad():  # tensors that forward keeps are for training too
                for batch in batches:
                    inputs = inputs_of(batch)
                    with mixed_precision(inputs[0].device.type, autocast):
                        model(*inputs)
                    n_batches += 1
            is_done = True
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                # One that did not run, as in a head for training alone, keeps what it had.
                if not is_done or not norm.num_batches_tracked:
                    for name, buffer in buffers.items():
                        norm.get_buffer(name).copy_(buffer)
    if not n_batches:
        msg = "batch-norm statistics were to be re-estimated on no batches; hand in at least one batch of images"
        raise ValueError(msg)
