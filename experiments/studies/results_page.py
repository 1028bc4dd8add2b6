"""docs/results.md out of the cells that are finished; those that are missing are named at its end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import Method
from ..machine import Machine
from ..outcome import DENSE, MethodOutcome, percent
from ..pages import Table
from ..progress import duration
from .joint_page import joint_sections, reading_of
from .matrix import JOINT_EVALUATIONS, JOINT_METHODS, METHODS_BUDGET
from .results_cells import Cells, in_points, interval, spread


def render_page(root: Path, names: Sequence[str], agent: Method) -> str:
    """The page as Markdown.

    Args:
        root: folder of their records.
        names: all cells of the matrix, finished or not.
        agent: the method that the joint searches are compared with.
    """
    cells = Cells(root, names)
    sections = [(title, text, _search_table(cells, cells.methods(table))) for table, title, text in _SEARCH_TABLES]
    sections.append((*_RECONSTRUCTED, _reconstructed_table(cells)))
    for model, text in (("resnet20", _TUNED_20), ("resnet56", _TUNED_56)):
        sections.append((f"{model} after fine-tuning", text, _tuned_table(cells, f"tuned-{model}")))
    sections.append((*_TRANSFER, _transfer_table(cells)))
    sections += joint_sections(cells)
    seeds = cells.seeds("resnet18_cifar", "methods")
    together: dict[str, list[str]] = {method: seeds for method in JOINT_METHODS}
    sections.append((*_JOINT_SEARCHES, _search_table(cells, together, reference=agent)))
    parts = [_HEAD, *_latencies(cells)]
    for title, text, tables in sections:
        parts += [f"## {title}", text, *tables] if tables else []
    parts += ["## Every cell", *_every_cell(cells)]
    return "\n\n".join(parts) + "\n"


_HEAD = """# Results on CIFAR-10

Written by `make results` from the records of finished cells in `docs/results`, with the plans found and a verdict for
each test image; do not edit. What has no finished cell has no section yet: the end of the page names what is
missing, `docs/results/2026-11-22.md` holds earlier readings, without plans, and `docs/results/2026-11-30.md` what
repairing and distilling the plans of ResNet-56 near its floor changed. Half of the multiply-adds are removed,
rounding 1, the residual streams dense (`search.protected`: layer2.0.conv2, layer3.0.conv2), where a section says
nothing else. The searches score on even-numbered files of the test folder, in bfloat16 (`search.autocast`) unless bits
are decided or it is slower; accuracies are those of the odd-numbered ones, read once when a cell was finished. The
images went through JPEG, so compare differences with published ones, not absolutes. A cell that has a record is not run
again; with `--records FOLDER --page FILE` `python -m experiments.studies.results` runs it beside them."""

_LATENCIES = """Latencies are those of settled calls in ONNX Runtime (`docs/latency.md`), read on {}. Searches up to 30
November 2026 spent times of calls made straight after another network, in which small networks are up to 1.4 times as
slow. Their plans were timed anew with `--time-again`, in networks made from them and not fine-tuned, and so was the
floor: the plans take less than their budgets allow, and a budget is a larger multiple of the floor than was asked. So
were the plans of 1 December for ResNet-56 with dense residual streams, as other programs had disturbed the clock. The
curves of ResNet-18 were all read on one processor."""

_SEARCH_TABLES = (
    (
        "resnet56",
        "ResNet-56 before fine-tuning",
        "L1 importance, batch norms re-estimated on augmented training images, plans scored on all 5,000 even-numbered "
        "files. Searching methods start from the sensitivity plan; its probes count as evaluations. Mean and standard "
        "deviation over the seeds; differences from the cross-entropy method in points, paired by seed, with 95 % "
        "intervals (Student's t). One thread; seconds were read under different load and compare no methods; the share "
        "of them outside evaluating does.",
    ),
    (
        "resnet56-layerwise",
        "ResNet-56 layer by layer",
        "The layerwise environment, for its cost: fewer evaluations, one decision a step.",
    ),
)

_JOINT_SEARCHES = (
    f"ResNet-18 at {METHODS_BUDGET}, before fine-tuning",
    f"Channels and bits, scored on 2,000 of the even-numbered files, {JOINT_EVALUATIONS} evaluations, the probes among "
    "them. The budget is kept by the table alone (`--set latency.clock=false`), so that no plan depends on how a "
    "reading came out. Mean and standard deviation over the seeds; differences from the agent in points, "
    "paired by seed, with 95 % intervals (Student's t). Latency is that of the saved files on one thread, as a share "
    "of the dense network's in single precision.",
)
_RECONSTRUCTED = (
    "ResNet-56 before fine-tuning, with least-squares reconstruction",
    """The plans that searches found without it, from the sensitivity plan, their pruned layers fitted to the dense
network's outputs and sums by least squares (AMC's method, see `pruning/reconstruction.py`) on 4,000 training images,
before batch norms are re-estimated.""",
)
_TUNED_20 = """15 epochs for each network, the dense one too: SGD with Nesterov momentum, cosine schedule, the same
batches. Differences in points, with 95 % intervals: over the seeds (pairs of runs, Student's t), and over the test
images (pairs of verdicts on the same image, averaged over the seeds, normal)."""
_TUNED_56 = """30 epochs for each network, the dense one too, whose batch norms were re-estimated before; one seed, each
network in a cell of its own, fine-tuned in bfloat16 where the processor of its cell gains by it (AMD's does, Intel's
without AMX does not), else in float32."""
_TRANSFER = (
    "A frozen agent on another network",
    """An agent trained on ResNet-20 (300 evaluations from the uniform plan, without sensitivities, seed 0), its
weights frozen, plans ResNet-56 in one forward pass with the features that cost nothing: no evaluation on ResNet-56.""",
)


def _latencies(cells: Cells) -> list[str]:
    """Where all latencies were read; nothing where none was."""
    found = [reading["processor"] for readings in cells.timed.values() for reading in readings]
    processors = {f"{processor['name']} ({processor['model']})" for processor in found}
    return [_LATENCIES.format(" and ".join(sorted(processors)))] if processors else []


def _search_table(cells: Cells, searches: Mapping[str, Sequence[str]], reference: Method = "cem") -> list[str]:
    """Methods at equal evaluations.

    Args:
        cells: the finished cells.
        searches: names of each method's cells, one a seed.
        reference: the method that the others are compared with.
    """
    own = [name for names in searches.values() for name in names]
    is_timed = any(name in cells.timed for name in own)
    heads = [
        "method",
        "test accuracy",
        f"against {reference}",
        "seeds",
        "validation",
        "evaluations",
        "seconds",
        "s an evaluation",
        "outside evaluating",
        *(["latency"] if is_timed else []),
    ]
    lines = []
    for method, names in searches.items():
        rows = cells.rows(names, method)
        if not rows:
            continue
        lines.append(
            [
                method,
                spread([row.test_accuracy for row in rows]),
                _against(cells, searches, method, reference),
                f"{len(rows)} of {len(names)}",
                spread([row.validation_accuracy for row in rows]),
                f"{statistics.mean(row.evaluations for row in rows):.4g}",
                f"{statistics.mean(row.seconds for row in rows):.1f}",
                f"{_mean_of([_each(row) for row in rows]):.2f}",
                f"{_mean_of([row.overhead for row in rows]):.1%}",
                *([_share_of_dense(cells, names, method)] if is_timed else []),
            ]
        )
    dense = cells.rows(own, DENSE)
    if dense and lines:
        head = [DENSE, percent(dense[0].test_accuracy), "-", "-", percent(dense[0].validation_accuracy)]
        lines.insert(0, [*head, *["-"] * (len(heads) - len(head))])
    if not lines:
        return []
    return [Table(heads, lines).markdown(), *(_devices(cells, own) if is_timed else [])]


def _devices(cells: Cells, names: Sequence[str]) -> list[str]:
    """Where plans were searched for and their latency was read on processors of other names."""
    tables = {cells.outcomes[name].machine.processor for name in names if name in cells.outcomes}
    read = {entry["processor"]["name"] for name in names for entry in cells.timed.get(name, [])}
    if tables == read:
        return []
    searched, where = (" and ".join(sorted(found)) for found in (tables, read))
    return [f"Searched for on {searched}, with its table; latency was read on {where}, another device."]


def _against(cells: Cells, searches: Mapping[str, Sequence[str]], method: str, reference: str) -> str:
    """Difference of test accuracies from those of the method ``reference``, seed by seed."""
    own, theirs = (_test_accuracies(cells, searches.get(name, []), name) for name in (method, reference))
    return interval([accuracy - theirs[seed] for seed, accuracy in own.items() if seed in theirs])


def _share_of_dense(cells: Cells, names: Sequence[str], method: str) -> str:
    """Measured latency of a method's networks on one thread, as a share of the dense one's."""
    readings = [reading_of(cells.timed.get(name, []), method, threads=1, run=name) for name in names]
    return spread([reading["ratio"] if reading else None for reading in readings])


def _test_accuracies(cells: Cells, names: Sequence[str], method: str) -> dict[str, float]:
    """Test accuracies of a method in the cells ``names`` by seed, those that are known."""
    done = [name for name in names if name in cells.outcomes]
    found = {name.rpartition("-seed")[2]: cells.outcomes[name].row(method).test_accuracy for name in done}
    return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}


def _tuned_table(cells: Cells, table: str) -> list[str]:
    """Networks that were fine-tuned alike; those of one seed may lie in several cells."""
    names = [name for name in cells.names if name.startswith(f"{table}-")]
    found = _tuned_rows(cells, names)
    if not found:
        return []
    lines = []
    for method in sorted(found, key=lambda method: (method != DENSE, method != "uniform")):
        rows = [row for _, row in found[method].values()]
        lines.append(
            [
                method,
                spread([row.test_accuracy for row in rows]),
                spread([row.tuned_test_accuracy for row in rows]),
                *(_paired(found, method, other) for other in ("uniform", DENSE)),
                *(_paired_by_image(cells, found, method, other) for other in ("uniform", DENSE)),
            ]
        )
    others = [f"against {other}, {over}" for over in ("seeds", "images") for other in ("uniform", DENSE)]
    heads = ["network", "before", "fine-tuned", *others]
    n_done = len(set.intersection(*(set(rows) for rows in found.values())))
    n_seeds = len({name.rpartition("-seed")[2] for name in names})
    return [f"{n_done} of {n_seeds} seeds.", Table(heads, lines).markdown()]


_TunedRows = dict[str, dict[str, tuple[str, MethodOutcome]]]
"""By method and seed: the cell, and the row in it. In a cell of the dense network alone it has a method's name."""


def _tuned_rows(cells: Cells, names: Sequence[str]) -> _TunedRows:
    found: _TunedRows = {}
    for name in names:
        if name not in cells.outcomes:
            continue
        stem, _, seed = name.rpartition("-seed")
        for row in cells.outcomes[name].rows:
            if row.tuned_test_accuracy is not None:
                method = DENSE if stem.endswith(f"-{DENSE}") else row.method
                found.setdefault(method, {})[seed] = name, row
    return found


def _pairs(found: _TunedRows, method: str, other: str) -> list[tuple[tuple[str, MethodOutcome], ...]]:
    theirs = found.get(other, {})
    return [(own, theirs[seed]) for seed, own in found[method].items() if seed in theirs]


def _paired(found: _TunedRows, method: str, other: str) -> str:
    """Difference in points from ``other``, seed by seed."""
    differences = []
    for (_, one), (_, two) in _pairs(found, method, other):
        assert one.tuned_test_accuracy is not None and two.tuned_test_accuracy is not None
        differences.append(one.tuned_test_accuracy - two.tuned_test_accuracy)
    return interval(differences)


def _paired_by_image(cells: Cells, found: _TunedRows, method: str, other: str) -> str:
    """Difference in points from ``other`` with a 95 % interval over the test images."""
    pairs = _pairs(found, method, other)
    differences = [
        cells.judged(one, own.method) - cells.judged(two, theirs.method) for (one, own), (two, theirs) in pairs
    ]
    mean = np.mean(differences, axis=0) if differences else np.zeros(0)
    if len(mean) < 2 or not mean.any():
        return "-"
    half = 1.96 * mean.std(ddof=1) / math.sqrt(len(mean))
    return in_points(float(mean.mean()), half)


def _reconstructed_table(cells: Cells) -> list[str]:
    lines = []
    for method, names in cells.methods("resnet56-reconstructed").items():
        done = [name for name in names if name in cells.applied]
        if done:
            plain = cells.rows([name.replace("-reconstructed", "") for name in done], method)
            with_it = spread([cells.applied[name]["accuracy"] for name in done])
            lines.append(
                [method, with_it, spread([row.test_accuracy for row in plain]), f"{len(done)} of {len(names)}"]
            )
    heads = ["method", "test accuracy", "without reconstruction", "seeds"]
    return [Table(heads, lines).markdown()] if lines else []


def _transfer_table(cells: Cells) -> list[str]:
    heads = ["plan", "accuracy (even files)", "multiply-adds"]
    lines = [
        [plan, percent(facts[f"{key}accuracy"]), f"{facts[f'{key}macs']:,}"]
        for name, facts in cells.applied.items()
        if name.startswith("transfer-")
        for plan, key in (("dense", "dense_"), ("uniform", "uniform_"), ("agent", ""))
    ]
    return [Table(heads, lines).markdown()] if lines else []


def _every_cell(cells: Cells) -> list[str]:
    heads = ["cell", "seed", "date", "commit", "processor", "threads", "command"]
    lines = []
    for name in cells.names:
        command = f"`python -m experiments.studies.results --only {name}`"
        if name in cells.outcomes:
            outcome = cells.outcomes[name]
            lines.append([name, str(outcome.seed), *_where(outcome.machine), command])
        elif name in cells.applied:
            machine = Machine.model_validate(cells.applied[name]["machine"])
            lines.append([name, "-", *_where(machine), command])
    # A search that another cell took over has the same seconds there, to the last digit.
    total = math.fsum({row.seconds for outcome in cells.outcomes.values() for row in outcome.rows})
    missing = [name for name in cells.names if name not in cells.outcomes and name not in cells.applied]
    table = Table(heads, lines, words=("date", "commit", "processor", "command")).markdown()
    return [
        *([table, f"Searching took {duration(total)} in all."] if lines else []),
        f"Not run, {len(missing)} of {len(cells.names)} cells: {_by_seed(missing)}.",
    ]


def _by_seed(names: Sequence[str]) -> str:
    """Names of cells, those that differ by their seed together."""
    seeds: dict[str, list[str]] = {}
    for name in names:
        stem, _, seed = name.partition("-seed")
        seeds.setdefault(stem, []).extend([seed] if seed else [])
    texts = [f"{stem} (seed {', '.join(own)})" if own else stem for stem, own in seeds.items()]
    return ", ".join(texts) or "none"


def _where(machine: Machine) -> list[str]:
    return [machine.date, machine.commit, machine.processor, str(machine.threads)]


def _each(row: MethodOutcome) -> float | None:
    return row.seconds_evaluating / row.evaluations if row.evaluations else None


def _mean_of(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else math.nan
