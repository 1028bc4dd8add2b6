"""The whole way through with networks that have modules which cannot be captured."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur
from experiments.check import check_network
from experiments.config import Method
from pruning.export import load_compressed, save_compressed
from tests.graph_encoder.networks import seeded
from tests.graph_encoder.opaque_networks import OPAQUE, Item, Numpy, ResidualWith


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def share_of_weights(model: nn.Module) -> float:
    """A stand-in for accuracy, of a network that runs."""
    assert model(images()).shape == (8, 5)
    return secateur.count_params(model) / 10_000


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "random") for name in OPAQUE), pytest.param("several", "ppo", marks=pytest.mark.slow)]
)
def test_search_around_a_module_keeps_it_and_the_budget_and_the_result_can_be_saved(
    name: str, method: Method, tmp_path: Path
) -> None:
    build, opaque = OPAQUE[name]
    dense = seeded(build)

    found = secateur.compress(
        dense, images(2), evaluate=share_of_weights, budget="70%", calibration=[images()], method=method, evaluations=9
    )

    assert found.cost == secateur.count_macs(found.model, images(2)) <= 0.7 * found.dense_cost
    for module in opaque:
        kept = dict(found.model.get_submodule(module).named_parameters())
        assert all(torch.equal(p, kept[key]) for key, p in dense.get_submodule(module).named_parameters())
    save_compressed(found.model, found.policy, tmp_path, constructor="mine", example_inputs=images(2))
    with torch.inference_mode():
        torch.testing.assert_close(load_compressed(tmp_path, build)(images()), found.model(images()))


def test_check_lists_modules_that_cannot_be_captured_among_what_is_skipped() -> None:
    report = check_network(seeded(lambda: ResidualWith(Item, Numpy)), images(2))

    assert report.passed and len(report.proof) == 4
    skipped = report.to_dict()["skipped"]
    for module in ("blocks.1.inner.0", "head"):
        assert skipped[module].startswith("cannot be captured (")
        assert f"  {module}: {skipped[module]}" in report.lines()
