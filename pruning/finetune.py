"""Training: from scratch and after pruning, with the same loop, so that a comparison compares networks only."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from graph_encoder.errors import SecateurError, first_line
from graph_encoder.modes import evaluation_mode, mixed_precision

from .files import CheckpointError, load_checked, write_atomic
from .quantize import step_sizes

_log = logging.getLogger(__name__)


class FinetuneError(SecateurError, RuntimeError):
    """Training that cannot go on; the message says at which step and what to change."""


class TrainData(Protocol):
    """Training batches: ``data(epoch)`` gives the pairs (images, labels) of an epoch, ``len(data)`` their number."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def __call__(self, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of one epoch, the same ones whenever it is called with that epoch."""
        ...


class Loader(Protocol):
    """Training batches that are drawn anew whenever they are asked for, as `torch.utils.data.DataLoader` gives them."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """The pairs (images, labels) of one epoch."""
        ...


Loss = Callable[[Any, Any], Tensor]
"""What the network returns, in single precision, and labels, as the batches give them: the mean over a batch."""


@dataclass(frozen=True)
class FinetuneReport:
    """What training did.

    Attributes:
        losses: mean training loss of each epoch.
        accuracies: of each epoch, in [0, 1]: what ``evaluate`` returned, else the share of right answers on the
            (augmented) training images.
        seconds: wall time, over all sittings.
        resumed_epoch: epochs that came from a checkpoint.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    seconds: float
    resumed_epoch: int


def finetune(
    model: nn.Module,
    batches: TrainData | Loader,
    *,
    epochs: int,
    learning_rate: float,
    loss: Loss = F.cross_entropy,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup_steps: int | None = None,
    teacher: nn.Module | None = None,
    distillation_weight: float = 0.0,
    temperature: float = 4.0,
    autocast: bool = False,
    seed: int = 0,
    first_epoch: int = 0,
    checkpoint: Path | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> FinetuneReport:
    """Train ``model`` in place by stochastic gradient descent with Nesterov momentum.

    The learning rate rises linearly for ``warmup_steps`` and then falls to zero along half a cosine, step by step
    (Loshchilov & Hutter, "SGDR", 2017, without restarts). There is no choice of a best epoch: the result is the last.

    With a teacher what is minimised is ``(1 - w) * loss + w * T^2 * KL(teacher / T || student / T)`` (Hinton et al.,
    "Distilling the Knowledge in a Neural Network", 2015, section 2; the square keeps the gradients' scale).

    A run that was stopped and is started again with the same arguments gives the weights of a run that was not: what
    an epoch draws at random depends on the seed and the epoch alone, and the rest is in the checkpoint.

    Args:
        model: network to train, on the device to train on; each module's mode is put back at the end. Modules in
            evaluation mode stay in it where the network as a whole is not.
        batches: batches of images, ``(N, ...)``, and labels as ``loss`` takes them, for
            `torch.nn.functional.cross_entropy` int64 ``(N,)`` or one for each position, or shares of the classes; moved
            to the model's device. A `torch.utils.data.DataLoader` will do: without a generator and workers' randomness
            of its own, what it draws depends on ``seed`` and the epoch.
        epochs: passes over the batches; 0 does nothing.
        learning_rate: peak of the schedule.
        loss: of what the network returns and the labels. With another one than `torch.nn.functional.cross_entropy`
            itself nothing is said of right answers: accuracies are NaN without ``evaluate``.
        momentum: of the gradient.
        weight_decay: L2 penalty on every parameter but the step sizes of quantizers.
        warmup_steps: steps of linear rise; by default one epoch, at most a twentieth of the run.
        teacher: network to distil from, on the same device; put into evaluation mode meanwhile.
        distillation_weight: ``w`` above; needs a teacher unless it is 0.
        temperature: ``T`` above.
        autocast: compute in bfloat16 where PyTorch deems it safe and the device has it
            (`graph_encoder.modes.has_bfloat16`; `graph_encoder.modes.bfloat16_pays` tells whether it is faster);
            weights stay in float32, and quantized layers compute in it.
        seed: of dropout and whatever else the model draws; the batches have their own.
        first_epoch: number of the first epoch for what is drawn, where others came before; the schedule starts anew.
        checkpoint: file in which the state is kept after each epoch, with the one before beside it.
        evaluate: accuracy of the network, in evaluation mode, after each epoch; it may look at validation images,
            never at the test's.
        on_epoch: called after each epoch with its number (from 1), loss and accuracy, once the checkpoint is written.

    Raises:
        FinetuneError: if the loss is not finite, or there is no batch.
        CheckpointError: if the checkpoint is of another run, or neither it nor the one before can be read.
        ValueError: if ``distillation_weight`` is above 0 and there is no teacher.
    """
    if distillation_weight > 0 and teacher is None:
        msg = f"distillation_weight {distillation_weight} needs a teacher; pass the dense network, or set it to 0"
        raise ValueError(msg)
    steps = len(batches)
    if steps == 0 and epochs > 0:
        msg = "no training batches: the training split is empty"
        raise FinetuneError(msg)
    if warmup_steps is None:
        warmup_steps = min(steps, epochs * steps // 20)
    # NumPy's numbers are no plain values, and a checkpoint is read with no others.
    learning_rate, momentum, weight_decay = float(learning_rate), float(momentum), float(weight_decay)
    distillation_weight, temperature = float(distillation_weight), float(temperature)
    optimizer = torch.optim.SGD(
        _parameter_groups(model), lr=learning_rate, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    # Everything that the result depends on, so that a checkpoint of another run is told apart.
    settings: dict[str, Any] = {
        "epochs": epochs,
        "steps": steps,
        "learning_rate": learning_rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "distillation_weight": distillation_weight,
        "temperature": temperature,
        "autocast": autocast,
        "seed": seed,
    } | ({"first_epoch": first_epoch} if first_epoch else {})
    if loss is not F.cross_entropy:
        settings["loss"] = getattr(loss, "__qualname__", type(loss).__qualname__)
    progress = _restore(checkpoint, settings, model, optimizer) if checkpoint else _Progress()
    resumed_epoch = len(progress.losses)
    objective = _Objective(loss, teacher, distillation_weight, temperature)
    modes = [(module, module.training) for module in model.modules()]
    # In a network that is ready to train, what is in evaluation mode is so by choice: a batch norm that is frozen.
    frozen = [module for module, training in modes if model.training and not training]
    try:
        for epoch in range(resumed_epoch, epochs):
            started = time.perf_counter()
            rates = [learning_rate * _schedule(epoch * steps + i, epochs * steps, warmup_steps) for i in range(steps)]
            model.train()
            for module in frozen:
                module.eval()
            drawn = batches(first_epoch + epoch) if callable(batches) else batches
            with _seeded(seed, first_epoch + epoch, _device(model)):
                mean_loss, accuracy = _train_epoch(model, drawn, optimizer, objective, rates, epoch, autocast)
            if evaluate is not None:
                with evaluation_mode(model):
                    accuracy = float(evaluate(model))
            progress = progress.plus(mean_loss, accuracy, time.perf_counter() - started)
            if checkpoint:
                _save(checkpoint, settings, model, optimizer, progress)
            if on_epoch is not None:
                on_epoch(epoch + 1, mean_loss, accuracy)
    finally:
        optimizer.zero_grad(set_to_none=True)
        for module, training in modes:
            module.training = training
    return FinetuneReport(progress.losses, progress.accuracies, progress.seconds, resumed_epoch)


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """All parameters, step sizes apart and without weight decay.

    A penalty would pull the range of a grid towards zero, whatever values it has to hold.
    """
    steps = step_sizes(model)
    chosen = {id(step) for step in steps}
    others = {"params": [parameter for parameter in model.parameters() if id(parameter) not in chosen]}
    return [others, {"params": steps, "weight_decay": 0.0}] if steps else [others]


IGNORED = -100
"""Label that the loss leaves out, as PyTorch's cross-entropy does."""
_PARTS = {"settings", "losses", "accuracies", "seconds", "model", "optimizer"}
"""Of a checkpoint."""


@dataclass(frozen=True)
class _Progress:
    losses: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()
    seconds: float = 0.0

    def plus(self, loss: float, accuracy: float, seconds: float) -> "_Progress":
        return _Progress((*self.losses, loss), (*self.accuracies, accuracy), self.seconds + seconds)


@dataclass(frozen=True)
class _Objective:
    loss: Loss
    teacher: nn.Module | None
    weight: float
    temperature: float

    def __call__(self, x: Tensor, logits: Any, labels: Any) -> Tensor:
        loss = self.loss(logits, labels)
        if self.teacher is None or self.weight == 0:
            return loss
        with evaluation_mode(self.teacher), torch.no_grad():
            target = self.teacher(x).float()
        divergence = F.kl_div(
            F.log_softmax(logits / self.temperature, dim=1),
            F.log_softmax(target / self.temperature, dim=1),
            reduction="none",
            log_target=True,
        )
        # Over the classes of each label, of which a network for maps has many an image.
        divergence = divergence.sum(dim=1).mean()
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence


def _train_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    objective: _Objective,
    rates: list[float],
    epoch: int,
    autocast: bool,
) -> tuple[float, float]:
    """One pass over the batches: mean loss and share of right answers, NaN where the loss tells of none."""
    device = _device(model)
    loss_sum, n_right, n_images, n_labels = 0.0, 0, 0, 0
    step, classifies = -1, objective.loss is F.cross_entropy
    for step, (images, labels) in enumerate(batches):
        if step == len(rates):
            break
        rate = rates[step]
        x, y = images.to(device), tree_map_only(Tensor, lambda each: each.to(device), labels)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.enable_grad(), mixed_precision(device.type, autocast):
            outputs = model(x)
            if not isinstance(outputs, Tensor) and (classifies or objective.teacher is not None):
                msg = f"the network returns a {type(outputs).__name__}; this loss needs one tensor of scores"
                raise FinetuneError(msg)
            logits = tree_map_only(Tensor, lambda each: each.float() if each.is_floating_point() else each, outputs)
            loss = objective(x, logits, y)
        value = loss.item()
        if not math.isfinite(value):
            msg = (
                f"the training loss is {value} at step {step + 1} of epoch {epoch + 1} (learning rate {rate:.3g}): "
                f"lower the learning rate, or check the images and labels for values that are not finite"
            )
            raise FinetuneError(msg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum, n_images = loss_sum + value * len(x), n_images + len(x)
        if not classifies:
            continue
        # Shares of classes have a likeliest one; of maps each position has a label.
        labelled = y.argmax(dim=1) if y.is_floating_point() else y
        n_right += int((logits.argmax(dim=1) == labelled).sum())
        n_labels += int((labelled != IGNORED).sum())
    if step + 1 != len(rates):
        given = "more" if step == len(rates) else str(step + 1)
        msg = f"epoch {epoch + 1} has {given} batches of the {len(rates)} that len() of the data says; make them agree"
        raise FinetuneError(msg)
    return loss_sum / n_images, n_right / max(1, n_labels) if classifies else math.nan


def _schedule(step: int, n_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise, then half a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (n_steps - warmup_steps)))


@contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Draw from PyTorch's global generator (dropout does) as the seed and the epoch say, and put it back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]))
        yield


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _previous(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.previous{checkpoint.suffix}")


def _save(
    checkpoint: Path,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
) -> None:
    content = {
        "settings": settings,
        "losses": progress.losses,
        "accuracies": progress.accuracies,
        "seconds": progress.seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    if checkpoint.exists():
        checkpoint.replace(_previous(checkpoint))
    write_atomic(checkpoint, lambda file: torch.save(content, file))


def _restore(
    checkpoint: Path, settings: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> _Progress:
    """Continue from the newest checkpoint that can be read; from the start if there is none."""
    existing = [path for path in (checkpoint, _previous(checkpoint)) if path.exists()]
    failures: list[str] = []
    for path in existing:
        try:
            content = load_checked(path, _device(model))
            if not isinstance(content, dict) or not content.keys() >= _PARTS:
                failures.append(f"'{path}' is no checkpoint of a training")
                continue
        except Exception as error:  # a damaged archive fails in the unzipper, the unpickler or the tensor reader
            failures.append(f"'{path}' cannot be read ({first_line(error)})")
            continue
        for failure in failures:
            _log.warning("checkpoint %s: going on from the previous one, '%s'", failure, path)
        _check_same_run(path, content, settings)
        _check_same_groups(path, content["optimizer"], optimizer)
        try:
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            msg = (
                f"checkpoint '{path}' is of another network, or of one whose zeros were held: "
                f"{' '.join(str(error).split())[:300]}; train the same network, or delete it"
            )
            raise CheckpointError(msg) from error
        if failures:
            checkpoint.unlink()  # or the next one saved would put it in the place of this one
        return _Progress(tuple(content["losses"]), tuple(content["accuracies"]), content["seconds"])
    if failures:
        msg = f"no checkpoint to go on from: {'; '.join(failures)}; delete them to train from the start"
        raise CheckpointError(msg)
    return _Progress()


def _check_same_run(path: Path, content: dict[str, Any], settings: dict[str, Any]) -> None:
    before = content["settings"]
    changed = [
        f"{name} {before.get(name)}, now {value}" for name, value in settings.items() if before.get(name) != value
    ]
    if changed:
        msg = f"checkpoint '{path}' is of another run: {', '.join(changed)}; use the same settings, or delete it"
        raise CheckpointError(msg)


def _check_same_groups(path: Path, before: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    groups = [before["param_groups"], optimizer.param_groups]
    found, own = ([len(group["params"]) for group in each] for each in groups)
    if found != own:
        msg = (
            f"checkpoint '{path}' is of another run: its optimizer has groups of {found} parameters, now {own} (step "
            "sizes of quantizers are a group of their own); delete it to train from the start"
        )
        raise CheckpointError(msg)
