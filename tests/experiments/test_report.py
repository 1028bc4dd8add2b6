import re
from html.parser import HTMLParser

import pytest

from experiments.figures import Plan, keep_ratio_figure, pareto_front
from experiments.outcome import RunOutcome, amount, plain_lines, table_cells
from experiments.report import render_report, verdict

from .outcomes import outcome, plans, row


class Assets(HTMLParser):
    """Collects what a page would fetch, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def two_methods(**others: object) -> RunOutcome:
    return outcome(row("uniform", 0.7, 0.85), row("ppo", 0.8, 0.88), **others)


def test_report_fetches_nothing_and_is_well_formed() -> None:
    page = Assets()
    page.feed(render_report(two_methods(), plans(), "model: {}\n"))

    assert [target for target in page.fetched if not target.startswith("#")] == []
    assert page.open == []


def test_everything_that_a_user_names_is_escaped() -> None:
    nasty = "<script>alert('x')</script>$\\frac{1}{"
    named = row("ppo", 0.8, 0.88, keep_ratios={nasty: 0.5})

    page = render_report(outcome(named, model=nasty, data=nasty, command=nasty), plans(), nasty)

    assert "<script" not in page


def test_verdict_names_the_winner_whoever_it_is() -> None:
    text = verdict(outcome(row("uniform", 0.7, 0.85), row("cem", 0.81, 0.87), row("ppo", 0.8, 0.88)))

    assert text == (
        "Before fine-tuning cem is best with 81.00 % on the 750 test images, +11.00 points from uniform and -9.00 "
        "from the dense network. After fine-tuning ppo is best with 88.00 % on the 750 test images, +3.00 points from "
        "uniform and -3.00 from the dense network. One seed: differences of a few tenths of a point are within the "
        "spread between seeds."
    )


def test_without_a_test_split_validation_accuracy_is_shown_and_said_to_be() -> None:
    untested = row("ppo", 0.8, 0.88, test_accuracy=None, tuned_test_accuracy=None, validation_accuracy=0.75)

    text = verdict(outcome(untested, n_test=0))

    assert "ppo is best with 75.00 % on the 750 validation images" in text


def test_without_fine_tuning_nothing_is_said_of_it() -> None:
    text = verdict(outcome(row("ppo", 0.8, 0.0, tuned_test_accuracy=None)))

    assert "After fine-tuning" not in text


def test_table_shows_shares_of_the_dense_network() -> None:
    cells = table_cells(two_methods())[2]

    assert cells == [
        "ppo", "80.00 %", "88.00 %", "500 (50.0%)", "60 (60.0%)", "240B",
        "2.00 [1.90-2.10]", "1.00 [0.90-1.10]", "10", "20.0",
    ]  # fmt: skip


def test_plain_lines_are_aligned() -> None:
    assert plain_lines([["method", "x"], ["ppo", "100"]]) == ["method    x", "ppo     100"]


def test_report_of_one_method_without_fine_tuning_and_times_is_made() -> None:
    bare = row("uniform", 0.7, 0.0, tuned_test_accuracy=None, tuned_validation_accuracy=None, latencies=())
    dense_row = outcome().rows[0].model_copy(update={"latencies": ()})

    page = render_report(outcome(bare).model_copy(update={"rows": (dense_row, bare)}), [], "")

    assert "70.00 %" in page
    assert "Measured time" not in page


def test_keep_ratio_figure_names_groups_in_the_networks_order() -> None:
    figure = keep_ratio_figure([row("ppo", 0.8, 0.88, keep_ratios={"stem": 0.5, "body": 1.0, "head": 0.2})])

    # Text becomes outlines, whose comments hold what was written.
    assert re.findall(r"<!-- (stem|body|head) -->", figure) == ["stem", "body", "head"]


def test_pareto_front_holds_what_no_other_plan_beats_in_both() -> None:
    assert pareto_front([(5, 0.8), (3, 0.7), (4, 0.6), (5, 0.9), (9, 0.9), (1, 0.1)]) == [(1, 0.1), (3, 0.7), (5, 0.9)]


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (12_345, "12.35k"), (125_500_000, "125.5M")])
def test_amounts_are_short(count: int, text: str) -> None:
    assert amount(count) == text


def test_reports_of_equal_runs_are_equal() -> None:
    pages = [render_report(two_methods(), [*plans(), Plan("uniform", 2, 0.5, 400)], "a: 1") for _ in range(2)]

    assert pages[0] == pages[1]
