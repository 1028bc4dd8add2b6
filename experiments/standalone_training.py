"""`secateur train` and `secateur finetune`: training outside a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from envs.evaluator import RANGE_IMAGES
from graph_encoder.modes import evaluation_mode
from pruning.export import Manifest, load_compressed, read_manifest, save_compressed
from pruning.policy import CompressionPolicy
from pruning.quantize import calibrate

from .config import ConfigError, RunConfig
from .data import ImageData, TrainBatches, labelled_batches, make_evaluate, normalise
from .exported_files import describe_images, write_exported
from .identity import tensors_digest
from .interrupt import StopFlag
from .machine import set_up_device
from .models import build_model, check_outputs, load_weights
from .precision import settle_precision
from .progress import RunDisplay
from .run import MethodFolder, claimed
from .training import behaviour, train_from_scratch, tune
from .user_function import is_reference


def train_named(config: RunConfig, out: Path, display: RunDisplay, stop: StopFlag) -> dict[str, Any]:
    """Train the configuration's network from scratch and write its weights.

    Returns:
        What to tell: the file, and the accuracy on the validation images.

    Raises:
        ConfigError: if ``out`` is not to be safetensors.
        RunError: if it exists, or another process trains it.
    """
    if out.suffix != ".safetensors":
        msg = f"--out {out} must end in .safetensors: weights are written in that format"
        raise ConfigError(msg)
    with claimed(out):
        return _trained(config, out, display, stop)


def _trained(config: RunConfig, out: Path, display: RunDisplay, stop: StopFlag) -> dict[str, Any]:
    device = set_up_device(config.device, config.threads)
    config = settle_precision(config, device, display)
    data = ImageData(config.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.search.seed)
        model = build_model(config.model.name, len(data.classes), data.train.images.shape[1]).to(device)
    # Whatever is missing is found before the training rather than after it.
    evaluate = make_evaluate(data.validation, config.data, batch_size=config.search.batch_size, device=device)
    with evaluation_mode(model):
        check_outputs(model, normalise(data.train.images[:2].to(device), config.data), data.classes)
    train_from_scratch(config, data, model, device, display, stop, out)
    return {"weights": str(out), "validation_accuracy": evaluate(model)}


def finetune_saved(source: Path, config: RunConfig, out: Path, display: RunDisplay, stop: StopFlag) -> dict[str, Any]:
    """Fine-tune a compressed network that was saved, and save the result as it was, with its channels, zeros and bits.

    Args:
        source: folder of the compressed network, or of the run's method that made it.
        config: data, recipe, device, what builds the dense network (if it is not named there, the name in the folder is
            taken, unless that is a function); for distillation also the dense network's weights.
        out: folder to write.
        display: shows each epoch.
        stop: looked at after each epoch.

    Returns:
        What to tell: the folder, and the accuracy on the validation images before and after.

    Raises:
        ConfigError: if there are no epochs, ``source`` holds no network or would choose the code that runs, or
            distillation lacks the dense network's weights.
        RunError: if ``out`` exists, or another process makes it.
    """
    recipe, source = config.finetune, _network_folder(source)
    manifest = read_manifest(source)
    if not recipe.epochs:
        msg = "finetune.epochs is 0, so there is nothing to do; pass --epochs"
        raise ConfigError(msg)
    # Named in a configuration of the user's own, or by an option.
    named = config.model.name if "name" in config.model.model_fields_set else None
    if named is None and is_reference(manifest.constructor):
        msg = (
            f"'{source}' was made from '{manifest.constructor}'; a file must not choose what code runs, so pass "
            f"--model {manifest.constructor} if you trust it"
        )
        raise ConfigError(msg)
    if recipe.distillation_weight and config.model.weights is None:
        msg = (
            f"finetune.distillation_weight is {recipe.distillation_weight:g}, so the dense network is the teacher, and "
            "no weights of it are given; pass --weights (a run keeps them in RUN/dense.safetensors), or set "
            "finetune.distillation_weight to 0"
        )
        raise ConfigError(msg)
    with claimed(out):
        return _finetuned(source, manifest, named or manifest.constructor, config, out, display, stop)


def _finetuned(
    source: Path, manifest: Manifest, name: str, config: RunConfig, out: Path, display: RunDisplay, stop: StopFlag
) -> dict[str, Any]:
    device = set_up_device(config.device, config.threads)
    recipe = settle_precision(config, device, display).finetune
    data = ImageData(config.data)
    n_classes, n_channels = len(data.classes), data.train.images.shape[1]

    def dense() -> nn.Module:
        return build_model(name, n_classes, n_channels)

    model, teacher = load_compressed(source, dense).to(device), None
    if recipe.distillation_weight and config.model.weights:
        teacher = dense()
        load_weights(teacher, config.model.weights)
        teacher.to(device).eval()
    policy = CompressionPolicy.load(source / "policy.json")
    evaluate = make_evaluate(data.validation, config.data, batch_size=config.search.batch_size, device=device)
    before, seed = evaluate(model), config.search.seed
    batches = TrainBatches(data.train, config.data, batch_size=recipe.batch_size, seed=seed, device=device)
    example = normalise(data.train.images[:2], config.data)
    # A training that was stopped is continued for the same network, images and teacher alone, not for their names.
    made_of = [
        manifest.weights_sha256,
        manifest.policy_digest,
        behaviour(model, example.to(device)),
        config.data.model_dump_json(),
        tensors_digest([("images", data.train.images), ("labels", data.train.labels)]),
        tensors_digest(teacher.state_dict().items()) if teacher else "",
    ]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    search, scratch = config.search, out.with_name(f"{out.name}.{digest}.training")
    n_images = min(RANGE_IMAGES, search.calibration_images)
    labelled = labelled_batches(
        data.train, config.data, n_images=n_images, batch_size=search.batch_size, device=device, seed=seed
    )
    images = [batch for batch, _ in labelled]
    tune(
        model,
        batches,
        recipe,
        seed,
        f"fine-tuning {name}",
        display,
        stop,
        scratch=scratch,
        teacher=teacher,
        sparse_layers=policy.sparse_layers,
        calibrate_ranges=lambda network: calibrate(network, images, method=search.calibration_method),
    )
    # Exported for the images that it was trained on, which may be of another size, and read back as it was.
    metadata = describe_images(config.data, data.classes)
    write_exported(model, "the fine-tuned network", example, out, images[0].cpu(), config.measure, display, metadata)
    save_compressed(model, policy, out, constructor=manifest.constructor, example_inputs=manifest.examples())
    # Last: what is stopped before has its checkpoints.
    shutil.rmtree(scratch, ignore_errors=True)
    return {"network": str(out), "validation_accuracy_before": before, "validation_accuracy": evaluate(model)}


def _network_folder(source: Path) -> Path:
    """The folder of the network that ``source`` means: itself, or the one within a run's method."""
    for folder in (source, MethodFolder(source).model):
        if (folder / "manifest.json").exists():
            return folder
    networks = [str(path.parent) for path in sorted(source.glob("methods/*/model/manifest.json"))]
    todo = f"name one of the run's: {', '.join(networks)}" if networks else "a run keeps them in RUN/methods/NAME/model"
    msg = f"'{source}' holds no compressed network (no manifest.json in it); {todo}"
    raise ConfigError(msg)
