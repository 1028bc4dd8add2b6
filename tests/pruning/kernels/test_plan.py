from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pruning.kernels.native import Library, library
from pruning.kernels.operators import Add, Concat, Convolution, Linear, Operator, Pad, Pool, Reshape, Scale, Slice
from pruning.kernels.plan import FORMATS, Plan, pack_as
from pruning.kernels.reference import ACTIVATIONS

from .layers import GEOMETRIES, Geometry, assert_as_exact_as_torch, available_sets, compiled, sparse

pytestmark = compiled


@pytest.fixture(params=available_sets())
def native(request: pytest.FixtureRequest) -> Iterator[Library]:
    found = library()
    assert found is not None
    with found.using(request.param):
        yield found


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def run(native: Library, operators: list[Operator], inputs: dict[str, Tensor], form: str = "dense") -> Tensor:
    sizes = {name: tuple(x.shape) for name, x in inputs.items()}
    output = operators[-1].output
    plan = Plan(native, operators, sizes, [output], {one.output: form for one in operators})
    (found,) = plan.run(*inputs.values())
    (again,) = plan.run(*inputs.values())
    torch.testing.assert_close(found, again, rtol=0, atol=0, equal_nan=True)
    return found


def compute(operators: list[Operator], inputs: dict[str, Tensor]) -> Tensor:
    values = dict(inputs)
    for one in operators:
        values[one.output] = one.compute(*(values[name] for name in one.inputs))
    return values[operators[-1].output]


def convolutions(geometry: Geometry, form: str, activation: str, density: float = 0.3) -> list[Operator]:
    """A convolution of the geometry, with a residual and between layers of 1x1, so that it reads and writes borders."""
    generator = torch.Generator().manual_seed(0)
    batch, in_channels, height, width = geometry.x
    out_channels = geometry.out_channels + (3 if form == "unstructured" else 0)
    block = 1 if form in ("dense", "unstructured") else FORMATS[form]
    weight, _ = sparse((out_channels, in_channels, *geometry.kernel), block, density, generator)
    bias = torch.randn(out_channels, generator=generator)
    window = (geometry.stride, geometry.padding, geometry.dilation)
    reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    sides = zip((height, width), geometry.padding, reach, geometry.stride, strict=True)
    size = (batch, out_channels, *((n + 2 * p - r - 1) // s + 1 for n, p, r, s in sides))
    before = Add("before", ("x",), "a", geometry.x, "none")
    middle = Convolution("layer", ("a", "r"), "b", size, weight, bias, activation, *window, 1)
    point = torch.randn(5, out_channels, 1, 1, generator=generator)
    behind = Convolution("behind", ("b",), "c", (batch, 5, *size[2:]), point, None, "none", (1, 1), (0, 0), (1, 1), 1)
    return [Add("residual", ("y",), "r", size, "none"), before, middle, behind]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("form", FORMATS)
def test_a_convolution_in_a_plan_is_as_exact_as_torch(native: Library, geometry: Geometry, form: str) -> None:
    operators = convolutions(geometry, form, "relu")
    inputs = {"x": noise(*geometry.x), "y": noise(*operators[0].size, seed=1)}

    found = run(native, operators, inputs, form)

    exact = compute(in_double(operators), {name: x.double() for name, x in inputs.items()})
    assert_as_exact_as_torch(found, compute(operators, inputs), exact)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("size", [(1024, 128, 7, 7), (256, 64, 30, 30), (600, 96, 5, 13)])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_that_overlap_at_the_end_of_a_map_are_summed_and_activated_once(
    native: Library,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    size: tuple[int, int, int, int],
    activation: str,
    threads: int,
) -> None:
    """The plan's own input is read where it lies, and nothing beyond it, so the last tile moves back."""
    in_channels, out_channels, height, width = size
    generator = torch.Generator().manual_seed(0)
    block = 1 if form in ("dense", "unstructured") else FORMATS[form]
    weight, _ = sparse((out_channels, in_channels, 1, 1), block, 1 if form == "dense" else 0.7, generator)
    window = ((1, 1), (0, 0), (1, 1), 1)
    bias, out = torch.randn(out_channels, generator=generator), (1, out_channels, height, width)
    one = Convolution("layer", ("x",), "y", out, weight, bias, activation, *window)
    inputs = {"x": noise(1, in_channels, height, width)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    found = run(native, [one], inputs, form)

    exact = compute(in_double([one]), {"x": inputs["x"].double()})
    assert_as_exact_as_torch(found, compute([one], inputs), exact)


WINOGRAD_SIZES = {
    "one block": Geometry((2, 37, 14, 13)),
    "several blocks": Geometry((1, 130, 31, 28), out_channels=16),
    "no padding": Geometry((1, 5, 9, 40), padding=(0, 0)),
    "wide padding": Geometry((2, 3, 5, 6), padding=(2, 3)),
    "one pixel": Geometry((3, 4, 1, 1)),
}


@pytest.mark.parametrize("geometry", WINOGRAD_SIZES.values(), ids=WINOGRAD_SIZES.keys())
@pytest.mark.parametrize("threads", [1, 2])
def test_winograd_is_as_exact_as_torch(
    native: Library, geometry: Geometry, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual, before, middle, behind = convolutions(geometry, "dense", "relu", density=1)
    first = dataclasses.replace(middle, inputs=("x", "y"))  # reads the input of the plan, where no zeros lie around it
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for operators in ([residual, before, middle, behind], [first]):
        inputs = {"x": noise(*geometry.x), "y": noise(*residual.size, seed=1)}
        sizes = {name: tuple(x.shape) for name, x in inputs.items()}
        plan = Plan(native, operators, sizes, [operators[-1].output], {middle.output: "winograd"})

        (found,) = plan.run(*inputs.values())

        exact = compute(in_double(operators), {name: x.double() for name, x in inputs.items()})
        assert_as_exact_as_torch(found, compute(operators, inputs), exact)


@pytest.mark.parametrize("sizes", [(5, 33, 9, 31, 29), (100, 12, 33, 15, 17), (3, 40, 100, 7, 6)])
def test_winograd_writes_the_zeros_that_the_next_layer_reads_around_its_map(
    native: Library, sizes: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    *channels, height, width = sizes
    operators: list[Operator] = [Add("before", ("x",), "v0", (2, channels[0], height, width), "none")]
    for index, (before, after) in enumerate(itertools.pairwise(channels)):
        weight = torch.randn(after, before, 3, 3, generator=generator) / before
        window = ((1, 1), (1, 1), (1, 1))
        size = (2, after, height, width)
        operators.append(
            Convolution(f"c{index}", (f"v{index}",), f"v{index + 1}", size, weight, None, "relu", *window, 1)
        )
    inputs = {"x": noise(*operators[0].size)}
    plan = Plan(native, operators, {"x": operators[0].size}, ["v2"], {"v1": "winograd", "v2": "winograd"})
    for _ in range(2):
        plan._arena.fill_(torch.nan)

        (found,) = plan.run(*inputs.values())

        exact = compute(in_double(operators), {"x": inputs["x"].double()})
        assert_as_exact_as_torch(found, compute(operators, inputs), exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_ends_a_winograd_convolution(native: Library, activation: str) -> None:
    geometry = GEOMETRIES["same"]
    operators = convolutions(geometry, "dense", activation)[:3]
    inputs = {"x": noise(*geometry.x), "y": noise(*operators[0].size, seed=1)}
    sizes = {name: tuple(x.shape) for name, x in inputs.items()}

    (found,) = Plan(native, operators, sizes, ["b"], {"b": "winograd"}).run(*inputs.values())

    torch.testing.assert_close(found, compute(operators, inputs), rtol=1e-4, atol=1e-4)


def in_double(operators: list[Operator]) -> list[Operator]:
    return [
        Convolution(
            *(one.name, one.inputs, one.output, one.size, one.weight.double()),
            *(None if one.bias is None else one.bias.double(), one.activation),
            *(one.stride, one.padding, one.dilation, one.groups),
        )
        if isinstance(one, Convolution)
        else one
        for one in operators
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["same", "strided", "1x1, one pixel"])
def test_every_activation_ends_a_convolution(native: Library, activation: str, name: str) -> None:
    geometry = GEOMETRIES[name]
    operators = convolutions(geometry, "block 16", activation)
    inputs = {"x": noise(*geometry.x), "y": noise(*operators[0].size, seed=1)}

    torch.testing.assert_close(
        run(native, operators, inputs, "block 16"), compute(operators, inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_depthwise_convolutions_are_those_of_torch(native: Library, geometry: Geometry, activation: str) -> None:
    channels, window = geometry.x[1], (geometry.stride, geometry.padding, geometry.dilation)
    weight, bias = noise(channels, 1, *geometry.kernel), noise(channels)
    size = tuple(torch.nn.functional.conv2d(noise(*geometry.x), weight, None, *window, channels).shape)
    operators: list[Operator] = [
        Add("before", ("x",), "a", geometry.x, "none"),
        Convolution("layer", ("a",), "b", size, weight, bias, activation, *window, channels),
    ]
    for chain in (operators, [Convolution("layer", ("x",), "b", size, weight, bias, activation, *window, channels)]):
        inputs = {"x": noise(*geometry.x)}
        torch.testing.assert_close(run(native, chain, inputs), compute(chain, inputs), rtol=1e-5, atol=1e-5)


OTHERS: dict[str, tuple[Operator, tuple[tuple[int, ...], ...]]] = {
    "max pool": (Pool("p", ("x",), "y", (2, 5, 5, 10), "max_pool", (3, 3), (2, 2), (1, 1)), ((2, 5, 9, 20),)),
    "max pool, dilated": (
        Pool("p", ("x",), "y", (1, 3, 7, 36), "max_pool", (2, 3), (1, 1), (0, 1), (2, 2)),
        ((1, 3, 9, 38),),
    ),
    "max pool, stride 3, ceiled": (
        Pool("p", ("x",), "y", (1, 2, 4, 7), "max_pool", (2, 2), (3, 3), (0, 0), (1, 1), True),
        ((1, 2, 10, 20),),
    ),
    "average pool": (
        Pool("p", ("x",), "y", (2, 3, 5, 9), "average_pool", (3, 2), (2, 2), (1, 0)),
        ((2, 3, 9, 18),),
    ),
    "padded average pool": (
        Pool("p", ("x",), "y", (2, 3, 5, 10), "padded_average_pool", (3, 2), (2, 2), (1, 1)),
        ((2, 3, 9, 18),),
    ),
    "adaptive pool": (Pool("p", ("x",), "y", (2, 3, 4, 5), "adaptive_pool"), ((2, 3, 9, 17),)),
    "global pool": (Pool("p", ("x",), "y", (2, 3), "adaptive_pool"), ((2, 3, 9, 21),)),
    "add": (Add("a", ("x", "y"), "z", (2, 3, 5, 7), "gelu"), ((2, 3, 5, 7), (2, 3, 5, 7))),
    "add rows": (Add("a", ("x", "y"), "z", (2, 19), "relu"), ((2, 19), (2, 19))),
    "scale": (Scale("s", ("x", "y"), "z", (2, 3, 5, 7)), ((2, 3, 5, 7), (2, 3, 1, 1))),
    "slice": (Slice("s", ("x",), "y", (2, 3, 3, 3), (1, 2), (2, 3)), ((2, 3, 7, 11),)),
    "slice of one pixel": (Slice("s", ("x",), "y", (2, 3, 1, 1), (0, 0), (2, 2)), ((2, 3, 1, 1),)),
    "pad": (Pad("p", ("x",), "y", (2, 7, 8, 12), (3, 1, 2)), ((2, 3, 6, 7),)),
    "pad channels of one pixel": (Pad("p", ("x",), "y", (2, 7, 1, 1), (3, 0, 0)), ((2, 3, 1, 1),)),
    "concat": (Concat("c", ("x", "y", "x"), "z", (2, 8, 5, 6)), ((2, 3, 5, 6), (2, 2, 5, 6))),
    "flatten": (Reshape("r", ("x",), "y", (2, 90)), ((2, 3, 5, 6),)),
    "unflatten": (Reshape("r", ("x",), "y", (2, 19, 1, 1)), ((2, 19),)),
    "linear": (Linear("l", ("x", "y"), "z", (3, 21), noise(21, 19), noise(21), "hardswish"), ((3, 19), (3, 21))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_are_those_of_torch(native: Library, name: str) -> None:
    one, sizes = OTHERS[name]
    inputs = {key: noise(*size, seed=seed) for seed, (key, size) in enumerate(zip("xy", sizes, strict=False))}
    # Once on tensors of the caller, and once on memory of the plan.
    inner = [Add("in", (key,), f"{key}'", tuple(x.shape), "none") for key, x in inputs.items()]
    renamed = type(one)(**{**vars(one), "inputs": tuple(f"{key}'" for key in one.inputs)})
    for operators in ([one], [*inner, renamed]):
        torch.testing.assert_close(run(native, operators, inputs), compute(operators, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["max pool", "max pool, dilated", "max pool, stride 3, ceiled"])
def test_max_pooling_hands_not_a_number_on_as_torch_does(native: Library, name: str) -> None:
    one, (size,) = OTHERS[name]
    x = noise(*size)
    x[0, 0, 4, 5] = x[0, 1, 0, 0] = float("nan")

    torch.testing.assert_close(run(native, [one], {"x": x}), one.compute(x), equal_nan=True)


def test_memory_is_used_again_once_a_value_is_not_needed() -> None:
    native = library()
    assert native is not None
    size = (1, 8, 32, 32)
    chain: list[Operator] = [Add("a", (f"v{i}",), f"v{i + 1}", size, "relu") for i in range(20)]

    one_value = Plan(native, chain[:1], {"v0": size}, ["v1"], {}).arena_bytes
    twenty = Plan(native, chain, {"v0": size}, ["v20"], {}).arena_bytes

    assert one_value < twenty < 2 * one_value


@pytest.mark.parametrize("form", FORMATS)
def test_packing_fills_up_the_last_block(form: str) -> None:
    weight, _ = sparse((10, 3, 3, 3), 1, 0.2, torch.Generator().manual_seed(0))

    packed = pack_as(weight, form)

    assert torch.equal(packed.to_dense()[:10], weight)
    assert not packed.to_dense()[10:].any()


def test_a_plan_reads_float32_alone() -> None:
    native = library()
    assert native is not None
    plan = Plan(native, [Add("a", ("x",), "y", (1, 2), "none")], {"x": (1, 2)}, ["y"], {})
    message = "'x' is torch.bfloat16 on 'cpu'; a plan reads torch.float32 on 'cpu', so convert it first"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        plan.run(noise(1, 2).bfloat16())


def test_a_plan_for_another_instruction_set_is_refused() -> None:
    native, sets = library(), available_sets()
    assert native is not None
    one = Add("a", ("x",), "y", (1, 2), "none")
    with native.using(sets[0]):
        plan = Plan(native, [one], {"x": (1, 2)}, ["y"], {})
    message = (
        f"the plan was prepared for the instruction set '{sets[0]}', and 'portable' is in use now; prepare it again"
    )
    with native.using("portable"), pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        plan.run(noise(1, 2))
