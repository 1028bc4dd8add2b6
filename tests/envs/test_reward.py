import math

import pytest

from envs.reward import accuracy_guaranteed_reward, compute_reward, resolve_reward


def test_without_a_budget_error_is_weighed_by_the_logarithm_of_cost() -> None:
    assert accuracy_guaranteed_reward(0.9, 1_000_000, None) == pytest.approx(-0.1 * math.log(1e6))
    assert accuracy_guaranteed_reward(1.0, 1_000_000, None) == 0


def test_the_default_depends_on_the_budget() -> None:
    assert resolve_reward(None, 100)(0.7, 90, 100) == 0.7
    assert resolve_reward(None, None) is accuracy_guaranteed_reward


def test_an_unknown_name_is_refused() -> None:
    message = r"^reward 'acc' is unknown; pass one of \['accuracy', 'accuracy_guaranteed'\] or a function "
    with pytest.raises(ValueError, match=message):
        resolve_reward("acc", None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "0.5", None, True])
def test_a_users_reward_must_be_finite(bad: object) -> None:
    with pytest.raises(ValueError, match=r"the reward function returned .* it must return a finite float$"):
        compute_reward(lambda accuracy, cost, limit: bad, 0.5, 10, 20)  # type: ignore[arg-type,return-value]
