from __future__ import annotations

import pytest
import torch

from agent.noise import geometric, mirrored_noise, rollout_noise
from agent.schedule import rollout_size


@pytest.mark.parametrize(
    ("n_evaluations", "wanted", "size"),
    [
        (300, 20, 23),  # 299 = 13 * 23
        (201, 20, 20),
        (40, 20, 19),  # 39 = 2 * 19 + 1
        (20, 20, 9),  # two rollouts of nine, and two left
        (3, 20, 2),
    ],
)
def test_rollouts_fill_the_budget_but_for_the_last_plan(n_evaluations: int, wanted: int, size: int) -> None:
    assert rollout_size(n_evaluations, wanted) == size


@pytest.mark.parametrize("n_evaluations", range(40, 400, 7))
def test_little_of_a_budget_is_left_unlearned(n_evaluations: int) -> None:
    size = rollout_size(n_evaluations, wanted=20)

    assert 15 <= size <= 25
    assert 1 <= n_evaluations - size * ((n_evaluations - 1) // size) <= 8


def test_a_rollout_starts_without_noise_and_goes_on_in_mirrored_pairs() -> None:
    noise = mirrored_noise(6, (2, 3), torch.Generator().manual_seed(0))

    assert noise.shape == (6, 2, 3)
    assert not noise[0].any()
    assert torch.equal(noise[1], -noise[2])
    assert torch.equal(noise[3], -noise[4])
    assert not torch.equal(noise[1].abs(), noise[3].abs())


def test_whole_episodes_are_mirrored_layer_by_layer() -> None:
    steps = torch.stack(rollout_noise(9, 3, 1, 1, torch.Generator().manual_seed(0))).flatten()

    assert not steps[:3].any()
    assert torch.equal(steps[3:6], -steps[6:9])


def test_environments_side_by_side_share_the_pairs() -> None:
    first, second = rollout_noise(2, 1, 4, 3, torch.Generator().manual_seed(0))

    episodes = torch.cat([first, second])
    assert not episodes[0].any()
    assert torch.equal(episodes[1:7:2], -episodes[2:7:2])
    assert len({tuple(row.tolist()) for row in episodes}) == 8


def test_the_spread_falls_by_a_constant_factor() -> None:
    assert [geometric(0.4, 0.1, remaining) for remaining in (1.0, 0.5, 0.0)] == pytest.approx([0.4, 0.2, 0.1])
