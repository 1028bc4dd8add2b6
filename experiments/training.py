"""Training from scratch and fine-tuning, by one recipe for all networks of a run."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graph_encoder.copies import copied
from graph_encoder.modes import evaluation_mode, has_bfloat16
from graph_encoder.randomness import kept_randomness
from pruning.batch_norm import batch_norms, reestimate_batch_norm
from pruning.export import unique_tensors
from pruning.files import CheckpointError, FileWriteError, write_atomic
from pruning.finetune import finetune
from pruning.quantize import quantized_layers, without_quantizers
from pruning.sparse_training import hold_zeros

from .config import FinetuneConfig, RunConfig, TrainConfig
from .data import ImageData, TrainBatches, normalise
from .identity import without_places
from .images import cache_folder
from .interrupt import StopFlag
from .precision import NO_KERNELS
from .progress import RunDisplay
from .run import locked

SETTLING_STEPS = 100
"""Steps after which running statistics of batch norms, which forget a tenth at each, have followed the weights."""
SETTLING_BATCHES = 10
"""Batches that they are taken from anew after fewer steps."""
QUANTIZED_RATE = 0.1
"""Peak learning rate of the epochs with bits that follow others without, as a share of theirs."""


def tune(
    model: nn.Module,
    batches: TrainBatches,
    recipe: TrainConfig,
    seed: int,
    title: str,
    display: RunDisplay,
    stop: StopFlag,
    *,
    scratch: Path,
    teacher: nn.Module | None = None,
    sparse_layers: Sequence[str] = (),
    calibrate_ranges: Callable[[nn.Module], None] | None = None,
) -> None:
    """Train or fine-tune ``model`` in place and leave it in evaluation mode.

    Args:
        model: network, on the device to train on.
        batches: training images.
        recipe: epochs, learning rate and so on; layers with bits are trained in single precision.
        seed: of what the network draws.
        title: what the display calls it.
        display: shows each epoch.
        stop: looked at after each epoch.
        scratch: folder for checkpoints; a run that was stopped continues from there. To be removed once the network is
            on disk.
        teacher: network to distil from, if the recipe says so.
        sparse_layers: qualified names of the layers whose zeros are to stay.
        calibrate_ranges: calibrates a network with bits, in place; needed where the recipe trains without them first.

    Raises:
        CheckpointError: if the folder holds the checkpoints of another recipe.
    """
    tuning = recipe if isinstance(recipe, FinetuneConfig) else FinetuneConfig(**recipe.model_dump())
    with_bits = tuning.epochs
    if quantized_layers(model) and tuning.quantized_epochs is not None:
        with_bits = tuning.quantized_epochs
    without = tuning.epochs - with_bits
    first, last = scratch / "without_bits.pt", scratch / "checkpoint.pt"
    if first.exists() if not without else last.exists() and not first.exists():
        msg = (
            f"'{scratch}' holds a training with another finetune.quantized_epochs; use the same settings, or delete "
            "the folder to train from the start"
        )
        raise CheckpointError(msg)

    def train(network: nn.Module, epochs: int, rate: float, what: str, checkpoint: Path, first_epoch: int) -> None:
        is_quantized = bool(quantized_layers(network))
        if tuning.autocast and is_quantized:
            display.say(f"{what}: in single precision, as bfloat16 would round about as much as the network's bits do")
        elif tuning.autocast and not has_bfloat16(next(network.parameters()).device.type):
            display.say(f"{what}: in single precision, as {NO_KERNELS}")
        with ExitStack() as stack:
            if sparse_layers:
                stack.enter_context(hold_zeros(network, sparse_layers))
            stage = stack.enter_context(display.stage(what, epochs, "epoch"))

            def on_epoch(_epoch: int, loss: float, accuracy: float) -> None:
                stage.advance(note=f"loss {loss:.3f}, {accuracy:.1%} of the training images right")
                stop.check()

            network.train()
            finetune(
                network,
                batches,
                epochs=epochs,
                learning_rate=rate,
                momentum=tuning.momentum,
                weight_decay=tuning.weight_decay,
                teacher=teacher if tuning.distillation_weight else None,
                distillation_weight=tuning.distillation_weight,
                temperature=tuning.temperature,
                autocast=tuning.autocast and not is_quantized,
                seed=seed,
                first_epoch=first_epoch,
                checkpoint=checkpoint,
                on_epoch=on_epoch,
            )

    rate = tuning.learning_rate
    if without:
        assert calibrate_ranges is not None
        plain = without_quantizers(model)
        train(plain, without, rate, f"{title} without bits", first, 0)
        # What is not there are the quantizers, which are calibrated next.
        assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
        calibrate_ranges(model)
        rate *= QUANTIZED_RATE
    if with_bits:
        train(model, with_bits, rate, title, last, without)
    steps = tuning.epochs * len(batches)
    if steps < SETTLING_STEPS and batch_norms(model):
        display.say(f"{title}: {steps} steps are too few for batch norms to follow the weights; re-estimated")
        drawn = itertools.islice(batches(tuning.epochs), SETTLING_BATCHES)
        reestimate_batch_norm(model, [images for images, _ in drawn])
    model.eval()


def trained_weights(
    config: RunConfig, data: ImageData, model: nn.Module, device: torch.device, display: RunDisplay, stop: StopFlag
) -> Path:
    """Weights of ``model`` trained from scratch by the configuration's recipe, from the cache if they are there.

    Raises:
        RunBusyError: if another process trains them.
    """
    key = _training_key(config, data, model, device)
    path = cache_folder() / "networks" / f"{config.model.name.replace(':', '-')}-{key}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = (
            f"cannot make the folder '{path.parent}', where trained weights are kept: {error.strerror}; set "
            "SECATEUR_CACHE to a folder that can be written"
        )
        raise FileWriteError(error.errno, msg) from error
    with locked(path.with_suffix(".lock"), f"on the weights {path}"):
        if path.exists():
            display.say(f"{config.model.name} has no weights; taking those trained before by the same recipe, {path}")
        else:
            train_from_scratch(config, data, model, device, display, stop, path)
    return path


def _training_key(config: RunConfig, data: ImageData, model: nn.Module, device: torch.device) -> str:
    """Digest of all that trained weights depend on; a user's functions may have changed behind their names."""
    # Where the images lie and how they got there changes no weight.
    augmentation = config.data.model_dump(mode="json", include={"mean", "std", "flip", "crop_padding"})
    recipe = [augmentation, config.train.model_dump(), config.search.seed, torch.__version__]
    digest = hashlib.sha256(json.dumps(recipe).encode())
    digest.update(data.train.images.numpy().tobytes())
    digest.update(data.train.labels.numpy().tobytes())
    # The first weights are drawn by the seed, so equal outputs mean the same layers and the same forward.
    digest.update(behaviour(model, normalise(data.train.images[:2].to(device), config.data)).encode())
    digest.update(repr({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}).encode())
    return digest.hexdigest()[:16]


def behaviour(model: nn.Module, x: Tensor) -> str:
    """How ``model`` is written and what it computes, in evaluation and in training mode; it is left as it is.

    Dropout and the momentum of a batch norm, for two, show in no weight and in no output of the evaluation mode.

    Args:
        model: network, on the device of ``x``.
        x: some images.
    """
    trained = copied(model).train()
    with kept_randomness(), torch.no_grad():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        in_training = trained(torch.cat([x, x]))  # of one image a batch norm knows no variance
    with evaluation_mode(model), torch.inference_mode():
        outputs = [leaf for leaf in tree_leaves([model(x), in_training]) if isinstance(leaf, Tensor)]
    return repr((without_places(repr(model)), [output.float().cpu().mul(1000).round().tolist() for output in outputs]))


def train_from_scratch(
    config: RunConfig,
    data: ImageData,
    model: nn.Module,
    device: torch.device,
    display: RunDisplay,
    stop: StopFlag,
    path: Path,
) -> None:
    """Train ``model`` by the configuration's recipe and write its weights to ``path`` (safetensors)."""
    seed, batch_size = config.search.seed, config.train.batch_size
    batches = TrainBatches(data.train, config.data, batch_size=batch_size, seed=seed, device=device)
    title = f"training {config.model.name}"
    # A training that was stopped is continued by the same recipe on the same images alone.
    scratch = path.with_name(f"{path.stem}.{_training_key(config, data, model, device)}.training")
    tune(model, batches, config.train, seed, title, display, stop, scratch=scratch)
    write_atomic(path, save(unique_tensors(model)))
    shutil.rmtree(scratch, ignore_errors=True)
