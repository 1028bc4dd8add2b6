"""A network and images small enough for a whole run in seconds, as a user would hand them over."""

import signal

import torch
from torch import Tensor, nn

SIDE = 8
CLASSES = 3


def network(num_classes: int, in_channels: int) -> nn.Module:
    """Four convolutions, three of them prunable by default."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


def deeper_network(num_classes: int, in_channels: int) -> nn.Module:
    """`network` with another convolution before its last one, so that its plans do not fit."""
    layers = [*network(num_classes, in_channels)]
    extra = [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers[:9], *extra, *layers[9:])


class ScaledByWidth(nn.Module):
    """Divides by a width that a run on shapes alone does not show, so that the proof refutes its first group."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(in_channels, 8, 1, bias=False), nn.Conv2d(8, 6, 1, bias=False)
        self.last = nn.Linear(6, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        out: Tensor = self.last((self.second(y) / y.new_tensor(float(y.shape[1]))).relu().mean((2, 3)))
        return out


def accuracy_within_the_limit(accuracy: float, cost: int, limit: int | None) -> float:
    """A reward that is not defined for plans over their budget."""
    if limit is not None and cost > limit:
        msg = f"{cost} is over {limit}"
        raise ValueError(msg)
    return accuracy


_interrupted: list[float] = []


def reward_that_is_interrupted(accuracy: float, cost: int, limit: int | None) -> float:
    """The accuracy; the first time somebody presses Ctrl-C meanwhile."""
    if not _interrupted:
        _interrupted.append(accuracy)
        signal.raise_signal(signal.SIGINT)
    return accuracy


def images() -> dict[str, tuple[Tensor, Tensor]]:
    """Noise with a bright stripe whose direction is the class: 240 images to train on, 90 and 90 others."""
    return {
        name: _split(n, seed) for seed, (name, n) in enumerate({"train": 240, "validation": 90, "test": 90}.items())
    }


def images_without_test() -> dict[str, tuple[Tensor, Tensor]]:
    """`images` but for the test split."""
    return {name: split for name, split in images().items() if name != "test"}


def _split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    pixels = torch.randint(0, 170, (n, 1, SIDE, SIDE), generator=generator)
    places = torch.randint(0, SIDE, (n,), generator=generator)
    for i, (label, place) in enumerate(zip(labels.tolist(), places.tolist(), strict=True)):
        if label == 0:
            pixels[i, 0, place, :] += 85
        elif label == 1:
            pixels[i, 0, :, place] += 85
    return pixels.to(torch.uint8), labels
