"""report.html: one file with the table, the figures and the record of a run; opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from latency.budget import in_words
from latency.runtimes import SPARSE

from .config import METHODS, ONE_SHOT
from .figures import COLOURS, Plan, accuracy_figure, keep_ratio_figure, latency_figure, near_limit, pareto_figure
from .outcome import (
    ANOTHER_DEVICE,
    DENSE,
    MethodOutcome,
    RunOutcome,
    Split,
    amount,
    headings,
    percent,
    significant,
    sparse_speed,
    speed_notes,
    table_cells,
)
from .progress import count, duration
from .sparse_times import sparse_section


def render_report(outcome: RunOutcome, plans: Sequence[Plan], configuration: str) -> str:
    """The report as HTML.

    Args:
        outcome: what results.json holds.
        plans: every plan evaluated, in the order of the journal.
        configuration: the run's YAML.
    """
    template = Template((Path(__file__).parent / "templates" / "report.html").read_text())
    return template.substitute(
        title=escape(f"{outcome.model} with {outcome.budget}"),
        subtitle=escape(
            f"{outcome.data}; seed {outcome.seed}; {outcome.machine.date}; commit {outcome.machine.commit}"
        ),
        cards=_cards(outcome),
        verdict=escape(verdict(outcome)),
        warnings=_warnings(outcome),
        table=_result_table(outcome),
        figures="".join([*_figure_sections(outcome, plans), sparse_section(outcome)]),
        cost_note=escape(_cost_note(outcome)),
        cost_table=_cost_table(outcome),
        provenance=_provenance(outcome),
        configuration=escape(configuration),
    )


_SLOWER = (
    ": slower than the dense network, as happens where channel counts are no multiples of 4 or 8; --rounding 8 or a "
    "budget of latency avoids it"
)


def verdict(outcome: RunOutcome) -> str:
    """Who won on the validation images, in a sentence that holds whoever it is, and what the test images say of it."""
    sentences = []
    for stage, tuned in (("Before fine-tuning", False), ("After fine-tuning", True)):
        best = outcome.best(tuned=tuned)
        if not best:
            continue
        names = " and ".join(row.method for row in best)
        verb = "is best" if len(best) == 1 else "are best, all alike,"
        text = f"{stage} {names} {verb} with {_standing(outcome, best, 'validation', tuned)}"
        if outcome.n_test:
            text += f"; chosen by that, it has {_standing(outcome, best, 'test', tuned)}"
        sentences.append(text + ".")
    sentences.append("One seed: differences of a few tenths of a point are within the spread between seeds.")
    return " ".join(sentences)


def _standing(outcome: RunOutcome, best: Sequence[MethodOutcome], split: Split, tuned: bool) -> str:
    """Accuracy of the best on a split, and how far it is from the uniform plan's and the dense network's."""
    reached = [value for row in best if (value := row.accuracy(split, tuned=tuned)) is not None]
    text = f"{' and '.join(dict.fromkeys(map(percent, reached)))} on the {outcome.splits[split]:,} {split} images"
    if len(set(reached)) != 1:
        return text
    others = {row.method: row.accuracy(split, tuned=tuned) for row in outcome.rows if row not in best}
    distances = [
        f"{100 * (reached[0] - other):+.2f} {words}"
        for method, words in (("uniform", "points from uniform"), (DENSE, "from the dense network"))
        if (other := others.get(method)) is not None
    ]
    return f"{text}, {' and '.join(distances)}" if distances else text


def _cards(outcome: RunOutcome) -> str:
    dense = outcome.row(DENSE)
    tuned = outcome.is_tuned
    best = outcome.best(tuned=tuned)[0]
    kind = "when fine-tuned" if tuned else "before fine-tuning"
    *_, (split, n_images) = outcome.splits.items()
    cards = [
        (percent(dense.accuracy(split, tuned=False)), f"dense, on {n_images:,} {split} images"),
        (percent(best.accuracy(split, tuned=tuned)), f"{best.method} {kind}, best on validation"),
        (f"{1 - best.macs / dense.macs:.1%}", f"multiply-adds removed ({amount(best.macs)} left)"),
        (f"{1 - best.params / dense.params:.1%}", f"parameters removed ({amount(best.params)} left)"),
    ]
    times = {latency.runtime: latency for latency in best.latencies}
    for before in dense.latencies:
        if (after := times.get(before.runtime)) is None:
            continue
        if before.runtime == SPARSE:
            speed = sparse_speed(best.method, after, dense.latencies)
        else:
            speed = after.speed(best.method, before)
        label = f"measured speed, {speed.runtime}"
        label += f" against the dense network on {speed.dense_runtime}" if speed.dense_runtime else ""
        label += f", {ANOTHER_DEVICE}" if outcome.elsewhere else ""
        if speed.verdict == "unclear":
            cards.append(("unclear", f"{label}: the times overlap with the dense network's"))
        else:
            slower = _SLOWER if speed.verdict == "slower" else ""
            cards.append((f"{significant(1 / speed.ratio, 2)}x", f"{label}{slower}"))
    return "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in cards
    )


def _warnings(outcome: RunOutcome) -> str:
    """A section with what the run warned of; empty if it did not."""
    if not outcome.warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in outcome.warnings)
    return f"<section><h2>Warnings</h2><ul>{items}</ul></section>"


def _result_table(outcome: RunOutcome) -> str:
    heads = headings(outcome)
    best = {
        heads.index(heading): {row.method for row in outcome.best(tuned=tuned)}
        for heading, tuned in (("validation accuracy", False), ("validation, fine-tuned", True))
        if heading in heads
    }
    body = []
    for cells in table_cells(outcome):
        method = cells[0]
        marked = "".join(
            f'<td class="best">{escape(cell)}</td>' if method in best.get(column, ()) else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(cells[1:], start=1)
        )
        body.append(
            f'<tr class="{"dense" if method == DENSE else ""}"><td>{_key(method)}{escape(method)}</td>{marked}</tr>'
        )
    return _html_table(heads, body)


def _figure_sections(outcome: RunOutcome, plans: Sequence[Plan]) -> list[str]:
    rows = [row for row in outcome.rows if row.keep_ratios]
    sections = []
    if plans:
        sections.append(
            _section(
                "Accuracy per evaluation",
                "The reward where nothing else was asked for. Dots are candidates, lines the highest so far, dashed "
                "lines the methods that propose a single plan. "
                f"{_comparison(outcome)}",
                accuracy_figure([plan for plan in plans if plan.method in METHODS]),
            )
        )
    if rows:
        sections.append(
            _section(
                "What each method keeps",
                "Share of the channels kept in each group, in the network's order; then, where they are decided, the "
                "share of the weights and of 32 bits in each layer.",
                keep_ratio_figure(rows),
            )
        )
    if plans:
        sections.append(
            _section(
                "Accuracy against cost",
                "Every plan evaluated, sensitivity probes included. A plan on the front is beaten by none in both."
                f"{_close_note(outcome, plans)}",
                pareto_figure(plans, outcome),
            )
        )
    timed = [row for row in outcome.rows if row.latencies]
    if timed:
        sections.append(
            _section(
                "Measured time",
                " ".join(
                    [
                        f"CPU, {count(outcome.timed_threads, 'thread')}, all networks of one runtime in turn. "
                        "Multiply-adds are not time: small layers, memory traffic and the runtime decide how much of "
                        "the saving arrives.",
                        *speed_notes(outcome),
                    ]
                ),
                latency_figure(timed),
            )
        )
    return sections


def _comparison(outcome: RunOutcome) -> str:
    """On what terms the searching methods are compared: equal numbers of evaluations, if they were equal."""
    if outcome.has_one_plan:
        return "Everything on offer keeps the budget: there is one plan, and nothing was searched for."
    searching = [row for row in outcome.rows if row.method not in (DENSE, *ONE_SHOT)]
    if len(searching) < 2:
        return ""
    most = max(row.evaluations for row in searching)
    text = "All searching methods start from the same plan"
    # The finalists count pro rata, so that equal grants may differ by less than one.
    if all(row.evaluations > most - 1 for row in searching):
        asked = outcome.granted_evaluations
        early = f", {most:.4g} of {asked} granted: all ended early" if asked and most < asked - 1 else ""
        return f"{text} and spend the same number of evaluations{early}."
    spent = ", ".join(f"{row.method} {row.evaluations:.4g} ({row.plans} different plans)" for row in searching)
    granted = f", of {outcome.granted_evaluations} granted" if outcome.granted_evaluations else ""
    why = "A method that proposes little but known plans ends early."
    return f"{text}, but did not spend the same number of evaluations{granted}: {spent}. {why}"


def _close_note(outcome: RunOutcome, plans: Sequence[Plan]) -> str:
    quantized = f" {outcome.bits_note[0].upper()}{outcome.bits_note[1:]}." if outcome.bits_note else ""
    for budget in outcome.budgets:
        if budget.asked_limit is None:
            continue
        spent, asked = budget.limit / budget.dense_cost, budget.asked / budget.dense_cost
        was = "over" if spent < asked else "well within"
        return (
            f"{quantized} The start plan was {was} the budget on the clock, so searches spent {spent:.1%} of the dense "
            f"latency by the table in place of {asked:.1%}."
        )
    if quantized or not outcome.has_budget or near_limit(plans, outcome.cost_limit):
        return quantized
    over = "another budget" if outcome.further_budgets else "it"
    return f" No plan costs nearly as much as the limit allows: one rounding step more would be over {over}."


def _cost_note(outcome: RunOutcome) -> str:
    note = (
        "An evaluation is one candidate: built, batch norms re-estimated, scored. Finalists count pro rata; plans "
        "proposed again are not scored again and count nothing."
    )
    if outcome.probe_evaluations:
        note += (
            f" The sensitivity probes were made once, in {duration(outcome.probe_seconds)}; they count as "
            f"{outcome.probe_evaluations:.4g} evaluations for each method that uses them."
        )
    return note


def _cost_table(outcome: RunOutcome) -> str:
    heads = [
        "method",
        "evaluations",
        "different plans",
        "proposed again",
        "wall time",
        "s an evaluation",
        "outside evaluating",
    ]
    body = []
    for row in outcome.rows:
        if row.method == DENSE:
            continue
        each = f"{row.seconds_evaluating / row.evaluations:.3f}" if row.evaluations else "-"
        share = f"{row.overhead:.1%}" if row.overhead is not None and row.method not in ONE_SHOT else "-"
        plans = str(row.plans or "-")
        cells = [f"{row.evaluations:.4g}", plans, str(row.cache_hits), duration(row.seconds), each, share]
        body.append(
            f"<tr><td>{_key(row.method)}{escape(row.method)}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"
        )
    return _html_table(heads, body)


def _provenance(outcome: RunOutcome) -> str:
    machine = outcome.machine
    facts = {
        "command": outcome.command,
        "seed": str(outcome.seed),
        "date": machine.date,
        "commit": machine.commit,
        "processor": f"{machine.processor}, {machine.cores} cores",
        "device, threads": f"{machine.device}, {machine.threads}",
        "system": f"{machine.system}, Python {machine.python}",
        "packages": ", ".join(f"{name} {version}" for name, version in machine.packages.items()),
        **({"continued": "; ".join(machine.differences(outcome.timed_on))} if outcome.timed_on else {}),
        "limit": f"{', '.join(in_words(b.asked, b.kind) for b in outcome.budgets)} ({outcome.budget})",
        **({"latency table": str(outcome.device)} if outcome.device else {}),
        "images": f"{outcome.n_validation:,} validation, {outcome.n_test:,} test",
    }
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _section(title: str, text: str, svg: str) -> str:
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p><figure>{labelled}</figure></section>"


def _html_table(heads: Sequence[str], body: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _key(method: str) -> str:
    return f'<span class="key" style="background:{COLOURS.get(method, "#000000")}"></span>'
