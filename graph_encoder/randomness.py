"""The global random generators: their state, and work that leaves it as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """State of the global generators, which Stable-Baselines3 draws from."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002


def set_random_states(states: Mapping[str, Any]) -> None:
    """Return the global generators to `random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])


def have_drawn(states: Mapping[str, Any]) -> bool:
    """Whether a global generator was drawn from since it had one of these `random_states`."""
    now = random_states()
    as_numpys_were = all(np.array_equal(*pair) for pair in zip(states["numpy"], now["numpy"], strict=True))
    return not (states["python"] == now["python"] and as_numpys_were and torch.equal(states["torch"], now["torch"]))


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Put the global generators of Python, NumPy and PyTorch back to where they stood, whatever is drawn meanwhile.

    Agents draw from them too: a score that is replayed, and so draws nothing, must leave them as one that was taken.
    """
    states = random_states()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        set_random_states(states)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
