"""Bindings between channels that show only at other widths, and work that is no image's."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph, TraceError
from pruning.policy import CompressionPolicy
from pruning.proof import leave_refuted_dense, prove
from pruning.surgery import apply_policy, mask_policy

from .networks import EXAMPLE, seeded


def differs(model: nn.Module, graph: NetworkGraph, kept: dict[str, int]) -> float:
    """How far the network that keeps so many units of these groups is from the silenced one, on its scale."""
    sizes = {name: graph.group(name).size for name in kept}
    policy = CompressionPolicy({name: tuple(range(n)) for name, n in kept.items()}, sizes)
    with torch.no_grad():
        small, masked = (make(model, graph, policy).eval()(EXAMPLE) for make in (apply_policy, mask_policy))
    return float((small - masked).abs().max() / masked.abs().max())


def every_uneven_plan_holds(model: nn.Module, graph: NetworkGraph) -> bool:
    generator = torch.Generator().manual_seed(0)
    plans = [
        {group.name: 1 + int(torch.randint(group.size, (1,), generator=generator)) for group in graph.prunable}
        for _ in range(8)
    ]
    return all(differs(model, graph, plan) < 1e-4 for plan in plans)


class InHalves(nn.Module):
    """Parts of one map go apart, at a place that follows from its width or is held by forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b = (nn.Conv2d(9 if how == "parts" and i else 3 if how == "parts" else 6, 8, 1) for i in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        width = x.shape[1]
        if self.how == "parts":
            one, other = x.split([width // 4, width - width // 4], 1)
        else:
            one, other = torch.split(x, width // 2 if self.how == "half" else 6, dim=1)
        out: Tensor = self.head((self.a(one) + self.b(other)).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize("how", ["half", "parts", "held"])
def test_parts_of_a_map_may_shrink_apart(how: str) -> None:
    model = seeded(lambda: InHalves(how))

    graph = capture(model, EXAMPLE)

    assert sum(group.size for group in graph.prunable) == 12 + 8
    assert every_uneven_plan_holds(model, graph)
    assert leave_refuted_dense(model, graph, EXAMPLE).prunable == graph.prunable


class ViewedLikeAnother(nn.Module):
    """The gate is viewed with the width of the map that it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.down, self.head = nn.Conv2d(8, 4, 1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        n, width, rows, columns = x.shape
        gate = self.gate(x).view(n, width, rows * columns).softmax(-1).view(n, width, rows, columns)
        out: Tensor = self.head(self.down(gate).view(-1, 256))
        return out


@pytest.mark.parametrize("kept", [{"stem": 5}, {"gate": 5}, {"stem": 3, "gate": 6}, {"stem": 6, "down": 1}])
def test_a_width_taken_from_another_group_is_rewritten_whichever_of_them_shrinks(kept: dict[str, int]) -> None:
    model = seeded(ViewedLikeAnother)
    graph = capture(model, EXAMPLE)
    assert {group.name for group in graph.prunable} == {"stem", "gate", "down"}

    assert differs(model, graph, kept) < 1e-4


class WithDropout(nn.Module):
    """Dropout as a function that is told the mode, and a view that holds a width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=3)
        self.inner, self.last = Drops(), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.inner(self.first(x).relu())).relu()
        out: Tensor = functional.dropout(self.last(x.view(-1, 32)), 0.4, self.training)
        return out


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, training=self.training)


def test_a_rewritten_copy_follows_the_mode_where_forward_did() -> None:
    model = seeded(WithDropout)
    graph = capture(model, EXAMPLE)
    assert {group.name for group in graph.prunable} == {"first", "second"}
    assert differs(model, graph, {"first": 4, "second": 5}) < 1e-4

    policy = CompressionPolicy({"second": (0, 3, 4)}, {"second": 8})
    small = apply_policy(model.train(), graph, policy)
    assert not torch.equal(small(EXAMPLE), small(EXAMPLE))
    small.eval()
    assert torch.equal(small(EXAMPLE), small(EXAMPLE))
    # Each part has a mode of its own.
    small.train()
    small.inner.eval()
    is_dropped = [(small(EXAMPLE) == 0).float().mean() for _ in range(9)]
    assert any(is_dropped)
    small.eval()
    small.inner.train()
    assert not torch.equal(small(EXAMPLE), small(EXAMPLE))


class Biased(nn.Module):
    """Attention whose biases a small network computes from positions, one for each head."""

    def __init__(self, *, by_position: bool = False) -> None:
        super().__init__()
        self.by_position = by_position
        self.stem, self.qkv = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 3 * 4 * 6)
        self.of_positions = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.out, self.head = nn.Linear(24, 16), nn.Linear(16, 5)
        self.register_buffer("places", torch.randn(16, 16, 2, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).view(len(x), 16, 3, 4, 6).permute(2, 0, 3, 1, 4)
        bias = self.of_positions(self.places).permute(2, 0, 1)[None]
        x = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out: Tensor = self.head(self.out(x.transpose(1, 2).flatten(2)).mean(1))
        return out


def test_what_is_added_to_the_products_of_a_head_goes_with_the_head() -> None:
    model = seeded(Biased)

    graph = capture(model, EXAMPLE)

    members = {member.tensor for member in graph.group("qkv").members}
    assert {"qkv.weight", "of_positions.2.weight", "out.weight"} <= members
    assert graph.group("qkv").size == 4
    assert every_uneven_plan_holds(model, graph)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_work_on_no_input_counts_once_whatever_the_batch(batch: int) -> None:
    model = seeded(Biased)
    graph = capture(model, EXAMPLE[:1].repeat(batch, 1, 1, 1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.of_positions(model.places)

    counted = {operator.name: operator.macs for operator in graph.operators}
    assert counted["of_positions.0"] == 16 * 16 * 2 * 8
    assert 2 * (counted["of_positions.0"] + counted["of_positions.2"]) == counter.get_total_flops()
    assert counted["qkv"] == 16 * 16 * 72


class Grouped(nn.Module):
    """Several heads of queries share one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.keys = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 24), nn.Linear(16, 12)
        self.out, self.head = nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        query = self.query(x).view(x.shape[0], 16, 4, 6).transpose(1, 2)
        keys = self.keys(x).view(x.shape[0], 16, 2, 6).transpose(1, 2)
        x = functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
        out: Tensor = self.head(self.out(x.transpose(1, 2).flatten(2)).mean(1))
        return out


def test_heads_that_share_keys_go_with_them_and_are_counted() -> None:
    model = seeded(Grouped)

    graph = capture(model, EXAMPLE)

    assert {group.name: group.size for group in graph.prunable} == {"stem": 16, "query": 2, "out": 16}
    members = {(member.tensor, *member.indices.shape) for member in graph.group("query").members}
    assert {("query.weight", 2, 12), ("keys.weight", 2, 6), ("out.weight", 2, 12)} <= members
    assert next(op.macs for op in graph.operators if op.kind == "attention") == 4 * 16 * 16 * (6 + 6)
    assert every_uneven_plan_holds(model, graph)


class Rotary(nn.Module):
    """Attention whose heads share the frequencies of their positions, and the scale of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.rand(3))
        self.stem, self.scale = nn.Conv2d(3, 16, 2, stride=2), nn.Parameter(torch.rand(6))
        self.query, self.keys, self.values = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12)
        self.out, self.head = nn.Linear(24, 16), nn.Linear(16, 5)

    def turned(self, x: Tensor) -> Tensor:
        x = self.scale * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        angles = torch.arange(x.shape[2], device=x.device)[:, None].float() * self.frequencies.to(x.device)
        angles = torch.cat([angles, angles], -1)
        half = torch.cat([-x[..., 3:], x[..., :3]], -1)
        return x * angles.cos() + half * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        query, keys, values = (
            layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.query, self.keys, self.values)
        )
        x = functional.scaled_dot_product_attention(self.turned(query), self.turned(keys), values, enable_gqa=True)
        out: Tensor = self.head(self.out(x.transpose(1, 2).flatten(2)).mean(1))
        return out


def test_what_all_heads_share_stays_whole() -> None:
    model = seeded(Rotary)

    graph = capture(model, EXAMPLE)

    assert {group.name: group.size for group in graph.prunable} == {"stem": 16, "query": 2, "out": 16}
    assert not {"scale", "frequencies"} & {member.tensor for group in graph.groups for member in group.members}
    assert every_uneven_plan_holds(model, graph)
    assert all(proof.holds for proof in prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0)))


class ScaledHeads(nn.Module):
    """Heads that are summed position by position, and share a scale of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale, self.head = nn.Conv2d(3, 24, 1), nn.Parameter(torch.rand(6)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.stem(x).mean((2, 3)).unflatten(1, (4, -1))
        out: Tensor = self.head((heads * self.scale).sum(1))
        return out


def test_what_all_heads_share_goes_with_a_position_of_each() -> None:
    model = seeded(ScaledHeads)

    graph = capture(model, EXAMPLE)

    assert {group.name: group.size for group in graph.prunable} == {"stem": 6}
    assert ("scale", 6, 1) in {(member.tensor, *member.indices.shape) for member in graph.group("stem").members}
    assert every_uneven_plan_holds(model, graph)


class ScaledTwice(nn.Module):
    """The scale of a norm multiplies another branch, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.norm, self.mix, self.head = nn.BatchNorm2d(8), nn.Conv2d(16, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        normed, scaled = self.norm(self.a(x)), self.b(x) * self.norm.weight.view(1, -1, 1, 1)
        out: Tensor = self.head(self.mix(torch.cat([normed, scaled], 1).relu()).mean((2, 3)))
        return out


def test_a_parameter_of_a_layer_that_is_used_elsewhere_too_binds_both() -> None:
    model = seeded(ScaledTwice)
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(0.5, 2, 8))

    graph = capture(model, EXAMPLE)

    assert {"a.weight", "b.weight", "norm.weight"} <= {member.tensor for member in graph.group("a").members}
    assert every_uneven_plan_holds(model, graph)


class Upsampled(nn.Module):
    """A decoder: a depthwise transposed convolution, resizing in one or three dimensions, and tiles."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        transposed = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        self.mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[dims]
        self.stem, self.up = convolution(3, 8, 1), transposed(8, 8, 2, stride=2, groups=8)
        self.mix, self.last = convolution(16, 6, 1), convolution(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.logsigmoid(self.up(self.stem(x).relu()))
        whole = x.mean(tuple(range(2, x.dim())), keepdim=True)
        x = torch.cat([x, whole.repeat(1, 1, *x.shape[2:])], 1)
        resized: Tensor = functional.interpolate(self.mix(x).relu(), scale_factor=2, mode=self.mode)
        out: Tensor = self.last(resized).flatten(2).amax(2)
        return out


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_decoders_are_offered_in_any_dimension(dims: int) -> None:
    model, x = seeded(lambda: Upsampled(dims)), torch.randn(2, 3, *(4,) * dims)

    graph = capture(model, x)

    assert {group.name: group.size for group in graph.prunable} == {"stem": 8, "mix": 6}
    assert {"up.weight", "up.bias", "mix.weight"} <= {member.tensor for member in graph.group("stem").members}
    assert next(op for op in graph.operators if op.name == "up").macs == 8 * math.prod((8,) * dims)
    assert all(proof.holds for proof in prove(model, graph, x, generator=torch.Generator().manual_seed(1)))


class Noisy(nn.Module):
    """Draws noise in evaluation too, and is told its strength by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor, strength: Tensor) -> Tensor:
        x = self.stem(x + strength * torch.randn_like(x)).relu()
        out: Tensor = self.head(self.next(x).mean((2, 3)))
        return out


def test_noise_and_numbers_refute_nothing() -> None:
    model, inputs = seeded(Noisy), (EXAMPLE, torch.tensor(0.3))
    before = torch.get_rng_state()

    graph = leave_refuted_dense(model, capture(model, inputs), inputs)

    assert {group.name for group in graph.prunable} == {"stem", "next"}
    assert torch.equal(torch.get_rng_state(), before)


class Spectrum(nn.Module):
    """Hears a signal by its spectrum, whose window lies on the processor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stft(x, 16, window=self.window, return_complex=True).abs()[:, None]
        out: Tensor = self.head(self.second(self.first(x).relu()).mean((2, 3)))
        return out


def test_a_spectrum_is_no_hindrance() -> None:
    model, x = seeded(Spectrum), torch.randn(2, 200, generator=torch.Generator().manual_seed(0))

    graph = capture(model, x)

    assert {group.name for group in graph.prunable} == {"first", "second"}
    assert all(proof.holds for proof in prove(model, graph, x, generator=torch.Generator().manual_seed(0)))


def test_layers_whose_weight_is_computed_are_named() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 6, 1)),
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(4, 5, 1),
    )

    graph = capture(model, EXAMPLE)

    why = (
        "its weight is computed from other tensors; torch.nn.utils.parametrize.remove_parametrizations (or "
        "remove_weight_norm, remove_spectral_norm) makes it a parameter that can be sliced"
    )
    assert {name: graph.skipped.get(name) for name in "02"} == {"0": why, "2": why}
    assert {group.name for group in graph.prunable} == {"3"}


class Standardized(nn.Conv2d):
    """Standardizes its filters, each over all that it reads, by a batch norm."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, self.gain, training=True).reshape_as(self.weight)
        return functional.conv2d(input, weight, self.bias)


def test_channels_that_a_standardized_convolution_reads_or_writes_stay() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Standardized(8, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 5, 1))
    )

    graph = capture(model, EXAMPLE)

    assert [group.name for group in graph.prunable] == ["2"]
    assert graph.group("0").reason == "is read by a convolution whose weight is computed in '1'"
    assert graph.skipped["1"] == "its weight is computed from other tensors"
    assert all(proof.holds for proof in prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0)))


class InFullPrecision(nn.Module):
    """Leaves autocast for a part of its pass, and looks at half of the columns by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)
        self.register_buffer("mask", torch.arange(6) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = self.first(x).relu()[..., self.mask]
        out: Tensor = self.head(self.second(x[:, :, self.mask.nonzero()[0] :]).relu().mean((2, 3)))
        return out


def test_autocast_and_masks_with_values_are_no_hindrance() -> None:
    model = seeded(InFullPrecision)
    make = torch.autocast.__init__

    graph = capture(model, EXAMPLE)

    assert {group.name: group.size for group in graph.prunable} == {"first": 8, "second": 6}
    assert every_uneven_plan_holds(model, graph)
    assert torch.autocast.__init__ is make


class Queries(nn.Module):
    """Queries that are repeated for the batch, which comes second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.of_queries, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 16), nn.Linear(16, 5)
        self.queries = nn.Parameter(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.of_queries(self.queries[:, None].repeat(1, len(x), 1))
        keys = self.stem(x).flatten(2).permute(2, 0, 1)
        found = functional.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (queries, keys, keys)))
        out: Tensor = self.head(found.mean(1))
        return out


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_queries_repeated_for_the_batch_count_for_one_image(batch: int) -> None:
    graph = capture(seeded(Queries), EXAMPLE[:1].repeat(batch, 1, 1, 1))

    assert next(operator.macs for operator in graph.operators if operator.name == "of_queries") == 10 * 16 * 16


class AsksForWidths(nn.Module):
    """Adds two maps, or goes around a projection, where they happen to have the same width."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.project, self.head = nn.Conv2d(12, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.b(x).relu()
        if self.how == "projects":
            y = y + (x if x.shape == y.shape else self.project(x))
        elif x.shape == y.shape:
            y = y + x
        out: Tensor = self.head(y.mean((2, 3)))
        return out


@pytest.mark.parametrize("how", ["projects", "adds"])
def test_what_happens_at_equal_widths_alone_keeps_one_of_them_dense(how: str) -> None:
    model = seeded(lambda: AsksForWidths(how))

    graph = capture(model, EXAMPLE)

    assert [group.name for group in graph.prunable] == ["a"]
    assert " with fewer channels it computes something else (first at '" in graph.group("b").reason
    assert every_uneven_plan_holds(model, graph)


class JoinsEarly(nn.Module):
    """Two maps are joined in another way where they have the same width; layers follow that have no part in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 24, 1), nn.Conv2d(40, 8, 1)
        self.later = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x).relu()
        x = self.join(torch.cat([a + b if a.shape == b.shape else b, a], 1))
        out: Tensor = self.head(self.later(x).mean((2, 3)))
        return out


def test_groups_that_have_no_part_in_a_failure_are_offered() -> None:
    graph = capture(seeded(JoinsEarly), EXAMPLE)

    assert [group.name for group in graph.groups if not group.is_prunable] == ["b", "head"]


class FollowsTheBatch(nn.Module):
    """Folds channels into the batch or into space, beside a pad that has to be rewritten."""

    def __init__(self, *, into_batch: bool) -> None:
        super().__init__()
        self.into_batch = into_batch
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x) + functional.pad(self.a(x), (0, 0, 0, 0, 4, 4))
        n, c, h, w = y.shape
        folded = y.view(n * c, h * w).softmax(1) if self.into_batch else y.reshape(n, c * h * w).sigmoid()
        out: Tensor = self.head((y * folded.view(n, c, h, w)).sum((2, 3)))
        return out


@pytest.mark.parametrize("into_batch", [True, False])
@pytest.mark.parametrize("n_examples", [1, 2])
def test_sizes_that_forward_computes_rightly_stay_computed(into_batch: bool, n_examples: int) -> None:
    model = seeded(lambda: FollowsTheBatch(into_batch=into_batch))
    graph = leave_refuted_dense(model, capture(model, EXAMPLE[:n_examples]), EXAMPLE[:n_examples])
    assert [group.size for group in graph.prunable] == [8, 8]

    policy = CompressionPolicy(
        {group.name: (0, 2, 3, 5, 7) for group in graph.prunable}, dict.fromkeys(["b", "b#2"], 8)
    )
    small, masked = apply_policy(model, graph, policy).eval(), mask_policy(model, graph, policy).eval()
    for x in (torch.randn(batch, 3, *size) for batch, size in ((1, (8, 8)), (3, (8, 8)), (2, (12, 10)))):
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)


class LeavesOut(nn.Module):
    """In training a layer is left out now and then; a view holds a width."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw
        self.stem, self.block, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.view(x.shape[0], 16, -1).view(x.shape[0], 16, 8, 8)
        if not (self.training and self.draw() < 0.1):
            x = x + self.block(x).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: float(torch.rand(())), lambda: float(np.random.rand())],  # noqa: NPY002
    ids=["python", "torch", "numpy"],
)
def test_a_forward_that_draws_is_not_frozen_in_a_trace(draw: Callable[[], float]) -> None:
    assert capture(seeded(lambda: LeavesOut(draw)), EXAMPLE).rewrites == ()
    assert capture(seeded(lambda: LeavesOut(lambda: 0.5)), EXAMPLE).rewrites


class Combined(nn.Module):
    """Branches are stacked and combined, or heads normalised."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.branches = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.norm, self.mix, self.head = nn.LayerNorm(4), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (branch(x) for branch in self.branches)
        if self.how == "norm":
            heads = (one + other).view(x.shape[0], 2, 4, 64).transpose(2, 3)
            y = self.norm(heads).transpose(2, 3).reshape(one.shape)
        elif self.how == "softmax":
            y = (torch.stack([one, other], 1).softmax(1) * torch.stack([other, one], 1)).sum(1)
        elif self.how == "maxout":
            y = (one + other).view(x.shape[0], 4, 2, 8, 8).amax(2).repeat_interleave(2, 1)
        else:
            y = getattr(torch.stack([one, other]), self.how)(0)
        out: Tensor = self.head(self.mix(y.relu()).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize(
    ("how", "units"), [("sum", 8), ("mean", 8), ("amax", 8), ("softmax", 8), ("maxout", 4), ("norm", 2)]
)
def test_what_is_combined_goes_together(how: str, units: int) -> None:
    model = seeded(lambda: Combined(how))

    graph = capture(model, EXAMPLE)

    assert {group.name: group.size for group in graph.prunable} == {"branches.0": units, "mix": 6}
    assert {"branches.0.weight", "branches.1.weight"} <= {m.tensor for m in graph.group("branches.0").members}
    assert every_uneven_plan_holds(model, graph)


class NonLocal(nn.Module):
    """Attention of one head between all positions (Wang et al., 2018, figure 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.key = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.value, self.out, self.head = nn.Conv2d(8, 7, 1), nn.Conv2d(7, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        similar = (self.query(x).flatten(2).transpose(1, 2) @ self.key(x).flatten(2)).softmax(-1)
        seen = (similar @ self.value(x).flatten(2).transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.head((x + self.out(seen.reshape(len(x), seen.shape[1], 6, 6))).mean((2, 3)))
        return out


def test_attention_of_one_head_loses_channels() -> None:
    model = seeded(NonLocal)

    graph = capture(model, EXAMPLE)

    assert {group.name: group.size for group in graph.prunable} == {"stem": 8, "query": 6, "value": 7}
    assert every_uneven_plan_holds(model, graph)


class Spatial(nn.Module):
    """A map goes through what works on space."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        around = self.how == "circular"
        self.next = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular" if around else "zeros")
        self.mix, self.head = nn.Conv2d(72, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if self.how == "sampled":
            places = torch.linspace(-1, 1, 8)
            grid = torch.stack(torch.meshgrid(places, places**3, indexing="ij"), -1)
            x = functional.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)
        elif self.how == "over channels":
            x = functional.max_pool3d(x, (3, 1, 1), 1, (1, 0, 0))
        elif self.how == "in steps over channels":
            x = functional.max_pool3d(x, (2, 1, 1), (2, 1, 1)).repeat_interleave(2, 1)
        if self.how == "unfolded":
            y = self.mix(functional.unfold(x, 3, padding=1).unflatten(2, (8, 8)))
        else:
            y = self.next(x)
        out: Tensor = self.head(y.relu().mean((2, 3)))
        return out


@pytest.mark.parametrize(
    ("how", "offered"),
    [
        ("circular", {"stem", "next"}),
        ("sampled", {"stem", "next"}),
        ("unfolded", {"stem", "mix"}),
        ("over channels", {"next"}),
        ("in steps over channels", {"next"}),
    ],
)
def test_operators_in_space_keep_channels_apart(how: str, offered: set[str]) -> None:
    model = seeded(lambda: Spatial(how))

    graph = capture(model, EXAMPLE)

    assert {group.name for group in graph.prunable} == offered
    assert every_uneven_plan_holds(model, graph)


class Turned(nn.Module):
    """A view that holds since element-wise operators keep how their operand lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(functional.gelu(self.conv(x).permute(0, 2, 3, 1)), 0.1, self.training)
        out: Tensor = self.head((x + x * 2).permute(0, 3, 1, 2).view(len(x), -1))
        return out


def test_maps_lie_in_memory_as_they_do_on_values() -> None:
    model = seeded(Turned)

    graph = capture(model, EXAMPLE)

    assert {group.name for group in graph.prunable} == {"conv"}
    assert every_uneven_plan_holds(model, graph)


def test_a_lazy_layer_has_to_be_called_first() -> None:
    with pytest.raises(TraceError) as caught:
        capture(nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()), EXAMPLE)
    assert str(caught.value) == (
        "'0.weight' has no size before a first call; call the network once on an example, then pass it"
    )


class TurnedLinear(nn.Module):
    """A linear layer with its weight the other way round, which holds how many features it writes."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(len(x), -1, self.n_out)


class Decoder(nn.Module):
    """Causal attention that appends to an empty cache, and a perceptron of turned linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 12), nn.LayerNorm(12)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.wide, self.narrow, self.head = TurnedLinear(12, 48), TurnedLinear(48, 12), nn.Linear(12, 5)
        self.register_buffer("cache", torch.zeros(0))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (layer(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (torch.cat([self.cache, each], dim=-2) for each in (k, v))
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        y = self.wide(self.norm(x))
        y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y.pow(3.0))))
        out: Tensor = self.head(x + self.narrow(y))
        return out


def test_layers_with_the_weight_the_other_way_round_are_offered() -> None:
    model, tokens = seeded(Decoder), torch.arange(14).reshape(2, 7)

    graph = capture(model, tokens)

    assert {group.name: group.size for group in graph.prunable} == {"q": 3, "wide": 48}
    assert graph.macs == 7 * (4 * 12 * 12 + 2 * 12 * 48 + 12 * 5) + 7 * 7 * 24
    assert all(proof.holds for proof in prove(model, graph, tokens, generator=torch.Generator().manual_seed(0)))
