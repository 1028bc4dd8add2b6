"""Stable-Baselines3's logger on TensorBoard files that can be continued."""

from __future__ import annotations

from pathlib import Path

from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter


class ContinuedTensorBoard(TensorBoardOutputFormat):
    """Writes to ``folder`` from ``first_step`` on; what an interrupted run wrote there from that step on is void."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=first_step)
        self._is_closed = False


def tensorboard_logger(folder: Path | None, first_step: int) -> Logger:
    """A logger to TensorBoard below ``folder``, or to nowhere."""
    if folder is None:
        return Logger(None, [])
    return Logger(str(folder), [ContinuedTensorBoard(folder, first_step)])
