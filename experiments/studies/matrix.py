"""The cells of docs/results.md: what is run, in order of worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import Method

EVALUATIONS = 300
LAYERWISE_EVALUATIONS = 60
SEARCHERS: tuple[Method, ...] = ("ppo", "ddpg", "cem", "random")
SHORTCUT_GROUPS = ["layer2.0.conv2", "layer3.0.conv2"]
"""Left dense beside the first layer, so that what is decided is the inner channels of the blocks, as in the papers."""
JOINT_EVALUATIONS = 150
METHODS_BUDGET = "10% latency"
JOINT_METHODS: tuple[Method, ...] = ("uniform", "greedy", "knapsack", "random", "cem", "ppo", "ddpg")
DECIDED = {"channels": ["channels"], "bits": ["bits"], "both": ["channels", "bits"]}
CURVE_SHARES = {"channels": (20, 30, 50), "bits": (30,), "both": (14, 20, 30)}
"""Latencies asked for in the curves of ResNet-18, in percent of the dense network's in single precision, of which 8
bits in every layer but the last leave about 25. Bits alone are that one plan under any budget that it keeps."""
CURVE_EPOCHS = 1
"""Epochs of fine-tuning of each point of a curve."""
SAME_MACS = {"macs": "50% macs", "macs-and-latency": "50% macs, 75% latency"}
"""Budgets of channels alone: found for multiply-adds, and for latency at as many of them. Plans of half of the
multiply-adds take 78 to 83 % of the latency in calls that have not settled, and 75 % is the least at which that many
can stay."""


@dataclass(frozen=True)
class JointCell:
    """A cell of channels and bits under a budget of latency; plans are fine-tuned without bits, then calibrated.

    Attributes:
        name: of its folder.
        model: the network.
        asked: a budget, or a multiple of what the fastest network takes that may be chosen, where many thin layers soon
            leave nothing to save.
        epochs: of fine-tuning.
        protected: channel groups left dense.
        reconstruct: plans are repaired by least squares before they are scored and fine-tuned: near the floor they
            score so little without that searches can hardly tell them apart.
    """

    name: str
    model: str
    asked: str | float
    epochs: int
    protected: tuple[str, ...] = ()
    reconstruct: bool = False


JOINT = (
    JointCell("resnet18_cifar-joint", "resnet18_cifar", METHODS_BUDGET, epochs=4),
    JointCell("resnet56-joint", "resnet56", 1.1, epochs=4, reconstruct=True),
    JointCell("resnet56-inner-joint", "resnet56", 1.1, epochs=4, protected=tuple(SHORTCUT_GROUPS)),
    # Its epochs take longest by far, and its weights are trained beforehand.
    JointCell("mobilenet_v2_cifar-joint", "mobilenet_v2_cifar", "35% latency", epochs=2),
)


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Attributes:
        name: of its folder.
        options: dotted configuration keys that set it apart.
        agent: name of the cell whose trained agent is applied, frozen, in place of a search.
        plan: name of the cell whose plan is applied in place of a search, with least-squares reconstruction, and the
            method that found it. Nothing is chosen there, so it is scored on the test images at once.
        searched: name of the cell that searched the same, whose plans are taken in place of another search.
        is_timed: its budget is one of latency, or what it saves is compared by latency: the networks are timed in a
            process of their own when it is finished.
        beside: name of the cell whose networks are timed in the same rounds.
        above_floor: its budget of latency as a multiple of what the fastest network takes that may be chosen, on the
            clock; 0 if the options say it.
    """

    name: str
    options: dict[str, Any]
    agent: str = ""
    plan: tuple[str, Method] | None = None
    searched: str = ""
    is_timed: bool = False
    beside: str = ""
    above_floor: float = 0.0


def matrix(agent: Method) -> Iterator[Cell]:
    """All cells, the most telling first.

    Args:
        agent: the method whose plans are fine-tuned and which is carried to another network.
    """
    yield from _searches("resnet56", seed=0)
    yield _tuned("resnet20", ["uniform", agent], epochs=15, seed=0)
    teaching = {"model.name": "resnet20", "search.methods": [agent], "search.for_transfer": True}
    teacher = Cell("transfer-resnet20", teaching)
    yield teacher
    yield Cell("transfer-resnet56", {"model.name": "resnet56"}, agent=teacher.name)
    yield from _searches("resnet56", seed=1)
    yield from _searches("resnet56", seed=2)
    for seed in range(1, 5):
        yield _tuned("resnet20", ["uniform", agent], epochs=15, seed=seed)
    for seed in range(3):
        for method in (*SEARCHERS[:3], "sensitivity", "uniform"):
            yield _reconstructed("resnet56", method, seed)
    for method in ("ppo", "ddpg"):
        layerwise = {"search.environment": "layerwise", "search.evaluations": LAYERWISE_EVALUATIONS}
        yield _search("resnet56-layerwise", method, 0, layerwise)
    yield from _tuned_apart("resnet56", ["uniform", agent], epochs=30, seed=0)
    yield from joint(agent)


def joint(agent: Method) -> Iterator[Cell]:
    """The cells of channels and bits under a budget of latency.

    Args:
        agent: the method whose plans are fine-tuned.
    """
    chosen: tuple[Method, ...] = ("uniform", "knapsack", agent)
    for own in JOINT:
        above_floor = own.asked if isinstance(own.asked, float) else 0.0
        options: dict[str, Any] = {
            "budget": "100% latency" if above_floor else own.asked,
            "search.reconstruct": own.reconstruct,
            "search.protected": list(own.protected),
            "finetune.epochs": own.epochs,
            "finetune.quantized_epochs": 0,
            "finetune.dense_control": True,
        }
        yield replace(_timed(own.name, own.model, chosen, options), above_floor=above_floor)
    for what, decided in DECIDED.items():
        for share in CURVE_SHARES[what]:
            tuning: dict[str, Any] = {"finetune.epochs": CURVE_EPOCHS, "finetune.quantized_epochs": 0}
            point: dict[str, Any] = {"budget": f"{share}% latency", "search.decide": decided} | tuning
            yield _timed(f"resnet18_cifar-curve-{what}-{share}", "resnet18_cifar", [agent], point)
    same = {"search.decide": DECIDED["channels"], "search.rounding": 1, "search.protected": SHORTCUT_GROUPS}
    first = f"resnet56-{next(iter(SAME_MACS))}"
    for name, budget in SAME_MACS.items():
        cell = _timed(f"resnet56-{name}", "resnet56", [agent], same | {"budget": budget})
        yield cell if cell.name == first else replace(cell, beside=first)
    for seed in range(3):
        # By the table alone: with the clock limits and plans would follow from how much that errs.
        searched = {"budget": METHODS_BUDGET, "search.seed": seed, "latency.clock": False}
        yield _timed(f"resnet18_cifar-methods-seed{seed}", "resnet18_cifar", JOINT_METHODS, searched)


def _searches(model: str, seed: int) -> Iterator[Cell]:
    for method in ("uniform", "sensitivity", "magnitude", *SEARCHERS):
        yield _search(model, method, seed, {})


def _search(table: str, method: str, seed: int, options: dict[str, Any]) -> Cell:
    own = {"model.name": table.partition("-")[0], "search.methods": [method], "search.seed": seed, "finetune.epochs": 0}
    return Cell(f"{table}-{method}-seed{seed}", own | options)


def _reconstructed(model: str, method: Method, seed: int) -> Cell:
    # Nothing is searched, so that images cost little: least squares gains by each.
    options = {"model.name": model, "search.reconstruct": True, "search.calibration_images": 4000, "search.seed": seed}
    return Cell(f"{model}-reconstructed-{method}-seed{seed}", options, plan=(f"{model}-{method}-seed{seed}", method))


def _tuned(model: str, methods: Sequence[Method], epochs: int, seed: int) -> Cell:
    own = {"model.name": model, "search.methods": list(methods), "search.seed": seed}
    tuning = {"finetune.epochs": epochs, "finetune.autocast": True, "finetune.dense_control": True}
    return Cell(f"tuned-{model}-seed{seed}", own | tuning)


def _tuned_apart(model: str, methods: Sequence[Method], epochs: int, seed: int) -> Iterator[Cell]:
    """The same, a cell for each network, so that each ends within one sitting; what was searched is not again."""
    for method in methods:
        whole = _tuned(model, [method], epochs, seed)
        yield replace(
            whole,
            name=f"tuned-{model}-{method}-seed{seed}",
            options=whole.options | {"finetune.dense_control": False},
            searched=f"{model}-{method}-seed{seed}",
        )
    # Of everything that is allowed uniform pruning removes nothing: the dense control.
    control = _tuned(model, ["uniform"], epochs, seed)
    options = control.options | {"budget": "100%", "finetune.dense_control": False}
    yield replace(control, name=f"tuned-{model}-dense-seed{seed}", options=options)


def _timed(name: str, model: str, methods: Sequence[Method], options: dict[str, Any]) -> Cell:
    """A search of channels and bits, unless ``options`` say otherwise."""
    own = {
        "model.name": model,
        "search.methods": list(methods),
        "search.decide": DECIDED["both"],
        "search.evaluations": JOINT_EVALUATIONS,
        "search.search_images": 2000,
        "search.calibration_images": 500,
        "search.protected": [],
        "search.rounding": 8,
        "finetune.autocast": True,
        "finetune.dense_control": False,
    }
    return Cell(name, own | options, is_timed=True)
