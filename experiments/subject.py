"""The network and the images that a run works on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from envs.evaluator import RANGE_IMAGES
from envs.plans import count_shared
from graph_encoder.capture import capture
from graph_encoder.errors import SecateurError
from graph_encoder.network import NetworkGraph
from pruning.proof import leave_refuted_dense
from pruning.reconstruction import MOST_BYTES, most_images

from .config import RunConfig
from .data import (
    ImageData,
    TrainBatches,
    calibration_batches,
    check_classes_are_covered,
    labelled_batches,
    make_evaluate,
    make_judge,
    normalise,
)
from .interrupt import StopFlag
from .models import build_model, check_outputs, check_trains, load_weights
from .outcome import percent
from .progress import RunDisplay
from .training import trained_weights

USUAL_GAP = 0.05
"""Accuracy that networks commonly lose on images that they were not trained on; many lose more, some less."""


class NearChanceError(SecateurError, ValueError):
    """The dense network guesses: its weights, the normalisation or the order of the classes must be wrong."""


@dataclass(frozen=True)
class Subject:
    """What a run works on.

    Attributes:
        config: the run's configuration.
        data: images; the test split unread.
        model: the dense network, in evaluation mode.
        graph: its capture.
        device: where networks run.
        trained: file in the cache with the weights, if they were trained for want of any.
    """

    config: RunConfig
    data: ImageData
    model: nn.Module
    graph: NetworkGraph
    device: torch.device
    trained: Path | None = None

    @property
    def n_search(self) -> int:
        """Validation images that a candidate is scored on."""
        return min(self.config.search.search_images, len(self.data.validation))

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / len(self.data.classes)

    def example(self, batch_size: int) -> Tensor:
        """The first validation images as the network reads them, ``(batch_size, C, H, W)``."""
        return normalise(self.data.validation.images[:batch_size].to(self.device), self.config.data)

    def evaluate_on_search_images(self, share: float = 1.0) -> Callable[[nn.Module], float]:
        """Accuracy on a share of the search images; smaller shares are part of the larger ones."""
        search = self.config.search
        return make_evaluate(
            self.data.validation,
            self.config.data,
            n_images=count_shared(self.n_search, share),
            batch_size=search.batch_size,
            device=self.device,
            autocast=search.scores_in_bfloat16,
            seed=search.seed,
        )

    def evaluate_on_validation(self) -> Callable[[nn.Module], float]:
        """Accuracy on the whole validation split, never in bfloat16."""
        batch_size = self.config.search.batch_size
        return make_evaluate(self.data.validation, self.config.data, batch_size=batch_size, device=self.device)

    def judge_on_test(self) -> Callable[[nn.Module], Tensor]:
        """Which test images are classified rightly: for the report alone, once everything has been chosen."""
        batch_size = self.config.search.batch_size
        return make_judge(self.data.test, self.config.data, batch_size=batch_size, device=self.device)

    def calibration(self) -> list[Tensor]:
        """Training images for batch-norm statistics."""
        search = self.config.search
        return calibration_batches(
            self.data.train,
            self.config.data,
            n_images=search.calibration_images,
            batch_size=search.batch_size,
            device=self.device,
            seed=search.seed,
        )

    def range_images(self) -> list[Tensor]:
        """The first of the calibration images as in use, not augmented: for ranges of quantized activations."""
        n_images = min(RANGE_IMAGES, self.config.search.calibration_images)
        return [images for images, _ in self.labelled_batches(n_images)]

    def labelled_batches(self, n_images: int) -> list[tuple[Tensor, Tensor]]:
        """So many of the calibration images, not augmented, with labels."""
        search = self.config.search
        return labelled_batches(
            self.data.train,
            self.config.data,
            n_images=n_images,
            batch_size=search.batch_size,
            device=self.device,
            seed=search.seed,
        )

    def train_batches(self, batch_size: int) -> TrainBatches:
        """Augmented training batches."""
        seed = self.config.search.seed
        return TrainBatches(self.data.train, self.config.data, batch_size=batch_size, seed=seed, device=self.device)


def prepare_subject(
    config: RunConfig,
    device: torch.device,
    display: RunDisplay,
    stop: StopFlag,
    weights: Path | None = None,
    *,
    check: Callable[[Subject], object],
) -> Subject:
    """Load images and network, capture it, train it if it has no weights.

    Args:
        config: what to load.
        device: where networks run.
        display: told what happens.
        stop: checked after each epoch of training.
        weights: read in place of the configuration's, as a resumed run does.
        check: raises if what is to be done does not fit the network and the images; called before anything takes long,
            so the network may not have its weights yet.
    """
    data = ImageData(config.data)
    sample = data.sample
    # The layers draw their first weights from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.search.seed)
        model = build_model(config.model.name, len(sample.classes), sample.images.shape[1]).to(device).eval()
    weights = weights or config.model.weights
    if weights:
        load_weights(model, weights)
    # The names and sizes of the groups are the same for any weights: no reason to train before they are known.
    example = normalise(sample.images.expand(2, -1, -1, -1).to(device), config.data)
    graph = leave_refuted_dense(model, capture(model, example), example)
    check_outputs(model, example, sample.classes)
    if not weights:
        check_trains(model, example)
    subject = Subject(config, data, model, graph, device)
    check(subject)
    _tell_images_left_out(config, graph, display)
    if not weights:
        _ = data.validation  # missing validation images end a run too, and before the training rather than after it
        trained = trained_weights(config, data, model, device, display, stop)
        load_weights(model, trained)
        model.eval()
        subject = replace(subject, trained=trained)
    return subject


def _tell_images_left_out(config: RunConfig, graph: NetworkGraph, display: RunDisplay) -> None:
    """Say where least squares will not take all calibration images, as a forward pass of all takes too much memory."""
    fitting, asked = most_images(graph), config.search.calibration_images
    if config.search.reconstruct and fitting < asked:
        display.say(
            f"reconstruction takes {fitting:,} of the {asked:,} calibration images (search.calibration_images), so "
            f"that no output of a layer is larger than {MOST_BYTES / 1e9:g} GB, and more positions of each"
        )


def near_chance(chance: float) -> float:
    """Accuracy below which a network is as good as guessing."""
    return chance + min(chance, (1 - chance) / 4)


def report_dense(subject: Subject, display: RunDisplay) -> float:
    """Say the dense accuracy on the validation images, and warn if they look like training images.

    Raises:
        NearChanceError: if the accuracy is below chance plus the smaller of chance and a quarter of what is above it.
    """
    data, n_validation = subject.data, len(subject.data.validation)
    accuracy = subject.evaluate_on_validation()(subject.model)
    display.say(
        f"dense accuracy: {percent(accuracy)} on {n_validation:,} validation images (chance {percent(subject.chance)})"
    )
    floor = near_chance(subject.chance)
    if accuracy < floor:
        todo = (
            "Check the weights, the normalisation (data.mean, data.std), and that the class folders sort into the "
            "order that the network was trained with"
        )
        if subject.trained is not None:
            todo = (
                f"It was trained here, for {subject.config.train.epochs} epochs, and whoever asks for the same "
                f"training gets the weights kept in '{subject.trained}': train it longer or otherwise (train.epochs, "
                "train.learning_rate, train.batch_size), or pass --weights"
            )
        msg = (
            f"the dense network scores {percent(accuracy)} on the validation images, where guessing scores "
            f"{percent(subject.chance)}; below {percent(floor)} there is nothing to compress. {todo}"
        )
        raise NearChanceError(msg)
    seen = make_evaluate(
        data.train,
        subject.config.data,
        n_images=n_validation,
        batch_size=subject.config.search.batch_size,
        device=subject.device,
    )(subject.model)
    warning = check_validation_is_unseen(seen, accuracy, n_validation, min(n_validation, len(data.train)))
    for each in (warning, check_classes_are_covered(data.train, data.validation)):
        if each:
            display.say(f"warning: {each}")
    return accuracy


def check_validation_is_unseen(
    train_accuracy: float, validation_accuracy: float, n_validation: int, n_train: int | None = None
) -> str | None:
    """Warn when the network does as well on the validation images as on those it was trained on.

    A trained network does better on what it was trained on. The test is the one-sided two-proportion z-test with the
    pooled variance: no warning if ``(train - validation) / sqrt(p (1 - p) (1 / n_train + 1 / n_validation))``
    exceeds 1.645, that is, if validation is lower at the 5 % level. Nor is there one where the images are too few to
    tell: where a true gap of `USUAL_GAP` would be missed by that test in more than 5 % of the cases. A network that
    truly generalises without loss is warned about: the text says so.

    Args:
        train_accuracy: of the dense network on training images without augmentation, in ``[0, 1]``.
        validation_accuracy: of the dense network on the validation images.
        n_validation: validation images.
        n_train: training images; as many as validation images if not given.

    Returns:
        The warning, or None if validation is clearly lower, or the images are too few to say.
    """
    n_train = n_train or n_validation
    pooled = (train_accuracy * n_train + validation_accuracy * n_validation) / (n_train + n_validation)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n_train + 1 / n_validation))
    if train_accuracy - validation_accuracy > 1.645 * error or 2 * 1.645 * error > USUAL_GAP:
        return None
    return (
        f"the network scores {validation_accuracy:.2%} on the {n_validation:,} validation images and "
        f"{train_accuracy:.2%} on {n_train:,} training images: no lower at the 5 % level, though so many images would "
        f"show a gap of {100 * USUAL_GAP:g} points. If it was trained on these validation images, the search will "
        "choose plans that remember them rather than plans that work; pass images that were held out of training. If "
        "they were held out, ignore this"
    )
