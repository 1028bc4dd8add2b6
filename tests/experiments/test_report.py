import re
import warnings
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from envs.journal import ClockReading
from experiments.figures import Plan, accuracy_figure, keep_ratio_figure, pareto_figure, pareto_front, shortened
from experiments.outcome import (
    Allowance,
    Latency,
    MethodOutcome,
    RunOutcome,
    amount,
    headings,
    missing_speedups,
    plain_lines,
    result_tables,
    significant,
    speed_notes,
    table_cells,
)
from experiments.report import render_report, verdict
from latency.measure import LatencyEntry

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


def test_what_the_clock_said_of_a_latency_budget_has_a_column_and_says_what_is_over() -> None:
    def read(measured: float) -> ClockReading:
        return ClockReading("ppo", "a plan", 0.49, measured, measured - 0.01, measured + 0.01, 60)

    timed = outcome(
        row("uniform", 0.7, 0.85, clock_readings=(read(0.6), read(0.48))),
        row("ppo", 0.8, 0.88, clock_readings=(read(0.52),)),
        row("cem", 0.8, 0.88),
        budget_kind="latency",
        dense_cost=1000,
    )
    column = headings(timed).index("latency on the clock")
    cells = ["", "48.0% (47.0% to 49.0%)", "52.0% (51.0% to 53.0%) over", "-"]
    assert [line[column] for line in table_cells(timed)] == cells
    assert RunOutcome.model_validate_json(timed.model_dump_json()) == timed
    page = render_report(timed, plans(), "")
    assert all(f"<td>{cell}</td>" in page for cell in cells)
    assert "latency on the clock" not in headings(two_methods())


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


def test_verdict_names_the_winner_on_validation_and_what_the_test_images_say_of_it() -> None:
    lucky = row("cem", 0.7, 0.85, test_accuracy=0.95, tuned_test_accuracy=0.95)
    chosen = row("ppo", 0.81, 0.88, test_accuracy=0.8, tuned_test_accuracy=0.87)

    text = verdict(outcome(row("uniform", 0.7, 0.85), lucky, chosen))

    assert text == (
        "Before fine-tuning ppo is best with 81.00 % on the 750 validation images, +11.00 points from uniform and "
        "-9.00 from the dense network; chosen by that, it has 80.00 % on the 750 test images, +10.00 points from "
        "uniform and -10.00 from the dense network. After fine-tuning ppo is best with 88.00 % on the 750 validation "
        "images, +3.00 points from uniform and -3.00 from the dense network; chosen by that, it has 87.00 % on the "
        "750 test images, +2.00 points from uniform and -4.00 from the dense network. One seed: differences of a few "
        "tenths of a point are within the spread between seeds."
    )


def test_the_network_on_the_card_is_the_best_on_validation_with_its_test_accuracy() -> None:
    lucky = row("cem", 0.7, 0.85, tuned_test_accuracy=0.95, macs=100)
    told = outcome(lucky, row("ppo", 0.8, 0.88, tuned_test_accuracy=0.87, macs=400))

    page = render_report(told, plans(), "")

    assert "<b>87.00 %</b><span>ppo when fine-tuned, best on validation</span>" in page
    assert "<b>60.0%</b><span>multiply-adds removed" in page
    assert '<td class="best">88.00 %</td>' in page
    assert '<td class="best">95.00 %</td>' not in page


def test_methods_that_are_alike_on_validation_are_all_named() -> None:
    alike = row("cem", 0.8, 0.88, test_accuracy=0.79), row("ppo", 0.8, 0.86)

    text = verdict(outcome(*alike))

    assert "cem and ppo are best, all alike, with 80.00 % on the 750 validation images, -10.00 from the dense" in text
    assert "it has 79.00 % and 80.00 % on the 750 test images. After" in text


def test_without_a_test_split_validation_accuracy_is_shown_and_said_to_be() -> None:
    untested = row("ppo", 0.8, 0.88, test_accuracy=None, tuned_test_accuracy=None, validation_accuracy=0.75)

    text = verdict(outcome(untested, n_test=0))

    assert "ppo is best with 75.00 % on the 750 validation images" in text


def test_table_shows_the_size_of_onnx_files_where_there_are_some() -> None:
    found = outcome(row("ppo", 0.8, 0.88, onnx_bytes=500), row("cem", 0.8, 0.88))
    found = found.model_copy(update={"rows": (found.rows[0].model_copy(update={"onnx_bytes": 2000}), *found.rows[1:])})
    column = headings(found).index("ONNX file")

    assert headings(found)[column - 1] == "bytes"
    assert [cells[column] for cells in table_cells(found)] == ["2kB", "500B (25.0%)", "-"]
    assert "ONNX file" not in headings(two_methods())


def test_without_fine_tuning_nothing_is_said_of_it() -> None:
    text = verdict(outcome(row("ppo", 0.8, 0.0, tuned_validation_accuracy=None, tuned_test_accuracy=None)))

    assert "After fine-tuning" not in text


def test_table_shows_shares_of_the_dense_network() -> None:
    cells = table_cells(two_methods())[2]

    assert cells == [
        "ppo", "80.00 %", "80.00 %", "88.00 %", "88.00 %", "500 (50.0%)", "60 (60.0%)", "240B (60.0%)",
        "2.0 [1.9-2.1]", "1.0 [0.90-1.1]", "10", "20.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("n_test", "heads"),
    [
        (750, ["validation accuracy", "test accuracy", "validation, fine-tuned", "test, fine-tuned", "MACs"]),
        (0, ["validation accuracy", "validation, fine-tuned", "MACs"]),
    ],
)
def test_headings_say_which_split_an_accuracy_is_of(n_test: int, heads: list[str]) -> None:
    assert headings(two_methods(n_test=n_test))[1 : len(heads) + 1] == heads


def test_without_fine_tuning_there_are_no_columns_of_it() -> None:
    told = outcome(row("ppo", 0.8, 0.0, tuned_validation_accuracy=None, tuned_test_accuracy=None))

    assert headings(told)[1:4] == ["validation accuracy", "test accuracy", "MACs"]
    assert all(len(cells) == len(headings(told)) for cells in table_cells(told))


def timed(lower_ms: float, median_ms: float, upper_ms: float) -> Latency:
    return Latency(
        runtime="eager", median_ms=median_ms, lower_quartile_ms=lower_ms, upper_quartile_ms=upper_ms, n_runs=30
    )


def measured(dense: Latency, pruned: Latency) -> RunOutcome:
    """A run of one method with these times."""
    whole = outcome(row("ppo", 0.8, 0.88, latencies=(pruned,)))
    return whole.model_copy(update={"rows": (whole.rows[0].model_copy(update={"latencies": (dense,)}), whole.rows[1])})


def test_speed_that_is_clear_is_told_as_a_ratio() -> None:
    found = measured(timed(2.9, 3.0, 3.1), timed(1.4, 1.5, 1.6))

    assert speed_notes(found) == []
    assert "<b>2.0x</b><span>measured speed, eager</span>" in render_report(found, plans(), "")


def test_times_that_overlap_give_no_ratio_but_a_reason() -> None:
    found = measured(timed(1.41, 3.0, 13.5), timed(0.79, 1.5, 7.89))
    page = render_report(found, plans(), "")

    assert speed_notes(found) == [
        "Times on eager: the quartiles of ppo lie on both sides of the dense network's. The machine was too noisy, or "
        "the saving too small, to tell them apart."
    ]
    assert "<b>unclear</b>" in page
    assert "2.0x" not in page


def entry(model: str, *times_ms: float) -> LatencyEntry:
    lower, median, upper = np.percentile(times_ms, [25, 50, 75]).tolist()
    return LatencyEntry(model, "eager", median, lower, upper, len(times_ms), 0.0, times_ms)


def test_ratios_are_taken_round_by_round() -> None:
    # The machine gets three times slower and the network is always a tenth faster: times overlap, ratios do not.
    dense = entry("dense", 1.0, 1.5, 2.0, 2.5, 3.0)
    found = Latency.of(entry("ppo", 0.9, 1.35, 1.8, 2.25, 2.7), dense)

    assert found.ratio == pytest.approx((0.9, 0.9, 0.9))
    assert found.speed("ppo", Latency.of(dense, None)).verdict == "faster"


def test_a_network_that_is_slower_is_called_so_in_table_and_report() -> None:
    found = measured(timed(1.9, 2.0, 2.1), timed(2.3, 2.4, 2.5).model_copy(update={"ratio": (1.15, 1.2, 1.25)}))
    page = render_report(found, plans(), "")

    note = "Slower than the dense network on eager: ppo takes 1.2 of the dense network's time (quartiles 1.15 to 1.25)."
    assert speed_notes(found) == [note]
    assert escape(note) in page
    assert "<b>0.83x</b><span>measured speed, eager: slower than the dense network, as happens where" in page
    eager = found.model_copy(
        update={
            "rows": tuple(
                row.model_copy(
                    update={
                        "latencies": tuple(t.model_copy(update={"runtime": "pytorch-eager"}) for t in row.latencies)
                    }
                )
                for row in found.rows
            )
        }
    )
    assert [cells[headings(eager).index("eager ms")] for cells in table_cells(eager)] == [
        "2.0 [1.9-2.1]",
        "2.40 [2.30-2.50] slower",
    ]


def test_speedups_that_are_missing_are_named_with_ratio_and_quartiles() -> None:
    def with_ratio(name: str, *ratio: float) -> MethodOutcome:
        return row(name, 0.8, 0.88, latencies=(timed(1, 2, 3).model_copy(update={"ratio": ratio}),))

    rows = with_ratio("cem", 0.5, 0.51, 0.53), with_ratio("ppo", 1.1, 1.2, 1.3), with_ratio("ddpg", 0.9, 0.98, 1.02)
    whole = outcome(*rows, row("random", 0.8, 0.88, latencies=()))
    dense = whole.rows[0].model_copy(update={"latencies": (timed(1, 2, 3),)})

    assert missing_speedups(whole.model_copy(update={"rows": (dense, *whole.rows[1:])})) == [
        "ppo on eager: slower, 1.2 of the dense network's time (quartiles 1.1 to 1.3)",
        "ddpg on eager: cannot be told from the dense network, 0.98 of the dense network's time (quartiles 0.9 to "
        "1.02)",
        "random: not timed on any runtime",
    ]


@pytest.mark.parametrize(
    ("latency", "text"),
    [
        (timed(1.41, 1.494, 13.5), "1.5 [1.4-14]"),
        (timed(1.481, 1.4942, 1.52), "1.49 [1.48-1.52]"),
        (timed(1203.4, 1234.5, 1250), "1230 [1200-1250]"),
        (timed(0.0171, 0.02, 0.0305), "0.020 [0.017-0.030]"),
    ],
)
def test_times_have_no_more_digits_than_they_are_worth(latency: Latency, text: str) -> None:
    assert str(latency) == text


def test_numbers_are_rounded_to_significant_digits() -> None:
    assert [significant(value, 2) for value in (0.0123, 1.25, 99.6, 1234.0)] == ["0.012", "1.2", "100", "1200"]


def test_equal_numbers_of_evaluations_are_claimed_only_where_they_were_equal() -> None:
    equal = outcome(row("cem", 0.8, 0.88, evaluations=39.5), row("ppo", 0.8, 0.88, evaluations=39))
    uneven = outcome(
        row("cem", 0.8, 0.88, evaluations=14, plans=9),
        row("ppo", 0.8, 0.88, evaluations=10, plans=5),
        granted_evaluations=14,
    )

    assert "All searching methods start from the same plan and spend the same number of evaluations." in render_report(
        equal, plans(), ""
    )
    assert (
        "All searching methods start from the same plan, but did not spend the same number of evaluations, of 14 "
        "granted: cem 14 (9 different plans), ppo 10 (5 different plans)."
    ) in render_report(uneven, plans(), "")


def test_panel_close_to_the_limit_is_left_out_where_no_plan_is() -> None:
    far = [Plan("ppo", 1, 0.8, 300), Plan("ppo", 2, 0.7, 400)]
    shown, hidden = (render_report(two_methods(), some, "") for some in (plans(), far))

    assert "<!-- close to the limit -->" in shown
    assert "<!-- close to the limit -->" not in hidden
    assert "No plan costs nearly as much as the limit allows" in hidden


def test_run_without_a_budget_shows_no_limit() -> None:
    page = render_report(two_methods(budget="no budget", cost_limit=1000), [*plans(), Plan("ppo", 11, 0.9, 1000)], "")

    assert "<!-- limit -->" not in page
    assert "<!-- close to the limit -->" not in page


def test_methods_that_tie_are_all_marked_as_best() -> None:
    page = render_report(outcome(row("cem", 0.8, 0.87), row("ppo", 0.8, 0.88), row("ddpg", 0.7, 0.86)), [], "")

    assert page.count('<td class="best">80.00 %</td>') == 2
    assert page.count('<td class="best">88.00 %</td>') == 1


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


@pytest.mark.parametrize("figure", [accuracy_figure, lambda plans: pareto_figure(plans, outcome())])
@pytest.mark.parametrize("lowest", [0.5, 0.95, 0.99, 0.998])
def test_accuracies_on_an_axis_differ_and_end_at_100_percent(
    figure: Callable[[list[Plan]], str], lowest: float
) -> None:
    svg = figure([Plan("cem", i, float(accuracy), 495 + i) for i, accuracy in enumerate(np.linspace(lowest, 1, 5), 1)])

    # Text is drawn as paths, with what it says beside them.
    for axis in re.findall(r'<g id="matplotlib.axis_\d*[02468]">(.*?)(?=<g id="matplotlib.axis_|$)', svg, re.DOTALL):
        ticks = [float(text) for text in re.findall(r"<!-- ([\d.]+)% -->", axis)]
        assert ticks == sorted(set(ticks)) and len(ticks) > 2 and max(ticks) <= 100


def test_pareto_front_holds_what_no_other_plan_beats_in_both() -> None:
    assert pareto_front([(5, 0.8), (3, 0.7), (4, 0.6), (5, 0.9), (9, 0.9), (1, 0.1)]) == [(1, 0.1), (3, 0.7), (5, 0.9)]


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (12_345, "12.35k"), (125_500_000, "125.5M")])
def test_amounts_are_short(count: int, text: str) -> None:
    assert amount(count) == text


def test_reports_of_equal_runs_are_equal() -> None:
    pages = [render_report(two_methods(), [*plans(), Plan("uniform", 2, 0.5, 400)], "a: 1") for _ in range(2)]

    assert pages[0] == pages[1]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("spent", "was"), [(400, "over"), (600, "well within")])
def test_what_the_clock_leaves_of_a_budget_is_told_and_over_is_what_was_asked(
    spent: int, was: str, *, is_first: bool
) -> None:
    reading = ClockReading("ppo", "a plan", 0.4, 0.46, 0.45, 0.47, 60)
    first = {"budget_kind": "latency", "dense_cost": 1000, "cost_limit": spent, "asked_limit": 500}
    latency = Allowance(kind="latency", dense_cost=1000, limit=spent, asked_limit=500)
    second = {"dense_cost": 2000, "cost_limit": 1000, "further_budgets": (latency,)}
    told = outcome(row("ppo", 0.8, 0.88, clock_readings=(reading,)), **(first if is_first else second))

    assert (
        f"The start plan was {was} the budget on the clock, so searches spent {spent / 1000:.1%} of the dense latency "
        "by the table in place of 50.0%."
    ) in render_report(told, plans(), "")
    assert "46.0% (45.0% to 47.0%)" in table_cells(told)[1]


@pytest.mark.parametrize("width", [60, 80, 400])
def test_a_terminal_gets_the_table_in_as_many_parts_as_it_needs(width: int) -> None:
    told, console = two_methods(), Console(width=width, file=StringIO())

    tables = result_tables(told, width)
    console.print(*tables, sep="\n")

    assert (len(tables) == 1) == (width == 400)
    assert all([str(cell) for cell in table.columns[0].cells] == ["dense", "uniform", "ppo"] for table in tables)
    assert [str(column.header) for table in tables for column in table.columns[1:]] == headings(told)[1:]
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_table_shows_names_as_they_are() -> None:
    console = Console(width=400, file=StringIO(), force_terminal=True)

    console.print(*result_tables(two_methods(data="photos [old]"), 400))

    assert "photos [old]" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("n_methods", [1, 3])
def test_long_names_leave_room_for_the_keep_ratios(n_methods: int) -> None:
    names = [f"backbone.stages.{i}.blocks.residual_function.convolutions.{i}.conv2" for i in range(20)]
    rows = [row(name, 0.7, 0.8, keep_ratios=dict.fromkeys(names, 0.5)) for name in ("ppo", "cem", "random")[:n_methods]]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = keep_ratio_figure(rows)

    assert shortened(names[0], 36) in figure


@pytest.mark.parametrize(
    ("name", "length", "text"), [("layer1.0.conv1", 14, "layer1.0.conv1"), ("layer1.0.conv1", 9, "laye…onv1")]
)
def test_long_names_lose_their_middle(name: str, length: int, text: str) -> None:
    assert shortened(name, length) == text
