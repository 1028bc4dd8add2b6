import pytest
import torch
from torch import Tensor, nn

from pruning.batch_norm import reestimate_batch_norm


def test_statistics_become_the_averages_over_the_batches_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Flatten())
    model.train()
    model[1].eval()
    batches = list(torch.randn(3, 8, 3, 5, 5))
    inputs = [model[0](batch).detach() for batch in batches]
    weights = {name: p.clone() for name, p in model.named_parameters()}

    reestimate_batch_norm(model, batches)

    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))
    assert model[1].momentum == 0.3 and model[2].training and not model[1].training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_no_batches_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"^batch-norm statistics were to be re-estimated on no batches; hand in at least"
    ):
        reestimate_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), [])


def test_what_forward_keeps_can_be_trained_with() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.BatchNorm2d(3), nn.Parameter(torch.ones(()))
            self.grid: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.grid is None:
                self.grid = torch.linspace(-1, 1, x.shape[-1])
            out: torch.Tensor = self.norm(x) * (self.scale * self.grid)
            return out

    model, x = Keeping(), torch.randn(2, 3, 4, 4)
    reestimate_batch_norm(model, [x])
    model(x).sum().backward()
    assert model.scale.grad is not None


class WithAuxiliary(nn.Module):
    """A head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.auxiliary = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.auxiliary(x)
        if x.isnan().any():
            raise ValueError
        out: Tensor = self.norm(x)
        return out


def test_statistics_of_what_does_not_run_or_fails_are_kept() -> None:
    model, x = WithAuxiliary(), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for norm in (model.norm, model.auxiliary):
        norm.running_mean.fill_(3)
        norm.running_var.fill_(7)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    for batches in ([], [x, torch.full((8, 3), torch.nan)]):
        with pytest.raises(ValueError):
            reestimate_batch_norm(model, batches)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    reestimate_batch_norm(model, [x])

    torch.testing.assert_close(model.norm.running_mean, x.mean(0))
    assert float(model.auxiliary.running_mean[0]) == 3 and float(model.auxiliary.running_var[0]) == 7
