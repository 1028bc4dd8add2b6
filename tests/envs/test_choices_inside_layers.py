"""The environments on spaces in which densities and bits are decided beside channels."""

import re

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import example, given, settings
from hypothesis import strategies as st

from envs.action import counts_of, project, start_plan
from envs.allocation import greedy, knapsack
from envs.layerwise_env import LayerwiseEnv
from envs.network_env import NetworkEnv
from envs.plans import global_magnitude, uniform
from envs.space import SearchSpace
from experiments.problem import least_squares
from graph_encoder.capture import capture
from graph_encoder.features import NODE_FEATURES
from graph_encoder.network import KINDS
from latency.budget import Budget
from latency.cost import CostKind, predict_cost
from latency.decision import LayerChoice, LayerDecision, layer_decisions
from pruning.nonzeros import nonzero_macs
from pruning.quantize import quantized_layers
from pruning.stored_size import parameter_bytes
from pruning.surgery import apply_policy

from .conftest import SmallNetwork, images, l1_importance, make_evaluator

MODEL = SmallNetwork(width=16).eval()
GRAPH = capture(MODEL, images())
IMPORTANCE = l1_importance(MODEL, GRAPH)


SEEN: dict[CostKind, list[LayerChoice]] = {
    "macs": ["density"],
    "params": ["density"],
    "bytes": ["density", "weight_bits"],
    "bops": ["density", "weight_bits", "act_bits"],
}
"""What each cost depends on."""


def mixed_space(kind: CostKind, share: float, sparsity: str = "unstructured", **options: object) -> SearchSpace:
    layers = layer_decisions(GRAPH, options.pop("choices", SEEN[kind]), sparsity=sparsity, bits=(2, 4, 8, 32))  # type: ignore[arg-type]
    budget = Budget(kind=kind, share=share)
    return SearchSpace.build(GRAPH, IMPORTANCE, budget, layers=layers, sparsity=sparsity, **options)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@example(seed=231, kind="bytes", share=0.25, sparsity="2:4")
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["macs", "params", "bytes", "bops"]),
    share=st.floats(0.15, 0.9),
    sparsity=st.sampled_from(["unstructured", "block8", "2:4"]),
)
def test_every_mixed_plan_meets_the_budget_as_its_policy_costs(
    seed: int, kind: CostKind, share: float, sparsity: str
) -> None:
    space = mixed_space(kind, share, sparsity)
    counts = counts_of(np.random.default_rng(seed).uniform(-1, 1, space.n), space)

    policy = space.policy(counts)
    predicted = predict_cost(GRAPH, policy, kind)
    assert predicted <= space.cost(counts) <= (space.limit or 0)
    # Places and scales of layers that could have some are counted where they have none: 2 bits may count as 3.
    assert predicted >= (0.6 if kind == "bytes" else 1) * space.cost(counts)
    # Carried out, a pattern that does not fit is refused, and what is left is no more than was counted.
    built = apply_policy(MODEL, GRAPH, policy)
    if kind == "macs":
        assert nonzero_macs(built, capture(built, images())) <= predicted
    for index, ladder in enumerate(space.ladders):
        assert counts[index] in ladder
        if counts[index] < ladder[-1]:
            more = counts.copy()
            more[index] = space.next_rung(index, int(counts[index]))
            assert space.cost(more) > (space.limit or 0)


@pytest.mark.parametrize("choices", [["density"], ["weight_bits"], ["density", "weight_bits"]])
def test_bytes_of_a_policy_never_exceed_the_budget(choices: list[LayerChoice]) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        space = mixed_space("bytes", rng.uniform(0.3, 0.9), rounding=1, choices=choices)
        policy = space.policy(counts_of(rng.uniform(-1, 1, space.n), space))
        assert sum(parameter_bytes(GRAPH, policy).values()) <= (space.limit or 0)


@pytest.mark.parametrize(("sparsity", "divisor"), [("block8", 8), ("2:4", 4)])
def test_patterns_divide_what_is_left_of_groups_that_sparse_layers_write_and_read(sparsity: str, divisor: int) -> None:
    space = mixed_space("macs", 0.4, sparsity, rounding=1)
    sparse = {decision.layer for decision in space.layers}
    seen = set()
    for seed in range(20):
        counts = counts_of(np.random.default_rng(seed).uniform(-1, 1, space.n), space)
        for group, count in zip(space.groups, counts.tolist(), strict=False):
            bound = group.producers if sparsity == "block8" else group.consumers
            assert count % divisor == 0 or not sparse & set(bound)
        seen.add(tuple(counts))
        make_evaluator(MODEL, space).build(space.policy(counts))
    assert len(seen) > 5


def test_reconstruction_leaves_zeros_zero() -> None:
    space = mixed_space("macs", 0.6)
    policy = space.policy(project(np.full(space.n, 0.0), space))

    candidate = make_evaluator(MODEL, space, reconstruct=least_squares(0)).build(policy)

    plain = apply_policy(MODEL, GRAPH, policy)
    assert nonzero_macs(candidate, capture(candidate, images())) <= nonzero_macs(plain, capture(plain, images()))


@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("macs", "weight_bits", "conv1:weight_bits changes nothing that macs count; leave weight_bits out of what is "),
        (
            "bytes",
            "act_bits",
            "conv1:act_bits changes nothing that bytes count; leave act_bits out of what is decided, ",
        ),
    ],
)
def test_a_decision_that_the_budget_does_not_see_is_refused(kind: CostKind, choice: LayerChoice, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mixed_space(kind, 0.5, choices=[choice])


def test_layers_whose_weight_is_shared_or_is_no_layers_decide_nothing() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(8, 8)
            self.twin = torch.nn.Linear(8, 8)
            self.twin.weight = self.first.weight
            self.own = torch.nn.Parameter(torch.randn(8, 8))
            self.plain = torch.nn.Linear(8, 8)
            self.head = torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.plain(torch.nn.functional.linear(self.twin(self.first(x)), self.own)))

    found = layer_decisions(capture(Odd(), torch.zeros(2, 8)), ["bits"])

    assert [decision.layer for decision in found] == ["plain", "head"]


def test_zeros_of_the_candidate_are_those_of_the_plan() -> None:
    space = mixed_space("macs", 0.3, channels=False)
    counts = space.sizes.copy()
    counts[space.names.index("inner:density")] = 25
    candidate = make_evaluator(MODEL, space).build(space.policy(counts))

    left = {name: float((w != 0).float().mean()) for name, w in candidate.named_parameters() if w.dim() > 1}

    assert left["inner.weight"] == pytest.approx(0.25, abs=1e-3)
    assert left["down.weight"] == 1


def test_candidate_computes_with_the_bits_of_the_plan() -> None:
    layers = layer_decisions(GRAPH, ["weight_bits"], bits=(2, 32))
    space = SearchSpace.build(GRAPH, IMPORTANCE, Budget(kind="bytes", share=0.5), channels=False, layers=layers)
    counts = space.sizes.copy()
    counts[space.names.index("inner:weight_bits")] = 2
    evaluator = make_evaluator(MODEL, space)

    candidate = evaluator.build(space.policy(counts))

    quantized = quantized_layers(candidate)
    assert list(quantized) == ["inner"]
    weight = quantized["inner"].quantized_weight()
    assert max(len(row.unique()) for row in weight.flatten(1)) <= 4


@pytest.mark.parametrize("environment", [NetworkEnv, LayerwiseEnv])
def test_actions_reach_every_rung_of_the_bits_alike(
    environment: type[NetworkEnv | LayerwiseEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder, rng = (2, 3, 4, 5, 6, 7, 8, 32), np.random.default_rng(0)
    layers = [LayerDecision(layer, "weight_bits", ladder) for layer in ("inner", "outer", "down")]
    space = SearchSpace.build(GRAPH, IMPORTANCE, None, kind="bytes", channels=False, layers=layers)
    evaluator = make_evaluator(MODEL, space, evaluate=lambda _: 0.5)
    monkeypatch.setattr(evaluator, "build", lambda _: MODEL)
    env = environment(space, evaluator, reward=lambda accuracy, *_: accuracy)

    chosen: list[int] = []
    for _ in range(250):
        env.reset(seed=0)
        actions = rng.uniform(-1, 1, space.n).astype(np.float32)
        for action in actions[:, None] if environment is LayerwiseEnv else [actions]:
            *_, info = env.step(action)
        chosen += np.rint(info["kept_ratios"] * space.sizes).astype(int).tolist()

    assert set(chosen) == set(ladder)
    assert all(abs(chosen.count(bits) / len(chosen) - 1 / len(ladder)) < 0.04 for bits in ladder)


def test_actions_under_a_budget_take_all_bits_that_it_has_room_for() -> None:
    ladder, rng = (2, 3, 4, 5, 6, 7, 8, 32), np.random.default_rng(0)
    layers = [LayerDecision(layer, "weight_bits", ladder) for layer in ("inner", "outer", "down", "last")]
    budget = Budget(kind="bytes", share=0.2)
    space = SearchSpace.build(GRAPH, IMPORTANCE, budget, channels=False, layers=layers)

    chosen = np.concatenate([counts_of(rng.uniform(-1, 1, space.n), space) for _ in range(200)]).tolist()

    assert all(0.1 < chosen.count(bits) / len(chosen) < 0.2 for bits in ladder[:-1])


@pytest.mark.parametrize("environment", [NetworkEnv, LayerwiseEnv])
def test_every_layer_is_quantized_where_no_bits_leave_it_as_it_is(
    environment: type[NetworkEnv | LayerwiseEnv],
) -> None:
    layers = layer_decisions(GRAPH, ["weight_bits"], bits=range(2, 9))
    budget = Budget(kind="bytes", share=0.18)
    space = SearchSpace.build(GRAPH, IMPORTANCE, budget, channels=False, layers=layers)
    evaluator = make_evaluator(MODEL, space, evaluate=lambda _: 0.5)
    env = environment(space, evaluator)
    check_env(env, skip_render_check=True)

    rng, seen = np.random.default_rng(0), set()
    for _ in range(5):
        env.reset(seed=0)
        actions = rng.uniform(-1, 1, space.n).astype(np.float32)
        for action in actions[:, None] if environment is LayerwiseEnv else [actions]:
            *_, info = env.step(action)
        assert info["cost"] <= (space.limit or 0)
        counts = np.rint(info["kept_ratios"] * space.sizes).astype(int)
        bits = {
            name: each.policy.weight_bits
            for name, each in quantized_layers(evaluator.build(space.policy(counts))).items()
        }
        assert bits == {decision.layer: count for decision, count in zip(layers, counts.tolist(), strict=True)}
        assert bits["conv1"] == bits["classify"] == 8 and set(bits.values()) <= set(range(2, 9))
        seen.add(tuple(counts))
    assert len(seen) > 3
    for ratios in (
        uniform(space),
        *(of(space, [np.linspace(1, 0, len(each)) for each in space.ladders]) for of in (greedy, knapsack)),
    ):
        counts = project(ratios, space)
        assert space.fits(counts) and (counts <= 8).all()


@pytest.mark.parametrize("environment", [NetworkEnv, LayerwiseEnv])
def test_environments_pass_the_checks_with_mixed_decisions(environment: type[NetworkEnv | LayerwiseEnv]) -> None:
    layers = layer_decisions(GRAPH, ["density"])
    space = SearchSpace.build(GRAPH, IMPORTANCE, Budget(share=0.4), layers=layers)
    env = environment(space, make_evaluator(MODEL, space))
    check_env(env, skip_render_check=True)

    obs, _ = env.reset(seed=0)
    n_groups, kinds = len(space.groups), obs["kinds"][obs["node_mask"] == 1].astype(int)
    assert [KINDS[kind] for kind in kinds[len(GRAPH.operators) :]] == ["group"] * n_groups + ["density"] * len(layers)
    rows = obs["nodes"][len(GRAPH.operators) + n_groups :]
    np.testing.assert_allclose(
        rows[: len(layers), NODE_FEATURES.index("keep_ratio")],
        (start_plan(space) / space.sizes)[n_groups:],
        atol=1e-6,
    )


def test_one_agent_action_a_decision_and_plans_differ_in_density() -> None:
    layers = layer_decisions(GRAPH, ["density"])
    space = SearchSpace.build(GRAPH, IMPORTANCE, Budget(share=0.4), layers=layers)
    env = NetworkEnv(space, make_evaluator(MODEL, space, evaluate=lambda _: 0.5))
    assert env.action_space.shape == (len(space.groups) + len(layers),)
    action = np.zeros(space.n, dtype=np.float32)
    action[-1], action[-2] = 1, -1

    env.reset(seed=0)
    *_, info = env.step(action)

    assert info["evaluation"].cost <= (space.limit or 0)
    ratios = dict(zip(space.names, info["kept_ratios"], strict=True))
    assert ratios[layers[-1].name] > ratios[layers[-2].name]


def test_uniform_plan_has_the_fewest_bits_and_one_keep_ratio() -> None:
    layers = layer_decisions(GRAPH, ["bits"])
    space = SearchSpace.build(GRAPH, IMPORTANCE, Budget(kind="bytes", share=0.15), layers=layers, rounding=1)
    ratios = project(uniform(space), space) / space.sizes

    assert set(ratios[len(space.groups) :]) == {0.25}
    # A unit more or less is the remainder of the budget.
    assert np.ptp(ratios[: len(space.groups)]) <= 2 / min(space.sizes)


def test_magnitude_leaves_choices_inside_layers_at_the_average() -> None:
    space = mixed_space("macs", 0.4)
    ratios = global_magnitude(space)
    n_groups = len(space.groups)
    assert len(set(ratios[:n_groups])) > 1
    np.testing.assert_allclose(ratios[n_groups:], np.maximum(ratios[:n_groups].mean(), space.min_keep_ratio[n_groups:]))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [LayerDecision("nose", "bits", (8, 32))],
            "'nose' is no weighted layer of this network; layers are ['conv1', ",
        ),
        (
            [LayerDecision("down", "bits", (8, 32))] * 2,
            "'down:bits' is decided twice; name each choice of a layer once",
        ),
        ([], "there is nothing to decide: neither channels nor a choice inside a layer; pass one of them"),
    ],
)
def test_choices_that_do_not_fit_are_refused(layers: list[LayerDecision], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SearchSpace.build(GRAPH, IMPORTANCE, Budget(share=0.5), channels=False, layers=layers)


def test_model_is_untouched_by_sparse_candidates() -> None:
    space = mixed_space("macs", 0.3)
    before = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    make_evaluator(MODEL, space).score(space.policy(start_plan(space)))
    assert all(torch.equal(before[name], tensor) for name, tensor in MODEL.state_dict().items())
