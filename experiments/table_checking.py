"""`secateur latency check`: how well a latency table predicts whole networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latency.device import TableError, pace_of
from latency.table import LatencyTable

from .progress import Say
from .rank_correlation import spearman
from .timed_network import TimedNetwork
from .timing_device import Remote, device_for
from .whole_networks import plan_ratios


@dataclass(frozen=True)
class CheckedTable:
    """Predicted and measured times of random plans of one network.

    Attributes:
        model: name of the network.
        shape: of one image.
        table: what predicted.
        seed: of the plans.
        integers: whether layers have random bits.
        predicted_ms: shape ``(plans,)``.
        measured_ms: times over the reference layer's in the same rounds, in milliseconds of the table's reference
            layer; shape ``(plans,)``.
    """

    model: str
    shape: tuple[int, ...]
    table: LatencyTable
    seed: int
    integers: bool
    predicted_ms: NDArray[np.float64]
    measured_ms: NDArray[np.float64]

    @property
    def errors(self) -> NDArray[np.float64]:
        """Predicted over measured, less 1."""
        found: NDArray[np.float64] = self.predicted_ms / self.measured_ms - 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        absolute = np.abs(self.errors)
        return {
            "model": self.model,
            "device": str(self.table.fingerprint),
            "policies": len(self.errors),
            "seed": self.seed,
            "integers": self.integers,
            "fastest_ms": round(float(self.measured_ms.min()), 3),
            "slowest_ms": round(float(self.measured_ms.max()), 3),
            "median_absolute_error": round(float(np.median(absolute)), 4),
            "upper_quartile_of_error": round(float(np.percentile(absolute, 75)), 4),
            "largest_error": round(float(absolute.max()), 4),
            # None where all plans are alike to the table: there is no order to compare.
            "spearman": None if math.isnan(rank := spearman(self.predicted_ms, self.measured_ms)) else round(rank, 4),
        }


def check_table(
    path: Path,
    model: str,
    *,
    shape: str | None = None,
    n_classes: int = 10,
    rounding: int | None = None,
    n_policies: int = 50,
    seed: int = 0,
    integers: bool = False,
    remote: Remote | None = None,
    say: Say = lambda text: None,
) -> CheckedTable:
    """Time whole networks of random plans, and compare with what the table predicts.

    With ``integers``, layers have 8 bits too, by turns all of them, in runs, and each by itself.

    Raises:
        TableError: if the table cannot be read, is of another device, or lacks layers of the network.
    """
    table = LatencyTable.load(path)
    asked = table.fingerprint
    device = device_for(asked.runtime, asked.threads, remote, asked.cpus)
    asked.check(device.fingerprint)
    network = TimedNetwork.build(model, shape, n_classes, rounding)
    predicts = network.cost(table, integers=integers)
    found = predicts.calibration
    if not found.n_networks or (integers and not found.n_mixed):
        option = " with --integers" if integers else ""
        msg = (
            f"the table '{path}' is not calibrated for '{model}' with these inputs; build it for this network first"
            f"{option}"
        )
        raise TableError(msg)
    # Seed 0 is the calibration's: no network is to be predicted from itself.
    plans = network.plans(n_policies, seed + 1)
    if integers:
        plans = [network.mixed(plan, 3, n_policies * seed + at)[at % 3] for at, plan in enumerate(plans)]
    predicted = [predicts([plan[name] for name in predicts.names]) for plan in plans]
    pace = pace_of(device, table.reference_ns)
    measured = plan_ratios(device, network, plans, pace, say) * table.reference_ns
    if pace.warning:
        say(pace.warning)
    image = tuple(network.example.shape[1:])
    checked = CheckedTable(model, image, table, seed, integers, np.array(predicted) / 1e6, measured / 1e6)
    within = np.percentile(np.abs(checked.errors), [50, 75])
    say(
        f"half of the plans are predicted within {within[0]:.1%} of their time, three quarters within "
        f"{within[1]:.1%}; what a search finds is measured too, and made smaller where the table asked too little"
    )
    if found.n_mixed and not integers:
        say("the table knows layers of 8 bits as well; --integers checks it with those")
    return checked
