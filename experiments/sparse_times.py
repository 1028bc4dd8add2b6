"""Finished networks with zeros on our own plan, told layer by layer in the report."""

from __future__ import annotations

from html import escape

from latency.runtimes import SPARSE
from pruning.kernels.plan import DENSE_FORMS

from .outcome import DENSE, MethodOutcome, RunOutcome, significant, sparse_speed


def sparse_sentences(outcome: RunOutcome) -> list[str]:
    """How fast each network with zeros is on our plan, against the dense network on its fastest runtime."""
    times = outcome.row(DENSE).latencies
    dense = min(times, key=lambda latency: latency.median_ms)
    sentences = []
    for row in outcome.rows:
        own = next((latency for latency in row.latencies if latency.runtime == SPARSE), None)
        if own is None or row.method == DENSE:
            continue
        speed = sparse_speed(row.method, own, times)
        told = (
            f"{significant(1 / speed.ratio, 2)}x as fast" if speed.verdict != "unclear" else "too close to tell apart"
        )
        sentences.append(f"{row.method}: {own} ms through sparsify, dense {dense} ms on {dense.runtime}, {told}.")
    return sentences


def sparse_section(outcome: RunOutcome) -> str:
    """The section of the report, empty if no network was timed so."""
    rows = [row for row in outcome.rows if row.layer_forms and row.method != DENSE]
    if not rows:
        return ""
    text = (
        "ONNX Runtime and PyTorch compute with zeros as with any other weight. secateur.sparsify skips them where that "
        "is faster, and this is what it chose; each form of a layer was timed alone. "
        f"{' '.join(sparse_sentences(outcome))}"
    )
    tables = "".join(_table(row) for row in rows)
    return f"<section><h2>Sparse or dense, layer by layer</h2><p>{escape(text)}</p>{tables}</section>"


def _table(row: MethodOutcome) -> str:
    lines = []
    for layer in row.layer_forms:
        cells = (layer.form, f"{layer.density:.1%}", f"{layer.stored:.1%}", layer.reason)
        lines.append(f"<tr><td>{escape(layer.layer)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    n_sparse = sum(layer.form not in DENSE_FORMS for layer in row.layer_forms)
    title = f"{row.method}: {n_sparse} of {len(row.layer_forms)} layers run sparse"
    heads = "".join(f"<th>{name}</th>" for name in ("layer", "form", "not zero", "stored", "why"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<details><summary>{escape(title)}</summary><div class="scroll">{table}</div></details>'
