import copy
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from graph_encoder.capture import capture
from pruning.layer_policy import LayerPolicy, PolicyError
from pruning.regroup import permute_units, refill_masks, regroup
from pruning.sparsity import apply_masks, layer_masks, sparsity_mask, zero_weights
from tests.graph_encoder.networks import EXAMPLE, NETWORKS, build


def held_energy(weight: Tensor, layer: LayerPolicy) -> float:
    return float((weight * sparsity_mask(weight, layer)).square().sum())


def test_refill_keeps_the_blocks_with_the_strongest_winners_whole() -> None:
    # Blocks are columns of four. By total energy column 0 (4 * 1.44 = 5.76) comes before column 1 (5.2), but the
    # winners, six of twelve, are the 2.2 of column 1, the four of column 0 being in it only by ties of 1.2.
    w = torch.tensor([[1.2, 2.2, 1.3], [1.2, 0.3, 1.3], [1.2, 0.3, 1.3], [1.2, 0.1, 0.1]])
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.copy_(w)
    layers = {"0": LayerPolicy("block4", 1 / 3)}

    # Four winners: 2.2 and the three of 1.3, so energies of 0, 4.84 and 5.07 by winners; 5.76, 5.03 and 5.08 in all.
    assert layer_masks(model, layers)["0"][0].tolist() == [True, False, False]
    mask = refill_masks(model, layers)["0"]
    assert mask[0].tolist() == [False, False, True]
    apply_masks(model, {"0": mask})
    assert torch.equal(model[0].weight, w * torch.tensor([0.0, 0, 1]))


def test_refill_keeps_as_many_blocks_as_plain_blocks_and_leaves_other_patterns_alone() -> None:
    model = build("Residual")
    layers = {"conv2": LayerPolicy("block4", 0.3), "conv1": LayerPolicy("unstructured", 0.2), "stem": LayerPolicy()}
    plain, refilled = layer_masks(model, layers), refill_masks(model, layers)
    assert plain.keys() == refilled.keys() == {"conv1", "conv2"}
    assert int(plain["conv2"].sum()) == int(refilled["conv2"].sum())
    assert torch.equal(plain["conv1"], refilled["conv1"])


@pytest.mark.parametrize("name", NETWORKS)
def test_moving_the_units_of_a_group_changes_no_output(name: str) -> None:
    model = build(name)
    graph = capture(model, EXAMPLE)
    before = model(EXAMPLE)
    for group in graph.prunable:
        moved = copy.deepcopy(model)
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(1))
        permute_units(moved, group, order)
        torch.testing.assert_close(moved(EXAMPLE), before, rtol=1e-4, atol=1e-5)
        first = group.members[0]
        tensor, old = moved.get_parameter(first.tensor), model.get_parameter(first.tensor)
        places = first.indices[:, 0]
        assert torch.equal(tensor.index_select(first.dim, places), old.index_select(first.dim, first.indices[order, 0]))


def striped(rows: int, columns: int) -> Tensor:
    """Rows of two kinds in turn, each with its own half of strong columns."""
    noise = 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    noise[::2, : columns // 2] += 1
    noise[1::2, columns // 2 :] += 1
    return noise


def test_regrouping_brings_rows_with_the_same_strong_columns_together() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(striped(8, 10))
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())

    layer = LayerPolicy("block4", 0.5)
    found = regroup(model, capture(model, x), {"0": layer}, x)

    assert {name: order.tolist() for name, order in found.orders.items()} == {"0": [0, 2, 4, 6, 1, 3, 5, 7]}
    assert not found.refused
    assert torch.equal(found.model[0].weight, before["0.weight"][[0, 2, 4, 6, 1, 3, 5, 7]])
    torch.testing.assert_close(found.model(x), model(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    zero_weights(found.model, {"0": layer})
    assert int(found.model[0].weight[:4, :5].count_nonzero()) == 20


def test_regrouping_holds_no_less_energy_and_close_to_the_best_of_all_orders() -> None:
    layer = LayerPolicy("block4", 0.25)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(8, 6, generator=generator))
        x = torch.randn(4, 6, generator=generator)
        w = model[0].weight.detach()

        found = held_energy(regroup(model, capture(model, x), {"0": layer}, x).model[0].weight.detach(), layer)

        halves = {tuple(sorted(order[:4])) for order in permutations(range(8)) if order[0] == 0}
        orders = [[*half, *(i for i in range(8) if i not in half)] for half in halves]
        best = max(held_energy(w[order], layer) for order in orders)
        assert held_energy(w, layer) <= found <= best + 1e-5
        assert found >= 0.95 * best


def test_blocks_that_do_not_fit_are_refused() -> None:
    model = build("Residual")
    with pytest.raises(PolicyError, match=r"^the policy does not fit the network: layer 'conv1' has 6 output channels"):
        regroup(model, capture(model, EXAMPLE), {"conv1": LayerPolicy("block4", 0.5)}, EXAMPLE)


def test_a_residual_stream_is_moved_alike_in_all_its_layers() -> None:
    model = build("Residual")
    with torch.no_grad():
        model.stem.weight.copy_(striped(8, 27).view(8, 3, 3, 3))
    layers = {"stem": LayerPolicy("block4", 0.5), "conv2": LayerPolicy("block4", 0.5)}

    found = regroup(model, capture(model, EXAMPLE), layers, EXAMPLE)

    order = found.orders["stem"]
    assert found.orders.keys() == {"stem"}
    assert torch.equal(found.model.stem.weight, model.stem.weight[order])
    assert torch.equal(found.model.norm.running_var, model.norm.running_var[order])
    assert torch.equal(found.model.conv2.weight, model.conv2.weight[order])
    assert torch.equal(found.model.conv1.weight, model.conv1.weight[:, order])
    torch.testing.assert_close(found.model(EXAMPLE), model(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_units_are_left_where_moving_them_would_change_the_outputs() -> None:
    model = build("Residual")
    with torch.no_grad():
        model.stem.weight.copy_(striped(8, 27).view(8, 3, 3, 3))
    graph = capture(model, EXAMPLE)
    group = graph.group("stem")
    # A group that misses a tensor: the batch norm would scale other channels than before.
    object.__setattr__(group, "members", tuple(m for m in group.members if m.tensor != "norm.bias"))

    found = regroup(model, graph, {"stem": LayerPolicy("block4", 0.5)}, EXAMPLE)

    assert not found.orders
    assert found.refused["stem"].startswith("the outputs would change by ")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.model.state_dict().items())
