import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from envs.action import decode, start_plan
from envs.evaluator import (
    EvaluateError,
    EvaluationBudgetSpent,
    ReplayError,
    check_accuracy,
    check_calibration_is_like_training,
    check_validation_is_unseen,
)
from envs.journal import Journal
from envs.space import SearchSpace
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy
from pruning.quantize import ActQuantizer

from .conftest import SmallNetwork, images, make_evaluator, remaining_share


def plans(space: SearchSpace, n: int, seed: int = 0) -> list[CompressionPolicy]:
    rng = np.random.default_rng(seed)
    found: dict[str, CompressionPolicy] = {}
    while len(found) < n:
        policy = decode(rng.uniform(-1, 1, space.n), space)
        found[policy.digest] = policy
    return list(found.values())


class Counted:
    """An evaluate function that counts its calls."""

    def __init__(self, evaluate: Callable[[nn.Module], float]) -> None:
        self.evaluate, self.calls = evaluate, 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        return self.evaluate(model)


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
            "evaluate returned None of type NoneType; it must return the accuracy as a float in [0, 1] (for a tensor, "
            "return tensor.item())",
        ),
        (
            torch.tensor(0.5),
            "evaluate returned tensor(0.5000) of type Tensor; it must return the accuracy as a float in [0, 1] (for a "
            "tensor, return tensor.item())",
        ),
    ],
)
def test_what_is_no_accuracy_is_named_and_not_counted(
    model: SmallNetwork, space: SearchSpace, returned: object, message: str
) -> None:
    evaluator = make_evaluator(model, space, evaluate=lambda _: returned)
    with pytest.raises(EvaluateError, match=f"^{re.escape(message)}$"):
        evaluator.score(CompressionPolicy({}))
    assert evaluator.evaluations_used == len(evaluator.journal) == 0


def test_numpy_numbers_are_accuracies() -> None:
    assert check_accuracy(np.float32(0.5)) == 0.5


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


def test_validation_as_good_as_training_is_warned_about() -> None:
    text = check_validation_is_unseen(0.998, 0.996, 1000)
    assert text is not None
    assert text.startswith(
        "the network scores 99.60% on the 1,000 validation images and 99.80% on 1,000 training images"
    )


def test_validation_clearly_below_training_is_not() -> None:
    assert check_validation_is_unseen(0.99, 0.90, 1000) is None
    # 0.90 against 0.88 on 1,000 images is z = 1.43; on 10,000 it is 4.5.
    assert check_validation_is_unseen(0.90, 0.88, 1000) is not None
    assert check_validation_is_unseen(0.90, 0.88, 10_000) is None


def test_calibration_unlike_training_is_warned_about() -> None:
    assert check_calibration_is_like_training(0.8968, 0.862, 5000) == (
        "with batch-norm statistics re-estimated the dense network scores 86.20% in place of 89.68%, so every plan "
        "will score below what it is worth. Prepare the calibration images as those it was trained on: the same "
        "normalisation and augmentation, and a few hundred of them"
    )
    assert check_calibration_is_like_training(0.8968, 0.889, 5000) is None
    # Four of 100 images are lost by chance.
    assert check_calibration_is_like_training(0.5, 0.46, 100) is None
