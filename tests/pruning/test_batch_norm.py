import contextlib
import copy
from collections.abc import Iterator

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


class Twice(nn.Module):
    """A batch norm that runs twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.norm(x) ** 2)
        return out


def spread_images(n: int) -> Tensor:
    """Images whose scale and mean differ from one to the next."""
    x = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.2, 3, n).view(-1, 1, 1, 1) + torch.linspace(-1, 1, n).view(-1, 1, 1, 1)


@pytest.mark.parametrize("sizes", [[8, 8, 3], [3, 8, 8], [8, 2, 2]])
def test_every_image_counts_the_same_in_batches_of_any_size(sizes: list[int]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = spread_images(sum(sizes)).split(sizes)

    reestimate_batch_norm(model, batches)

    shares = torch.tensor(sizes).view(-1, 1) / sum(sizes)
    torch.testing.assert_close(model[0].running_mean, torch.cat(batches).mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, (shares * torch.stack([x.var((0, 2, 3)) for x in batches])).sum(0))


@pytest.mark.parametrize("model", [nn.Sequential(nn.BatchNorm2d(3)), Twice()])
def test_batches_of_equal_size_give_pytorchs_cumulative_average_to_the_last_bit(model: nn.Module) -> None:
    batches = spread_images(7 * 3).split(3)
    expected = copy.deepcopy(model).train()
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    for batch in batches:
        expected(batch)

    reestimate_batch_norm(model, batches)

    assert all(torch.equal(buffer, expected.get_buffer(name)) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_of_one_image_is_joined_to_the_one_before(several: bool) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
            out: Tensor = self.norm((scale * x).mean((2, 3)))
            return out

    x = spread_images(9)
    scale = torch.arange(9.0).view(-1, 1, 1, 1)
    model = Features()

    reestimate_batch_norm(model, zip(x.split(4), scale.split(4), strict=True) if several else x.split(4))

    features = (scale * x if several else x).mean((2, 3))
    first, rest = features[:4], features[4:]
    torch.testing.assert_close(model.norm.running_mean, features.mean(0))
    torch.testing.assert_close(model.norm.running_var, (4 * first.var(0) + 5 * rest.var(0)) / 9)


def test_batches_may_share_their_memory() -> None:
    def batches() -> Iterator[Tensor]:
        buffer = torch.empty(4, 3, 2, 2)
        for value in range(4):
            yield buffer.fill_(value)

    model = nn.Sequential(nn.BatchNorm2d(3))

    reestimate_batch_norm(model, batches())

    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 1.5))


def test_images_that_are_all_alone_or_of_another_size_are_not_joined() -> None:
    for batches in (spread_images(3).split(1), [spread_images(3), spread_images(3)[:1, :, :2]]):
        model = nn.Sequential(nn.BatchNorm2d(3))

        reestimate_batch_norm(model, batches)

        assert int(model[0].num_batches_tracked) == len(batches)


def test_momenta_and_hooks_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3, momentum=None))

    for batches in ([spread_images(4)], []):
        with contextlib.suppress(ValueError):
            reestimate_batch_norm(model, batches)
        assert [norm.momentum for norm in model] == [0.3, None]
        assert not any(norm._forward_pre_hooks for norm in model)
