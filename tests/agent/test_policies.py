from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agent.ddpg import GraphDDPGPolicy
from agent.policies import GraphActorCriticPolicy, PlanDistribution
from tests.agent.synthetic import N_FEATURES, chain_observation, chain_space

ENCODER = {"hidden": 8, "n_layers": 2, "n_frequencies": 3}


def box(size: int) -> spaces.Box:
    return spaces.Box(-1, 1, (size,), np.float32)


def rows(n_decisions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_decisions, N_FEATURES))


def batch_of(observation: dict[str, np.ndarray], size: int = 3) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value).repeat(size, *[1] * value.ndim) for name, value in observation.items()}


def shake(policy: torch.nn.Module) -> None:
    """Move every weight off its start, zeros included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def ppo_policy(n_decisions: int, padding: int = 0, n_actions: int | None = None) -> GraphActorCriticPolicy:
    torch.manual_seed(0)
    space = chain_space(n_decisions, padding, n_actions)
    actions = box(n_actions or n_decisions + padding)
    return GraphActorCriticPolicy(space, actions, lambda _: 1e-3, encoder=ENCODER, std=0.3)


def ddpg_policy(n_decisions: int, padding: int = 0, *, plan_layers: int = 1, n_critics: int = 2) -> GraphDDPGPolicy:
    torch.manual_seed(0)
    return GraphDDPGPolicy(
        chain_space(n_decisions, padding),
        box(n_decisions + padding),
        lambda _: 1e-3,
        encoder=ENCODER,
        plan_hidden=32,
        plan_layers=plan_layers,
        n_critics=n_critics,
    )


@pytest.mark.parametrize("policy", [ppo_policy(5), ddpg_policy(5)], ids=["ppo", "ddpg"])
def test_the_first_plan_is_the_start_plan(policy: GraphActorCriticPolicy | GraphDDPGPolicy) -> None:
    action, _ = policy.predict(chain_observation(rows(5)), deterministic=True)

    assert action.tolist() == [0, 0, 0, 0, 0]


def test_log_probability_and_entropy_are_those_of_a_gaussian_by_hand() -> None:
    mean, std = torch.tensor([[0.1, -0.2, 0.9]], requires_grad=True), torch.tensor(0.5)
    distribution = PlanDistribution(mean, std, torch.tensor([[1.0, 1.0, 0.0]]))

    found = distribution.log_prob(torch.tensor([[0.6, -0.2, math.nan]]))

    # -log(0.5 sqrt(2 pi)) for both decisions, and -1/2 for the one that is a standard deviation away.
    assert found.item() == pytest.approx(-math.log(0.5 * math.sqrt(2 * math.pi)) - 0.25)
    assert distribution.entropy().item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.25))
    # (0.6 - 0.1) / 0.5^2, a mean over two; of the padded decision none, whatever its action is.
    (slope,) = torch.autograd.grad(found.sum(), mean)
    assert slope[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_the_clipped_ratio_does_not_shrink_with_the_number_of_decisions() -> None:
    def log_ratio(n: int) -> float:
        old, new = (PlanDistribution(torch.full((1, n), m), torch.tensor(0.3), torch.ones(1, n)) for m in (0.0, 0.1))
        action = torch.full((1, n), 0.2)
        return float(new.log_prob(action) - old.log_prob(action))

    assert log_ratio(60) == pytest.approx(log_ratio(6), rel=1e-5)


@pytest.mark.parametrize("garbage", [0.0, 4.0, 6.0])
def test_padding_changes_no_loss_and_no_gradient_of_ppo(garbage: float) -> None:
    plain, padded = ppo_policy(4), ppo_policy(4, padding=3)
    shake(plain)
    padded.load_state_dict(plain.state_dict())
    actions = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    wide = torch.cat([actions, torch.full((3, 3), 50.0)], dim=1)

    def losses(policy: GraphActorCriticPolicy, observation: dict[str, np.ndarray], taken: Tensor) -> Tensor:
        values, log_prob, entropy = policy.evaluate_actions(batch_of(observation), taken)
        loss = torch.stack([values.flatten(), log_prob, entropy])
        loss.square().sum().backward()
        return loss.detach()

    expected = losses(plain, chain_observation(rows(4)), actions)
    found = losses(padded, chain_observation(rows(4), 3, garbage), wide)

    torch.testing.assert_close(found, expected)
    for one, other in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("garbage", [0.0, 4.0, 6.0])
def test_padding_changes_no_value_and_no_gradient_of_ddpg(garbage: float) -> None:
    plain, padded = ddpg_policy(4), ddpg_policy(4, padding=3)
    shake(plain)
    padded.load_state_dict(plain.state_dict())
    actions = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    wide = torch.cat([actions, torch.full((3, 3), math.nan)], dim=1)

    def values(policy: GraphDDPGPolicy, observation: dict[str, np.ndarray], taken: Tensor) -> Tensor:
        batch = batch_of(observation)
        found = torch.cat([*policy.critic(batch, taken), *policy.critic(batch, policy.actor(batch))], dim=1)
        found.square().sum().backward()
        return found.detach()

    expected = values(plain, chain_observation(rows(4)), actions)
    found = values(padded, chain_observation(rows(4), 3, garbage), wide)

    torch.testing.assert_close(found, expected)
    for one, other in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_noise_leaves_padded_decisions_alone() -> None:
    policy = ppo_policy(4, padding=3)
    actions, _, _ = policy(batch_of(chain_observation(rows(4), 3)))

    assert torch.equal(actions[:, 4:], torch.zeros(3, 3))
    assert (actions[:, :4] != 0).all()


def test_one_decision_a_step_uses_the_head_of_a_whole_plan() -> None:
    whole, layerwise = ppo_policy(4), ppo_policy(4, n_actions=1)
    shake(whole)
    layerwise.load_state_dict(whole.state_dict())
    observation = chain_observation(rows(4))
    plan, _ = whole.predict(observation, deterministic=True)

    one, _ = layerwise.predict(
        {**observation, "decisions": observation["decisions"][2:3], "decision_mask": np.ones(1, np.float32)},
        deterministic=True,
    )

    assert one == pytest.approx(plan[2:3])


def test_critics_share_no_weight_with_the_actor_or_each_other() -> None:
    policy = ddpg_policy(4)
    parts = [policy.actor, *policy.critic.q_networks]
    owned = [{id(parameter) for parameter in part.parameters()} for part in parts]
    in_optimizer = {id(p) for group in policy.critic.optimizer.param_groups for p in group["params"]}

    assert not owned[0] & owned[1]
    assert not owned[1] & owned[2]
    assert in_optimizer == owned[1] | owned[2]


def test_training_ppo_reaches_its_encoder() -> None:
    policy = ppo_policy(4)
    shake(policy)
    batch = batch_of(chain_observation(rows(4)))

    values, log_prob, _ = policy.evaluate_actions(batch, torch.full((len(batch["nodes"]), 4), 0.3))
    (values.sum() + log_prob.sum()).backward()

    assert all(parameter.grad is not None for parameter in policy.features_extractor.parameters())
    assert any(bool(parameter.grad.any()) for parameter in policy.features_extractor.parameters())


def test_training_the_actor_reaches_its_encoder() -> None:
    policy = ddpg_policy(4)
    shake(policy)
    batch = batch_of(chain_observation(rows(4)))

    policy.critic(batch, policy.actor(batch))[0].sum().backward()

    assert policy.actor.features_extractor is not None
    assert all(p.grad is not None for p in policy.actor.features_extractor.graph.messages.parameters())


@pytest.mark.parametrize(("plan_layers", "hears"), [(0, False), (2, True)])
def test_the_critic_hears_what_was_decided_next_door(plan_layers: int, hears: bool) -> None:
    policy = ddpg_policy(4, plan_layers=plan_layers, n_critics=1)
    shake(policy)
    one, other = torch.tensor([0.5, -0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, -0.5])
    plans = torch.stack([0 * one, one, other, one + other])  # all of mean 0, so only messages can make them interact

    with torch.no_grad():
        (values,) = policy.critic(batch_of(chain_observation(rows(4)), size=4), plans)

    interaction = (values[3] - values[2] - values[1] + values[0]).abs().item()
    assert (interaction > 1e-4) is hears
