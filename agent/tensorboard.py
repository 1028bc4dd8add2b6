"""Stable-Baselines3's logger on TensorBoard files that can be continued."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)
MOST_AHEAD_S = 5
"""Seconds that are waited for."""


class ContinuedTensorBoard(TensorBoardOutputFormat):
    """Writes to ``folder`` from ``first_step`` on; what an interrupted run wrote there from that step on is void."""

    def __init__(self, folder: Path, first_step: int) -> None:
        wait_for_a_later_second(folder)
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=first_step)
        self._is_closed = False


def wait_for_a_later_second(folder: Path) -> None:
    """Let the clock pass the second in the name of the newest event file: readers order files by name."""
    newest = max((int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.*")), default=0)
    if (ahead := newest - time.time()) > MOST_AHEAD_S:
        # It was written by another clock, or this one was set back.
        _log.warning(
            "the newest curves in '%s' were written %.0f s from now: TensorBoard may show what follows before them",
            folder,
            ahead,
        )
        return
    while int(time.time()) <= newest:
        time.sleep(0.05)


def tensorboard_logger(folder: Path | None, first_step: int) -> Logger:
    """A logger to TensorBoard below ``folder``, or to nowhere."""
    if folder is None:
        return Logger(None, [])
    return Logger(str(folder), [ContinuedTensorBoard(folder, first_step)])
