import json
from pathlib import Path

import pytest

from pruning.policy import CompressionPolicy, PolicyError

POLICY = CompressionPolicy({"a": (0, 2), "b.0": (1,)}, {"a": 4, "b.0": 2})


def test_policy_survives_its_file(tmp_path: Path) -> None:
    POLICY.save(tmp_path / "policy.json")

    assert CompressionPolicy.load(tmp_path / "policy.json") == POLICY
    assert POLICY.keep_ratios() == {"a": 0.5, "b.0": 0.5}


def test_digest_depends_on_the_decision_and_not_on_its_order() -> None:
    same = CompressionPolicy({"b.0": (1,), "a": (0, 2)}, {"b.0": 2, "a": 4})
    other = CompressionPolicy({"b.0": (0,), "a": (0, 2)}, {"b.0": 2, "a": 4})

    assert POLICY.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "'p.json' is not a compression policy: 'format' must be 'secateur-policy'"),
        ({"version": 2}, "'p.json' has version 2; this release reads version 1"),
        ({"extra": 1}, "'p.json' has the unknown entry 'extra'; a policy has exactly 'format', 'version' and 'groups'"),
        ({"groups": []}, "'p.json' has no object 'groups'; a policy has exactly 'format', 'version' and 'groups'"),
        (
            {"groups": {"a": {"size": 4, "kept": [1.5]}}},
            "group 'a' of 'p.json' must be an object with an integer 'size' and a list of integers 'kept'",
        ),
        (
            {"groups": {"a": {"size": 4, "kept": [3, 1]}}},
            "the policy keeps [3, 1] of the 4 units of 'a'; kept units are ascending, without repeats, "
            "between 0 and 3, and at least one",
        ),
    ],
)
def test_bad_policy_is_refused_in_words(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(POLICY.to_json()), **change})

    with pytest.raises(PolicyError) as caught:
        CompressionPolicy.from_json(text, "'p.json'")
    assert str(caught.value) == message


def test_text_that_is_not_json_names_the_line() -> None:
    with pytest.raises(
        PolicyError, match=r"^the policy is not JSON \(line 1: Expecting value\); a policy is written by"
    ):
        CompressionPolicy.from_json("nonsense")
