"""Small networks, each with a module that cannot run without values."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Item(nn.Module):
    """Scales by a number that is read out of a tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) * (1 + abs(x.mean().item()))


class Numpy(nn.Module):
    """Sorts in NumPy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        values = x.detach().cpu().numpy()
        values.sort(axis=1)
        out: Tensor = self.fc(torch.from_numpy(values))
        return out


class Branch(nn.Module):
    """One of two convolutions, by the sign of a mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 1)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) if x.mean() > 0 else self.b(x)
        return out


class Histogram(nn.Module):
    """A gate by `torch.bincount` and `torch.nonzero`, which have no kernels for shapes alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.bincount(x.sigmoid().mul(4).long().flatten(), minlength=4).float()
        positive = len(torch.nonzero(x > 0)) / x.numel()
        gate: Tensor = self.fc(counts / x.numel() + positive).sigmoid()
        return x * gate[None, :, None, None]


class Block(nn.Module):
    """A residual block with ``inner`` on its branch."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm2(self.conv2(self.inner(self.norm1(self.conv1(x)).relu())))
        return x.relu()


class ResidualWith(nn.Module):
    """Three residual blocks, the second with a module of its own on its branch, and a head that may have one too."""

    def __init__(self, inner: Callable[[int], nn.Module], head: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(
            Block(12, nn.Identity()), Block(12, nn.Sequential(inner(8))), Block(12, nn.Identity())
        )
        self.reduce = nn.Linear(12, 10)
        self.head = head(10) if head else nn.Identity()
        self.last = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).relu())
        out: Tensor = self.last(self.head(self.reduce(x.mean((2, 3)))))
        return out


OPAQUE: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "item": (lambda: ResidualWith(Item), ("blocks.1.inner.0",)),
    "numpy": (lambda: ResidualWith(nn.Identity, Numpy), ("head",)),
    "branch": (lambda: ResidualWith(Branch), ("blocks.1.inner.0",)),
    "histogram": (lambda: ResidualWith(Histogram), ("blocks.1.inner.0",)),
    "several": (lambda: ResidualWith(Item, Numpy), ("blocks.1.inner.0", "head")),
}
"""Networks by name, and the modules of each that cannot be captured."""
