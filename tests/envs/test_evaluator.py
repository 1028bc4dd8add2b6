import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from envs.action import decode, start_plan
from envs.evaluator import (
    CandidateEvaluator,
    EvaluateError,
    EvaluationBudgetSpent,
    ReplayError,
    check_accuracy,
)
from envs.journal import Journal
from envs.space import SearchSpace
from latency.budget import Budget
from latency.decision import LayerDecision
from pruning.batch_norm import reestimate_batch_norm
from pruning.calibration import CalibrationError
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy
from pruning.quantize import ActQuantizer

from .conftest import SmallNetwork, images, make_evaluator, make_space, remaining_share


def plans(space: SearchSpace, n: int, seed: int = 0) -> list[CompressionPolicy]:
    rng = np.random.default_rng(seed)
    found: dict[str, CompressionPolicy] = {}
    while len(found) < n:
        policy = decode(rng.uniform(-1, 1, space.n), space)
        found[policy.digest] = policy
    return list(found.values())


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **options)


def test_score_is_that_of_the_network_built_and_leaves_the_dense_one_as_it_was(
    model: SmallNetwork, space: SearchSpace
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluator = make_evaluator(model, space)
    policy = decode(np.zeros(space.n), space)

    evaluation = evaluator.score(policy)

    built = evaluator.build(policy)
    assert evaluation.accuracy == remaining_share(model)(built)
    assert evaluation.cost == space.cost(start_plan(space)) <= (space.limit or 0)
    assert not built.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_batch_norm_statistics_are_those_of_the_calibration_images(model: SmallNetwork, space: SearchSpace) -> None:
    built = make_evaluator(model, space).build(CompressionPolicy({}))
    out = model.conv1(images(8))
    torch.testing.assert_close(built.bn1.running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(built.bn1.running_var, out.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_ranges_are_chosen_by_the_method_on_images_of_their_own(model: SmallNetwork, space: SearchSpace) -> None:
    policy, ranges = (
        CompressionPolicy({}, {}, {"conv1": LayerPolicy(weight_bits=8, act_bits=8)}),
        3 * images(16, seed=1),
    )

    def step_of_the_input(**options: object) -> float:
        built = make_evaluator(model, space, calibration_method="minmax", **options).build(policy)
        return next(module.step.item() for module in built.modules() if isinstance(module, ActQuantizer))

    for x, options in ((ranges, {"range_images": [ranges]}), (images(8), {})):
        assert step_of_the_input(**options) == pytest.approx(float(x.max() - x.min()) / 255)


def test_plans_that_differ_in_bits_alone_share_what_comes_before(
    model: SmallNetwork, space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    repaired = Counted(reestimate_batch_norm)
    monkeypatch.setattr("envs.evaluator.reestimate_batch_norm", repaired)
    half = decode(np.zeros(space.n), space)
    zeros = LayerPolicy(sparsity="unstructured", density=0.5, weight_bits=8)
    wanted = [
        replace(plan, layers=layers)
        for plan, layers in [
            (half, {"conv1": LayerPolicy(weight_bits=2)}),
            (half, {"conv1": LayerPolicy(weight_bits=8, act_bits=8), "inner": LayerPolicy(weight_bits=4)}),
            (half, {"inner": zeros}),
            (half, {"inner": replace(zeros, weight_bits=3)}),
            (CompressionPolicy({}), {"conv1": LayerPolicy(weight_bits=2)}),
            (half, {"conv1": LayerPolicy(weight_bits=2)}),
        ]
    ]
    evaluator = make_evaluator(model, space)
    built = [evaluator.build(policy).state_dict() for policy in wanted]

    assert repaired.calls == 4  # channels, zeros, the whole network, channels again
    for policy, found in zip(wanted, built, strict=True):
        alone = make_evaluator(model, space).build(policy).state_dict()
        assert alone.keys() == found.keys()
        assert all(torch.equal(alone[name], tensor) for name, tensor in found.items())


def test_a_plan_is_scored_once(model: SmallNetwork, space: SearchSpace) -> None:
    evaluate = Counted(remaining_share(model))
    evaluator = make_evaluator(model, space, evaluate=evaluate)
    first, second = plans(space, 2)
    scores = [evaluator.score(policy) for policy in (first, second, first)]
    assert evaluate.calls == 2
    assert [s.cached for s in scores] == [False, False, True]
    assert scores[2] == scores[0]
    assert (evaluator.evaluations_used, evaluator.cache_hits) == (2, 1)
    assert [s.evaluations_used for s in scores] == [1, 2, 2]


def test_few_image_scores_count_as_their_share(model: SmallNetwork, space: SearchSpace) -> None:
    few = Counted(lambda _: 0.25)
    evaluator = make_evaluator(model, space, few_images={0.1: few}, max_evaluations=1.3)
    for policy in plans(space, 3):
        assert evaluator.score(policy, fidelity=0.1).accuracy == 0.25
    assert evaluator.evaluations_used == pytest.approx(0.3)
    # A score on few images is not a score on all of them.
    assert not evaluator.score(plans(space, 1)[0]).cached
    assert evaluator.is_spent()


def test_the_limit_is_hard(model: SmallNetwork, space: SearchSpace) -> None:
    evaluate = Counted(remaining_share(model))
    evaluator = make_evaluator(model, space, evaluate=evaluate, max_evaluations=2)
    first, second, third = plans(space, 3)
    evaluator.score(first)
    evaluator.score(second)
    message = (
        "2 of 2 evaluations are used, and the next would count as 1; grant more evaluations, or score on fewer images"
    )
    with pytest.raises(EvaluationBudgetSpent, match=f"^{re.escape(message)}$"):
        evaluator.score(third)
    assert evaluate.calls == 2
    assert evaluator.score(first).cached


def test_a_share_without_images_is_refused(model: SmallNetwork, space: SearchSpace) -> None:
    message = (
        "there is no evaluate function for a share of 0.5 of the search images; there are some for [0.1, 1.0]: pass "
        "one of these, or add it to few_images"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_evaluator(model, space, few_images={0.1: lambda _: 0.5}).score(CompressionPolicy({}), fidelity=0.5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            math.nan,
            "evaluate returned nan, but an accuracy lies in [0, 1]; were there any images, and are the network's "
            "outputs finite?",
        ),
        (90.5, "evaluate returned 90.5, but an accuracy lies in [0, 1]; is it a percentage? divide by 100"),
        (-0.1, "evaluate returned -0.1, but an accuracy lies in [0, 1]"),
        (
            None,
            "evaluate returned None of type NoneType; it must return the accuracy as a float in [0, 1] (of a tensor or "
            "an array, return its .item())",
        ),
        (
            torch.tensor(0.5),
            "evaluate returned tensor(0.5000) of type Tensor; it must return the accuracy as a float in [0, 1] (of a "
            "tensor or an array, return its .item())",
        ),
        (
            np.array(0.5),
            "evaluate returned array(0.5) of type ndarray; it must return the accuracy as a float in [0, 1] (of a "
            "tensor or an array, return its .item())",
        ),
        (1.001, "evaluate returned 1.001, but an accuracy lies in [0, 1]"),
    ],
)
def test_what_is_no_accuracy_is_named_and_not_counted(
    model: SmallNetwork, space: SearchSpace, returned: object, message: str
) -> None:
    evaluator = make_evaluator(model, space, evaluate=lambda _: returned)
    with pytest.raises(EvaluateError, match=f"^{re.escape(message)}$"):
        evaluator.score(CompressionPolicy({}))
    assert evaluator.evaluations_used == len(evaluator.journal) == 0


@pytest.mark.parametrize(
    ("returned", "accuracy"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        # Two and eight rounding errors of single precision.
        (np.nextafter(np.float32(1), np.float32(2)), 1.0),
        (1 + 2**-20, 1.0),
    ],
)
def test_numpy_numbers_and_rounding_errors_above_one_are_accuracies(returned: object, accuracy: float) -> None:
    assert check_accuracy(returned) == accuracy


def test_sensitivity_is_what_one_group_alone_costs_and_counts(model: SmallNetwork, space: SearchSpace) -> None:
    evaluator = make_evaluator(model, space)
    found = evaluator.probe_sensitivity(space, (0.3, 0.6))
    assert evaluator.evaluations_used == 2 * space.n + 1
    counts = space.sizes.copy()
    counts[1] = 7  # 0.3 of 24 is 7.2
    alone = remaining_share(model)(evaluator.build(space.policy(counts)))
    assert found.lost[1, 0] == pytest.approx(1 - alone)
    assert (found.at(0.3) > found.at(0.6)).all()
    assert {entry.purpose for entry in evaluator.history} == {"probe"}


def space_of_bits(model: SmallNetwork, *, channels: bool, bits: tuple[int, ...] = (2, 4, 8, 32)) -> SearchSpace:
    layers = [LayerDecision(name, "weight_bits", bits) for name in ("inner", "down")]
    return make_space(model, Budget(kind="bytes", share=0.5), channels=channels, layers=layers)


def alone(space: SearchSpace, name: str, count: int) -> CompressionPolicy:
    counts = space.sizes.copy()
    counts[space.names.index(name)] = count
    return space.policy(counts)


def outputs_on_calibration(evaluator: CandidateEvaluator, policy: CompressionPolicy, n: int = 8) -> torch.Tensor:
    with torch.no_grad():
        return evaluator.build(policy)(images(8)[:n])


def test_a_comparison_is_the_squared_difference_of_outputs_over_their_spread(model: SmallNetwork) -> None:
    space = space_of_bits(model, channels=False)
    evaluator = make_evaluator(model, space)
    policy = alone(space, "inner:weight_bits", 2)

    found = evaluator.compare(policy, n_images=5)

    dense = outputs_on_calibration(evaluator, CompressionPolicy({}), 5)
    expected = ((outputs_on_calibration(evaluator, policy, 5) - dense) ** 2).sum() / (
        (dense - dense.mean(0)) ** 2
    ).sum()
    assert found.divergence == pytest.approx(float(expected), rel=1e-4)
    assert evaluator.compare(CompressionPolicy({}), n_images=5).divergence == 0
    # With more search images all eight calibration images are compared.
    assert evaluator.compare(policy, n_images=16).divergence != found.divergence


def test_outputs_of_any_shape_are_compared() -> None:
    class TwoOutputs(SmallNetwork):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # type: ignore[override]
            logits = super().forward(x)
            return logits, {"wide": logits[:, :, None] * torch.ones(3)}

    model = TwoOutputs().eval()
    space = space_of_bits(SmallNetwork().eval(), channels=False)
    policy = alone(space, "inner:weight_bits", 2)

    # Repeating each output as often as the others changes no ratio of sums.
    found = CandidateEvaluator(model, space.graph, lambda _: 0.5, [images(8)]).compare(policy, n_images=8).divergence

    plain = make_evaluator(SmallNetwork().eval(), space).compare(policy, n_images=8).divergence
    assert found == pytest.approx(plain)


def test_infinite_logits_and_outputs_of_no_image_are_left_out_of_comparisons() -> None:
    class Masked(SmallNetwork):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            logits = super().forward(x)
            never = torch.full((len(x), 1), -math.inf)
            return torch.cat([logits, never], dim=1), logits.mean()

    space = space_of_bits(SmallNetwork().eval(), channels=False)
    policy = alone(space, "inner:weight_bits", 2)

    found = CandidateEvaluator(Masked().eval(), space.graph, lambda _: 0.5, [images(8)]).compare(policy, n_images=8)

    plain = make_evaluator(SmallNetwork().eval(), space).compare(policy, n_images=8)
    assert found.divergence == pytest.approx(plain.divergence)


def test_scores_leave_the_global_generators_as_they_were(model: SmallNetwork, space: SearchSpace) -> None:
    def drawing(_: nn.Module) -> float:
        return (random.random() + np.random.rand() + torch.rand(1).item()) / 3  # noqa: NPY002

    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    found = []
    for scored in (False, True):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        if scored:
            evaluator = make_evaluator(model, space, evaluate=drawing)
            evaluator.dense_accuracy()
            evaluator.score(space.policy(start_plan(space)))
        found.append(drawn())

    assert found[0] == found[1]


def test_comparisons_count_by_their_images_and_are_replayed(model: SmallNetwork, tmp_path: Path) -> None:
    space = space_of_bits(model, channels=False)
    policy = alone(space, "down:weight_bits", 4)
    first = make_evaluator(model, space, journal=Journal(tmp_path / "journal.jsonl"), evaluate=lambda _: 0.5)
    # There are 8 calibration images: as many search images as that make a comparison a whole evaluation.
    assert [first.compare(policy, n_images=n).evaluations_used for n in (32, 32, 8)] == [0.25, 0.25, 1.25]
    assert first.cache_hits == 1
    assert first.score(policy).accuracy == 0.5
    first.journal.close()

    second = make_evaluator(model, space, journal=Journal(tmp_path / "journal.jsonl"), evaluate=lambda _: 0.0)
    assert second.compare(policy, n_images=32) == first.compare(policy, n_images=32)
    assert second.evaluations_used == 0.25
    assert len(second.journal) == 3
    assert {entry.purpose for entry in first.history} == {"comparison", "candidate"}
    with pytest.raises(EvaluationBudgetSpent):
        make_evaluator(model, space, max_evaluations=0.2).compare(policy, n_images=32)


def test_sensitivity_of_bits_follows_outputs_and_falls_with_the_bits(model: SmallNetwork) -> None:
    space = space_of_bits(model, channels=False, bits=(2, 3, 4, 5, 8, 32))
    evaluator = make_evaluator(model, space, evaluate=lambda _: 0.75)

    found = evaluator.probe_sensitivity(space, n_images=32)

    # The whole network, and for each layer the least, a middle and the largest level below the untouched.
    assert evaluator.evaluations_used == 1 + 2 * 3 * 8 / 32
    for name in space.names:
        assert list(found.by_level[name]) == [2, 4, 8]
        for level, lost in found.by_level[name].items():
            divergence = evaluator.compare(alone(space, name, level), n_images=32).divergence
            assert lost == min(divergence or 0.0, 1.0)
        lost_by_bits = found.of_levels(name, space.ladders[0], 32)
        assert (np.diff(lost_by_bits) < 0).all() and lost_by_bits[-1] == 0
        # A bit more is a grid twice as fine: between the levels measured, logarithms run straight.
        assert lost_by_bits[1] == pytest.approx(np.sqrt(lost_by_bits[0] * lost_by_bits[2]))
    # No image of a thousand tells the layers apart at 8 bits; their outputs do.
    at_eight = [found.by_level[name][8] for name in space.names]
    assert 0 < min(at_eight) < 0.001 and len(set(at_eight)) == 2
    # A place of 0.3 is the second of six.
    np.testing.assert_allclose(found.at(0.3), [found.of_levels(name, np.array([3]), 32)[0] for name in space.names])
    np.testing.assert_array_equal(found.floors(0.01), [1e-6, 1e-6])


def test_losses_of_bits_are_on_the_scale_of_those_of_channels(model: SmallNetwork) -> None:
    """Where what groups lose is half of their divergence, so is what bits are taken to lose."""
    space = space_of_bits(model, channels=True)
    probe = make_evaluator(model, space)
    dense = outputs_on_calibration(probe, CompressionPolicy({}))

    def evaluate(network: nn.Module) -> float:
        with torch.no_grad():
            difference = ((network(images(8)) - dense) ** 2).sum() / ((dense - dense.mean(0)) ** 2).sum()
        return float(1 - difference.clamp_max(1) / 2)

    found = make_evaluator(model, space, evaluate=evaluate).probe_sensitivity(space, n_images=1000)

    for name in ("inner:weight_bits", "down:weight_bits"):
        divergence = probe.compare(alone(space, name, 4), n_images=1000).divergence or 0.0
        assert found.by_level[name][4] == pytest.approx(divergence / 2, rel=0.02)
    np.testing.assert_array_equal(found.floors(0.01), [0.01] * len(space.groups) + [1e-6] * 2)


def test_sensitivity_inside_layers_without_calibration_images_is_refused(model: SmallNetwork) -> None:
    space = space_of_bits(model, channels=False)
    message = (
        "the sensitivity of choices inside layers is read off outputs on calibration images, and there are none; pass "
        "some batches of training images as calibration, or start from the uniform plan"
    )
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        CandidateEvaluator(model, space.graph, lambda _: 0.5, []).probe_sensitivity(space)


def test_the_dense_network_is_scored_once_for_free_and_keeps_its_mode(model: SmallNetwork, space: SearchSpace) -> None:
    modes: list[bool] = []
    model.train()

    def evaluate(network: nn.Module) -> float:
        modes.append(network.training)
        return 0.9

    evaluator = make_evaluator(model, space, evaluate=evaluate)
    assert evaluator.dense_accuracy() == evaluator.dense_accuracy() == 0.9
    assert modes == [False]
    assert model.training
    assert evaluator.evaluations_used == 0


def test_an_evaluate_function_may_change_the_networks_that_it_scores(model: SmallNetwork, space: SearchSpace) -> None:
    def changing(network: nn.Module) -> float:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(2)
        network.double()
        return 0.5

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluator = make_evaluator(model, space, evaluate=changing, few_images={0.5: changing})
    bits = CompressionPolicy({}, layers={"inner": LayerPolicy(weight_bits=8, act_bits=8)})

    assert evaluator.dense_accuracy() == evaluator.dense_accuracy(0.5) == 0.5
    evaluator.score(decode(np.zeros(space.n), space))
    evaluator.score(bits)
    evaluator.score(bits, fidelity=0.5)

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_a_resumed_search_repeats_no_evaluation_and_counts_the_same(
    model: SmallNetwork, space: SearchSpace, tmp_path: Path
) -> None:
    path = tmp_path / "journal.jsonl"
    wanted = plans(space, 6)
    uninterrupted = make_evaluator(model, space, journal=Journal(path), searcher="ppo", seed=1)
    first = [uninterrupted.score(policy) for policy in wanted[:3]]
    uninterrupted.score(wanted[0])
    checkpoint = uninterrupted.state_dict()
    later = [uninterrupted.score(policy) for policy in wanted[3:5]]
    written = path.read_bytes()

    evaluate = Counted(remaining_share(model))
    resumed = make_evaluator(model, space, journal=Journal(path), searcher="ppo", seed=1, evaluate=evaluate)
    resumed.load_state_dict(checkpoint)
    assert (resumed.evaluations_used, resumed.cache_hits) == (3, 1)
    assert resumed.seconds == sum(evaluation.seconds for evaluation in first)

    replayed = [resumed.score(policy) for policy in reversed(wanted[3:5])]

    assert replayed == later[::-1]
    assert [evaluation.seconds for evaluation in replayed] == [evaluation.seconds for evaluation in later[::-1]]
    assert not any(evaluation.cached for evaluation in replayed)
    assert evaluate.calls == 0
    assert path.read_bytes() == written
    assert resumed.evaluations_used == 5
    resumed.score(wanted[5])
    assert evaluate.calls == 1
    assert [entry.index for entry in Journal(path).entries()] == list(range(6))


def test_going_back_within_one_process_repeats_no_evaluation_either(model: SmallNetwork, space: SearchSpace) -> None:
    evaluate = Counted(remaining_share(model))
    evaluator = make_evaluator(model, space, evaluate=evaluate)
    wanted = plans(space, 3)
    evaluator.score(wanted[0])
    state = evaluator.state_dict()
    later = [evaluator.score(policy) for policy in wanted[1:]]
    evaluator.load_state_dict(state)
    assert evaluator.evaluations_used == 1
    assert [evaluator.score(policy) for policy in wanted[1:]] == later
    assert (evaluate.calls, evaluator.evaluations_used, len(evaluator.journal)) == (3, 3, 3)


def test_killed_before_the_first_checkpoint_the_whole_journal_is_replayed(
    model: SmallNetwork, space: SearchSpace, tmp_path: Path
) -> None:
    wanted = plans(space, 3)
    killed = make_evaluator(model, space, journal=Journal(tmp_path / "journal.jsonl"))
    for policy in wanted:
        killed.score(policy)
    evaluate = Counted(remaining_share(model))
    resumed = make_evaluator(model, space, journal=Journal(tmp_path / "journal.jsonl"), evaluate=evaluate)
    assert resumed.evaluations_used == 0
    for policy in wanted:
        resumed.score(policy)
    assert (evaluate.calls, resumed.evaluations_used) == (0, 3)


def test_searchers_sharing_a_journal_do_not_share_scores(model: SmallNetwork, space: SearchSpace) -> None:
    journal, policy = Journal(), plans(space, 1)[0]
    make_evaluator(model, space, journal=journal, searcher="ppo").score(policy)
    other = make_evaluator(model, space, journal=journal, searcher="cem")
    assert not other.score(policy).cached
    assert len(journal) == 2


def test_a_state_from_another_journal_is_refused(model: SmallNetwork, space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    message = (
        "the saved state refers to evaluation 0 of searcher 'ppo', seed 0, but the journal "
        f"'{path}' holds 0 of them; it is older than the checkpoint, or of another run"
    )
    with pytest.raises(ReplayError, match=f"^{re.escape(message)}$"):
        make_evaluator(model, space, journal=Journal(path), searcher="ppo").load_state_dict(
            {"handed_out": [0], "cache_hits": 0}
        )
