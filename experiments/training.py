"""Training from scratch and fine-tuning, by one recipe for all networks of a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from graph_encoder.modes import evaluation_mode
from pruning.files import write_atomic
from pruning.finetune import FinetuneReport, finetune
from pruning.quantize import quantized_layers

from .config import FinetuneConfig, RunConfig, TrainConfig
from .data import ImageData, TrainBatches, normalise
from .images import cache_folder
from .interrupt import StopFlag
from .progress import RunDisplay


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
) -> FinetuneReport:
    """Train or fine-tune ``model`` in place and leave it in evaluation mode.

    Args:
        model: network, on the device to train on.
        batches: training images.
        recipe: epochs, learning rate and so on; a network with quantized layers is trained in single precision.
        seed: of what the network draws.
        title: what the display calls it.
        display: shows each epoch.
        stop: looked at after each epoch.
        scratch: folder for checkpoints; a run that was stopped continues from there. Removed at the end.
        teacher: network to distil from, if the recipe says so.
    """
    tuning = recipe if isinstance(recipe, FinetuneConfig) else FinetuneConfig(**recipe.model_dump())
    autocast = tuning.autocast and not quantized_layers(model)
    if tuning.autocast and not autocast:
        display.say(f"{title}: in single precision, as bfloat16 would round about as much as the network's bits do")
    model.train()
    with display.stage(title, recipe.epochs, "epoch") as stage:

        def on_epoch(_epoch: int, loss: float, accuracy: float) -> None:
            stage.advance(note=f"loss {loss:.3f}, {accuracy:.1%} of the training images right")
            stop.check()

        report = finetune(
            model,
            batches,
            epochs=tuning.epochs,
            learning_rate=tuning.learning_rate,
            momentum=tuning.momentum,
            weight_decay=tuning.weight_decay,
            teacher=teacher if tuning.distillation_weight else None,
            distillation_weight=tuning.distillation_weight,
            temperature=tuning.temperature,
            autocast=autocast,
            seed=seed,
            checkpoint=scratch / "checkpoint.pt",
            on_epoch=on_epoch,
        )
    model.eval()
    shutil.rmtree(scratch, ignore_errors=True)
    return report


def trained_weights(
    config: RunConfig, data: ImageData, model: nn.Module, device: torch.device, display: RunDisplay, stop: StopFlag
) -> Path:
    """Weights of ``model`` trained from scratch by the configuration's recipe, from the cache if they are there."""
    key = _training_key(config, data, model, device)
    path = cache_folder() / "networks" / f"{config.model.name.replace(':', '-')}-{key}.safetensors"
    if path.exists():
        display.say(f"{config.model.name} has no weights; taking those trained before by the same recipe, {path}")
    else:
        train_from_scratch(config, data, model, device, display, stop, path)
    return path


def _training_key(config: RunConfig, data: ImageData, model: nn.Module, device: torch.device) -> str:
    """Digest of all that trained weights depend on; a user's functions may have changed behind their names."""
    recipe = [config.data.model_dump(mode="json"), config.train.model_dump(), config.search.seed, torch.__version__]
    digest = hashlib.sha256(json.dumps(recipe).encode())
    digest.update(data.train.images.numpy().tobytes())
    digest.update(data.train.labels.numpy().tobytes())
    with evaluation_mode(model), torch.inference_mode():
        # The first weights are drawn by the seed, so equal outputs mean the same layers and the same forward.
        outputs = model(normalise(data.train.images[:2].to(device), config.data))
    digest.update(repr(outputs.float().cpu().mul(1000).round().tolist()).encode())
    digest.update(repr({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}).encode())
    return digest.hexdigest()[:16]


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
    tune(model, batches, config.train, seed, title, display, stop, scratch=path.with_suffix(".training"))
    write_atomic(path, save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}))
