import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graph_encoder.capture import capture
from pruning.export import load_compressed, save_compressed
from pruning.kernels.formats import pack
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy, PolicyError
from pruning.sparsity import apply_masks, layer_masks, sparsity_mask, zero_weights
from pruning.surgery import apply_policy
from tests.graph_encoder.networks import EXAMPLE, NETWORKS, build, seeded


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept_by_row(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask.flatten(1)]


def test_unstructured_keeps_the_largest_magnitudes() -> None:
    w = torch.tensor([[0.1, -5.0, 0.2], [4.0, -0.3, 3.0]])
    mask = sparsity_mask(w, LayerPolicy("unstructured", 0.5))
    assert kept_by_row(mask) == [[1], [0, 2]]


def test_block_keeps_the_largest_sums_of_squares_of_rows_together() -> None:
    # Sums of squares of the columns: 9, 16, 8, 7 in the first four rows; 0, 0, 4, 4 * 3.61 in the others. By sums of
    # magnitudes the fourth column of the first block (5.2) would go before its second (4).
    first = torch.tensor([[3.0, 4, 2, 1.3], [0, 0, 2, 1.3], [0, 0, 0, 1.3], [0, 0, 0, 1.3]])
    other = torch.tensor([[0.0, 0, 1, 1.9]]).repeat(4, 1)
    mask = sparsity_mask(torch.cat([first, other]), LayerPolicy("block4", 3 / 8))
    assert kept_by_row(mask) == [[0, 1]] * 4 + [[3]] * 4


def test_n_of_m_keeps_the_n_largest_of_m_consecutive_inputs() -> None:
    w = torch.tensor([[1.0, -3, 2, 0.5, 9, 8, 7, 6], [0, 0, 0, 1, -1, 2, -3, 4]])
    mask = sparsity_mask(w, LayerPolicy("2:4"))
    assert kept_by_row(mask) == [[1, 2, 4, 5], [0, 3, 6, 7]]


def test_n_of_m_runs_along_the_inputs_of_each_kernel_position() -> None:
    w = weight(6, 8, 3, 2)
    mask = sparsity_mask(w, LayerPolicy("1:4"))
    for o in range(6):
        for first in (0, 4):
            for row in range(3):
                for column in range(2):
                    taps = w[o, first : first + 4, row, column].abs()
                    expected = torch.arange(4) == int(taps.argmax())
                    assert torch.equal(mask[o, first : first + 4, row, column], expected)


@pytest.mark.parametrize(("density", "kept"), [(0.5, 54), (0.1, 10), (1 / 216, 1), (0.001, 1), (7 / 108, 7)])
def test_number_kept_is_density_times_size_rounded_down_and_at_least_one(density: float, kept: int) -> None:
    mask = sparsity_mask(weight(4, 3, 3, 3), LayerPolicy("unstructured", density))
    assert int(mask.sum()) == kept


def test_half_a_block_does_not_stay() -> None:
    # Five blocks of eight rows: 0.5 and 0.7 of them are 2.5 and 3.5.
    for density, blocks in ((0.5, 2), (0.7, 3)):
        mask = sparsity_mask(weight(8, 5), LayerPolicy("block8", density))
        assert int(mask.sum()) == 8 * blocks


def test_of_equal_weights_those_of_the_lower_index_stay() -> None:
    ones = torch.ones(8, 4)
    assert kept_by_row(sparsity_mask(ones, LayerPolicy("unstructured", 0.25))) == [[0, 1, 2, 3]] * 2 + [[]] * 6
    assert kept_by_row(sparsity_mask(ones, LayerPolicy("block4", 0.25))) == [[0, 1]] * 4 + [[]] * 4
    assert kept_by_row(sparsity_mask(ones, LayerPolicy("1:2"))) == [[0, 2]] * 8


def test_tiny_weights_are_told_apart_within_blocks() -> None:
    # Their squares are below the smallest single-precision number.
    w = 1e-30 * torch.arange(1.0, 5).repeat(4, 1)
    assert kept_by_row(sparsity_mask(w, LayerPolicy("block4", 0.5))) == [[2, 3]] * 4


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["unstructured", "block4", "block8", "1:2", "2:3", "3:4"]),
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.floats(0.02, 1), st.integers(0, 1000),
)  # fmt: skip
def test_what_goes_is_never_larger_than_what_stays(
    sparsity: str, blocks: int, inputs: int, kernel: int, density: float, seed: int
) -> None:
    layer = LayerPolicy(sparsity, 1.0 if ":" in sparsity else density)
    w = weight(8 * blocks, 12 * inputs, kernel, kernel, seed=seed)
    mask = sparsity_mask(w, layer)

    if layer.n_of_m:
        n, m = layer.n_of_m
        energy, kept = (t.unflatten(1, (-1, m)).movedim(2, -1).reshape(-1, m) for t in (w.abs(), mask))
        assert (kept.sum(1) == n).all()
    else:
        shared = mask.unflatten(0, (-1, layer.block))
        assert torch.equal(shared.any(1), shared.all(1))
        energy = w.double().square().unflatten(0, (-1, layer.block)).sum(1).reshape(1, -1)
        kept = shared.all(1).reshape(1, -1)
        assert int(kept.sum()) == max(1, int(layer.density * kept.numel() + 1e-9))
    for scores, stays in zip(energy, kept, strict=True):
        if not stays.all():
            assert scores[stays].min() >= scores[~stays].max()


def test_the_kernels_pack_what_blocks_leave() -> None:
    for block in (4, 8, 16):
        w = weight(32, 6, 3, 3)
        kept = sparsity_mask(w, LayerPolicy(f"block{block}", 0.3))
        packed = pack(w * kept, block)
        assert packed.values.numel() == int(kept.sum())


def test_blocks_of_a_grouped_convolution_lie_within_its_groups() -> None:
    conv = nn.Conv2d(8, 16, 3, groups=2)
    mask = layer_masks(nn.Sequential(conv), {"0": LayerPolicy("block8", 0.5)})["0"]
    shared = mask.unflatten(0, (2, 8))
    assert torch.equal(shared.any(1), shared.all(1))
    assert int(mask.sum()) == 16 * 4 * 9 // 2


@pytest.mark.parametrize(
    ("module", "layer", "message"),
    [
        (
            nn.Conv2d(3, 12, 3),
            LayerPolicy("block8", 0.5),
            "layer 'a' has 12 output channels, which blocks of 8 do not divide; keep a multiple of 8, take a smaller "
            "block, or 'unstructured'",
        ),
        (
            nn.Conv2d(8, 16, 3, groups=8),
            LayerPolicy("block4", 0.5),
            "layer 'a' has 2 output channels in each of its 8 groups, which blocks of 4 do not divide; keep a multiple "
            "of 4, take a smaller block, or 'unstructured'",
        ),
        (
            nn.Linear(6, 8),
            LayerPolicy("2:4"),
            "layer 'a' has 6 input channels, which 4 of '2:4' does not divide; keep a multiple of 4, or take "
            "'unstructured'",
        ),
        (
            nn.Conv2d(12, 12, 3, groups=2),
            LayerPolicy("1:4"),
            "layer 'a' has 6 input channels in each of its 2 groups, which 4 of '1:4' does not divide; keep a multiple "
            "of 4, or take 'unstructured'",
        ),
        (
            nn.ConvTranspose2d(8, 8, 2),
            LayerPolicy("unstructured", 0.5),
            "layer 'a' is ConvTranspose2d; only convolutions and linear layers can be sparse",
        ),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            LayerPolicy("unstructured", 0.5),
            "layer 'a' computes its weight (a parametrization); make it a plain parameter first",
        ),
    ],
)
def test_a_pattern_that_does_not_fit_names_layer_and_numbers(
    module: nn.Module, layer: LayerPolicy, message: str
) -> None:
    model = nn.ModuleDict({"a": module})
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(PolicyError) as caught:
        zero_weights(model, {"a": layer, "b": LayerPolicy("1:2")})

    assert str(caught.value) == (f"the policy does not fit the network: {message}; the network has no layer 'b'")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_alone_that_does_not_fit_is_refused_too() -> None:
    with pytest.raises(PolicyError) as caught:
        sparsity_mask(weight(6, 3), LayerPolicy("block4", 0.5))
    assert str(caught.value) == (
        "the weight has 6 output channels, which blocks of 4 do not divide; keep a multiple of 4, take a smaller "
        "block, or 'unstructured'"
    )


def test_layers_that_share_a_weight_must_agree() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    alike = {"0": LayerPolicy("unstructured", 0.25), "1": LayerPolicy("unstructured", 0.25)}
    zero_weights(model, alike)
    assert int(model[0].weight.count_nonzero()) == 16

    with pytest.raises(PolicyError) as caught:
        zero_weights(model, alike | {"1": LayerPolicy("2:4")})
    assert str(caught.value) == (
        "the policy does not fit the network: layers '0' and '1' share a weight and differ in sparsity or density"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_policy_removes_channels_and_then_zeroes_weights_of_what_is_left(name: str) -> None:
    model = build(name)
    graph = capture(model, EXAMPLE)
    group = graph.prunable[0]
    channels = CompressionPolicy({group.name: (0, 1)}, {group.name: group.size})
    small = apply_policy(model, graph, channels)
    layers = {
        layer: LayerPolicy("unstructured", 0.3)
        for layer, module in small.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    before = copy.deepcopy(model.state_dict())

    sparse = apply_policy(model, graph, CompressionPolicy(channels.kept, channels.sizes, layers))

    for layer, policy in layers.items():
        dense = small.get_submodule(layer).weight
        found = sparse.get_submodule(layer).weight
        assert torch.equal(found, dense * sparsity_mask(dense, policy))
        assert int(found.count_nonzero()) == max(1, int(0.3 * dense.numel()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert small.state_dict().keys() == sparse.state_dict().keys() == before.keys()


def test_patterns_are_checked_at_the_width_that_channel_removal_leaves() -> None:
    model = build("Residual")
    graph = capture(model, EXAMPLE)
    layers = {"conv2": LayerPolicy("block8", 0.5), "conv1": LayerPolicy("2:4")}
    apply_policy(model, graph, CompressionPolicy(layers=layers))

    with pytest.raises(PolicyError) as caught:
        apply_policy(model, graph, CompressionPolicy({"stem": (0, 1, 2, 3, 5, 6)}, {"stem": 8}, layers))

    assert str(caught.value) == (
        "the policy does not fit the network: layer 'conv2' has 6 output channels, which blocks of 8 do not divide; "
        "keep a multiple of 8, take a smaller block, or 'unstructured'; layer 'conv1' has 6 input channels, which 4 "
        "of '2:4' does not divide; keep a multiple of 4, or take 'unstructured'"
    )


def test_a_saved_sparse_network_loads_bit_equal_into_other_initial_weights(tmp_path: Path) -> None:
    model = build("Residual")
    layers = {
        "conv1": LayerPolicy("unstructured", 0.2),
        "conv2": LayerPolicy("block4", 0.5),
        "stem": LayerPolicy("1:3"),
    }
    policy = CompressionPolicy({"conv1": (0, 2, 3, 5)}, {"conv1": 6}, layers)
    sparse = apply_policy(model, capture(model, EXAMPLE), policy)
    save_compressed(sparse, policy, tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)

    loaded = load_compressed(tmp_path, lambda: seeded(NETWORKS["Residual"], seed=9))

    own = sparse.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
    assert int(loaded.conv2.weight.count_nonzero()) == 8 * 4 * 9 // 2
    assert torch.equal(loaded(EXAMPLE), sparse(EXAMPLE))


def test_masks_of_any_origin_zero_what_they_leave_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    before = model[0].weight.detach().clone()

    apply_masks(model, {"0": mask})

    assert torch.equal(model[0].weight, before * mask)
