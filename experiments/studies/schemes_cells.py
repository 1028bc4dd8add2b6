"""The networks of `experiments.studies.schemes`: each a scheme at one strength, with one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """One network: how it is made smaller, and the seed of its fine-tuning.

    Attributes:
        model: name of the dense network.
        scheme: name of the curve that it is a point of.
        macs: share of the multiply-adds that stay when channels go.
        pattern: of the zeros, ``"dense"`` for none.
        density: share of the weights that stay.
        rounding: channels that groups keep a multiple of, so that blocks divide what is left.
        seed: of batches and training.
    """

    model: str
    scheme: str
    macs: float = 1.0
    pattern: str = "dense"
    density: float = 1.0
    rounding: int = 1
    seed: int = 0

    @property
    def strength(self) -> str:
        """How much stays, in words."""
        parts = [f"{self.macs:.0%} of the multiply-adds"] if self.macs < 1 else []
        parts += [f"{self.density:.0%} of the weights"] if self.density < 1 else []
        return " and ".join(parts) or "everything"

    @property
    def folder(self) -> Path:
        """Where it is kept, below the root."""
        scheme = self.scheme.replace(" + ", "-and-")
        return Path(self.model) / f"{scheme}-{100 * self.macs:.0f}-{100 * self.density:.0f}-seed{self.seed}"


def matrix(n_seeds: int = 1) -> Iterator[Cell]:
    """All cells, a whole set of curves first."""
    for seed in range(n_seeds):
        for model, channels, weights, blocks in (
            ("resnet20", (0.7, 0.4, 0.2), (0.5, 0.2, 0.05), (0.5, 0.25, 0.1)),
            ("resnet56", (0.5, 0.25), (0.3, 0.1), (0.4, 0.15)),
        ):
            yield Cell(model, "dense", seed=seed)
            for share in channels:
                yield Cell(model, "channels", macs=share, seed=seed)
            for density in weights:
                yield Cell(model, "unstructured", pattern="unstructured", density=density, seed=seed)
            for pattern in ("block8", "block16") if model == "resnet20" else ("block16",):
                for density in blocks:
                    yield Cell(model, pattern, pattern=pattern, density=density, seed=seed)
            if model == "resnet20":
                yield Cell(model, "channels + block8", 0.5, "block8", 0.4, rounding=8, seed=seed)
