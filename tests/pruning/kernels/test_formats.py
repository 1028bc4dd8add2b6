from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.kernels.formats import BLOCKS, FormatError, pack

from .layers import sparse


@settings(max_examples=40, deadline=None)
@given(
    block=st.sampled_from(BLOCKS),
    blocks=st.integers(1, 3),
    in_channels=st.integers(1, 70),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_unpacking_gives_back_what_was_packed(
    block: int, blocks: int, in_channels: int, kernel: tuple[int, int], density: float, seed: int
) -> None:
    shape = (block * blocks + (0 if block > 1 else seed % 3), in_channels, *kernel)
    weight, mask = sparse(shape, block, density, torch.Generator().manual_seed(seed))

    packed = pack(weight, block, mask)

    assert torch.equal(packed.to_dense(), weight)
    assert packed.values.numel() == int(mask.sum())


def test_a_mask_keeps_weights_that_happen_to_be_zero() -> None:
    packed = pack(torch.zeros(4, 3), 4, torch.ones(4, 3, dtype=torch.bool))

    assert packed.values.numel() == 12
    assert packed.density == 1.0


def test_an_unstructured_weight_may_have_channels_that_four_does_not_divide() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    assert torch.equal(pack(weight, 1).to_dense().reshape(5, 3), weight)


@pytest.mark.parametrize(
    ("weight", "block", "mask", "message"),
    [
        (
            torch.ones(4, 2).double(),
            4,
            None,
            "the weight is torch.float64 and torch.strided on 'cpu'; "
            "sparse kernels take torch.float32, torch.strided, on the CPU",
        ),
        (
            torch.ones(4, 2, 3),
            4,
            None,
            "the weight has shape (4, 2, 3); expected (out, in, kernel_h, kernel_w) of a convolution or "
            "(out, in) of a linear layer",
        ),
        (
            torch.ones(4, 0),
            4,
            None,
            "the weight has shape (4, 0) and no elements; every dimension must be at least 1",
        ),
        (torch.ones(4, 2), 3, None, "block is 3; allowed are 1, 4, 8, 16 (1 is unstructured)"),
        (
            torch.ones(12, 2),
            8,
            None,
            "a block of 8 does not divide the 12 output channels of the weight; "
            "take a smaller block, or 1 for unstructured",
        ),
        (
            torch.tensor([[1.0, 0], [0, 0], [1, 0], [1, 1]]),
            4,
            None,
            "2 of 2 blocks of 4 output channels hold both zeros and non-zeros; prune whole blocks, or pass the mask of "
            "what is stored",
        ),
        (
            torch.ones(4, 2),
            4,
            torch.zeros(4, 2, dtype=torch.bool),
            "8 weights outside the mask are not zero; multiply the weight by the mask first",
        ),
        (
            torch.ones(4, 2),
            4,
            torch.ones(4, 2),
            "the mask is torch.float32 of shape (4, 2); expected torch.bool of shape (4, 2)",
        ),
    ],
)
def test_what_does_not_fit_the_format_is_named(
    weight: torch.Tensor, block: int, mask: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        pack(weight, block, mask)
