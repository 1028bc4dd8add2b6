"""What TensorBoard shows of a run: one folder a method, the same scalars for baselines and agents.

TensorBoard orders its cards by name. ``evaluation/*``, the live curves of all methods, come before an agent's
``plan/*``; the final numbers, ``result/*``, are single dots and belong to the table of hyper-parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from agent.tensorboard import wait_for_a_later_second
from envs.evaluator import Evaluation

_FINAL = ".final"
"""How the name of the event file with the final metrics ends."""


class EvaluationScalars:
    """Writes each evaluation of one method: accuracy, reward, best so far, cost. The step is its number."""

    def __init__(self, folder: Path, recorded: Mapping[int, float] | None = None) -> None:
        """Log below ``folder``; nothing is written before the first evaluation.

        Args:
            folder: of the method.
            recorded: reward by step of the evaluations in the journal, so that the best so far goes on after a resume.
        """
        self._folder = folder
        self._recorded = recorded or {}
        self._writer: SummaryWriter | None = None
        self._best = -math.inf

    def add(self, evaluation: Evaluation, reward: float) -> None:
        """Write one evaluation; plans known before are not written again."""
        if evaluation.cached:
            return
        step = math.ceil(evaluation.evaluations_used)
        # A resumed search replays what came after its checkpoint: everything from that step on is written anew.
        if self._writer is None:
            self._best = max((r for at, r in self._recorded.items() if at < step), default=-math.inf)
            wait_for_a_later_second(self._folder)
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        writer = self._writer
        self._best = max(self._best, reward)
        writer.add_scalar("evaluation/accuracy", evaluation.accuracy, step)
        writer.add_scalar("evaluation/reward", reward, step)
        writer.add_scalar("evaluation/best_reward", self._best, step)
        writer.add_scalar("evaluation/cost", evaluation.cost, step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()


def log_final_metrics(folder: Path, hyperparameters: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    """Show the hyper-parameters of a method beside its final metrics in TensorBoard's HPARAMS tab.

    They are in a file of their own, in place of that of an earlier call.
    """
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hyperparameters.items()}
    results = {f"result/{name}": value for name, value in metrics.items()}
    for earlier in folder.glob(f"events.out.tfevents.*{_FINAL}"):
        earlier.unlink()
    # `SummaryWriter.add_hparams` would open a second file, whose name does not tell what is in it.
    with SummaryWriter(str(folder), filename_suffix=_FINAL) as writer:
        for summary in hparams(plain, results):
            writer.file_writer.add_summary(summary)
        for name, value in results.items():
            writer.add_scalar(name, value, 0)
