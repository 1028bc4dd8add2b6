"""One network of Han et al. (2015) with one seed: trained, pruned in rounds by their rule, and its controls.

Everything is chosen on validation images; the test images are read once, when all trainings are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from pruning.density import PruneRetrain, threshold_layers
from pruning.files import write_atomic
from pruning.finetune import finetune
from pruning.layer_policy import LayerPolicy
from pruning.sparse_training import hold_zeros, l1_penalty
from pruning.sparsity import can_be_sparse, sparse_weight, zero_weights

from ..config import ConfigError, TrainConfig
from ..data import ImageData, ImageSplit, TrainBatches, make_evaluate, make_judge
from ..interrupt import StopFlag
from ..models import build_model, load_weights
from .han_config import HanConfig

DENSITIES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
"""Of the sensitivity curves."""
CURVE_DENSITIES = (0.4, 0.2, 1 / 12, 0.05, 0.03)
"""Of the comparison of regularisations."""


class Images:
    """What the trials of one network train on, choose by, and are judged on in the end."""

    def __init__(self, config: HanConfig, data: ImageData | None = None) -> None:
        """Take the splits of the configuration, or of ``data``; the test images are read when they are asked for."""
        self._folds = config.folds
        self._data = data or ImageData(config.data)

    @cached_property
    def _known(self) -> ImageSplit:
        one, other = self._data.train, self._data.validation
        images, labels = torch.cat([one.images, other.images]), torch.cat([one.labels, other.labels])
        return ImageSplit(images, labels, one.paths + other.paths, one.classes)

    def splits(self, seed: int) -> tuple[ImageSplit, ImageSplit]:
        """Training and validation images of a seed; with folds, the latter are its part of both."""
        if not self._folds:
            return self._data.train, self._data.validation
        order = torch.randperm(len(self._known), generator=torch.Generator().manual_seed(7))
        parts = order.chunk(self._folds)
        others = torch.cat([part for place, part in enumerate(parts) if place != seed])
        return self._known.take(others), self._known.take(parts[seed])

    def judges(self, seed: int) -> ImageSplit:
        """The images that the outcome is of: the test's, or with folds those of the seed."""
        return self.splits(seed)[1] if self._folds else self._data.test

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many images for training, for validation and in the test; none in the test where it is not read."""
        return len(self._data.train), len(self._data.validation), 0 if self._folds else len(self._data.test)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self._data.sample.images.shape[1:])

    @property
    def classes(self) -> int:
        """How many."""
        return len(self._data.sample.classes)


@dataclass(frozen=True)
class Outcome:
    """What one network and seed gave.

    Attributes:
        kept: weights left by layer.
        weights: weights by layer.
        sensitivity: validation accuracy by layer, one for each of `DENSITIES`, that layer alone pruned.
        quality: quality parameter by layer, before the common factor.
        rounds: density, common factor, validation accuracy after the cut and after retraining, of each round.
        validation: accuracy by network: dense, longer (dense, trained on), one-shot, iterative.
        judged: a digit for each test image by network, 1 where it is right.
    """

    kept: Mapping[str, int]
    weights: Mapping[str, int]
    sensitivity: Mapping[str, Sequence[float]]
    quality: Mapping[str, float]
    rounds: Sequence[Sequence[float]]
    validation: Mapping[str, float]
    judged: Mapping[str, str]

    @property
    def test(self) -> dict[str, float]:
        """Accuracy on the test images by network."""
        return {name: digits.count("1") / len(digits) for name, digits in self.judged.items()}


class Trial:
    """One network with one seed; every finished training is a file, so that none is done twice."""

    def __init__(self, config: HanConfig, images: Images, seed: int, folder: Path, stop: StopFlag) -> None:
        """Open the folder that keeps the trained weights.

        Raises:
            ConfigError: if they are of another configuration.
        """
        self.config, self.images, self.seed, self.folder, self._stop = config, images, seed, folder, stop
        self._check_folder()
        self._train, validation = images.splits(seed)
        self.accuracy = make_evaluate(validation, config.data)

    def _check_folder(self) -> None:
        path = self.folder / "config.yaml"
        plain = self.config.model_dump(mode="json", exclude={"name", "seeds", "threads", "paper", "notes"})
        if path.exists() and (before := yaml.safe_load(path.read_text())) != plain:
            changed = ", ".join(
                f"{key} {before.get(key)}, now {plain[key]}" for key in plain if before.get(key) != plain[key]
            )
            msg = f"'{self.folder}' holds trainings of another configuration: {changed}; name another --root"
            raise ConfigError(msg)
        write_atomic(path, yaml.safe_dump(plain, sort_keys=False).encode())

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers to prune.

        Raises:
            PolicyError: if one that the configuration names is missing or cannot be sparse.
        """
        model = self.untrained()
        if self.config.prune.layers:
            return tuple(name for name in self.config.prune.layers if sparse_weight(model, name))
        return tuple(name for name, _ in model.named_modules() if name and can_be_sparse(model, name))

    def trained(self, name: str, start: nn.Module, recipe: TrainConfig, *, l1: bool = False) -> nn.Module:
        """``start`` after training with its zeros held, from the file of that name if there is one.

        Args:
            name: of the file.
            start: network to train, in place.
            recipe: epochs, learning rate and so on.
            l1: penalise magnitudes in place of squares.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            batches = TrainBatches(self._train, self.config.data, batch_size=recipe.batch_size, seed=self.seed)
            with hold_zeros(start, self.layers), l1_penalty(start, self.layers, self.config.prune.l1 if l1 else 0.0):
                finetune(
                    start.train(),
                    batches,
                    epochs=recipe.epochs,
                    learning_rate=recipe.learning_rate,
                    momentum=recipe.momentum,
                    weight_decay=0.0 if l1 else recipe.weight_decay,
                    autocast=recipe.autocast,
                    seed=self.seed,
                    on_epoch=lambda *_: self._stop.check(),
                )
            write_atomic(path, safetensors.torch.save(start.state_dict()))
        return self.load(name)

    def load(self, name: str) -> nn.Module:
        """The network of a finished training."""
        model = self.untrained().eval()
        model.load_state_dict(safetensors.torch.load_file(self.folder / f"{name}.safetensors"))
        return model

    def untrained(self) -> nn.Module:
        """Random weights, drawn with the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return build_model(self.config.model.name, self.images.classes, self.images.shape[0])

    def dense(self) -> nn.Module:
        """The network before pruning: trained from scratch, or with the weights that the configuration names."""
        weights = self.config.model.weights
        if weights is None:
            return self.trained("dense", self.untrained(), self.config.train)
        model = self.untrained()
        load_weights(model, weights)
        write_atomic(self.folder / "dense.safetensors", safetensors.torch.save(model.state_dict()))
        return self.load("dense")

    def for_rounds(self, rounds: int) -> TrainConfig:
        """A retraining as long as that of so many rounds."""
        return self.config.finetune.model_copy(update={"epochs": rounds * self.config.finetune.epochs})

    def outcome(self) -> dict[str, Any]:
        """What `run` found, as plain values for JSON."""
        return asdict(self.run())

    def run(self) -> Outcome:
        """Train, prune and retrain in rounds, with the controls; read the test images at the end."""
        plan, final = self.config.prune, self.config.prune.density
        dense = self.dense()
        sensitivity = self.sensitivity(dense)
        quality = relative_quality(dense, sensitivity, self.accuracy(dense) - plan.tolerance)
        model, rounds = dense, []
        for number in range(1, plan.rounds + 1):
            density = PruneRetrain(plan.rounds, 1).density(final, number - 1)
            factor, layers = common_factor(model, quality, density)
            zero_weights(model, layers)
            cut = self.accuracy(model)
            model = self.trained(f"round{number}", model, self.config.finetune)
            rounds.append((density, factor, cut, self.accuracy(model)))
        models = {
            "dense": self.load("dense"),
            "longer": self.trained("longer", self.load("dense"), self.for_rounds(plan.rounds)),
            "one-shot": self.one_shot("one-shot", self.load("dense"), quality, final, plan.rounds),
            "iterative": model,
        }
        validation = {name: self.accuracy(network) for name, network in models.items()}
        judge = make_judge(self.images.judges(self.seed), self.config.data)
        weights = {name: sparse_weight(model, name)[0] for name in self.layers}
        return Outcome(
            kept={name: int(weight.count_nonzero()) for name, weight in weights.items()},
            weights={name: weight.numel() for name, weight in weights.items()},
            sensitivity=sensitivity,
            quality=quality,
            rounds=rounds,
            validation=validation,
            judged={name: _digits(judge(network)) for name, network in models.items()},
        )

    def one_shot(
        self,
        name: str,
        dense: nn.Module,
        quality: Mapping[str, float],
        density: float,
        rounds: int,
        *,
        l1: bool = False,
    ) -> nn.Module:
        """Cut once, then train for as long as so many rounds."""
        zero_weights(dense, common_factor(dense, quality, density)[1])
        return self.trained(name, dense, self.for_rounds(rounds), l1=l1)

    def sensitivity(self, dense: nn.Module) -> dict[str, list[float]]:
        """Validation accuracy by layer and density, with that layer alone pruned and nothing retrained."""
        curves: dict[str, list[float]] = {}
        for name in self.layers:
            weight = sparse_weight(dense, name)[0]
            before = weight.detach().clone()
            for density in DENSITIES:
                zero_weights(dense, {name: LayerPolicy("unstructured", density)})
                curves.setdefault(name, []).append(self.accuracy(dense))
                with torch.no_grad():
                    weight.copy_(before)
        return curves

    def regularisations(self) -> dict[str, list[float]]:
        """Validation accuracy at `CURVE_DENSITIES`: L1 or L2, without and with one retraining (figure 5)."""
        curves: dict[str, list[float]] = {}
        for kind in ("L1", "L2"):
            l1 = kind == "L1"
            name = "dense-l1" if l1 else "dense"
            start = self.trained(name, self.untrained(), self.config.train, l1=l1) if l1 else self.dense()
            quality = relative_quality(
                start, self.sensitivity(start), self.accuracy(start) - self.config.prune.tolerance
            )
            for density in CURVE_DENSITIES:
                model = self.load(name)
                zero_weights(model, common_factor(model, quality, density)[1])
                curves.setdefault(f"{kind}, no retraining", []).append(self.accuracy(model))
                for again in ("L1", "L2") if l1 else ("L2",):
                    file = f"{kind}-{again}-{density:.3f}"
                    tuned = self.one_shot(file, self.load(name), quality, density, 1, l1=again == "L1")
                    label = f"{kind}, retrained with {again}"
                    curves.setdefault(label, []).append(self.accuracy(tuned))
        return curves


def relative_quality(
    dense: nn.Module, sensitivity: Mapping[str, Sequence[float]], least_accuracy: float
) -> dict[str, float]:
    """Quality parameters: each layer alone may be pruned until accuracy falls to ``least_accuracy``.

    The paper sets them by looking at the sensitivity curves; here the density at which a curve crosses the line,
    interpolated, gives the threshold, and the threshold over the standard deviation the parameter.
    """
    quality = {}
    for name, curve in sensitivity.items():
        density = crossing(curve, least_accuracy)
        weight = sparse_weight(dense, name)[0].detach()
        magnitude = weight.abs().flatten().sort(descending=True).values
        threshold = magnitude[max(1, round(density * weight.numel())) - 1]
        quality[name] = float(threshold / weight.std(correction=0))
    return quality


def crossing(curve: Sequence[float], least_accuracy: float) -> float:
    """The density below which accuracy first falls under a line, interpolated between `DENSITIES`."""
    below = next((i for i, accuracy in enumerate(curve) if accuracy < least_accuracy), None)
    if below is None or below == 0:
        return DENSITIES[-1] if below is None else DENSITIES[0]
    share = (curve[below - 1] - least_accuracy) / (curve[below - 1] - curve[below])
    return DENSITIES[below - 1] + share * (DENSITIES[below] - DENSITIES[below - 1])


def common_factor(
    model: nn.Module, quality: Mapping[str, float], density: float
) -> tuple[float, dict[str, LayerPolicy]]:
    """The factor of all quality parameters at which Han's rule leaves ``density`` of the weights, by bisection.

    Returns:
        The smallest factor found that leaves no more, and the layers' policies at it.
    """
    weights = {name: sparse_weight(model, name)[0].detach() for name in quality}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    total = sum(sizes.values())
    # No layer is left empty.
    most = {name: float(weight.abs().max() / weight.std(correction=0)) for name, weight in weights.items()}

    def layers_at(factor: float) -> dict[str, LayerPolicy]:
        return threshold_layers(model, {name: min(factor * q, 0.999 * most[name]) for name, q in quality.items()})

    def left(layers: Mapping[str, LayerPolicy]) -> int:
        return sum(round(layer.density * sizes[name]) for name, layer in layers.items())

    low, high = 0.0, 1.0
    while left(layers_at(high)) > density * total:
        low, high = high, 1.5 * high
    for _ in range(40):
        middle = (low + high) / 2
        if left(layers_at(middle)) > density * total:
            low = middle
        else:
            high = middle
    return high, layers_at(high)


def _digits(judged: Tensor) -> str:
    return "".join("1" if is_right else "0" for is_right in judged.tolist())
