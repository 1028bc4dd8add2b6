"""Numbers that forward computes from widths: right at every batch and image size, or the channels stay."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from graph_encoder.symbolic import rewrite
from pruning.proof import prove

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """Attention of several heads, in one of the ways in which it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.head_width = WIDTH // HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


class FoldedHeads(Attention):
    """Heads beside each other in the batch, as in BART and in fairseq."""

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = (
            layer(x).view(n, tokens, HEADS, self.head_width).transpose(1, 2).reshape(n * HEADS, -1, self.head_width)
            for layer in (self.q, self.k, self.v)
        )
        attended = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        out: Tensor = self.o(attended.view(n, HEADS, tokens, width // HEADS).transpose(1, 2).reshape(n, tokens, width))
        return out


class TokensFirst(Attention):
    """The same with the batch in the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        tokens, n, width = x.shape
        q, k, v = (layer(x).view(-1, n * HEADS, self.head_width).transpose(0, 1) for layer in (self.q, self.k, self.v))
        attended = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        out: Tensor = self.o(attended.transpose(0, 1).reshape(tokens, n, width)).transpose(0, 1)
        return out


class ChunkedHeads(nn.Module):
    """Queries, keys and values from one layer, each part taken in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        head_width = width // HEADS
        q, k, v = map(lambda part: part.view(n, tokens, HEADS, head_width).transpose(1, 2), self.q(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)) * head_width**-0.5
        out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, width))
        return out


class OwnWidth(ChunkedHeads):
    """The width of a head by that of each part."""

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = (
            part.view(n, tokens, HEADS, part.shape[-1] // HEADS).transpose(1, 2)
            for part in self.q(x).split([WIDTH, WIDTH, WIDTH], dim=-1)
        )
        out: Tensor = self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class AroundImage(nn.Module):
    """Attention over the positions of a feature map, heads in the batch, as in guided diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        n, width, length = (qkv := self.q(x)).shape
        channels = width // (3 * HEADS)
        q, k, v = qkv.reshape(n * HEADS, channels * 3, length).split(channels, dim=1)
        scale = 1 / math.sqrt(math.sqrt(channels))
        weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        out: Tensor = self.o(torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, length)).transpose(1, 2)
        return out


class OneHead(Attention):
    """One head, whose products are divided by the root of its width."""

    def __init__(self, root: Callable[[int], float | Tensor]) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(-1, -2) / self.root(q.shape[-1])
        out: Tensor = self.o(scores.softmax(-1) @ v)
        return out


class Block(nn.Module):
    """A stem, attention and a perceptron with shortcuts, and a head."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(WIDTH, WIDTH), attention(), nn.Linear(WIDTH, 10)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x)
        x = x + self.narrow(self.wide(x).relu())
        out: Tensor = self.head(x.mean(1))
        return out


def captured(attention: Callable[[], nn.Module]) -> tuple[nn.Module, NetworkGraph]:
    torch.manual_seed(0)
    model = Block(attention).eval()
    with torch.no_grad():
        # Sharp attention, so that other heads give other outputs.
        model.attention.q.weight *= 5
    return model, capture(model, torch.randn(1, 6, WIDTH))


@pytest.mark.parametrize(
    "attention",
    [
        FoldedHeads, TokensFirst, ChunkedHeads, OwnWidth, AroundImage, lambda: OneHead(lambda width: math.sqrt(width)),
        lambda: OneHead(lambda width: width**0.5),
    ],
    ids=["folded", "tokens first", "chunked", "own width", "around image", "root", "power"],
)  # fmt: skip
def test_attention_holds_with_fewer_heads_at_any_batch_and_length(attention: Callable[[], nn.Module]) -> None:
    model, graph = captured(attention)

    assert {"stem", "attention.q", "wide"} <= {group.name for group in graph.prunable}
    generator = torch.Generator().manual_seed(0)
    for n, tokens in ((1, 6), (2, 6), (5, 6), (3, 9)):
        x = torch.randn(n, tokens, WIDTH)
        assert [proof for proof in prove(model, graph, x, generator=generator) if not proof.holds] == []


@pytest.mark.parametrize(
    "scale",
    [
        lambda width: float(width) ** 0.5,
        lambda width: torch.sqrt(torch.tensor(float(width))),
        lambda width: torch.tensor(width) ** 0.5,
        lambda width: torch.full([], float(width) ** 0.5),
    ],
    ids=["float", "tensor", "integer tensor", "filled tensor"],
)
def test_a_number_that_no_trace_shows_keeps_its_channels_alone(scale: Callable[[int], float | Tensor]) -> None:
    # float() of what is traced fails, and so does a tensor of it.
    graph = captured(lambda: OneHead(scale))[1]

    assert {group.name for group in graph.prunable} == {"stem", "attention.v", "wide"}
    assert graph.group("attention.q").reason.startswith(
        "forward of 'attention' holds a channel count: with fewer channels it computes "
    )
    assert graph.group("attention.q").reason.endswith(" in place of 5.65685 (for div)")


class SharedScale(nn.Module):
    """A feature map divided by how many numbers it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.conv(y / (y.shape[1] * y.shape[2] * y.shape[3]))
        out: Tensor = self.head(y.relu().mean((2, 3)))
        return out


def test_a_number_that_follows_the_image_size_too_keeps_its_channels() -> None:
    graph = capture(SharedScale().eval(), torch.randn(2, 3, 4, 4))

    assert {group.name for group in graph.prunable} == {"conv"} and not graph.fixed
    assert "in place of 128 (for div)" in graph.group("stem").reason


def test_a_folded_batch_is_scaled_and_not_written_down() -> None:
    model, graph = captured(FoldedHeads)
    heads = next(index for index, group in enumerate(graph.groups) if group.name == "attention.q")

    small = rewrite(model, graph, {heads: torch.tensor([True, False, True, True])})

    assert "* 3" in small.code and "// 4" in small.code
    assert not any(held.computed_by and not held.is_scaled and 0 in held.argument[1:2] for held in graph.rewrites)


class BiasByPosition(ChunkedHeads):
    """A bias for each head and pair of positions, looked up at places that a buffer holds, as in Swin and BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, HEADS))
        self.register_buffer("places", torch.arange(6)[:, None] - torch.arange(6)[None] + 5)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.q(x).reshape(n, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        out: Tensor = self.o(attended.transpose(1, 2).reshape(n, tokens, -1))
        return out


def test_what_is_looked_up_by_a_buffer_does_not_keep_heads() -> None:
    model, graph = captured(BiasByPosition)

    assert {"stem", "attention.q", "wide"} <= {group.name for group in graph.prunable} and not graph.whole
    heads = graph.groups[graph.group_index["attention.q"]]
    assert any(member.tensor == "attention.table" for member in heads.members)
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 5):
        x = torch.randn(n, 6, WIDTH)
        assert [proof for proof in prove(model, graph, x, generator=generator) if not proof.holds] == []


class HeadsByWidth(Attention):
    """As many heads as the width of what comes in holds, beside each other in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        heads = width // 8
        q, k, v = (
            layer(x).view(n, tokens, heads, 8).transpose(1, 2).reshape(n * heads, tokens, 8)
            for layer in (self.q, self.k, self.v)
        )
        attended = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        out: Tensor = self.o(attended.view(n, heads, tokens, 8).transpose(1, 2).reshape(n, tokens, width))
        return out


def test_a_batch_times_a_number_of_heads_that_follows_the_width_is_never_written_down() -> None:
    model, graph = captured(HeadsByWidth)

    assert graph.group("wide").is_prunable
    generator = torch.Generator().manual_seed(0)
    for n, tokens in ((2, 6), (5, 6), (3, 9)):
        x = torch.randn(n, tokens, WIDTH)
        assert [proof for proof in prove(model, graph, x, generator=generator) if not proof.holds] == []


class Scaled(nn.Module):
    """A feature map that ``change`` changes between two convolutions."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.stem, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.change(self.stem(x))).relu()
        out: Tensor = self.head(self.last(y / y.shape[1] ** 0.5).mean((2, 3)))
        return out


def behind_a_view(y: Tensor) -> Tensor:
    n, channels, height, width = y.shape
    y = y.view(n, channels, height * width).relu().view(n, channels, height, width)
    return y / (y.shape[1] * y.shape[2] * y.shape[3])


def of_a_square(y: Tensor) -> Tensor:
    return (y + y.transpose(2, 3)) / (y.shape[1] * y.shape[2] * y.shape[3])


@pytest.mark.parametrize("change", [behind_a_view, of_a_square])
def test_a_number_that_follows_the_image_size_is_found_wherever_it_stands(change: Callable[[Tensor], Tensor]) -> None:
    graph = capture(Scaled(change).eval(), torch.randn(2, 3, 4, 4))

    assert {group.name for group in graph.prunable} == {"conv", "last"}
    assert "in place of 128 (for div)" in graph.group("stem").reason


def halves_by_size(y: Tensor) -> Tensor:
    first, second = y.split(y.shape[0] // 2)
    return torch.cat([second, first])


def halves_by_number(y: Tensor) -> Tensor:
    return torch.cat([half.relu() for half in y.chunk(2)])


@pytest.mark.parametrize("change", [halves_by_size, halves_by_number])
def test_a_batch_in_parts_follows_the_batch(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Scaled(change).eval()
    graph = capture(model, torch.randn(2, 3, 4, 4))

    assert {"stem", "last"} <= {group.name for group in graph.prunable}
    for n in (2, 4, 8):
        x = torch.randn(n, 3, 4, 4)
        proofs = prove(model, graph, x, generator=torch.Generator().manual_seed(0))
        assert [proof for proof in proofs if not proof.holds] == []


def test_a_number_that_is_drawn_is_no_width() -> None:
    graph = capture(Scaled(lambda y: y * (1 + random.random())).eval(), torch.randn(2, 3, 4, 4))

    assert {"stem"} <= {group.name for group in graph.prunable}
