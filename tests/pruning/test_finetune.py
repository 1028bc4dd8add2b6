import copy
import logging
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pruning.files import CheckpointError, load_checked
from pruning.finetune import FinetuneError, Loader, TrainData, finetune
from pruning.layer_policy import LayerPolicy
from pruning.quantize import quantize_layers


class Blobs:
    """Two classes of points on either side of a plane, in an order that depends on the epoch alone."""

    def __init__(self, n_batches: int = 4, batch_size: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(2, (n_batches * batch_size,), generator=generator)
        self.points = torch.randn(len(self.labels), 6, generator=generator) + 3 * self.labels[:, None].float()
        self.n_batches = n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch))
        for indices in order.chunk(self.n_batches):
            yield self.points[indices], self.labels[indices]


class Listed(list[tuple[Tensor, Tensor]]):
    """The same batches every epoch."""

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self)


def network(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def states_are_equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class KilledError(Exception):
    pass


def train_and_kill(
    model: nn.Module, checkpoint: Path, after: int, epochs: int = 5, data: TrainData | Loader | None = None
) -> None:
    def kill(epoch: int, loss: float, accuracy: float) -> None:
        if epoch == after:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(model, data or Blobs(), epochs=epochs, learning_rate=0.1, checkpoint=checkpoint, on_epoch=kill)


def test_learns_two_separate_blobs() -> None:
    model = network()
    report = finetune(model, Blobs(), epochs=15, learning_rate=0.1)

    data = Blobs()
    assert (model.eval()(data.points).argmax(1) == data.labels).float().mean() > 0.98
    assert report.losses[-1] < report.losses[0]
    assert len(report.losses) == len(report.accuracies) == 15


def test_learning_rate_rises_linearly_then_falls_along_a_cosine_to_almost_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def recorded(optimizer: torch.optim.SGD) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    finetune(network(), Blobs(), epochs=3, learning_rate=0.6, warmup_steps=2)

    falling = [0.3 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert rates == pytest.approx([0.2, 0.4, *falling])


def test_one_step_is_nesterov_momentum_with_weight_decay() -> None:
    model = nn.Linear(6, 2)
    data = Blobs(n_batches=1)
    before = model.weight.detach().clone()
    points, labels = next(data(0))
    loss = F.cross_entropy(F.linear(points, before.requires_grad_(), model.bias.detach()), labels)
    gradient = torch.autograd.grad(loss, before)[0] + 0.01 * before

    finetune(model, data, epochs=1, learning_rate=0.1, momentum=0.9, weight_decay=0.01, warmup_steps=0)

    # The first step of Nesterov momentum: gradient + momentum * gradient.
    torch.testing.assert_close(model.weight, before - 0.1 * 1.9 * gradient)


def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = network(), network()
    expected = finetune(whole, Blobs(), epochs=5, learning_rate=0.1)

    train_and_kill(resumed, tmp_path / "state.pt", after=2)
    fresh = network(seed=1)
    report = finetune(fresh, Blobs(), epochs=5, learning_rate=0.1, checkpoint=tmp_path / "state.pt")

    assert report.resumed_epoch == 2
    assert report.losses == expected.losses
    assert report.accuracies == expected.accuracies
    assert states_are_equal(fresh, whole)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    one, other = network(), network()
    torch.manual_seed(1)
    finetune(one, Blobs(), epochs=2, learning_rate=0.1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    finetune(other, Blobs(), epochs=2, learning_rate=0.1)

    assert states_are_equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint_falls_back_to_the_previous_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, fresh = network(), network()
    finetune(whole, Blobs(), epochs=5, learning_rate=0.1)
    path = tmp_path / "state.pt"
    train_and_kill(network(), path, after=3)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        stored = torch.load(path, weights_only=True)["model"]["0.weight"]
        content[content.find(stored.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)

    def read_both(*_: object) -> None:
        # The damaged one never takes the place of the one that training went on from.
        for each in (path, tmp_path / "state.previous.pt"):
            load_checked(each, torch.device("cpu"))

    with caplog.at_level(logging.WARNING):
        report = finetune(fresh, Blobs(), epochs=5, learning_rate=0.1, checkpoint=path, on_epoch=read_both)

    assert report.resumed_epoch == 2
    assert states_are_equal(fresh, whole)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"checkpoint '{path}' cannot be read (")
    assert caplog.messages[0].endswith(f"): going on from the previous one, '{tmp_path / 'state.previous.pt'}'")


def test_two_damaged_checkpoints_stop_the_run(tmp_path: Path) -> None:
    path, previous = tmp_path / "state.pt", tmp_path / "state.previous.pt"
    path.write_bytes(b"PK")
    previous.write_bytes(b"")

    with pytest.raises(CheckpointError) as caught:
        finetune(network(), Blobs(), epochs=2, learning_rate=0.1, checkpoint=path)

    assert str(caught.value) == (
        f"no checkpoint to go on from: '{path}' cannot be read (File is not a zip file); '{previous}' cannot be read "
        "(File is not a zip file); delete them to train from the start"
    )


def test_poisoned_checkpoint_is_refused_and_its_payload_not_run(tmp_path: Path) -> None:
    path, touched = tmp_path / "state.pt", tmp_path / "touched"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (touched,)

    torch.save({"settings": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Weights only load failed"):
        finetune(network(), Blobs(), epochs=2, learning_rate=0.1, checkpoint=path)

    assert not touched.exists()
    pickle.loads(pickle.dumps(Payload()))
    assert touched.exists()  # the payload does work where it is let in


def test_step_sizes_do_not_decay_and_everything_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    decays: dict[int, float] = {}

    def recorded(optimizer: torch.optim.SGD) -> None:
        for group in optimizer.param_groups:
            decays.update({id(parameter): group["weight_decay"] for parameter in group["params"]})

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    layers = {"0": LayerPolicy(weight_bits=4, act_bits=4), "4": LayerPolicy(weight_bits=3, quantizer="kmeans")}
    model = quantize_layers(network(), layers, [Blobs().points])
    finetune(model, Blobs(), epochs=1, learning_rate=0.1, weight_decay=0.25)

    found = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    steps = {"0.act_quantizer.step", "0.weight_quantizer.step"}
    assert found == {name: 0.0 if name in steps else 0.25 for name in found}
    assert steps < found.keys()


def test_network_without_quantizers_is_trained_by_one_group_of_all_parameters_in_order(tmp_path: Path) -> None:
    # So that its results do not hang on whether there could have been quantizers.
    path = tmp_path / "state.pt"
    finetune(network(), Blobs(), epochs=1, learning_rate=0.1, checkpoint=path)

    (group,) = torch.load(path)["optimizer"]["param_groups"]
    assert group["params"] == list(range(len(list(network().parameters()))))


def test_checkpoint_with_other_groups_of_parameters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    finetune(network(), Blobs(), epochs=1, learning_rate=0.1, checkpoint=path)
    model = quantize_layers(network(), {"0": LayerPolicy(weight_bits=4, act_bits=4)}, [Blobs().points])

    with pytest.raises(CheckpointError) as caught:
        finetune(model, Blobs(), epochs=1, learning_rate=0.1, checkpoint=path)

    assert str(caught.value) == (
        f"checkpoint '{path}' is of another run: its optimizer has groups of [6] parameters, now [6, 2] (step sizes of "
        "quantizers are a group of their own); delete it to train from the start"
    )


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    finetune(network(), Blobs(), epochs=1, learning_rate=0.1, checkpoint=path)

    with pytest.raises(CheckpointError) as caught:
        finetune(network(), Blobs(), epochs=1, learning_rate=0.2, checkpoint=path, seed=3)

    assert str(caught.value) == (
        f"checkpoint '{path}' is of another run: learning_rate 0.1, now 0.2, seed 0, now 3; use the same settings, "
        "or delete it"
    )


def test_loss_that_is_not_finite_stops_with_the_step() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan

    with pytest.raises(FinetuneError) as caught:
        finetune(model, Blobs(), epochs=2, learning_rate=0.1, warmup_steps=0)

    assert str(caught.value) == (
        "the training loss is nan at step 1 of epoch 1 (learning rate 0.1): lower the learning rate, or check the "
        "images and labels for values that are not finite"
    )


def test_distillation_alone_brings_the_student_to_the_teacher_whatever_the_labels() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, 2), nn.Linear(6, 2)
    data = Blobs()
    data.labels = 1 - data.labels

    finetune(student, data, epochs=300, learning_rate=0.02, weight_decay=0.0, teacher=teacher, distillation_weight=1.0)

    torch.testing.assert_close(student(data.points).softmax(1), teacher(data.points).softmax(1), atol=0.01, rtol=0)
    assert teacher.training
    assert all(parameter.grad is None for parameter in [*teacher.parameters(), *student.parameters()])


def test_first_loss_mixes_labels_and_teacher_as_hinton_does() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, 2), nn.Linear(6, 2)
    data = Blobs(n_batches=1)
    points, labels = next(data(0))
    ours, theirs = student(points).detach(), teacher(points).detach()
    soft = (theirs / 3).softmax(1)
    divergence = (soft * (soft.log() - (ours / 3).softmax(1).log())).sum(1).mean()

    report = finetune(
        student, data, epochs=1, learning_rate=0.1, teacher=teacher, distillation_weight=0.25, temperature=3.0
    )

    expected = 0.75 * F.cross_entropy(ours, labels) + 0.25 * 9 * divergence
    assert report.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_distillation_of_maps_weighs_each_position_as_labels_do() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    points, labels = torch.randn(2, 3, 5, 5), torch.randint(4, (2, 5, 5))
    flat_points, flat_labels = points.movedim(1, 3).reshape(50, 3, 1, 1), labels.reshape(50, 1, 1)
    losses = []
    for data in ([(points, labels)], [(flat_points, flat_labels)]):
        model = copy.deepcopy(student)
        train = Listed(data)
        found = finetune(model, train, epochs=1, learning_rate=0.1, teacher=teacher, distillation_weight=0.5)
        losses += found.losses

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        finetune(network(), Blobs(), epochs=1, learning_rate=0.1, distillation_weight=0.5)
    assert str(caught.value) == ("distillation_weight 0.5 needs a teacher; pass the dense network, or set it to 0")


def test_bfloat16_keeps_float32_weights_and_learns() -> None:
    model = network()
    report = finetune(model, Blobs(), epochs=8, learning_rate=0.1, autocast=True)

    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert report.accuracies[-1] > 0.9


def test_in_bfloat16_strided_depthwise_layers_get_gradients_from_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("graph_encoder.modes.has_bfloat16", lambda _: True)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, groups=4), nn.Flatten(), nn.Linear(4 * 2 * 2, 2))
    names: list[str] = []
    model[0].register_forward_hook(lambda _, __, y: names.append(y.grad_fn.name()))

    finetune(
        model, Listed([(torch.randn(6, 4, 5, 5), torch.arange(6) % 2)]), epochs=1, learning_rate=0.1, autocast=True
    )

    assert names == ["_ConvolutionBackward"]


def test_modes_are_put_back_and_callback_gets_what_evaluate_returned() -> None:
    model = network()
    model.train()
    model[1].eval()
    seen: list[tuple[int, float]] = []

    report = finetune(
        model,
        Blobs(),
        epochs=2,
        learning_rate=0.1,
        evaluate=lambda network: 0.0 if any(module.training for module in network.modules()) else 0.25,
        on_epoch=lambda epoch, loss, accuracy: seen.append((epoch, accuracy)),
    )

    assert seen == [(1, 0.25), (2, 0.25)]
    assert report.accuracies == (0.25, 0.25)
    assert [module.training for module in model] == [True, False, True, True, True]


def test_batch_norms_that_were_frozen_stay_frozen() -> None:
    model = network().train()
    model[1].eval()
    before = model[1].running_mean.clone()

    finetune(model, Blobs(), epochs=1, learning_rate=0.1)

    assert torch.equal(model[1].running_mean, before)
    assert [module.training for module in (model, model[0], model[1], model[3])] == [True, True, False, True]
    finetune(model.eval(), Blobs(), epochs=1, learning_rate=0.1)
    assert not torch.equal(model[1].running_mean, before)


def test_checkpoint_of_another_width_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "state.pt", network()
    finetune(network(), Blobs(), epochs=1, learning_rate=0.1, checkpoint=path)
    other[4] = nn.Linear(12, 3)

    with pytest.raises(
        CheckpointError, match=r"is of another network, or of one whose zeros were held: .*size mismatch"
    ):
        finetune(other, Blobs(), epochs=1, learning_rate=0.1, checkpoint=path)


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.inner(x)}


def test_outputs_that_are_no_scores_are_told() -> None:
    with pytest.raises(FinetuneError) as caught:
        finetune(Scores(), Blobs(), epochs=1, learning_rate=0.1)
    assert str(caught.value) == "the network returns a dict; this loss needs one tensor of scores"


@pytest.mark.parametrize(("given", "told"), [(2, "2"), (6, "more")])
def test_data_of_another_length_than_it_says_is_told(given: int, told: str) -> None:
    data = Blobs(given)
    data.__class__ = type("Miscounted", (Blobs,), {"__len__": lambda _: 4})
    with pytest.raises(FinetuneError) as caught:
        finetune(network(), data, epochs=1, learning_rate=0.1)
    assert str(caught.value) == (f"epoch 1 has {told} batches of the 4 that len() of the data says; make them agree")


class Positions(Blobs):
    """A label for each of two positions, in place of one for a point."""

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for points, labels in super().__call__(epoch):
            yield points[:, :, None, None].expand(-1, -1, 1, 2), labels[:, None, None].expand(-1, 1, 2)


class Shares(Blobs):
    """How much of each class a point is."""

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for points, labels in super().__call__(epoch):
            yield points, 0.8 * F.one_hot(labels, 2) + 0.1


@pytest.mark.parametrize(
    ("data", "layer"), [(Positions(), nn.Conv2d(6, 2, 1)), (Shares(), nn.Linear(6, 2))], ids=["positions", "shares"]
)
def test_accuracy_is_a_share_whatever_the_labels(data: Blobs, layer: nn.Module) -> None:
    report = finetune(layer, data, epochs=8, learning_rate=0.1)

    assert 0.9 < report.accuracies[-1] <= 1


def test_numbers_of_numpy_leave_checkpoints_that_can_be_read(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": np.float64(0.1), "evaluate": lambda _: np.float64(0.5)}
    path = tmp_path / "state.pt"
    finetune(network(), Blobs(), epochs=3, checkpoint=path, **options)

    report = finetune(network(), Blobs(), epochs=3, checkpoint=path, **options)

    assert report.resumed_epoch == 3
    assert report.accuracies == (0.5, 0.5, 0.5)


class Unlabelled(Blobs):
    """Every other point has no label."""

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for points, labels in super().__call__(epoch):
            yield points, torch.where(torch.arange(len(labels)) % 2 > 0, labels, -100)


def test_labels_that_the_loss_leaves_out_are_not_counted() -> None:
    assert finetune(nn.Linear(6, 2), Unlabelled(), epochs=8, learning_rate=0.1).accuracies[-1] > 0.9


def loader() -> DataLoader[tuple[Tensor, ...]]:
    (batch,) = Blobs(n_batches=1)(0)
    return DataLoader(TensorDataset(*batch), batch_size=8, shuffle=True)


def test_a_data_loader_is_shuffled_by_seed_and_epoch_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole, resumed, other = network(), network(), network()
    expected = finetune(whole, loader(), epochs=4, learning_rate=0.1)
    finetune(other, loader(), epochs=4, learning_rate=0.1, seed=1)

    train_and_kill(network(), tmp_path / "a.pt", after=2, epochs=4, data=loader())
    report = finetune(resumed, loader(), epochs=4, learning_rate=0.1, checkpoint=tmp_path / "a.pt")

    assert (report.resumed_epoch, report.losses) == (2, expected.losses)
    assert states_are_equal(resumed, whole) and not states_are_equal(other, whole)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.heads = nn.Linear(2, 8), nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: head(self.features(x).relu()) for name, head in self.heads.items()}


def test_a_loss_of_ones_own_takes_what_the_network_returns_and_labels_as_they_come() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    batches = [(x, {"a": x.sum(1, keepdim=True), "b": x * 2})]

    def loss(outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        return sum((F.mse_loss(outputs[name], labels[name]) for name in labels), start=torch.zeros(()))

    report = finetune(TwoOutputs(), batches, epochs=60, learning_rate=0.05, loss=loss)

    assert report.losses[-1] < 0.1 * report.losses[0]
    assert math.isnan(report.accuracies[-1])
