"""Symbolic traces, in which numbers that ``forward`` holds are rewritten: what they follow, what they leave whole."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graph_encoder.capture import capture
from pruning.policy import CompressionPolicy
from pruning.surgery import apply_policy, mask_policy

from .networks import EXAMPLE, seeded
from .test_bindings import every_uneven_plan_holds

HEADS, WIDTH = 4, 6


class Attention(nn.Module):
    """Attention whose forward holds the number of heads, and passes a mask and a rate on."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate
        self.qkv, self.out = nn.Linear(16, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).reshape(len(x), -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.rate if self.training else 0.0
        x = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        out: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return out


class Attending(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, 16, 2, stride=2), Attention(rate), nn.Linear(16, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.attention(self.stem(x).flatten(2).transpose(1, 2), mask).mean(1))
        return out


def test_a_mask_that_may_be_left_out_is_passed_on_by_the_rewritten_copy() -> None:
    model = seeded(Attending)
    graph = capture(model, EXAMPLE)
    assert graph.group("attention.qkv").size == HEADS and graph.group("attention.qkv").is_prunable
    assert every_uneven_plan_holds(model, graph)

    policy = CompressionPolicy({"attention.qkv": (0, 3)}, {"attention.qkv": HEADS})
    small, masked = apply_policy(model, graph, policy).eval(), mask_policy(model, graph, policy).eval()
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    torch.testing.assert_close(small(EXAMPLE, mask), masked(EXAMPLE, mask))
    assert not torch.allclose(small(EXAMPLE, mask), small(EXAMPLE))


def test_a_rate_of_dropout_that_is_zero_in_evaluation_follows_the_mode_of_the_rewritten_copy() -> None:
    model = seeded(lambda: Attending(rate=0.5))
    graph = capture(model, EXAMPLE)
    policy = CompressionPolicy({"attention.qkv": (0, 3)}, {"attention.qkv": HEADS})

    small = apply_policy(model, graph, policy)

    assert torch.equal(small.eval()(EXAMPLE), small(EXAMPLE))
    assert not torch.equal(small.train()(EXAMPLE), small(EXAMPLE))


class DropsPath(nn.Module):
    """A branch that is left out at random in training, as other operators than in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)


class AsksForASize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] % 2 == 0 else functional.pad(x, (0, 1, 0, 1))


class MakesATensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([0.5])


class WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x * self.scale


class InSinglePrecision(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.float() * 2


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
        return x


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if random.random() < 2 else x


class Around(nn.Module):
    """A module of which a trace cannot be made, or would be of one call, beside a split that holds widths."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 12, 3, padding=1), inner
        self.part, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.split(self.inner(self.stem(x)), [4, 8], dim=1)
        out: Tensor = self.head((self.inner(self.part(one)).relu() + other).mean((2, 3)))
        return out


class Splits(nn.Module):
    """A split of which the sizes are named, as the method or the function calls them."""

    def __init__(self, *, by_method: bool) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 5)
        self.by_method = by_method

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.by_method:
            one, other = x.split(split_size=[4, 8], dim=1)
        else:
            one, other = torch.split(x, split_size_or_sections=[4, 8], dim=1)
        out: Tensor = self.head((self.part(one).relu() + other).mean((2, 3)))
        return out


@pytest.mark.parametrize("by_method", [True, False])
def test_sizes_of_a_split_are_rewritten_however_they_are_named(by_method: bool) -> None:
    model = seeded(lambda: Splits(by_method=by_method))

    graph = capture(model, EXAMPLE)

    assert sorted(group.size for group in graph.prunable) == [4, 8] and graph.rewrites
    assert every_uneven_plan_holds(model, graph)


@pytest.mark.parametrize("inner", [DropsPath, AsksForASize, MakesATensor, WithoutGradients, InSinglePrecision, Counts])
def test_a_module_that_no_trace_can_follow_is_called_whole_and_all_else_is_rewritten(
    inner: Callable[[], nn.Module],
) -> None:
    model = seeded(lambda: Around(inner()))

    graph = capture(model, EXAMPLE)

    assert graph.whole == ("inner",)
    assert sorted(group.size for group in graph.prunable) == [4, 8] and graph.rewrites
    assert every_uneven_plan_holds(model, graph)


def test_a_module_that_is_called_whole_keeps_its_own_mode_and_asks_for_every_size() -> None:
    policy = CompressionPolicy({"stem": (0, 1)}, {"stem": 4})
    drops, asks = (seeded(lambda inner=inner: Around(inner())) for inner in (DropsPath, AsksForASize))
    dropping, asking = (apply_policy(model, capture(model, EXAMPLE), policy) for model in (drops, asks))

    assert torch.equal(dropping.eval()(EXAMPLE), dropping(EXAMPLE))
    assert any(not torch.equal(dropping.train()(EXAMPLE), dropping(EXAMPLE)) for _ in range(9))
    masked = mask_policy(asks, capture(asks, EXAMPLE), policy)
    torch.testing.assert_close(asking(EXAMPLE[..., :7]), masked(EXAMPLE[..., :7]))


def test_a_trace_counts_no_call_and_the_rewritten_copy_does() -> None:
    model = seeded(lambda: Around(Counts()))

    graph = capture(model.train(), EXAMPLE)

    assert model.inner.calls == 0
    small = apply_policy(model, graph, CompressionPolicy({"stem": (0, 1)}, {"stem": 4}))
    small(EXAMPLE)
    assert small.inner.calls == 2


def test_what_draws_in_forward_is_in_no_trace() -> None:
    assert capture(seeded(lambda: Around(Draws())), EXAMPLE).rewrites == ()


class Twice(nn.Module):
    """A layer with dropout by function, called twice, and a view that holds a width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 4, stride=4), Drops(), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.inner(self.stem(x))).view(-1, 32))
        return out


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, self.training)


def test_a_module_that_is_called_twice_follows_its_mode_in_both_calls() -> None:
    model = seeded(Twice)
    graph = capture(model, EXAMPLE)
    assert graph.group("stem").is_prunable and graph.rewrites

    small = apply_policy(model, graph, CompressionPolicy({"stem": (1, 2, 5)}, {"stem": 8}))

    assert torch.equal(small.eval()(EXAMPLE), small(EXAMPLE))
    assert not torch.equal(small.train()(EXAMPLE), small(EXAMPLE))


def test_steps_of_a_trace_are_named_by_the_module_that_they_are_part_of() -> None:
    model = seeded(Attending)

    graph = capture(model, EXAMPLE)

    assert graph.rewrites
    names = [operator.name for operator in graph.operators]
    assert names == ["input", "stem", "attention.qkv", "attention.attention", "attention.out", "head", "output"]
