"""What capture says of forwards that fail, or lie, at other widths than their own."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graph_encoder.capture import capture
from graph_encoder.network import TraceError
from graph_encoder.resize import Failure, holds_smaller_widths
from graph_encoder.symbolic import symbolic_trace
from pruning.proof import prove

from .networks import EXAMPLE, seeded


class Asserting(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        assert x.shape[1] == self.width, "the width changed"
        return x


class AssertingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Asserting(8)
        self.mix = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.block(x)).mean((2, 3)))
        return out


def test_assert_on_a_width_keeps_its_group_dense_and_names_the_module() -> None:
    graph = capture(AssertingNet(), EXAMPLE)

    assert [group.name for group in graph.prunable] == ["mix"]
    reason = graph.group("block.conv").reason
    assert reason == "forward of 'block' holds a channel count: AssertionError: the width changed"
    assert graph.skipped["block.conv"] == reason


class SqueezeExcite(nn.Module):
    """Scales each channel, by a view of a number of channels that may be written down."""

    def __init__(self, width: int, written: int | None) -> None:
        super().__init__()
        self.reduce, self.expand, self.written = nn.Linear(width, 3), nn.Linear(3, width), written

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(self.reduce(x.mean((2, 3))).relu()).sigmoid()
        if self.written is None:
            return x * scale[:, :, None, None]
        # What reads a size as text cannot be traced, and so not be rewritten.
        return x * scale.view(int(str(len(x))), self.written, 1, 1)


class SqueezeExciteNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width + 4, 1) for width in (3, 7, 11))
        self.gates = nn.ModuleList([SqueezeExcite(7, None), SqueezeExcite(11, 11), SqueezeExcite(15, 15)])
        self.head = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, gate in zip(self.convs, self.gates, strict=True):
            x = gate(conv(x).relu())
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_modules_of_one_class_are_blamed_each_for_what_it_holds() -> None:
    graph = capture(SqueezeExciteNet(), EXAMPLE)

    assert "convs.0" in [group.name for group in graph.prunable]
    for number, width in (1, 11), (2, 15):
        reason = graph.group(f"convs.{number}").reason
        assert reason.startswith(f"forward of 'gates.{number}' holds a channel count: shape '[2, {width}, 1, 1]' is ")


class TwoNumbers(nn.Module):
    """Where one number is met, the layer that reads what it went into fails, and another one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.third, self.fourth = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = int(str(len(x)))
        y = self.third(self.second(self.first(x)).relu().view(n, 8, x.shape[2], -1))
        assert y.shape[1] == 10, "the width changed"
        out: Tensor = self.head(self.fourth(y).mean((2, 3)))
        return out


def test_layers_around_two_numbers_are_not_blamed_for_them() -> None:
    graph = capture(TwoNumbers(), EXAMPLE)

    assert [group.name for group in graph.prunable] == ["first", "fourth"]
    assert graph.group("second").reason.startswith(
        "forward of 'third' holds a channel count: an input with 8 channels meets a convolution for "
    )
    reason = graph.group("third").reason
    assert reason == "forward of 'the network' holds a channel count: AssertionError: the width changed"


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x).sigmoid()


class Checked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        torch._assert(y.shape[1] == 8, "the width changed")
        return y


class CheckedAndViewed(nn.Module):
    """A trace is needed for the view, and one group has to stay all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.gate = Gate()
        self.checked = Checked()
        self.mix = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.checked(self.gate(self.stem(x))))
        out: Tensor = self.head(y.mean((2, 3)).view(-1, 16))
        return out


def test_a_failure_in_the_trace_keeps_only_the_group_to_blame_dense() -> None:
    graph = capture(seeded(CheckedAndViewed), EXAMPLE)

    assert [group.name for group in graph.prunable] == ["stem", "mix"]
    reason = graph.group("checked.conv").reason
    assert reason == "forward of 'checked' holds a channel count: AssertionError: the width changed"


def test_operators_of_a_trace_are_named_after_their_modules() -> None:
    graph = capture(seeded(CheckedAndViewed), EXAMPLE)

    assert graph.rewrites
    assert "gate.mul" in [operator.name for operator in graph.operators]


class KeepsItsScale(nn.Module):
    """Keeps what it makes of a parameter, as tables of positions are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.scale = nn.Parameter(torch.linspace(1, 2, 8))
        self.head = nn.Linear(8, 5)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        device = str(x.device)
        if device not in self.kept:
            self.kept[device] = self.scale.view(-1, 1, 1)
        out: Tensor = self.head((self.conv(x) * self.kept[device]).mean((2, 3)))
        return out


def test_what_forward_keeps_of_one_width_is_not_met_by_another() -> None:
    model = seeded(KeepsItsScale)

    graph = capture(model, EXAMPLE)

    assert [group.name for group in graph.prunable] == ["conv"]
    assert all(proof.holds for proof in prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0)))


def test_symbolic_trace_leaves_nothing_behind() -> None:
    model = seeded(KeepsItsScale)

    assert symbolic_trace(model) is not None
    assert model.kept == {}


class KeepsItsScaleInEvaluation(KeepsItsScale):
    def forward(self, x: Tensor) -> Tensor:
        y = (self.conv(x) * self.scale_on(x.device)).mean((2, 3)).view(-1, 8)
        torch._assert(y.ndim == 2, f"expected 2 dimensions, not {y.ndim}")
        out: Tensor = self.head(y)
        return out

    def scale_on(self, device: torch.device) -> Tensor:
        if self.training:
            return self.scale.view(-1, 1, 1)
        return self.kept.setdefault(str(device), self.scale.view(-1, 1, 1))


def test_what_is_kept_in_evaluation_alone_does_not_stop_a_trace() -> None:
    model = seeded(KeepsItsScaleInEvaluation)

    graph = capture(model, EXAMPLE)

    assert [group.name for group in graph.prunable] == ["conv"]
    assert graph.rewrites
    assert all(proof.holds for proof in prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0)))


class OneMayShrink(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(x) for conv in self.convs]
        assert sum(each.shape[1] == 8 for each in maps) >= 3, "too many widths changed"
        return torch.cat(maps, 1)


def test_no_groups_are_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[frozenset[int]] = []

    def counted(*args: Any) -> Failure | None:
        tried.extend(args[3:])
        return holds_smaller_widths(*args)

    monkeypatch.setattr("graph_encoder.capture.holds_smaller_widths", counted)

    graph = capture(nn.Sequential(OneMayShrink(), nn.Conv2d(32, 5, 1)), EXAMPLE)

    assert len(graph.prunable) == 1
    assert len(tried) == len(set(tried))


def test_any_exception_of_forward_becomes_a_trace_error_that_names_it() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table: dict[str, Tensor] = {"a": x}
            return table["b"]

    with pytest.raises(TraceError, match=r"^'0' cannot be captured: KeyError: 'b'\. The forward pass was given"):
        capture(nn.Sequential(Looks()), EXAMPLE)


class KeywordView(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(216, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        if self.spelling == "shape":
            y = torch.reshape(y, shape=(-1, 216))
        elif self.spelling == "input":
            y = torch.reshape(input=y, shape=(-1, 216))
        else:
            y = y.view(size=(-1, 216))
        out: Tensor = self.fc(y)
        return out


@pytest.mark.parametrize("spelling", ["shape", "input", "size"])
def test_size_given_by_keyword_is_rewritten(spelling: str) -> None:
    model = seeded(lambda: KeywordView(spelling))
    graph = capture(model, EXAMPLE)

    proofs = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0))

    assert [group.name for group in graph.prunable] == ["conv"]
    assert len(graph.rewrites) == 1
    assert all(proof.holds for proof in proofs)


class Unflattened(nn.Module):
    """A linear layer whose outputs are taken as channels of 2x2."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.encoder = nn.Linear(192, 24)
        self.unflatten = nn.Unflatten(1, (6, 2, 2))
        self.decoder = nn.Conv2d(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x.flatten(1)).relu()
        if self.spelling == "module":
            y = self.unflatten(y)
        elif self.spelling == "method":
            y = y.unflatten(-1, (6, 2, -1))
        elif self.spelling == "keywords":
            y = y.unflatten(dim=1, sizes=(6, 2, 2))
        else:
            y = torch.unflatten(y, 1, (6, 2, 2))
        out: Tensor = self.decoder(y).flatten(1)
        return out


@pytest.mark.parametrize("spelling", ["module", "method", "keywords", "function"])
def test_channels_that_an_unflatten_counts_are_rewritten(spelling: str) -> None:
    model, example = seeded(lambda: Unflattened(spelling)), torch.randn(2, 3, 8, 8)
    graph = capture(model, example)

    proofs = prove(model, graph, example, generator=torch.Generator().manual_seed(0))

    assert [(group.name, group.size) for group in graph.prunable] == [("encoder", 6)]
    assert [held.argument for held in graph.rewrites] == [("unflatten", 0, 0)]
    assert all(proof.holds for proof in proofs)


class OwnDepthwise(nn.Module):
    """A depthwise convolution, or one of two groups, whose weight and groups the network holds itself."""

    def __init__(self, groups: int, *, is_filter: bool = False, by_keyword: bool = False) -> None:
        super().__init__()
        self.groups, self.by_keyword = groups, by_keyword
        self.stem = nn.Conv2d(3, 6, 3)
        kernel = torch.randn(6, 6 // groups, 3, 3)
        if is_filter:
            self.register_buffer("kernel", kernel)
        else:
            self.kernel = nn.Parameter(kernel)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        if self.by_keyword:
            y = functional.conv2d(y, self.kernel, groups=self.groups)
        else:
            y = functional.conv2d(y, self.kernel, None, 1, 0, 1, self.groups)
        out: Tensor = self.head(y.mean((2, 3)))
        return out


@pytest.mark.parametrize("is_filter", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_groups_of_a_depthwise_convolution_are_rewritten(is_filter: bool, by_keyword: bool) -> None:
    model = seeded(lambda: OwnDepthwise(6, is_filter=is_filter, by_keyword=by_keyword))
    graph = capture(model, EXAMPLE)

    proofs = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0))

    assert [(group.name, group.size) for group in graph.prunable] == [("stem", 6)]
    assert [held.argument for held in graph.rewrites] == [("groups", 0, 0)]
    assert all(proof.holds for proof in proofs)


def test_groups_of_other_convolutions_stay() -> None:
    model = seeded(lambda: OwnDepthwise(2))
    graph = capture(model, EXAMPLE)

    proofs = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(0))

    assert [(group.name, group.size) for group in graph.prunable] == [("stem", 3), ("kernel", 3)]
    assert graph.rewrites == ()
    assert all(proof.holds for proof in proofs)


@dataclass
class Answer:
    logits: Tensor


class Returns(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> object:
        y = self.head(x)
        kinds = {"object": Answer(y), "beside": (y, Answer(y)), "nothing": None, "fine": {"y": [y, None, 3, "a", 0.5]}}
        return kinds[self.what]


ADVICE = (
    r"; forward must return tensors, alone or in tuples, lists or dicts, beside which only None, bool, int, float and "
    r"str may stand$"
)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("object", r"^forward returns an object of class 'tests\.graph_encoder\.test_trials\.Answer'"),
        ("beside", r"^forward returns an object of class 'tests\.graph_encoder\.test_trials\.Answer'"),
        ("nothing", r"^forward returns no tensor but None"),
    ],
)
def test_output_whose_tensors_cannot_be_seen_is_refused(what: str, message: str) -> None:
    with pytest.raises(TraceError, match=message + ADVICE):
        capture(Returns(what), torch.randn(2, 8))


def test_plain_values_beside_the_tensors_of_an_output_are_accepted() -> None:
    graph = capture(Returns("fine"), torch.randn(2, 8))

    assert graph.group("head").reason == "is an output of the network"


class FunctionalGroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 1)
        self.weight = nn.Parameter(torch.ones(24))
        self.bias = nn.Parameter(torch.zeros(24))
        self.mix = nn.Conv2d(24, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.group_norm(self.conv(x), 4, self.weight, self.bias)
        out: Tensor = self.head(self.mix(y).mean((2, 3)))
        return out


class UnscaledGroupNorm(FunctionalGroupNorm):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 24, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.norm(self.conv(x))).mean((2, 3)))
        return out


@pytest.mark.parametrize(("network", "where"), [(FunctionalGroupNorm, "the network"), (UnscaledGroupNorm, "norm")])
def test_constant_number_of_norm_groups_keeps_what_it_divides_dense(network: type[nn.Module], where: str) -> None:
    graph = capture(network(), EXAMPLE)

    assert [group.name for group in graph.prunable] == ["mix"]
    assert graph.group("conv").reason == (
        f"is normalised in 4 groups, a number that no nn.GroupNorm with a weight holds, in '{where}'"
    )


class Constants(nn.Module):
    """Concatenates, or adds, a constant that takes its width from an activation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.out = nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if self.how == "zeros_like":
            more = torch.zeros_like(x)
        elif self.how == "full_like":
            more = torch.full_like(x, 0.5)
        elif self.how == "ones_like":
            more = torch.ones_like(x).sigmoid()
        else:
            more = x.new_zeros(x.shape[0], 8 if self.how == "held" else x.shape[1], x.shape[2], x.shape[3])
        both = torch.cat([x, more], 1)
        out: Tensor = self.head(self.out(both + self.wide(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("how", ["zeros_like", "full_like", "ones_like", "new_zeros"])
def test_constant_as_wide_as_an_activation_shrinks_with_it(how: str) -> None:
    model = seeded(lambda: Constants(how))
    graph = capture(model, EXAMPLE)

    proofs = prove(model, graph, EXAMPLE, generator=torch.Generator().manual_seed(1))

    assert [(group.name, group.size) for group in graph.prunable] == [("stem", 8), ("out", 6)]
    (rows,) = [m.indices for m in graph.group("stem").members if m.tensor == "wide.weight" and m.dim == 0]
    assert rows.tolist() == [[unit, unit + 8] for unit in range(8)]
    assert [proof for proof in proofs if not proof.holds] == []


def test_constant_of_a_held_width_keeps_the_activation_beside_it_dense() -> None:
    graph = capture(Constants("held"), EXAMPLE)

    assert [group.name for group in graph.prunable] == ["out"]


def test_symbolic_trace_leaves_nothing_on_the_model_and_refuses_tensors_made_in_forward() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(3, 1, 1)

    model = Noise()
    before = set(model.__dict__)

    assert symbolic_trace(model) is None
    assert set(model.__dict__) == before


class HandShuffled(nn.Module):
    """A channel shuffle after a convolution of four groups, whose number is written down."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.conv = nn.Conv2d(3, 16, 1)
        self.grouped = nn.Conv2d(16, 32, 1, groups=4)
        self.mix = nn.Conv2d(32, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.conv(x).relu())
        n, channels, height, width = y.shape
        if self.spelling == "computed":
            y = y.view(n, 4, channels // 4, height, width)
        elif self.spelling == "inferred":
            y = y.view(n, 4, -1, height, width)
        else:
            y = y.view(n, self.grouped.groups, -1, height, width)
        out: Tensor = self.head(self.mix(y.transpose(1, 2).flatten(1, 2)).relu().mean((2, 3)))
        return out


class HandAttention(nn.Module):
    """Attention of four heads, whose number is written down."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        if self.spelling == "computed":
            return x.view(n, tokens, 4, width // 4)
        return x.view(n, tokens, 4, -1) if self.spelling == "inferred" else x.unflatten(-1, (4, -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out: Tensor = self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("spelling", ["computed", "inferred", "read"])
def test_a_shuffle_by_a_number_written_down_is_right(spelling: str) -> None:
    torch.manual_seed(0)
    model = HandShuffled(spelling).eval()

    graph = capture(model, EXAMPLE)

    assert graph.group("mix").is_prunable and graph.group("conv").is_prunable
    generator = torch.Generator().manual_seed(0)
    assert all(proof.holds for _ in range(3) for proof in prove(model, graph, EXAMPLE, generator=generator))


@pytest.mark.parametrize("spelling", ["computed", "inferred", "unflattened"])
def test_heads_by_a_number_written_down_are_right(spelling: str) -> None:
    torch.manual_seed(0)
    model, tokens = HandAttention(spelling).eval(), torch.randn(2, 9, 24)

    graph = capture(model, tokens)

    assert graph.group("q").is_prunable
    with torch.no_grad():
        # Sharp attention, so that other heads give other outputs.
        model.q.weight *= 20
    generator = torch.Generator().manual_seed(0)
    assert all(proof.holds for _ in range(3) for proof in prove(model, graph, tokens, generator=generator))


class Positions(nn.Module):
    """Tells by the positions of its tokens, made where the activations are, whether they are one sequence."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("frequencies", torch.rand(6))
        self.embed, self.place = nn.Embedding(20, 6), nn.Embedding(7, 6)
        self.wide, self.head = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.how == "overwritten":
            positions[:, 0] = tokens[0, 0]
        is_one = bool((positions.diff(prepend=positions[:, :1] - 1) == 1).all())
        mask = torch.ones(len(tokens), x.shape[1], dtype=torch.bool, device=x.device)
        x = (x + self.place(positions) + (positions[..., None].float() * self.frequencies.to(x.device)).cos())[mask]
        out: Tensor = self.head(self.wide(x).relu() if is_one else x)
        return out


def test_positions_have_values_wherever_they_are_made() -> None:
    model, tokens = seeded(lambda: Positions("made")), torch.arange(14).reshape(2, 7)

    graph = capture(model, tokens)

    assert {group.name for group in graph.prunable} == {"embed", "wide"} and not graph.opaque
    assert [
        proof for proof in prove(model, graph, tokens, generator=torch.Generator().manual_seed(0)) if not proof.holds
    ] == []


def test_positions_that_are_overwritten_with_what_is_not_known_have_no_values() -> None:
    with pytest.raises(TraceError, match=r"cannot be captured: Tensor\.item\(\) cannot be called on meta tensors"):
        capture(Positions("overwritten"), torch.arange(14).reshape(2, 7))
