"""A network and images small enough for a whole run in seconds, as a user would hand them over."""

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


def accuracy_within_the_limit(accuracy: float, cost: int, limit: int | None) -> float:
    """A reward that is not defined for plans over their budget."""
    if limit is not None and cost > limit:
        msg = f"{cost} is over {limit}"
        raise ValueError(msg)
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
