"""Ranges of quantized values: which part of what was seen the grid should span."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graph_encoder.errors import SecateurError

RangeMethod = Literal["minmax", "percentile", "entropy", "mse", "lsq"]
"""How a range is chosen: everything seen; all but the rarest values; the least Kullback-Leibler divergence of the
histogram; the least squared error; or the first step size of "Learned Step Size Quantization", for training."""

N_BINS = 2048
PERCENTILE = 99.99
"""Share, in percent, of the values other than zero that the percentile method keeps at either end of the range."""
N_SHRINKS = 100
_PART = 2**16
_TINY = 1e-12


class CalibrationError(SecateurError, ValueError):
    """Ranges that cannot be chosen: nothing was seen, or something that is no number."""


def nothing_seen(place: str) -> str:
    """What is wrong with a layer that calibration cannot see."""
    return (
        f"calibration saw nothing of {place}: it did not run as a module of its own on the calibration batches; leave "
        "the layer out of the policy"
    )


@dataclass(frozen=True)
class Grid:
    """Evenly spaced values ``step * (i - zero_point)`` for integers ``i`` from 0 to ``levels - 1``.

    Attributes:
        step: distance of neighbours.
        zero_point: integer that stands for zero, so that zero (a padded pixel) is met exactly.
        levels: number of values.
    """

    step: float
    zero_point: int
    levels: int

    @staticmethod
    def spanning(lowest: float, highest: float, levels: int) -> Grid:
        """The grid from ``lowest`` (at most 0) to ``highest`` (at least 0), moved by less than a step to meet zero."""
        step = max((highest - lowest) / (levels - 1), _TINY)
        return Grid(step, round(min(max(-lowest / step, 0), levels - 1)), levels)

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Index of the nearest value of the grid, beyond its ends that of the end."""
        return np.clip(np.round(values / self.step) + self.zero_point, 0, self.levels - 1)

    def values(self, indices: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the grid at ``indices``."""
        return (indices - self.zero_point) * self.step


class Observer:
    """Extremes of the values seen, then, in a second pass over the same batches, their histogram.

    Attributes:
        place: whose values these are, for messages.
        lowest: smallest value seen, at most 0.
        highest: largest value seen, at least 0.
        histogram: float64 of shape ``(N_BINS,)``, counts between the two; empty during the first pass. Exact zeros are
            not in it: they lie on every grid, and the many that a ReLU makes would outweigh everything else.
        zeros: count of these.
        batches: batches of the first pass.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.lowest, self.highest = 0.0, 0.0
        self.histogram = np.zeros(N_BINS)
        self.zeros = 0
        self.batches = 0
        self._counts = False

    def count_from_now_on(self) -> None:
        """Begin the second pass."""
        self._counts = True

    def see(self, values: Tensor) -> None:
        """Take in the values of one batch.

        Raises:
            CalibrationError: if one is not finite.
        """
        values = _as_it_lies(values.detach()).float()
        if not values.numel():  # what a layer reads of no image at all
            return
        if self._counts:
            self._count(values)
            return
        lowest, highest = (float(end) for end in values.aminmax())
        self.batches += 1
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            wrong = int((~torch.isfinite(values)).sum())
            msg = (
                f"calibration met {wrong} values that are NaN or infinite in {self.place} (batch {self.batches}); "
                f"check the calibration images and the weights"
            )
            raise CalibrationError(msg)
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)

    def grid(self, levels: int, method: RangeMethod) -> Grid:
        """The grid of so many levels that ``method`` chooses for what was seen.

        Raises:
            CalibrationError: if nothing was seen.
        """
        if not self.batches:
            raise CalibrationError(nothing_seen(self.place))
        if method == "minmax" or not self.histogram.any():
            return Grid.spanning(self.lowest, self.highest, levels)
        if method == "percentile":
            return Grid.spanning(*self._percentiles(), levels)
        if method == "lsq":
            return self._learned_step(levels)
        return self._search(levels, self._divergence if method == "entropy" else self._squared_error)

    def _count(self, values: Tensor) -> None:
        # In parts that stay in the cache, and not by torch.histc and count_nonzero: twice as fast, and in less memory.
        counts = torch.zeros(N_BINS, dtype=torch.int64, device=values.device)
        zeros = torch.zeros_like(counts[0])
        for part in values.flatten().split(_PART):
            zeros += (part == 0).sum()
            counts += torch.bincount(self._bins(part), minlength=N_BINS)
        self.zeros += int(zeros)
        counts[self._bins(values.new_zeros(1))] -= zeros
        if self.highest > self.lowest:
            self.histogram += counts.cpu().numpy()

    def _bins(self, values: Tensor) -> Tensor:
        width = max((self.highest - self.lowest) / N_BINS, _TINY)
        return (values - self.lowest).div_(width).to(torch.int32).clamp_(0, N_BINS - 1)

    @property
    def _centers(self) -> NDArray[np.float64]:
        edges = np.linspace(self.lowest, self.highest, N_BINS + 1)
        return (edges[:-1] + edges[1:]) / 2

    def _percentiles(self) -> tuple[float, float]:
        share = np.cumsum(self.histogram) / self.histogram.sum()
        edges = np.linspace(self.lowest, self.highest, N_BINS + 1)
        cut = 1 - PERCENTILE / 100
        lowest = edges[int(np.searchsorted(share, cut))]
        highest = edges[min(int(np.searchsorted(share, 1 - cut)) + 1, N_BINS)]
        return min(float(lowest), 0.0), max(float(highest), 0.0)

    def _learned_step(self, levels: int) -> Grid:
        """Twice the mean magnitude over the root of the largest level (Esser et al. 2020, section 2.1)."""
        mean = float((self.histogram * np.abs(self._centers)).sum() / (self.histogram.sum() + self.zeros))
        zero_point = Grid.spanning(self.lowest, self.highest, levels).zero_point
        return Grid(max(2 * mean / math.sqrt(max(levels - 1 - zero_point, 1)), _TINY), zero_point, levels)

    def _search(self, levels: int, cost: Callable[[Grid], float]) -> Grid:
        """The cheapest grid when first the upper end of the range shrinks towards zero, then the lower one."""
        shrinks = np.arange(1, N_SHRINKS + 1) / N_SHRINKS
        upper = [Grid.spanning(self.lowest, self.highest * shrink, levels) for shrink in shrinks]
        highest = self.highest * float(shrinks[_last_least([cost(grid) for grid in upper])])
        lower = [Grid.spanning(self.lowest * shrink, highest, levels) for shrink in shrinks]
        return lower[_last_least([cost(grid) for grid in lower])]

    def _squared_error(self, grid: Grid) -> float:
        centers = self._centers
        error = grid.values(grid.nearest(centers)) - centers
        return float((self.histogram * error**2).sum())

    def _divergence(self, grid: Grid) -> float:
        """Divergence of the histogram, its ends gathered in, from what is left of it on the grid.

        Each level spreads its counts evenly over the bins it stands for that are not empty, as in Migacz, "8-bit
        inference with TensorRT" (2017), here for a range with two ends.
        """
        centers, counts = self._centers, self.histogram
        first, last = grid.values(np.array([0.0, grid.levels - 1.0]))
        inside = (centers >= first - grid.step / 2) & (centers <= last + grid.step / 2)
        if not counts[inside].any():
            return math.inf
        reference = counts[inside].copy()
        reference[0] += counts[centers < first - grid.step / 2].sum()
        reference[-1] += counts[centers > last + grid.step / 2].sum()
        level = grid.nearest(centers[inside]).astype(np.int64)
        held = counts[inside]
        mass = np.bincount(level, held, grid.levels)
        filled = np.bincount(level, held > 0, grid.levels)
        spread = np.where(held > 0, (mass / np.maximum(filled, 1))[level], 0.0)
        p, q = reference / reference.sum(), spread / spread.sum()
        # A bin that only the gathered end fills would cost infinity: as much as an empty one may weigh.
        q = np.maximum(q, 1e-9)
        return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def _as_it_lies(values: Tensor) -> Tensor:
    """The same values in the order of memory, where they lie with channels last: twice as fast to read."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1)
    return values


def _last_least(costs: list[float]) -> int:
    """Position of the smallest cost; of equal ones the last, which shrinks the range least."""
    return len(costs) - 1 - int(np.argmin(costs[::-1]))


def weight_steps(weight: Tensor, bits: int, method: RangeMethod) -> Tensor:
    """Step sizes of a symmetric grid for each output channel.

    Args:
        weight: of shape ``(out, ...)``.
        bits: 1 to 8; the grid has the levels ``-n`` to ``n`` with ``n = 2 ** (bits - 1) - 1``, and 1 bit has one
            magnitude: the mean of the weights that are not zero (Rastegari et al., "XNOR-Net", 2016, section 3.1).
        method: ``"minmax"``, ``"mse"`` or ``"lsq"``.

    Returns:
        Float32 of shape ``(out, 1, ...)``, above 0.

    Raises:
        CalibrationError: if a weight is not finite, or the method is none for weights.
    """
    if method not in ("minmax", "mse", "lsq"):
        msg = f"weights have no calibration method '{method}'; pass minmax, mse or lsq"
        raise CalibrationError(msg)
    if not torch.isfinite(weight).all():
        msg = f"{int((~torch.isfinite(weight)).sum())} weights are NaN or infinite; load or train them again"
        raise CalibrationError(msg)
    rows = weight.detach().float().flatten(1)
    shape = (len(weight), *[1] * (weight.dim() - 1))
    if bits == 1:
        steps = rows.abs().sum(1) / (rows != 0).sum(1).clamp(min=1)
        signs: Tensor = steps.clamp(min=_TINY).view(shape)
        return signs
    top = 2 ** (bits - 1) - 1
    whole: Tensor
    if method == "lsq":
        whole = 2 * rows.abs().mean(1) / math.sqrt(top)
        return whole.clamp(min=_TINY).view(shape)
    whole = (rows.abs().amax(1) / top).clamp(min=_TINY)
    if method == "minmax":
        return whole.view(shape)
    return _least_squares_steps(rows, whole, top).view(shape)


def _least_squares_steps(rows: Tensor, whole: Tensor, top: int, n_shrinks: int = 40) -> Tensor:
    """Of step sizes between a fifth of ``whole`` and all of it, those of the least squared error, row by row."""
    best, least = whole.clone(), torch.full_like(whole, math.inf)
    for shrink in torch.linspace(1, 0.2, n_shrinks).tolist():
        steps = (whole * shrink)[:, None]
        error = (rows / steps).round_().clamp_(-top, top).mul_(steps).sub_(rows).square_().sum(1)
        better = error < least
        best[better], least[better] = steps[better, 0], error[better]
    return best


def shared_values(weight: Tensor, n_values: int, n_rounds: int = 30) -> tuple[Tensor, Tensor]:
    """Cluster the weights that are not zero around shared values, by Lloyd's k-means from evenly spaced ones.

    Args:
        weight: of any shape; zeros stay zeros and belong to no cluster.
        n_values: shared values.
        n_rounds: rounds at most; it ends where no weight changes its value.

    Returns:
        The values, float32 ``(n_values,)`` ascending, and for each weight the index of its own, uint8.

    Source: Han et al., "Deep Compression" (2016), section 3.
    """
    flat = weight.detach().float().flatten()
    kept = flat[flat != 0].double()
    if not len(kept):
        return torch.zeros(n_values), torch.zeros(weight.shape, dtype=torch.uint8)
    values = torch.linspace(float(kept.min()), float(kept.max()), n_values, dtype=torch.float64)
    for _ in range(n_rounds):
        cluster = _nearest(kept, values)
        counts = torch.bincount(cluster, minlength=n_values)
        means = torch.bincount(cluster, kept, minlength=n_values) / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, values)
        if torch.equal(moved, values):
            break
        values = moved
    # The exact borders hold for the values as they are kept, in single precision.
    values = values.float()
    return values, _nearest(flat, values).to(torch.uint8).view(weight.shape)


def _nearest(points: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of ascending ``values``."""
    return torch.bucketize(points, (values[:-1] + values[1:]) / 2)
