import pytest
import torch
from torch import nn

from graph_encoder.capture import capture
from pruning.importance import Criterion, rank_units

EXAMPLE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    weight = torch.tensor([[3.0, 0, 0], [1, 1, 1], [0, 0, 4], [1, 0, 0]])
    model[0].weight.data = weight[:, :, None, None]
    model[1].weight.data = torch.tensor([0.1, -0.4, 0.2, 0.3])
    return model.eval()


@pytest.mark.parametrize(
    ("criterion", "raw"),
    [
        ("l1", [3.0, 3.0, 4.0, 1.0]),
        ("l2", [3.0, 3**0.5, 4.0, 1.0]),
        ("fpgm", [6**0.5 + 5 + 2, 6**0.5 + 11**0.5 + 2**0.5, 5 + 11**0.5 + 17**0.5, 2 + 2**0.5 + 17**0.5]),
        ("bn_scale", [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_scores_are_those_worked_out_by_hand(criterion: Criterion, raw: list[float]) -> None:
    model = net()
    scores = rank_units(model, capture(model, EXAMPLE), criterion)["0"]

    expected = torch.tensor(raw)
    torch.testing.assert_close(scores, expected / expected.mean())


def test_taylor_score_is_the_squared_first_order_change_of_the_loss() -> None:
    model = net()
    graph = capture(model, EXAMPLE)
    batches = [(EXAMPLE, torch.tensor([0, 1])), (EXAMPLE + 1, torch.tensor([1, 1]))]
    expected = torch.zeros(4)
    for x, y in batches:
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model[0].weight])
        score = (gradient * model[0].weight.detach()).flatten(1).sum(1) ** 2
        expected += score / score.mean()

    scores = rank_units(model, graph, "taylor", batches=batches)["0"]

    torch.testing.assert_close(scores, expected / expected.mean())
    assert all(p.grad is None for p in model.parameters())


def test_unknown_criterion_and_missing_batches_are_refused() -> None:
    model = net()
    graph = capture(model, EXAMPLE)
    with pytest.raises(
        ValueError, match=r"^'l3' is no importance criterion; choose one of l1, l2, fpgm, taylor, bn_scale$"
    ):
        rank_units(model, graph, "l3")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^the criterion 'taylor' needs batches of inputs and targets; pass some training"
    ):
        rank_units(model, graph, "taylor")
