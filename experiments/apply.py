"""`secateur apply`: a saved policy to its network, or a trained agent, frozen, to another one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from envs.action import decode
from envs.evaluator import CandidateEvaluator
from envs.journal import Journal
from latency.cost import count_nonzero, predict_cost
from pruning.export import ExportError, export_onnx
from pruning.policy import CompressionPolicy

from .agents import plan_by_agent, search_by_agent
from .clock import TableDevice
from .config import ConfigError, RunConfig
from .exported_files import ONNX_NAME, save_network
from .interrupt import StopFlag
from .machine import set_up_device
from .methods import ranked_plans
from .outcome import ANOTHER_DEVICE, DENSE, Latency, speeds_that_count, unsure_speedups
from .problem import least_squares
from .progress import RunDisplay
from .run import MethodFolder, claimed, refuse_existing
from .search import Watch, build_problem, importance_of, settled_here, space_of_graph, tell_precision
from .subject import Subject, prepare_subject, report_dense
from .turns import FinishedNetwork, time_in_turn

COMPRESSED = "the compressed network"


def apply_saved(
    source: Path, config: RunConfig, out: Path, evaluations: int, display: RunDisplay, stop: StopFlag
) -> dict[str, Any]:
    """Build the compressed network that a policy or an agent asks for, and save it.

    Args:
        source: a policy (JSON), a trained agent (.pt), or the folder of a run's method, whose agent is taken.
        config: network, data and device; for an agent also the budget.
        out: folder to write.
        evaluations: to refine an agent's plan with; 0 takes its first plan.
        display: told what happens.
        stop: looked at after each evaluation.

    Returns:
        What to tell: the folder, accuracies on the validation images, and costs.

    Raises:
        PolicyError: if the policy does not fit; it names everything that does not, and no network is written.
        ConfigError: if a policy is to be refined, or an agent is given no budget.
        RunError: if ``out`` exists, or another process makes it.
    """
    refuse_existing(out)
    if source.is_dir():
        if not MethodFolder(source).agent_file.exists():
            msg = (
                f"'{source}' holds no trained agent; only ppo and ddpg train one, in RUN/methods/ppo or .../ddpg, and "
                "none where everything on offer keeps the budget"
            )
            raise ConfigError(msg)
        source = MethodFolder(source).agent_file
    if not source.exists():
        msg = (
            f"there is no policy and no agent '{source}'; a run keeps them in RUN/methods/NAME/policy.json and agent.pt"
        )
        raise ConfigError(msg)
    if source.suffix == ".pt" and not config.budget:
        msg = "an agent plans for a budget; pass --budget"
        raise ConfigError(msg)
    if source.suffix != ".pt" and evaluations:
        msg = "--evaluations refines the plan of an agent; a policy is applied as it is"
        raise ConfigError(msg)
    with claimed(out):
        return _applied(source, config, out, evaluations, display, stop)


def _applied(
    source: Path, config: RunConfig, out: Path, evaluations: int, display: RunDisplay, stop: StopFlag
) -> dict[str, Any]:
    device = set_up_device(config.device, config.threads)
    if source.suffix == ".pt":
        config = settled_here(config, device, display)
        subject = prepare_subject(
            config, device, display, stop, check=lambda subject: space_of_graph(config, subject.graph)
        )
        report_dense(subject, display)
        return _apply_agent(source, subject, out, evaluations, display, stop)
    policy, config = CompressionPolicy.load(source), settled_here(config, device, display)
    subject = prepare_subject(config, device, display, stop, check=lambda subject: policy.masks(subject.graph))
    report_dense(subject, display)
    settings = config.search
    builder = CandidateEvaluator(
        subject.model,
        subject.graph,
        subject.evaluate_on_validation(),
        subject.calibration(),
        reconstruct=least_squares(settings.seed) if settings.reconstruct else None,
        range_images=subject.range_images(),
        calibration_method=settings.calibration_method,
        channels_last=True,
        autocast=settings.autocast,
    )
    return _saved(subject, builder, policy, out, display, stop)


def _apply_agent(
    source: Path, subject: Subject, out: Path, evaluations: int, display: RunDisplay, stop: StopFlag
) -> dict[str, Any]:
    problem = build_problem(subject, importance_of(subject), Journal())
    evaluator = problem.evaluator("agent", lambda _: None)
    settings = subject.config.search
    tell_precision(settings, subject.device, display)
    config, policy = plan_by_agent(
        source, problem, evaluator, settings, lambda message: display.say(f"warning: {message}")
    )
    if evaluations:
        with display.stage("refining", evaluations, "evaluation") as stage:
            evaluator = problem.evaluator("refining", Watch(stage, problem, stop), max_evaluations=evaluations)
            evaluator.score(policy)
            if not evaluator.is_spent():
                search_by_agent(problem, evaluator, settings, config, None, None, start_from=source)
        policy = problem.policy(ranked_plans(problem, evaluator)[0])
    uniform = decode(np.zeros(problem.space.n), problem.space)
    evaluate = subject.evaluate_on_validation()
    uniform_network = evaluator.build(uniform)
    saved, uniform_accuracy = _saved(subject, evaluator, policy, out, display, stop), evaluate(uniform_network)
    return saved | {
        "uniform_accuracy": uniform_accuracy,
        "uniform_macs": count_nonzero(uniform_network, subject.graph, uniform, subject.example(2))[0],
        "verdict": agent_verdict(saved["accuracy"], uniform_accuracy, evaluations),
    }


def agent_verdict(accuracy: float, uniform_accuracy: float, evaluations: int) -> str:
    """Whether the agent's plan was worth it, in a sentence.

    Args:
        accuracy: of the agent's plan on the validation images, in [0, 1].
        uniform_accuracy: of uniform pruning within the same budget.
        evaluations: that the plan was refined with.
    """
    points = 100 * (accuracy - uniform_accuracy)
    if points > 0:
        return f"the agent's plan scores {points:.2f} points more than uniform pruning within the same budget"
    compared = f"{-points:.2f} points less than" if points else "as much as"
    more = f"more than {evaluations}" if evaluations else "some"
    return (
        f"the agent did not help: its plan scores {compared} uniform pruning within the same budget. Refine it with "
        f"--evaluations ({more}), or search this network with 'secateur search', which tries uniform pruning too"
    )


def _saved(
    subject: Subject,
    builder: CandidateEvaluator,
    policy: CompressionPolicy,
    out: Path,
    display: RunDisplay,
    stop: StopFlag,
) -> dict[str, Any]:
    """Build, save and score the network that ``policy`` leaves; once it is saved, nothing stops what is left."""
    evaluate, example = subject.evaluate_on_validation(), subject.example(2)
    stop.check()
    network = builder.build(policy)
    stop.check()
    if epochs := subject.config.finetune.epochs:
        display.say(
            f"finetune.epochs is {epochs}, but 'secateur apply' does not fine-tune: pass the same configuration to "
            f"'secateur finetune {out}'"
        )
    onnx = save_network(network, policy, COMPRESSED, subject, out, display)
    device = TableDevice.of(subject.config.latency.table)
    macs, params = count_nonzero(network, subject.graph, policy, example)
    own, dense = _times(subject, network, policy, onnx, device, display)
    has_zeros = bool(policy.sparse_layers)
    counting = speeds_that_count(COMPRESSED, own, dense, has_zeros=has_zeros, device=device.fingerprint)
    speeds = [*speeds_that_count(COMPRESSED, own, dense, has_zeros=False), *counting]
    missing = unsure_speedups(COMPRESSED, counting, device.fingerprint)
    if device.elsewhere:
        missing = [f"timed on {ANOTHER_DEVICE}: {device.elsewhere}"]
    return {
        "network": str(out),
        "dense_accuracy": evaluate(subject.model),
        "accuracy": evaluate(network),
        "dense_macs": subject.graph.macs,
        "macs": macs,
        "dense_params": subject.graph.params,
        "params": params,
        "dense_bytes": predict_cost(subject.graph, CompressionPolicy(), "bytes"),
        "bytes": predict_cost(subject.graph, policy, "bytes"),
        "dense_bops": predict_cost(subject.graph, CompressionPolicy(), "bops"),
        "bops": predict_cost(subject.graph, policy, "bops"),
        **{f"speed_on_{speed.runtime}": speed for speed in speeds},
        **({"no_speedup": "; ".join(missing)} if missing else {}),
    }


def _times(
    subject: Subject,
    network: nn.Module,
    policy: CompressionPolicy,
    onnx: Path | None,
    device: TableDevice,
    display: RunDisplay,
) -> tuple[list[Latency], list[Latency]]:
    """Times of the compressed network, and of the dense one, in turns."""
    settings, dense_onnx = subject.config.measure, None
    with tempfile.TemporaryDirectory() as scratch:
        if onnx:
            dense_onnx = Path(scratch) / ONNX_NAME
            try:
                export_onnx(subject.model, subject.example(2), dense_onnx)
            except ExportError as error:
                display.say(f"warning: no times of ONNX files, as there is none of the dense network: {error}")
                onnx = dense_onnx = None
        networks = {
            DENSE: FinishedNetwork(subject.model, CompressionPolicy(), dense_onnx),
            COMPRESSED: FinishedNetwork(network, policy, onnx),
        }
        times = time_in_turn(networks, subject.example(settings.batch_size).cpu(), settings.n_runs, device, display)
    return list(times[COMPRESSED].latencies), list(times[DENSE].latencies)
