"""Scoring that leaves the global random generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Put the global generators of Python, NumPy and PyTorch back to where they stood, whatever is drawn meanwhile.

    Agents draw from them too: a score that is replayed, and so draws nothing, must leave them as one that was taken.
    """
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
