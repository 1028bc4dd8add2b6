"""Hyper-parameters of the agents."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Algorithm = Literal["ppo", "ddpg"]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class AgentConfig(BaseModel):
    """What both agents have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    algorithm: ClassVar[Algorithm]
    """Which agent it is for."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of the graph encoder's embeddings."""
    n_layers: Annotated[int, Field(ge=0)] = 2
    """Rounds of message passing."""
    n_frequencies: Annotated[int, Field(ge=0)] = 6
    """Sines of a layer's place that the encoder reads; 0 for an agent that is meant for other networks, as with
    `search.for_transfer`."""
    std: Positive = 0.3
    """Spread of the plans around the agent's own at the start of a run, on the scale of actions, -1 to 1."""
    std_end: Positive = 0.05
    """Spread at the end of the run; it falls geometrically with the share of evaluations spent."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount a step; without effect where an episode is one step."""
    checkpoint_every: Count = 20
    """Evaluations between checkpoints, at least; they are taken between rollouts only."""

    def encoder(self) -> dict[str, Any]:
        """Keyword arguments of `GraphEncoder`."""
        return {"hidden": self.hidden, "n_layers": self.n_layers, "n_frequencies": self.n_frequencies}


class PPOConfig(AgentConfig):
    """Proximal policy optimisation."""

    algorithm = "ppo"

    rollout: Count = 20
    """Evaluations of a rollout, adjusted by up to a quarter so that rollouts fill the budget."""
    learning_rate: Positive = 3e-3
    """Adam's step size."""
    updates: Count = 40
    """Gradient steps after a rollout."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Most transitions in a gradient step; a rollout that is no larger is one batch, with a shared baseline."""
    clip_range: Positive = 0.2
    """Clip of the probability ratio, a geometric mean over decisions."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Generalised advantage estimation's trade-off; without effect where an episode is one step."""
    vf_coef: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the value loss; actor and value share no weights."""


class DDPGConfig(AgentConfig):
    """Deep deterministic policy gradient."""

    algorithm = "ddpg"

    rollout: Count = 10
    """Evaluations between trainings, adjusted by up to a quarter so that rollouts fill the budget."""
    learning_starts: Annotated[int, Field(ge=0)] = 20
    """Evaluations of noise around the start plan before anything is learned."""
    critic_learning_rate: Positive = 3e-3
    """Adam's step size for the critics."""
    actor_learning_rate: Positive = 1e-3
    """Adam's step size for the actor."""
    updates: Count = 4
    """Gradient steps of the critics an episode."""
    policy_delay: Count = 2
    """Critic steps for each actor step."""
    batch_size: Count = 64
    """Transitions in a gradient step."""
    tau: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share by which the targets follow in a step; without effect where an episode is one step."""
    n_critics: Count = 2
    """Critics, each with an encoder of its own."""
    plan_hidden: Count = 32
    """Width of the critics where they read the plan."""
    plan_layers: Annotated[int, Field(ge=0)] = 0
    """Rounds of messages after the plan is written onto the graph; it takes two to reach the next decision."""
    candidates: Count = 1
    """Plans that a critic ranks before one is evaluated; 1 ranks none."""
    buffer_bytes: Count = 1_000_000_000
    """Most memory for the replay buffer; the oldest transitions go first."""


def default_config(algorithm: Algorithm) -> AgentConfig:
    """The hyper-parameters that an algorithm takes if none are given."""
    return PPOConfig() if algorithm == "ppo" else DDPGConfig()
