"""Finished networks with zeros on our own plan: prepared for the clock, and told layer by layer in the report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from torch import Tensor, nn

from latency.measure import Variant
from latency.runtimes import ONNXRUNTIME, PYTORCH, SPARSE, Artifact, LatencyError, Runtime, find_runtime, prepare_sparse
from pruning.kernels.plan import DENSE_FORMS
from pruning.sparse_network import SparseNetwork

from .outcome import DENSE, LayerForm, MethodOutcome, RunOutcome, significant, sparse_speed
from .progress import RunDisplay


def prepared_networks(networks: Mapping[str, nn.Module], x: Tensor, display: RunDisplay) -> dict[str, SparseNetwork]:
    """Networks as `sparsify` runs them, sparse or dense chosen layer by layer by the clock.

    What cannot be prepared is named on the display and left out.

    Args:
        networks: in evaluation mode, on the CPU, by name.
        x: their input.
        display: told what was left out.
    """
    prepared = {}
    try:
        find_runtime(SPARSE)
    except LatencyError as error:
        display.say(f"warning: zeros are not timed: {error}")
        return {}
    for name, network in networks.items():
        try:
            prepared[name] = prepare_sparse(network.eval(), (x,))
        except LatencyError as error:
            display.say(f"warning: {name} is not timed with its zeros: {error}")
    return prepared


def variants_of(
    networks: Mapping[str, nn.Module],
    onnx: Mapping[str, Path],
    prepared: Mapping[str, SparseNetwork],
    searched_for: Runtime | None = None,
) -> list[Variant]:
    """All that is timed in one run: by name, modules, ONNX files, and what `prepared_networks` made.

    The runtime that plans were searched for is timed too, if it is none of these three.
    """
    artifacts: dict[str, Mapping[str, Artifact]] = {PYTORCH: networks, ONNXRUNTIME: onnx, SPARSE: prepared}
    if searched_for is not None:
        artifacts.setdefault(searched_for.name, onnx if searched_for.takes == "onnx" else networks)
    return [Variant(name, runtime, artifact) for runtime, own in artifacts.items() for name, artifact in own.items()]


def layer_forms(network: SparseNetwork) -> tuple[LayerForm, ...]:
    """What was chosen for each layer, as results.json holds it."""
    return tuple(
        LayerForm(layer=layer.layer, form=layer.form, density=layer.density, stored=layer.stored, reason=layer.reason)
        for layer in network.report.layers
    )


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
