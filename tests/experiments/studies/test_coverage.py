"""One small network of each family of the coverage page, so that a loss is seen before the page is made again."""

import json
from pathlib import Path

import pytest
import torch

from experiments.studies.coverage import Cell, build, render
from graph_encoder.capture import capture
from latency.cost import count_macs, predict_cost
from pruning.policy import CompressionPolicy
from pruning.proof import prove, random_policy
from pruning.surgery import apply_policy

PRUNABLE = {
    "convnext_tiny": 0.93,
    "densenet121": 1.00,
    "efficientnet_b0": 1.00,
    "googlenet": 1.00,
    "inception_v3": 1.00,
    "mnasnet0_5": 0.99,
    "regnet_y_400mf": 0.99,
    "swin_t": 0.29,
    "vit_b_32": 0.64,
}
"""Share of the multiply-adds that can go: as in ``docs/coverage.md``, where it has the network."""


def test_page_says_how_many_networks_of_how_many_were_measured() -> None:
    records = Path(__file__).parents[3] / "docs" / "coverage"
    names = ("alexnet.json", "convnext_tiny.json", "timm/dpn48b.json")
    cells = [Cell(**json.loads((records / name).read_text())) for name in names]

    page = render(cells, ["resnet18", "timm/vgg11", "timm/volo_d1_224"])

    assert (
        "The classification models of torchvision (2 of 3) and the smallest network of each family of timm (1 of 3)"
        in page
    )
    assert page.endswith("## Not measured yet\nresnet18, timm/vgg11, timm/volo_d1_224\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNABLE)
def test_family_of_networks_is_captured_right_and_as_much_of_it_can_be_pruned_as_ever(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, image = build(name)
    graph = capture(model, image)
    policy = random_policy(graph, torch.Generator().manual_seed(0))
    least = CompressionPolicy({g.name: (0,) for g in graph.prunable}, {g.name: g.size for g in graph.prunable})

    (proof,) = prove(model, graph, image, generator=torch.Generator().manual_seed(0), each_group=False)

    assert proof.holds
    assert not graph.opaque
    assert 1 - predict_cost(graph, least) / graph.macs >= PRUNABLE[name] - 0.02
    assert predict_cost(graph, policy) == count_macs(apply_policy(model, graph, policy), image)
