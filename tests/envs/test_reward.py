import math
import re

import pytest

from envs.reward import GalenReward, RewardError, accuracy_guaranteed_reward, compute_reward, resolve_reward


def test_without_a_budget_error_is_weighed_by_the_logarithm_of_cost() -> None:
    assert accuracy_guaranteed_reward(0.9, 1_000_000, None) == pytest.approx(-0.1 * math.log(1e6))
    assert accuracy_guaranteed_reward(1.0, 1_000_000, None) == 0


def test_the_default_depends_on_the_budget() -> None:
    assert resolve_reward(None, 100)(0.7, 90, 100) == 0.7
    assert resolve_reward(None, None) is accuracy_guaranteed_reward


def test_an_unknown_name_is_refused() -> None:
    message = r"^reward 'acc' is unknown; pass one of \['accuracy', 'accuracy_guaranteed', 'galen'\] or a function "
    with pytest.raises(ValueError, match=message):
        resolve_reward("acc", None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "0.5", None, True])
def test_a_users_reward_must_be_finite(bad: object) -> None:
    message = (
        f"the reward function '<lambda>' returned {bad!r} ({type(bad).__name__}) for accuracy 0.5 and cost 10; it "
    )
    with pytest.raises(RewardError, match=f"^{re.escape(message)}must return a finite float$"):
        compute_reward(lambda accuracy, cost, limit: bad, 0.5, 10, 20)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("cost", "beta", "reward"),
    [
        # A quarter over and a quarter under the target of 200 weigh alike.
        (250, -1.0, 0.9 - 0.25),
        (150, -1.0, 0.9 - 0.25),
        (200, -1.0, 0.9),
        (300, -0.1, 0.9 - 0.05),
        # The dense network at a target of a fifth: five times the target is four times off.
        (1000, -0.1, 0.9 - 0.4),
    ],
)
def test_galens_reward_falls_with_the_distance_from_the_target(cost: int, beta: float, reward: float) -> None:
    assert resolve_reward("galen", None, target=200, beta=beta)(0.9, cost, None) == pytest.approx(reward)


@pytest.mark.parametrize(("target", "limit", "found"), [(None, None, "no target"), (200, 500, "a budget")])
def test_galens_reward_needs_a_target_and_no_budget(target: int | None, limit: int | None, found: str) -> None:
    message = (
        f"the reward 'galen' aims at a target cost and takes no budget; found {found}: pass a target such as "
        "'20% latency', and budget none"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve_reward("galen", limit, target=target)


def test_a_beta_that_rewards_missing_the_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the reward 'galen' has target 200 and beta 0.5; they must lie above and "):
        GalenReward(200, 0.5)


def test_a_users_reward_that_fails_is_named() -> None:
    def ratio(accuracy: float, cost: int, limit: int | None) -> float:
        return accuracy / (cost - 10)

    message = "the reward function 'ratio' failed for accuracy 0.5 and cost 10 with ZeroDivisionError: float division "
    with pytest.raises(RewardError, match=f"^{message}by zero$"):
        compute_reward(ratio, 0.5, 10, 20)


def test_a_reward_that_names_itself_is_not_named_twice() -> None:
    def named(accuracy: float, cost: int, limit: int | None) -> float:
        raise RewardError("mine")  # noqa: EM101

    with pytest.raises(RewardError, match=r"^mine$"):
        compute_reward(named, 0.5, 10, 20)
