"""Training that keeps zeros, in whatever loop calls a PyTorch optimizer: `pruning.finetune` or a user's own.

The pattern rides in buffers that the layers have while it is held, so every checkpoint of the network's state dict has
it, and a resumed training goes on with it. It costs a byte a weight of the sparse layers and one pass over their
gradients a step: where the gradient of a zero is zero, momentum and weight decay leave it zero.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from graph_encoder.modes import evaluation_mode

from .density import DensitySchedule, at_density
from .files import CheckpointError
from .kernels import ops as _ops  # noqa: F401 - defines the operators
from .kernels.formats import BLOCKS, SparseWeight, pack, positions_of
from .kernels.gradients import layout_of
from .kernels.native import library
from .layer_policy import LayerPolicy, PolicyError
from .sparsity import can_be_sparse, layer_masks, sparse_weight

_DROPPED, _PROGRESS = "_secateur_dropped", "_secateur_progress"

MOST_KEPT = 1 / 3
"""With a larger share of its weights, a layer trains no faster by sparse kernels than by dense ones."""


def without_progress(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network, by name, but for those that it has while zeros are held."""
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[-1] not in (_DROPPED, _PROGRESS)}


@contextmanager
def hold_zeros(model: nn.Module, layers: Iterable[str], *, skip: bool = False) -> Iterator[None]:
    """Keep the weights that are zero now at zero, whatever trains the network meanwhile.

    Use it around `finetune` for what `apply_policy` made: ``with hold_zeros(model, policy.sparse_layers):
    finetune(model, ...)``. A checkpoint from within is continued from within; its zeros are then held.

    Args:
        model: the network; on return it has the buffers and hooks that it had before.
        layers: qualified names of convolutions and linear layers.
        skip: also run two-dimensional convolutions of those by the sparse kernels, forward and backward, so that steps
            get faster: those of one group that keep at most `MOST_KEPT` of their weights, in float32 on the CPU. The
            others, and all of them without the compiled kernels, run as before. Results differ by rounding. Their
            gradients cannot be differentiated again.

    Raises:
        PolicyError: if a layer is missing or cannot be sparse, or zeros of the network are held already.
    """
    held = _Held(model, layers, "zeros as they are")
    held.drop({name: weight == 0 for name, weight in held.weights.items()}, ())
    with held.attached(lambda _step: {}), ExitStack() as stack:
        if skip and library() is not None:
            for name in held.weights:
                layer = model.get_submodule(name)
                if isinstance(layer, nn.Conv2d) and _has_plain_window(layer):
                    layer._conv_forward = _SkippingForward(layer)  # type: ignore[method-assign, assignment]
                    stack.callback(delattr, layer, "_conv_forward")
        yield


@contextmanager
def prune_along(model: nn.Module, layers: Mapping[str, LayerPolicy], schedule: DensitySchedule) -> Iterator[None]:
    """Zero weights as ``schedule`` says while the network trains, and keep them at zero.

    The first cut is made on entering, the others after optimizer steps. A cut looks at the weights as they are; those
    that go lose their momentum too. A step is one of the optimizer that holds the first layer's weight.

    Args:
        model: the network; on return it has the buffers and hooks that it had before.
        layers: pattern and final density by qualified name.
        schedule: how dense a layer is after how many steps; N:M starts with all of M.

    Raises:
        PolicyError: if a pattern does not fit its layer, or zeros of the network are held already.
        CheckpointError: after the first step, if the state dict loaded within is of other layers or another schedule.
    """
    final = {name: layer for name, layer in layers.items() if layer.is_sparse}
    layer_masks(model, final)
    held = _Held(model, final, (sorted(final.items()), schedule))

    def cut(step: int) -> dict[str, Tensor]:
        now = {name: schedule.density(final[name].density, step) for name in held.weights}
        changed = {
            name: at_density(final[name], density)
            for name, density in now.items()
            if step == 0 or density != schedule.density(final[name].density, step - 1)
        }
        return {name: ~mask for name, mask in layer_masks(model, changed).items()}

    held.drop(cut(0), ())
    with held.attached(cut):
        yield


@contextmanager
def l1_penalty(model: nn.Module, layers: Iterable[str], strength: float) -> Iterator[None]:
    """Train with ``strength * sum of |weight|`` in the loss, through its gradient at every backward pass.

    Han et al. (2015, section 3.1) prune after training with L1 and retrain with L2, which is the ``weight_decay`` of
    `finetune`. For L1 alone pass ``weight_decay=0`` there.

    Args:
        model: the network.
        layers: names of the layers whose weights are penalised.
        strength: at least 0.
    """

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad.add_(weight.detach().sign(), alpha=strength)

    weights = {id(weight): weight for weight in (sparse_weight(model, name)[0] for name in layers)}
    with ExitStack() as stack:
        for weight in weights.values():
            stack.callback(weight.register_post_accumulate_grad_hook(add).remove)
        yield


@contextmanager
def corrected_dropout(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Iterator[None]:
    """Lower the dropout behind each sparse layer for a while: ``D_r = D_o * sqrt(C_r / C_o)``.

    ``C_o`` are the connections of the layers that the dropout reads, ``C_r`` those that are not zero on entering: a
    layer with fewer connections overfits less. Only dropout modules are seen, not ``functional.dropout``.

    Args:
        model: the network; the rates it had are put back at the end.
        example_inputs: what ``model`` takes, to see which layers each dropout reads.

    Source: Han et al. 2015, section 3.2, equation 2.
    """
    modules = dict(model.named_modules())
    before = {}
    for name, layers in dropout_sources(model, example_inputs).items():
        weights = [sparse_weight(model, layer)[0] for layer in layers]
        left = sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
        before[name] = modules[name].p
        modules[name].p *= left**0.5
    try:
        yield
    finally:
        for name, rate in before.items():
            modules[name].p = rate


def dropout_sources(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> dict[str, tuple[str, ...]]:
    """The convolutions and linear layers whose outputs each dropout module reads, with none of them in between.

    Args:
        model: the network; modes and hooks are as before afterwards.
        example_inputs: what ``model`` takes.

    Returns:
        Layer names by name of the dropout module; dropouts that read no such layer are left out.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    # A copy of the inputs that asks for gradients, so that frozen layers leave nodes in the graph too.
    inputs = tuple(x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    writer: dict[Any, str] = {}
    found: dict[str, tuple[str, ...]] = {}

    def note_layer(name: str, output: Tensor) -> None:
        writer[output.grad_fn] = name

    def note_dropout(name: str, x: Tensor) -> None:
        frontier, seen, layers = [x.grad_fn], set(), []
        while frontier:
            node = frontier.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in writer:
                layers.append(writer[node])
            else:
                frontier.extend(parent for parent, _ in node.next_functions)
        if layers:
            found[name] = (*found.get(name, ()), *sorted(layers))

    with ExitStack() as stack, evaluation_mode(model), torch.enable_grad():
        for name, module in model.named_modules():
            if isinstance(module, _DropoutNd):
                hook = module.register_forward_pre_hook(lambda _m, args, name=name: note_dropout(name, args[0]))
                stack.callback(hook.remove)
            elif can_be_sparse(model, name):
                hook = module.register_forward_hook(lambda _m, _a, output, name=name: note_layer(name, output))
                stack.callback(hook.remove)
        model(*inputs)
    return found


class _Held:
    """Weights of which some stay zero, while it is attached.

    Attributes:
        weights: by layer name; a weight that several layers share is there once.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], plan: object) -> None:
        if any(name in module._buffers for module in model.modules() for name in (_DROPPED, _PROGRESS)):
            msg = f"zeros of {type(model).__name__} are held already; hold those of all layers at once"
            raise PolicyError(msg)
        self.weights: dict[str, nn.Parameter] = {}
        for name in layers:
            weight = sparse_weight(model, name)[0]
            if not any(weight is other for other in self.weights.values()):
                self.weights[name] = weight
        self._model = model
        self._digest = int.from_bytes(hashlib.sha256(repr(plan).encode()).digest()[:7])
        self._dropped = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self._progress = torch.tensor([0, self._digest])

    @contextmanager
    def attached(self, cut: Callable[[int], Mapping[str, Tensor]]) -> Iterator[None]:
        """Buffers and hooks, for as long as it lasts; ``cut`` says what goes after so many steps."""
        optimizers: WeakSet[Optimizer] = WeakSet()

        def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            if not any(_steps(optimizer, weight) for weight in self.weights.values()):
                return
            dropped = cut(self._count_step()) if self._is_counted(optimizer) else {}
            # One that is new here may remember steps from before the zeros.
            known = {} if optimizer in optimizers else {name: self._buffer(name) for name in self.weights}
            optimizers.add(optimizer)
            self.drop({**known, **dropped}, optimizers)

        with ExitStack() as stack:
            stack.callback(register_optimizer_step_post_hook(after_step).remove)
            self._attach_buffer(stack, self._model, _PROGRESS, self._progress)
            for name, weight in self.weights.items():
                layer = self._model.get_submodule(name)
                self._attach_buffer(stack, layer, _DROPPED, self._dropped[name])
                silence = functools.partial(_silence, layer)
                is_trained = weight.requires_grad
                weight.requires_grad_()  # PyTorch hooks nothing else, and a frozen layer may be trained later
                stack.callback(weight.register_post_accumulate_grad_hook(silence).remove)
                weight.requires_grad_(is_trained)
            yield

    @staticmethod
    def _attach_buffer(stack: ExitStack, module: nn.Module, name: str, buffer: Tensor) -> None:
        module.register_buffer(name, buffer)
        stack.callback(module._buffers.pop, name)

    def drop(self, dropped: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
        """Zero weights, their gradients that wait for a step, and what the optimizers remember of them, from now on."""
        for name, mask in dropped.items():
            weight = self.weights[name]
            buffer = self._buffer(name)
            if mask is not buffer:  # a write would count as another pattern
                buffer.copy_(mask)
            states = [optimizer.state[weight] for optimizer in optimizers if weight in optimizer.state]
            remembered = [value for state in states for value in state.values()]
            with torch.no_grad():
                for tensor in (weight, weight.grad, *remembered):
                    if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                        tensor.masked_fill_(mask, 0)

    def _buffer(self, name: str) -> Tensor:
        # The layer's own once attached: moving a network to another device makes new buffers.
        buffer = self._model.get_submodule(name)._buffers.get(_DROPPED)
        return self._dropped[name] if buffer is None else buffer

    def _is_counted(self, optimizer: Optimizer) -> bool:
        # One that is frozen is handed to no optimizer.
        weights = [*self.weights.values()]
        return _steps(optimizer, next((weight for weight in weights if weight.requires_grad), weights[0]))

    def _count_step(self) -> int:
        """Note one more step: how many there were by now."""
        progress = self._model.get_buffer(_PROGRESS)
        progress[0] += 1
        step, digest = progress.tolist()
        if digest != self._digest:
            msg = (
                "the checkpoint is of a training with other sparse layers or another schedule; "
                "use the same ones, or delete it"
            )
            raise CheckpointError(msg)
        return int(step)


def _steps(optimizer: Optimizer, weight: nn.Parameter) -> bool:
    return any(parameter is weight for group in optimizer.param_groups for parameter in group["params"])


def _silence(layer: nn.Module, weight: Tensor) -> None:
    assert weight.grad is not None
    weight.grad.masked_fill_(layer.get_buffer(_DROPPED), 0)


class _SkippingForward:
    """In place of ``Conv2d._conv_forward``: the same by the sparse kernels, as long as they take the tensors."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer
        self._read: tuple[Tensor, int] | None = None
        self._pattern: tuple[SparseWeight, Tensor] | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self._layer
        pattern = self._current_pattern()
        is_plain = x.dim() == 4 and x.shape[1] == weight.shape[1]
        is_plain = is_plain and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, weight))
        if pattern is None or not is_plain or torch.is_autocast_enabled("cpu"):
            dense: Tensor = nn.Conv2d._conv_forward(layer, x, weight, bias)
            return dense
        padding = [int(side) for side in layer.padding]
        window = (list(layer.kernel_size), list(layer.stride), padding, list(layer.dilation))
        out: Tensor = _SkippingConvolution.apply(x, weight, bias, *pattern, window)
        return out

    def _current_pattern(self) -> tuple[SparseWeight, Tensor] | None:
        """The pattern, and the position of each value in the weight; None if too many weights are left."""
        dropped = self._layer.get_buffer(_DROPPED)
        # Loading a checkpoint writes into the buffer, and moving the network makes another one.
        if self._read is None or self._read[0] is not dropped or self._read[1] != dropped._version:
            self._read, self._pattern = (dropped, dropped._version), _pattern(~dropped.cpu())
        return self._pattern


class _SkippingConvolution(torch.autograd.Function):
    """The sparse convolution as a function of the dense weight, whose gradient is zero where the weight is dropped.

    Only the input and the parameter are kept for the backward pass, which gathers the values again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packed: SparseWeight,
        positions: Tensor,
        window: tuple[list[int], ...],
    ) -> Tensor:
        """Map (batch, in, height, width) to (batch, out, out_height, out_width)."""
        ctx.save_for_backward(x, weight)
        ctx.packed, ctx.positions, ctx.window = packed, positions, window
        values = weight.reshape(-1)[positions]
        pattern = (values, packed.columns, packed.counts)
        out: Tensor = torch.ops.secateur.sparse_conv2d(
            x, *pattern, bias, None, len(weight), *window, packed.block, "none"
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=layout_of(x))
        pattern = (weight.reshape(-1)[ctx.positions], ctx.packed.columns, ctx.packed.counts)
        window, block = ctx.window, ctx.packed.block
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.secateur.sparse_conv2d_input_grad(grad, *pattern, x.shape, *window, block)
        if ctx.needs_input_grad[1]:
            grad_values = torch.ops.secateur.sparse_conv2d_values_grad(grad, x, *pattern, *window, block)
            flat = grad.new_zeros(weight.numel()).index_put_((ctx.positions,), grad_values)
            grad_weight = flat.reshape(weight.shape)
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _pattern(kept: Tensor) -> tuple[SparseWeight, Tensor] | None:
    """In the largest block whose channels share all of their zeros."""
    if not 0 < float(kept.float().mean()) <= MOST_KEPT:
        return None
    kept = kept.contiguous()
    for block in sorted(BLOCKS, reverse=True):
        if len(kept) % block:
            continue
        shared = kept.reshape(-1, block, *kept.shape[1:])
        if torch.equal(shared.any(1), shared.all(1)):
            packed = pack(kept.float(), block, kept)
            return packed, positions_of(packed.columns, packed.counts, block, kept[0].numel())
    msg = "a block of one channel shares its zeros"
    raise AssertionError(msg)


def _has_plain_window(layer: nn.Conv2d) -> bool:
    is_own = type(layer).forward is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
    return is_own and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
