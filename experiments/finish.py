"""The end of a run: fine-tune every method's plan alike, measure, read the test split once, report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from envs.journal import ClockReading, Journal
from graph_encoder.copies import copied
from latency.cost import count_nonzero, predict_cost
from pruning.export import load_unique, unique_tensors
from pruning.files import write_atomic
from pruning.policy import CompressionPolicy
from pruning.quantize import calibrate

from .clock import TableDevice
from .config import RunConfig
from .exported_files import ONNX_NAME, save_network
from .figures import Plan
from .images import MissingSplitError
from .interrupt import StopFlag
from .machine import describe_machine
from .measured_budget import PlanClock, kept_by_the_clock
from .methods import MethodSearch, other_finalists
from .outcome import DENSE, Allowance, MethodOutcome, RunOutcome, budget_words
from .problem import SearchProblem
from .progress import RunDisplay
from .report import render_report
from .run import MethodFolder, RunFolder, reading
from .scalars import log_final_metrics
from .subject import Subject, near_chance
from .training import tune
from .turns import FinishedNetwork, time_in_turn

NOTICED = 0.01
"""Share of the validation images that fine-tuning may lose without a word."""


@dataclass(frozen=True)
class Finalist:
    """One network of the table.

    Attributes:
        name: ``dense`` or the method.
        policy: what is kept; empty for the dense network.
        network: as scored: built, repaired, not fine-tuned.
        tuned: fine-tuned, None without fine-tuning.
        search: how it was found, None for the dense network.
        readings: what the clock said of the plan that was found, and of each that followed under a latency budget.
    """

    name: str
    policy: CompressionPolicy
    network: nn.Module
    tuned: nn.Module | None
    search: MethodSearch | None
    readings: tuple[ClockReading, ...] = ()

    @property
    def product(self) -> nn.Module:
        """The network that a user takes away."""
        return self.network if self.tuned is None else self.tuned


def finish_run(
    folder: RunFolder,
    subject: Subject,
    problem: SearchProblem,
    searched: SearchProblem,
    searches: Sequence[MethodSearch],
    device: TableDevice,
    clock: PlanClock | None,
    display: RunDisplay,
    stop: StopFlag,
) -> RunOutcome:
    """Carry a run whose searches are done to its results and its report.

    Args:
        folder: of the run.
        subject: the dense network and its images.
        problem: what was asked for.
        searched: the same with the budgets that searches spent.
        searches: what each method found.
        device: of the latency table.
        clock: that a budget of latency is kept by, if there is one.
        display: told what happens.
        stop: looked at after every epoch and network.
    """
    finalists = _finalists(folder, subject, problem, searched, searches, clock, display, stop)
    _save_products(folder, subject, finalists, display, stop)
    rows = []
    for finalist in finalists:
        stop.check()
        rows.append(_row(folder, subject, problem, finalist))
    doubts = _doubts(rows, subject.chance)
    for doubt in doubts:
        # Of these rows, and of none that a run went on from with another recipe.
        display.say(f"warning: {doubt}", is_kept=False)
    rows = _with_latencies(folder, rows, finalists, subject, device, display)
    rows, n_test = _with_test_accuracy(folder, rows, finalists, subject, display)
    outcome = _outcome(folder, subject, problem, searched, rows, device, n_test, doubts)
    _log_metrics(folder, subject.config, outcome)
    write_atomic(folder.results_file, outcome.model_dump_json(indent=2).encode())
    return rebuild_report(folder, display)


def _doubts(rows: Sequence[MethodOutcome], chance: float) -> list[str]:
    """What is wrong with networks that are about to be reported."""
    doubts, best = [], 0.0
    for row in rows:
        before, after = row.validation_accuracy, row.tuned_validation_accuracy
        if after is not None and before is not None and after < before - NOTICED:
            doubts.append(
                f"fine-tuning lowered {row.method} from {before:.1%} to {after:.1%}; lower finetune.learning_rate, "
                "raise finetune.epochs, or check the augmentation (data.flip, data.crop_padding)"
            )
        if row.method != DENSE:
            best = max(best, after if after is not None else before or 0.0)
    if best < near_chance(chance):
        doubts.append(
            f"no compressed network is clearly better than guessing ({chance:.1%}): the best is right on {best:.1%} of "
            "the validation images; raise the budget or finetune.epochs"
        )
    return doubts


def rebuild_report(folder: RunFolder, display: RunDisplay) -> RunOutcome:
    """Write report.html from results.json and the journal; no image and no network is touched.

    Raises:
        RunError: if the run is not finished, or a file of it cannot be read.
    """
    outcome = folder.outcome()
    plans = evaluated_plans(Journal(folder.journal_file))
    with reading(folder.config_file, "put it back"):
        configuration = folder.config_file.read_text()
    html = render_report(outcome, plans, configuration)
    write_atomic(folder.report_file, html.encode())
    display.say(f"report: {folder.report_file}")
    return outcome


def evaluated_plans(journal: Journal) -> list[Plan]:
    """Every plan scored on the search images, as the figures show them.

    Finalists were plans before, and comparisons of outputs score nothing.
    """
    return [
        Plan(entry.searcher, entry.evaluations_used, entry.accuracy, entry.cost)
        for entry in journal.entries()
        if entry.purpose in ("candidate", "probe")
    ]


def _finalists(
    folder: RunFolder,
    subject: Subject,
    problem: SearchProblem,
    searched: SearchProblem,
    searches: Sequence[MethodSearch],
    clock: PlanClock | None,
    display: RunDisplay,
    stop: StopFlag,
) -> list[Finalist]:
    builder = problem.evaluator("", lambda _: None)
    found: list[Finalist] = []
    tuned = None
    if subject.config.finetune.dense_control:
        tuned = _tuned(folder.method(DENSE), subject, DENSE, subject.model, CompressionPolicy({}), display, stop)
    found.append(Finalist(DENSE, CompressionPolicy({}), subject.model, tuned, None))
    for search in searches:
        stop.check()
        policy = problem.policy(search)
        readings: tuple[ClockReading, ...] = ()
        if clock is not None:
            own = folder.method(search.method)
            others = other_finalists(search.method, searched, subject.config.search, policy)
            measured = kept_by_the_clock(policy, own, clock, problem.space, problem.journal, display, others)
            policy, readings = measured.policy, measured.readings
            # What is handed on to others is the plan of the network that is handed on.
            policy.save(own.policy_file)
        same = next((other for other in found[1:] if other.policy.digest == policy.digest), None)
        if same:
            display.say(f"{search.method}: the same plan as {same.name}, so the same network")
            found.append(replace(same, name=search.method, search=search, readings=readings))
            continue
        network = builder.build(policy)
        tuned = _tuned(folder.method(search.method), subject, search.method, network, policy, display, stop)
        found.append(Finalist(search.method, policy, network, tuned, search, readings))
    return found


def _tuned(
    own: MethodFolder,
    subject: Subject,
    name: str,
    network: nn.Module,
    policy: CompressionPolicy,
    display: RunDisplay,
    stop: StopFlag,
) -> nn.Module | None:
    """A fine-tuned copy of ``network``, None without fine-tuning; read back if it was made before."""
    recipe = subject.config.finetune
    if not recipe.epochs:
        return None
    tuned = copied(network)
    if own.tuned_file.exists():
        with reading(own.tuned_file, "delete it, and 'secateur resume' fine-tunes the network again"):
            load_unique(tuned, load_file(own.tuned_file))
        return tuned.eval()
    tune(
        tuned,
        subject.train_batches(recipe.batch_size),
        recipe,
        subject.config.search.seed,
        f"fine-tuning {name}",
        display,
        stop,
        scratch=own.finetuning,
        teacher=subject.model,
        sparse_layers=policy.sparse_layers,
        calibrate_ranges=lambda trained: calibrate(
            trained, subject.range_images(), method=subject.config.search.calibration_method
        ),
    )
    write_atomic(own.tuned_file, save(unique_tensors(tuned)))
    shutil.rmtree(own.finetuning, ignore_errors=True)
    return tuned


def _save_products(
    folder: RunFolder, subject: Subject, finalists: Sequence[Finalist], display: RunDisplay, stop: StopFlag
) -> None:
    """Write every network of the table as files that others can read; ONNX is made where the exporter can."""
    with display.stage("saving networks", len(finalists), "network") as stage:
        for finalist in finalists:
            save_product(folder, subject, finalist.name, finalist.product, finalist.policy, display)
            stage.advance()
            stop.check()


def save_product(
    folder: RunFolder, subject: Subject, name: str, network: nn.Module, policy: CompressionPolicy, display: RunDisplay
) -> None:
    """Write the network of a method, or the dense one, into a run, unless it is there already."""
    target = folder.method(name).model
    if not (target / "manifest.json").exists():
        save_network(network, policy, name, subject, target, display)


def _row(folder: RunFolder, subject: Subject, problem: SearchProblem, finalist: Finalist) -> MethodOutcome:
    evaluate, search = subject.evaluate_on_validation(), finalist.search
    policy, graph, space = finalist.policy, subject.graph, problem.space
    onnx = folder.method(finalist.name).model / ONNX_NAME
    macs, params = count_nonzero(finalist.network, graph, policy, subject.example(2))
    found: dict[str, Any] = {"cost": space.cost.dense}
    if search is not None:
        found = {
            "evaluations": search.evaluations,
            "plans": search.plans,
            "cache_hits": search.cache_hits,
            "seconds": search.seconds,
            "seconds_evaluating": search.seconds_evaluating,
            "search_accuracy": search.search_accuracy,
            "keep_ratios": space.keep_ratios(policy),
            "cost": space.cost_of(policy),
            "clock_readings": finalist.readings,
            "further_costs": {bound.cost.kind: space.cost_of(policy, bound.cost) for bound in space.bounds[1:]},
        }
    return MethodOutcome(
        method=finalist.name,
        validation_accuracy=evaluate(finalist.network),
        tuned_validation_accuracy=evaluate(finalist.tuned) if finalist.tuned is not None else None,
        macs=macs,
        params=params,
        size_bytes=predict_cost(graph, policy, "bytes"),
        onnx_bytes=onnx.stat().st_size if onnx.exists() else None,
        **found,
    )


def _with_latencies(
    folder: RunFolder,
    rows: Sequence[MethodOutcome],
    finalists: Sequence[Finalist],
    subject: Subject,
    device: TableDevice,
    display: RunDisplay,
) -> list[MethodOutcome]:
    settings = subject.config.measure
    networks = {}
    for finalist in finalists:
        onnx = folder.method(finalist.name).model / ONNX_NAME
        found = onnx if onnx.exists() else None
        networks[finalist.name] = FinishedNetwork(finalist.product, finalist.policy, found)
    timed = time_in_turn(networks, subject.example(settings.batch_size).cpu(), settings.n_runs, device, display)
    return [
        row.model_copy(update={"latencies": timed[row.method].latencies, "layer_forms": timed[row.method].layer_forms})
        for row in rows
    ]


def _with_test_accuracy(
    folder: RunFolder,
    rows: Sequence[MethodOutcome],
    finalists: Sequence[Finalist],
    subject: Subject,
    display: RunDisplay,
) -> tuple[list[MethodOutcome], int]:
    """The one place that opens the test split: plans, recipes and epochs are all chosen by now."""
    try:
        n_test = len(subject.data.test)
    except MissingSplitError as error:
        display.say(f"warning: no test accuracy: {error}")
        return list(rows), 0
    judge, tested = subject.judge_on_test(), []
    for row, finalist in zip(rows, finalists, strict=True):
        judged = judge(finalist.network)
        found = {"test_accuracy": judged.double().mean().item()}
        if finalist.tuned is not None:
            judged = judge(finalist.tuned)
            found["tuned_test_accuracy"] = judged.double().mean().item()
        digits = "".join("1" if is_right else "0" for is_right in judged.tolist())
        write_atomic(folder.method(row.method).judged_file, digits.encode())
        tested.append(row.model_copy(update=found))
    return tested, n_test


def _outcome(
    folder: RunFolder,
    subject: Subject,
    problem: SearchProblem,
    searched: SearchProblem,
    rows: Sequence[MethodOutcome],
    device: TableDevice,
    n_test: int,
    doubts: Sequence[str],
) -> RunOutcome:
    config, space, now = subject.config, problem.space, describe_machine(subject.device)
    allowances = [
        Allowance(
            kind=asked.cost.kind,
            limit=spent.limit,
            asked_limit=None if spent.limit == asked.limit else asked.limit,
            dense_cost=asked.cost.dense,
        )
        for asked, spent in zip(space.bounds, searched.space.bounds, strict=True)
    ]
    return RunOutcome(
        model=config.model.name,
        data=Path(config.data.source).name,
        budget=budget_words(config.budget, config.search.target),
        budget_kind=space.cost.kind,
        cost_limit=allowances[0].limit if allowances else space.cost.dense,
        dense_cost=space.cost.dense,
        asked_limit=allowances[0].asked_limit if allowances else None,
        further_budgets=tuple(allowances[1:]),
        is_reconstructed=config.search.reconstruct,
        seed=config.search.seed,
        command=folder.command,
        machine=folder.machine,
        timed_on=now if folder.machine.differences(now) else None,
        device=device.fingerprint,
        elsewhere=device.elsewhere,
        probe_evaluations=problem.probe_evaluations,
        probe_seconds=problem.probe_seconds,
        bits_note=problem.bits_note,
        has_one_plan=searched.space.has_one_plan,
        granted_evaluations=config.search.evaluations,
        n_validation=len(subject.data.validation),
        n_test=n_test,
        warnings=(*folder.log.warnings(), *doubts),
        rows=tuple(rows),
    )


def _log_metrics(folder: RunFolder, config: RunConfig, outcome: RunOutcome) -> None:
    """Hyper-parameters with final metrics, for TensorBoard's own table."""
    settings = config.search.model_dump(mode="json", exclude={"methods"})
    # By their names in a configuration; TensorBoard sorts them, and shows the first few.
    chosen = {f"search.{name}": value for name, value in settings.items()}
    chosen |= {"model": outcome.model, "data": outcome.data, "budget": outcome.budget}
    chosen |= {"finetune.epochs": config.finetune.epochs}
    for row in outcome.rows:
        if row.method == DENSE:
            continue
        metrics: Mapping[str, float | None] = {
            "search_accuracy": row.search_accuracy,
            "validation_accuracy": row.validation_accuracy,
            "tuned_validation_accuracy": row.tuned_validation_accuracy,
            "test_accuracy": row.test_accuracy,
            "tuned_test_accuracy": row.tuned_test_accuracy,
            "cost": row.cost,
            "macs": row.macs,
            "params": row.params,
            "size_bytes": row.size_bytes,
            "latency_ratio": row.clock_readings[-1].measured if row.clock_readings else None,
            "evaluations": row.evaluations,
            "seconds": row.seconds,
        }
        known = {name: value for name, value in metrics.items() if value is not None}
        agent = config.agent(row.method)
        own = {f"{row.method}.{name}": value for name, value in agent.model_dump(mode="json").items()} if agent else {}
        log_final_metrics(folder.tensorboard / row.method, {"method": row.method, **chosen, **own}, known)
