"""Plans that need no search, as offsets of places (see `SearchSpace.places`).

Pass them to `envs.action.project`, or start a search from them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .action import rounded_down
from .space import Counts, Ratios, SearchSpace


def uniform(space: SearchSpace) -> Ratios:
    """The same keep ratio in every group and the fewest bits in every layer, shape ``(n,)``."""
    offsets = np.zeros(space.n)
    for index, decision in enumerate(space.layers, start=len(space.groups)):
        # Below every place that a shift can make of it: bits rise only by what rounding of the units leaves over.
        offsets[index] = 0.0 if decision.choice == "density" else -1.0
    return offsets


def global_magnitude(space: SearchSpace) -> Ratios:
    """Places left by one threshold on the importance of all units, each over the mean magnitude of its group.

    The division makes layers comparable: raw norms grow with the fan-in and with whatever scale a batch norm takes
    back. The threshold is the lowest at which every budget is met, the groups' least being kept. Magnitude says nothing
    of choices inside layers: they stand at the ratio that all groups have on average.

    Returns:
        Places of shape ``(n,)``.

    Raises:
        ValueError: if the space has no budget, or no channel group.
    """
    if not space.bounds:
        msg = "global magnitude needs a budget to place its threshold; build the search space with one"
        raise ValueError(msg)
    if not space.groups:
        msg = "global magnitude ranks channels, and no channel group is decided here; choose another method"
        raise ValueError(msg)
    n_groups = len(space.groups)
    importance = [space.importance[group.name] for group in space.groups]
    # Of magnitudes, as scores may have signs, and a mean about 0.
    scores = [np.sort(values / max(np.abs(values).mean(), 1e-12)) for values in importance]
    thresholds = np.unique(np.concatenate(scores))

    def ratios(threshold: float) -> Ratios:
        kept = np.array([len(s) - np.searchsorted(s, threshold) for s in scores])
        of_groups = np.maximum(kept, space.minimum[:n_groups]) / space.sizes[:n_groups]
        of_layers = np.maximum(of_groups.mean(), space.ends[0][n_groups:])
        return np.asarray(np.append(of_groups, of_layers), dtype=np.float64)

    low, high = 0, len(thresholds)
    while low < high:
        middle = (low + high) // 2
        if space.fits(space.widened(rounded_down(space.kept_at(ratios(thresholds[middle])) * space.sizes, space))):
            high = middle
        else:
            low = middle + 1
    return ratios(thresholds[low] if low < len(thresholds) else math.inf)


def sensitivity(
    space: SearchSpace, lost: NDArray[np.float64], floor: NDArray[np.float64] | float, slope: float = 0.25
) -> Ratios:
    """Keep more of the decisions whose loss hurts: ``slope * log(accuracy lost)``, less its mean.

    Bits have a mean of their own, so that on average they stand where the other decisions do, and a slope of their own:
    a bit less is an error of four times the power, so that a bit more is due to a layer that loses four times as much.

    Args:
        space: the decisions.
        lost: accuracy lost when each decision alone stands at a place of 0.3 (a group: keeps 30 % of its units), shape
            ``(n,)``, in ``[0, 1]``.
        floor: losses below this are taken as this, one for all or each its own, see `noise_floor`.
        slope: how far a factor e of lost accuracy moves the place of a group or a density. On ResNet-56 at half the
            MACs 0.25 left 81.1 to 81.7 % of the validation images right, 0.125 79.0 to 80.7 %, the uniform plan 76.8 %.

    Returns:
        Offsets of places, shape ``(n,)``.
    """
    slopes, is_bits = np.full(space.n, slope), np.zeros(space.n, dtype=np.bool_)
    for index, rungs in space.rungs_of_bits.items():
        slopes[index] = rungs[0] / (math.log(4) * _bits_a_rung(space.ladders[index]))
        is_bits[index] = True
    offsets = slopes * np.log(np.clip(lost, floor, 1))
    for kind in (is_bits & space.has_choice, ~is_bits & space.has_choice):
        if kind.any():
            offsets[kind] -= offsets[kind].mean()
    return np.asarray(offsets, dtype=np.float64)


def _bits_a_rung(ladder: Counts) -> float:
    """Bits between neighbours on a ladder: the median, which 32 above 2 to 8 does not move; infinite without any."""
    return float(np.median(np.diff(ladder))) if len(ladder) > 1 else math.inf


def count_shared(n_images: int, share: float) -> int:
    """Images in a share of ``n_images``: rounded, and at least one."""
    return max(1, round(share * n_images))


def noise_floor(accuracy: float, n_images: int) -> float:
    """The smallest loss of accuracy that so many images can tell from none.

    Half the standard error of an accuracy: dense network and candidate are scored on the same images and mostly agree,
    so their difference varies less than either. At least one image.

    Args:
        accuracy: of the dense network, in ``[0, 1]``.
        n_images: images that plans are scored on.
    """
    return max(math.sqrt(accuracy * (1 - accuracy) / n_images) / 2, 1 / n_images)
