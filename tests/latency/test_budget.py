import re

import numpy as np
import pytest

from latency.budget import Budget, BudgetError, in_words, least_in_words, read_budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50%", Budget(share=0.5)),
        ("0.5", Budget(share=0.5)),
        (0.25, Budget(share=0.25)),
        ("30% params", Budget(kind="params", share=0.3)),
        ("62.7M macs", Budget(absolute=62_700_000)),
        ("125M flops", Budget(absolute=62_500_000)),
        ("400k params", Budget(kind="params", absolute=400_000)),
        ("  1.5G MACs ", Budget(absolute=1_500_000_000)),
        ("1000 macs", Budget(absolute=1000)),
        ("1.5 MB", Budget(kind="bytes", absolute=1_500_000)),
        ("25% bytes", Budget(kind="bytes", share=0.25)),
        ("800 b", Budget(kind="bytes", absolute=800)),
        ("2T bops", Budget(kind="bops", absolute=2 * 10**12)),
        ("3.5 ms", Budget(kind="latency", absolute=3_500_000)),
        ("0.5ms", Budget(kind="latency", absolute=500_000)),
        ("800 us", Budget(kind="latency", absolute=800_000)),
        ("800 \u00b5s", Budget(kind="latency", absolute=800_000)),
        ("800 \u03bcs", Budget(kind="latency", absolute=800_000)),
        ("35% latency", Budget(kind="latency", share=0.35)),
    ],
)
def test_parse(text: str | float, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "half",
            "budget 'half' cannot be read; write a share of the dense network's cost such as '50%' or '30% params', "
            "or a number such as '62.7M macs', '125M flops', '400k params', '1.5 MB', '20G bops' or '3.5 ms'",
        ),
        (
            "150%",
            "budget '150%' is a share of 1.5 of the dense network's cost; it must lie above 0 and at most 1 (100%)",
        ),
        ("0", "budget '0' is a share of 0 of the dense network's cost; it must lie above 0 and at most 1 (100%)"),
        (
            "62.7M",
            "budget '62.7M' is above 1 and has no unit; write '62.7M macs', '62.7M flops', '62.7M params', "
            "'62.7M bytes', '62.7M bops' or a share such as '50%'",
        ),
        *(
            (
                text,
                f"budget '{text}' is larger than any number that can be counted with; pass less, or none for no budget",
            )
            for text in ("1e999 macs", "1e400 ms")
        ),
        ("3 latency", "budget '3 latency' is a latency above 1 without a unit of time; write '3 ms', or a share"),
        *(
            (
                text,
                f"budget '{text}' is less than one of what is counted; nothing is left of a network that costs nothing",
            )
            for text in ("0M macs", "1.5 flops")
        ),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "same"), [("50\u00a0%", "50%"), ("3.5\u00a0MS", "3.5 ms")])
def test_parse_takes_spaces_that_do_not_break(text: str, same: str) -> None:
    assert Budget.parse(text) == Budget.parse(same)


@pytest.mark.parametrize("text", ["1e308T macs", "3 m\u017f", "5\u0660%", "1 \u212amacs", "0 ms", "1e-9 us"])
def test_parse_refuses_what_nothing_can_cost(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.parse(text)


def test_limit_of_a_share_does_not_lose_a_unit_to_float_error() -> None:
    assert Budget(share=0.29).limit(100) == 29
    assert Budget(share=1).limit(10**15 + 1) == 10**15 + 1


def test_budget_above_the_dense_cost_is_refused() -> None:
    message = (
        "the budget of 2,000 macs is above what the dense network costs, 1,000 macs; there is nothing to remove, "
        "so pass less"
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        Budget(absolute=2000).limit(1000)


def test_share_and_number_exclude_each_other() -> None:
    with pytest.raises(
        ValueError, match=r"a budget is either a share or an absolute number, got share=0.5, absolute=7"
    ):
        Budget(share=0.5, absolute=7)


def test_a_decimal_comma_is_no_second_budget() -> None:
    message = (
        "'1,5 MB': '1' has neither a unit nor a percent sign; commas separate budgets, so write numbers without them, "
        "and each share as '50% macs'"
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        read_budgets("1,5 MB")


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.float64(0.5), np.array([0.5])[0]])
def test_a_share_may_be_any_number(number: float) -> None:
    assert read_budgets(number) == (Budget(share=0.5),)


@pytest.mark.parametrize("cost", [7, 1_234_449, 1_234_500, 12_345_678_901, 999_999_999_999])
def test_the_least_that_is_advised_can_be_met(cost: int) -> None:
    text, _, share = least_in_words(cost, 3 * cost, "latency").partition(" (")

    assert cost <= (Budget.parse(text.replace(",", "")).absolute or 0) <= 1.001 * cost + 1
    assert cost <= Budget.parse(share.rstrip(")")).limit(3 * cost) <= 1.003 * cost


def test_long_latencies_are_written_out() -> None:
    assert in_words(12_345_678_901, "latency") == "12,346 ms"
    assert in_words(1_234_567, "latency") == "1.235 ms"
