"""Exploration noise shared by the agents."""

from __future__ import annotations

import torch
from torch import Tensor


def mirrored_noise(episodes: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise for each episode of a rollout: zeros for the first, then mirrored pairs.

    The first episode shows what the agent's own plan is worth. Mirroring takes the even part of the reward out of the
    variance of the gradient (antithetic sampling; Salimans et al. 2017, arXiv:1703.03864, section 2).

    Returns:
        Shape ``(episodes, *shape)``; where ``episodes`` is even the last one has no partner.
    """
    half = torch.randn((episodes // 2, *shape), generator=generator)
    pairs = torch.stack([half, -half], dim=1).flatten(0, 1)
    return torch.cat([torch.zeros((1, *shape)), pairs])[:episodes]


def rollout_noise(
    n_steps: int, episode_length: int, n_envs: int, n_decisions: int, generator: torch.Generator
) -> list[Tensor]:
    """Mirrored noise for ``n_steps`` steps of ``n_envs`` environments, each ``(n_envs, n_decisions)``.

    The episodes of all environments are one row of pairs: environments that all began without noise, or with partners
    in another one, would pay for one plan several times.
    """
    rounds = -(-n_steps // episode_length)
    noise = mirrored_noise(rounds * n_envs, (episode_length, n_decisions), generator)
    by_step = noise.unflatten(0, (rounds, n_envs)).transpose(1, 2)
    return list(by_step.flatten(0, 1)[:n_steps])


def geometric(start: float, end: float, remaining: float) -> float:
    """A value that falls from ``start`` to ``end`` by a constant factor as ``remaining`` goes from 1 to 0."""
    return end * float((start / end) ** remaining)
