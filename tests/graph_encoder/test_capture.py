import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d

from graph_encoder.capture import capture, trace_operators
from graph_encoder.network import NetworkGraph, TraceError
from graph_encoder.rules import RULES, Call, Result
from graph_encoder.trace import LabelPass

from .networks import EXAMPLE, NETWORKS, build
from .opaque_networks import Numpy


def graph_of(name: str) -> NetworkGraph:
    return capture(build(name), EXAMPLE)


def offered(graph: NetworkGraph) -> dict[str, int]:
    return {group.name: group.size for group in graph.prunable}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Residual", {"stem": 8, "conv1": 6}),
        ("Concat", {"a": 4, "b": 6, "mix": 8}),
        ("ChunkGate", {"conv": 6, "out": 8}),
        ("Depthwise", {"expand": 8, "project": 4}),
        ("FlattenHead", {"conv": 6, "fc1": 7}),
        ("HeldView", {"conv": 6}),
        ("PixelShuffle", {"conv": 4, "out": 6}),
        ("SqueezeExcite", {"conv": 8, "down": 4}),
        ("SharedWeights", {"stem": 8}),
        ("Attention", {"qkv": 4, "up": 16}),
        ("LayerScale", {"conv": 8, "out": 6}),
        ("GroupNorms", {"conv": 4}),
        ("Transposed", {"conv": 8, "up": 6, "out": 6}),
    ],
)
def test_groups_offered_are_those_counted_by_hand(name: str, expected: dict[str, int]) -> None:
    assert offered(graph_of(name)) == expected


def test_residual_sum_binds_both_producers_the_norm_and_every_consumer() -> None:
    group = graph_of("Residual").group("stem")

    assert group.producers == ("stem", "conv2")
    assert group.consumers == ("conv1", "head")
    touched = {(member.tensor, member.dim) for member in group.members}
    assert {("norm.running_var", 0), ("conv2.bias", 0), ("head.weight", 1)} <= touched


def test_zero_padded_shortcut_splits_the_sum_at_the_channel_where_the_shortcut_ends() -> None:
    graph = graph_of("OptionA")

    # Eight channels of the sum come with the stem; the four in front and the four behind have one producer only.
    assert offered(graph) == {"stem": 8, "conv1": 8, "conv2": 8}
    assert graph.group("stem").producers == ("stem", "conv2")
    pads = {held.argument: held.group.tolist() for held in graph.rewrites}
    assert pads == {("pad", 4, 0): [graph.group_index["conv2"]] * 4, ("pad", 5, 0): [graph.group_index["conv2"]] * 4}


def test_flattened_channel_owns_all_its_columns() -> None:
    group = graph_of("FlattenHead").group("conv")
    (columns,) = [member.indices for member in group.members if member.tensor == "fc1.weight"]

    assert columns.tolist() == [list(range(36 * unit, 36 * (unit + 1))) for unit in range(6)]


def test_narrow_convolution_groups_go_whole_and_wide_ones_lose_the_same_position_in_each() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 1)
            self.narrow = nn.Conv2d(16, 16, 3, groups=8)
            self.mix = nn.Conv2d(16, 16, 1)
            self.wide = nn.Conv2d(16, 16, 3, groups=2)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wide(self.mix(self.narrow(self.stem(x)).relu())).mean((2, 3)))

    graph = capture(Grouped(), EXAMPLE)

    assert offered(graph) == {"stem": 8, "mix": 8, "wide": 8}
    (rows,) = [m.indices for m in graph.group("stem").members if m.tensor == "narrow.weight"]
    assert rows.tolist() == [[2 * unit, 2 * unit + 1] for unit in range(8)]
    (rows,) = [m.indices for m in graph.group("wide").members if m.tensor == "wide.weight"]
    assert rows.tolist() == [[unit, unit + 8] for unit in range(8)]


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("Residual", "head", "is an output of the network in 'the network'"),
        ("GroupNorms", "out", "shares statistics over all channels in 'last'"),
        ("Attention", "embed", "shares layer-norm statistics in 'norm'"),
    ],
)
def test_every_group_left_dense_says_why(name: str, layer: str, reason: str) -> None:
    graph = graph_of(name)
    assert graph.skipped[layer] == reason.removesuffix(" in 'the network'")
    offered = {producer for group in graph.prunable for producer in group.producers}
    assert {operator.name for operator in graph.operators if operator.weight} <= offered | graph.skipped.keys()


def test_operator_without_a_rule_freezes_what_it_reads_and_nothing_else() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.b = nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu())
            return self.head(torch.sort(x, dim=1).values.mean((2, 3)))

    graph = capture(Sorted(), EXAMPLE)

    assert offered(graph) == {"a": 8}
    assert graph.group("b").reason == "is read by the operator 'aten.sort.default', which has no rule, in 'the network'"


def test_weight_that_an_operator_without_a_rule_reads_beside_its_layer_stays_dense() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.b(self.a(x).relu())) * torch.sort(self.a.weight, dim=0).values[0].sum()
            return out

    graph = capture(Scaled(), torch.randn(2, 4))

    assert offered(graph) == {"b": 6}
    assert graph.group("a").reason == "is read by the operator 'aten.sort.default', which has no rule, in 'the network'"


class Beside(nn.Module):
    """A layer that can be pruned, one that writes the outputs, and what ``more`` makes of what they write."""

    def __init__(self, more: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.more = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), more

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y.relu())
        more = self.more(y, z)
        return z.mean((2, 3)) + more


BESIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum of a number": lambda y, z: z.mean().sum(dim=0),
    "least of a number": lambda y, z: z.mean().min(-1).values,
    "norm of a number": lambda y, z: z.mean().norm(dim=0, keepdim=True),
    "deviation of a number": lambda y, z: z.mean().var(dim=(-1,), correction=0),
    "number flipped": lambda y, z: z.mean().flip(0),
    "sum over no images": lambda y, z: y[:0].sum((0, 2, 3)).sum(),
    "sum of no channels": lambda y, z: z[:, :0].sum(1).mean(),
    "no images in one": lambda y, z: torch.cat([y[:0], y[:0]], 1).sum(),
    "no images on each other": lambda y, z: torch.stack([y[:0], y[:0]], -1).sum(),
    "nothing before images": lambda y, z: torch.cat([z.new_zeros(0), z], -1).mean(),
    "no images picked": lambda y, z: y[:0].index_select(1, torch.zeros(2, dtype=torch.long)).sum(),
    "no channels padded": lambda y, z: nn.functional.pad(z[:, :0], (0, 0, 0, 0, 1, 0)).mean(),
    "product of nothing": lambda y, z: (z.flatten(2)[:, :, :0] @ z.flatten(2)[:, :, :0].mT).sum(),
    "pieces that overlap": lambda y, z: z.tensor_split((3, 1), dim=-1)[2].mean(),
    "in place": lambda y, z: z.clone().unsqueeze_(0).mean(),
}


@pytest.mark.parametrize("how", BESIDE)
def test_numbers_and_empty_tensors_are_read_as_any_others(how: str) -> None:
    graph = capture(Beside(BESIDE[how]), EXAMPLE)

    assert not graph.opaque
    assert not any("rule failed" in group.reason for group in graph.groups)
    assert offered(graph) == {"a": 8}


class OneByOne(nn.Module):
    """What layers make of a batch, in a loop over its images where ``loops``."""

    def __init__(self, *, loops: bool) -> None:
        super().__init__()
        self.loops, self.head = loops, nn.Linear(5, 3)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.PixelShuffle(2), nn.PixelUnshuffle(2),
            nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 5, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([self.layers(image) for image in x]) if self.loops else self.layers(x)
        return self.head(y.mean((2, 3)))


def test_images_of_a_loop_are_read_as_those_of_a_batch() -> None:
    batch, loop = (capture(OneByOne(loops=loops), EXAMPLE) for loops in (False, True))

    assert offered(batch) == offered(loop) == {"layers.0": 8, "layers.2": 2, "layers.5": 6, "layers.6": 5}
    assert loop.macs == batch.macs
    sizes = {operator.name: operator.out_size for operator in loop.operators}
    assert all(sizes[operator.name] == operator.out_size for operator in batch.operators if operator.kind == "conv")


def test_what_a_rule_that_fails_reads_stays_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: LabelPass, call: Call) -> Result:
        return [torch.zeros(7, 7)], call.sources

    monkeypatch.setitem(RULES, "sort", fails)

    graph = capture(Beside(lambda y, z: y.relu().sort(2).values.mean()), EXAMPLE)

    assert not graph.opaque and not graph.prunable
    assert re.fullmatch(
        r"is read by the operator 'aten\.sort\.default', whose rule failed \(The expanded size .*\), in 'the network'",
        graph.group("a").reason,
    )


def test_layer_whose_rule_fails_on_labels_alone_costs_what_it_costs_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule, model = RULES["conv2d"], build("Residual")

    def fails(run: LabelPass, call: Call) -> Result:
        if run.with_labels and run.name_of(call.args[1]) == "conv1.weight":
            raise KeyError("width")  # noqa: EM101 - as a fault of its own would
        return rule(run, call)

    expected = capture(model, EXAMPLE)
    monkeypatch.setitem(RULES, "conv2d", fails)
    graph = capture(model, EXAMPLE)

    assert graph.macs == expected.macs == sum(operator.macs for operator in trace_operators(model, EXAMPLE))
    assert [operator.name for operator in graph.operators] == [operator.name for operator in expected.operators]
    assert graph.edges == expected.edges
    assert offered(expected) == {"stem": 8, "conv1": 6} and not graph.prunable


def test_forward_that_names_a_channel_keeps_its_layer_dense() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x)[:, 2:5].mean((2, 3)))

    assert offered(capture(Picks(), EXAMPLE)) == {}


def test_multi_head_attention_module_keeps_its_heads_and_says_so() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.flatten(2).transpose(1, 2)[..., :3].repeat(1, 1, 3)[..., :8])
            return out.mean(1)

    graph = capture(Encoder().eval(), EXAMPLE)

    assert offered(graph) == {"layer.linear1": 16}
    assert graph.skipped["layer.self_attn.in_proj"] == (
        "is bound to one width by nn.MultiheadAttention in 'layer.self_attn'"
    )


def test_reading_a_value_in_the_forward_of_the_network_itself_is_refused() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    message = (
        r"^'the network itself' cannot be captured: Tensor\.item\(\) cannot be called on meta tensors "
        r"\(aten\._local_scalar_dense\.default on shapes \[\(\)\]\)\. The forward pass may not read the values of its "
        r"activations \(`\.item\(\)`, `if x\.sum\(\) > 0`\) and must accept inputs of the shapes "
        r"\[\(2, 3, 8, 8\)\]; move what depends on values out of the network$"
    )
    with pytest.raises(TraceError, match=message):
        capture(Reads(), EXAMPLE)


def test_input_that_is_missing_is_told_with_those_that_were_given() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    message = (
        r"^'the network itself' cannot be captured: .*missing 1 required positional argument: 'y'\. The "
        r"forward pass was given inputs of the shapes \[\(1, 3, 8, 8\)\]; their number and shapes must be those "
        r"that it takes$"
    )
    with pytest.raises(TraceError, match=message):
        capture(Adds(), torch.zeros(1, 3, 8, 8))


def test_example_input_of_the_wrong_shape_names_the_layer_that_refuses_it() -> None:
    message = (
        r"^'stem' cannot be captured: an input with 4 channels meets a convolution for 3 "
        r"\(aten\.conv2d\.default on shapes \[\(2, 4, 8, 8\), \(8, 3, 3, 3\)\]\)\. The forward "
        r"pass was given inputs of the shapes \[\(2, 4, 8, 8\)\]; their number and shapes must be those that it takes$"
    )
    with pytest.raises(TraceError, match=message):
        capture(build("Residual"), torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("example_inputs", "found"),
    [
        (EXAMPLE.numpy(), "the example inputs are an object of class 'ndarray'"),
        ((EXAMPLE.numpy(),), "example input 0 is an object of class 'ndarray'"),
        ({"x": EXAMPLE}, "the example inputs are an object of class 'dict'"),
        (None, "the example inputs are an object of class 'NoneType'"),
        ((), "no example input was given"),
    ],
    ids=["array", "tuple of an array", "mapping", "nothing", "empty tuple"],
)
def test_example_inputs_that_are_no_tensors_are_refused(example_inputs: Any, found: str) -> None:
    message = f"{found}; pass a tensor, or a tuple of the tensors that forward takes, batch first"
    with pytest.raises(TraceError, match=f"^{message}$"):
        capture(build("Residual"), example_inputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_and_parameters_agree_with_torch(name: str) -> None:
    model = build(name)
    graph = capture(model, EXAMPLE)
    with FlopCounterMode(display=False) as counter:
        model(EXAMPLE[:1])

    assert graph.macs * 2 == counter.get_total_flops()
    assert graph.params == sum(p.numel() for p in model.parameters())
    assert sum(operator.macs for operator in trace_operators(model, EXAMPLE)) == graph.macs


def test_capture_leaves_modes_tensors_and_global_hooks_as_they_were() -> None:
    model = build("SqueezeExcite")
    model.train()
    model.norm.eval()
    before = {name: (id(t), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    hooks: Any = nn.modules.module._global_forward_pre_hooks

    capture(model, EXAMPLE)

    assert model.training and not model.norm.training and not hooks
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])


def test_operators_keep_the_data_flow_with_everything_else_contracted() -> None:
    graph = graph_of("Residual")
    names = [operator.name for operator in graph.operators]

    assert names == ["input", "stem", "conv1", "conv2", "add", "head", "output"]
    edges = {(names[a], names[b]) for a, b in graph.edges}
    assert edges == {
        ("input", "stem"), ("stem", "conv1"), ("conv1", "conv2"), ("stem", "add"), ("conv2", "add"),
        ("add", "head"), ("head", "output"),
    }  # fmt: skip
    assert graph.operators[1].norm == "norm"


def test_operators_name_the_layer_that_holds_their_weight_at_every_call() -> None:
    layers = [operator.layer for operator in graph_of("Residual").operators]
    assert layers == ["", "stem", "conv1", "conv2", "", "head", ""]
    called = {operator.name: operator.layer for operator in graph_of("SharedWeights").operators if operator.weight}
    assert called["shared"] == called["shared#3"] == "shared"


@pytest.mark.parametrize("model", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), Numpy(4))])
def test_no_hook_of_all_modules_is_left_behind(model: nn.Module) -> None:
    capture(model, torch.zeros(2, 3))

    assert not nn.modules.module._has_any_global_hook()


@pytest.mark.parametrize(("inside", "named"), [(False, "the network"), (True, "0")])
def test_scripted_modules_are_refused_by_name(inside: bool, named: str) -> None:
    with pytest.warns(FutureWarning, match="torch.jit.script"):
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
    model = nn.Sequential(scripted, nn.Conv2d(4, 4, 1)) if inside else scripted

    with pytest.raises(TraceError) as caught:
        capture(model, torch.randn(2, 3, 8, 8))

    assert str(caught.value) == (
        f"'{named}' was compiled by torch.jit (it is a RecursiveScriptModule), so that its layers cannot be made "
        "smaller; pass the nn.Module that was scripted or traced, with its weights loaded"
    )


class BareProduct(nn.Module):
    """A product with a parameter that no layer holds, spelled in several ways."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.first = nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.ones(8, 10))
        self.last = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(self.first(x), self.weight))


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.einsum("bc,cd->bd", x, w),
        lambda x, w: torch.tensordot(x, w, 1),
        lambda x, w: x @ (2 * w),
        lambda x, w: (w.t() @ x.t()).t(),
    ],
    ids=["matmul", "einsum", "tensordot", "multiple", "from the left"],
)
def test_what_is_multiplied_by_a_bare_parameter_is_one_dense_group_however_it_is_spelled(
    product: Callable[[Tensor, Tensor], Tensor],
) -> None:
    graph = capture(BareProduct(product), torch.randn(2, 6))

    assert {(group.name, group.size, group.reason) for group in graph.groups} == {
        ("first", 8, "is multiplied by a bare parameter in 'the network'"),
        ("last.0", 12, ""),
        ("last.2", 3, "is an output of the network"),
    }


class LearnedQuery(nn.Module):
    """Attention in which a parameter asks, so that the weights of the values have no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(1, 4, 8))
        self.key = nn.Linear(6, 8)
        self.value = nn.Linear(6, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query.expand(len(x), -1, -1) @ self.key(x).transpose(1, 2)).softmax(-1)
        return self.head(weights @ self.value(x)).mean(1)


def test_channels_that_a_product_sums_no_further_are_all_offered() -> None:
    graph = capture(LearnedQuery(), torch.randn(2, 5, 6))

    assert offered(graph) == {"value": 12}
    assert graph.skipped["key"] == "is multiplied by a bare parameter in 'the network'"


class Grid(nn.Module):
    """Keeps what it made for images of the last size, in an attribute, a buffer and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
        self.grid: Tensor | None = None
        self.register_buffer("scale", None, persistent=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.grid is None or self.grid.shape[-1] != h.shape[-1]:
            self.grid = torch.linspace(-1, 1, h.shape[-1], device=x.device)
            self.scale = self.grid.abs() + 1
            self.seen.append(self.grid)
        return self.last((h + self.grid) * self.scale).mean((2, 3))


def test_what_forward_keeps_is_not_left_on_the_network() -> None:
    model, x = Grid().eval(), torch.randn(2, 3, 8, 8)
    hooked: list[nn.Module] = []
    handle = model.register_forward_hook(lambda module, *_: hooked.append(module))

    assert capture(model, x).prunable
    trace_operators(model, x)

    assert model.grid is None and model.scale is None and not model.seen
    assert model(x).isfinite().all()  # not from tensors without values
    capture(model, x)
    assert model.grid is not None and model.grid.device.type == "cpu"
    handle.remove()
    hooked.clear()
    model(x)
    assert not hooked


class Added(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x.new_zeros(1, 1, 1), x, x.transpose(1, 2))


class Mixing(nn.Module):
    """Products with a sum or of three operands."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6, 8)), nn.Parameter(torch.ones(8))
        self.linear, self.pairs = nn.Linear(8, 5), nn.Bilinear(5, 5, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(torch.addmm(self.bias, x, self.weight))
        return self.pairs(y, y)


def test_products_with_a_sum_and_of_three_operands_count() -> None:
    assert capture(Added(), torch.randn(2, 7, 6)).macs == 7 * 7 * 6
    graph = capture(Mixing(), torch.randn(4, 6))
    assert graph.macs == 6 * 8 + 8 * 5 + 7 * 5 * 5
    assert graph.skipped["linear"] == "takes part in a product (bilinear) in 'pairs'"


class Moment(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        h = self.first(x) + time
        return self.last(h / h.std(False))


def test_the_batch_is_that_of_the_first_input_that_has_one() -> None:
    assert capture(Moment(), (torch.tensor(0.5), torch.randn(4, 4))).macs == 128


class Line(nn.Module):
    """A residual block over a signal, with attention over its positions where ``by_tokens``."""

    def __init__(self, *, by_tokens: bool) -> None:
        super().__init__()
        self.by_tokens = by_tokens
        self.stem = nn.Conv1d(3, 8, 5, stride=2, padding=2)
        self.inner = nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.by_tokens:
            x = x.transpose(1, 2)
            return self.head((x + self.mix(x)).mean(1))
        return self.head((x + self.inner(x)).mean(-1))


@pytest.mark.parametrize(("by_tokens", "size"), [(False, (10,)), (True, (10, 1))])
def test_maps_of_one_dimension_are_told_from_tokens(by_tokens: bool, size: tuple[int, ...]) -> None:
    operators = {each.name: each for each in capture(Line(by_tokens=by_tokens), torch.randn(2, 3, 20)).operators}

    join, stem = operators["add"], operators["stem"]
    assert (stem.kernel, stem.stride, stem.dilation, stem.out_size) == ((5,), (2,), (1,), (10,))
    assert (join.in_channels, join.out_channels, join.out_size) == (8, 8, size)
    assert by_tokens or operators["inner"].dilation == (2,)


class Deforms(nn.Module):
    """A deformable convolution, which no rule is for, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.offsets = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 18, 3, padding=1)
        self.deformable, self.head = DeformConv2d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.deformable(self.stem(x), self.offsets(x)).mean((2, 3)))
        return out


def test_layers_whose_work_is_not_counted_are_named() -> None:
    graph = capture(Deforms().eval(), torch.randn(2, 3, 8, 8))

    assert graph.skipped["deformable"] == (
        "is read by the operator 'torchvision.deform_conv2d.default', which has no rule, so that its multiply-adds are "
        "not counted"
    )
    assert "deformable" not in {operator.layer for operator in graph.operators}
