import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments import subject
from experiments.config import RunConfig
from experiments.data import ImageData, normalise
from experiments.interrupt import StopFlag
from experiments.progress import RunDisplay
from experiments.subject import Subject, check_validation_is_unseen
from experiments.training import behaviour
from graph_encoder.capture import capture
from graph_encoder.copies import copied
from graph_encoder.network import NetworkGraph
from pruning import reconstruction

from .tiny import network

Configured = Callable[..., RunConfig]


def told_when_prepared(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    with RunDisplay() as display:
        subject.prepare_subject(config, torch.device("cpu"), display, StopFlag(), check=lambda _: None)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("reconstruction")]


def test_images_that_reconstruction_leaves_out_are_told(
    tiny_config: Configured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (reconstruction, subject):
        # The first layer puts out 6 maps of 8x8 values of 4 bytes.
        monkeypatch.setattr(module, "MOST_BYTES", 30 * 4 * 6 * 8 * 8)

    assert told_when_prepared(tiny_config(search__reconstruct=True), capsys) == [
        "reconstruction takes 30 of the 60 calibration images (search.calibration_images), so that no output of a "
        "layer is larger than 4.608e-05 GB, and more positions of each"
    ]
    assert told_when_prepared(tiny_config(), capsys) == []
    assert told_when_prepared(tiny_config(search__reconstruct=True, search__calibration_images=30), capsys) == []


def with_dropout() -> nn.Module:
    return nn.Sequential(*network(3, 1)[:-1], nn.Dropout(0.9), nn.Linear(12, 3))  # type: ignore[index]


def with_less_dropout() -> nn.Module:
    return nn.Sequential(*network(3, 1)[:-1], nn.Dropout(0.1), nn.Linear(12, 3))  # type: ignore[index]


class Dropped(nn.Sequential):
    """Does in forward what no layer tells of."""

    share = 0.9

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), self.share, self.training)


def dropping() -> nn.Module:
    return Dropped(*network(3, 1))


def dropping_less() -> nn.Module:
    model = dropping()
    model.share = 0.1  # type: ignore[assignment]
    return model


def forgetful() -> nn.Module:
    model = network(3, 1)
    model[1].momentum = 0.9  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    ("before", "after"),
    [(with_dropout, with_less_dropout), (dropping, dropping_less), (partial(network, 3, 1), forgetful)],
)
def test_a_network_that_trains_otherwise_is_trained_anew(
    before: Callable[[], nn.Module],
    after: Callable[[], nn.Module],
    tiny_config: Configured,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    config = tiny_config(train__epochs=1)

    def trained(model: Callable[[], nn.Module]) -> Path | None:
        monkeypatch.setattr("tests.experiments.tiny.network", lambda num_classes, in_channels: model())
        with RunDisplay(quiet=True) as display:
            found = subject.prepare_subject(config, torch.device("cpu"), display, StopFlag(), check=lambda _: None)
        return found.trained

    first = trained(before)
    assert first is not None and first.exists()
    assert trained(after) not in (first, None)
    assert trained(before) == first


class Addressed(nn.Linear):
    """Tells where in memory a part of it lies."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {object()}"


def test_behaviour_that_is_drawn_is_drawn_alike() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(x.mean((2, 3)))
            return out * 2 if self.training and random.random() < 0.5 else out

    states = random.getstate()

    assert len({behaviour(Drops(), torch.ones(1, 3, 2, 2)) for _ in range(12)}) == 1
    assert random.getstate() == states


def test_behaviour_is_that_of_the_network_and_not_of_its_place_in_memory() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), Addressed(64, 3), nn.Dropout())
    x, before = torch.randn(2, 1, 8, 8), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()

    assert behaviour(model, x) == behaviour(copied(model), x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


class Precision(nn.Module):
    """Gives every image class 0, and notes whether it was run in mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.mixed.append(torch.is_autocast_enabled("cpu"))
        return torch.eye(3)[torch.zeros(len(x), dtype=torch.long)]


@pytest.mark.usefixtures("with_bfloat16")
@pytest.mark.parametrize("autocast", [False, True])
def test_candidates_are_scored_in_the_precision_of_the_settings_and_finalists_in_full(
    autocast: bool, tiny_config: Configured
) -> None:
    config, model = tiny_config(search__autocast=autocast), Precision()
    subject = Subject(config, ImageData(config.data), model, NetworkGraph((), (), (), (), ()), torch.device("cpu"))

    subject.evaluate_on_search_images()(model)
    subject.evaluate_on_validation()(model)

    assert model.mixed == [autocast, False, False]  # 45 search images and 90 of validation, 45 at a time


class ByHeart(nn.Module):
    """Knows the training images and nothing else."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.images, self.labels = images.flatten(1), nn.functional.one_hot(labels).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.labels[torch.cdist(x.flatten(1), self.images).argmin(dim=1)]


def test_training_images_that_stand_in_for_validation_and_a_class_that_it_lacks_are_warned_about(
    tiny_config: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    data = ImageData(config.data)
    data.validation = data.train.take(torch.nonzero(data.train.labels != 2).flatten())
    model = ByHeart(normalise(data.train.images, config.data), data.train.labels)
    graph = capture(network(3, 1), torch.zeros(2, 1, 8, 8))
    capsys.readouterr()

    with RunDisplay() as display:
        subject.report_dense(subject.Subject(config, data, model, graph, torch.device("cpu")), display)

    _, seen, lacking = capsys.readouterr().err.splitlines()
    assert seen.startswith(
        "warning: the network scores 100.00% on the 160 validation images and 100.00% on 160 training"
    )
    assert lacking.startswith(
        "warning: the validation split has no image of 1 of the 3 classes of the training split ("
    )


def test_validation_as_good_as_training_is_warned_about() -> None:
    text = check_validation_is_unseen(0.998, 0.996, 1000)
    assert text is not None
    assert text.startswith(
        "the network scores 99.60% on the 1,000 validation images and 99.80% on 1,000 training images"
    )


def test_validation_clearly_below_training_is_not() -> None:
    assert check_validation_is_unseen(0.99, 0.90, 1000) is None
    # 0.90 against 0.88 on 1,000 images is z = 1.43; on 10,000 it is 4.5.
    assert check_validation_is_unseen(0.90, 0.88, 1000) is not None
    assert check_validation_is_unseen(0.90, 0.88, 10_000) is None


@pytest.mark.parametrize(
    ("train", "validation", "n_images", "is_told"),
    [
        # Pooled 67.7 %, of 600 images each: standard error 2.7 points, so that a gap of 5 would be missed in 42 %.
        (0.697, 0.657, 600, False),
        (0.697, 0.697, 600, False),
        # 10,000 images: 0.65 points.
        (0.697, 0.697, 10_000, True),
        # What was learned by heart is right on every image that was trained on, however few they are.
        (1.0, 1.0, 90, True),
    ],
)
def test_validation_is_likened_to_training_only_by_enough_images(
    train: float, validation: float, n_images: int, is_told: bool
) -> None:
    assert (check_validation_is_unseen(train, validation, n_images) is not None) == is_told
