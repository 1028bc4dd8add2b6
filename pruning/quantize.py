"""Fewer bits in a network: layers that compute with quantized weights and read quantized values, and can be trained.

Weights stay in single precision and are quantized whenever the layer runs ("fake quantization"), so that an optimizer
can go on changing them; what a layer computes is what integers would give.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from graph_encoder.batches import Batch, first_images, inputs_of, tensors_of
from graph_encoder.copies import copied
from graph_encoder.modes import attributes_kept, evaluation_mode
from graph_encoder.randomness import kept_randomness
from graph_encoder.symbolic import name_within, symbolic_trace

from .calibration import CalibrationError, Observer, RangeMethod, nothing_seen, shared_values, weight_steps
from .integer_flow import kind_of, tensors_to_quantize
from .layer_policy import FULL_BITS, HALF_BITS, INTEGER_BITS, LayerPolicy, PolicyError

_SMALLEST_STEP = 1e-12
_RELU6 = 6.0
ACT_QUANTIZERS = "act_quantizers"
"""Module of a trace with the quantizers of whole tensors."""
_ALIKE = 1e-3
"""Largest difference of outputs, as a share of the largest, that the order of sums explains."""


class _FakeQuantize(torch.autograd.Function):
    """Rounding to ``step * (i - zero_point)``, ``low <= i <= high``, with the gradients of learned step sizes.

    Source: Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 3 and 5.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int, scale: float) -> Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.bounds = low, high, scale
        return _round_to_grid(x, step, zero_point, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, step, zero_point = ctx.saved_tensors
        low, high, scale = ctx.bounds
        scaled = x / step
        shifted = scaled + zero_point
        is_inside = (shifted > low) & (shifted < high)
        of_step = torch.where(is_inside, scaled.round() - scaled, shifted.clamp_(low, high).sub_(zero_point))
        of_step = (gradient * of_step).sum_to_size(step.shape) * scale
        return gradient * is_inside, of_step, None, None, None, None


def _round_to_grid(x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    # Bounds that are numbers, not tensors, are taken by a kernel several times as fast.
    return (x / step).round_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(step)


def _fake_quantize(x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int, scale: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or step.requires_grad):
        result: Tensor = _FakeQuantize.apply(x, step, zero_point, low, high, scale)
        return result
    return _round_to_grid(x, step, zero_point, low, high)


class _KeepSign(torch.autograd.Function):
    """``step * sign(w)``; the sign lets the gradient pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.scale = scale
        return weight.sign() * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, step = ctx.saved_tensors
        return gradient, (gradient * weight.sign()).sum_to_size(step.shape) * ctx.scale, None


def _single_precision(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Let a module compute in float32 where autocast would take fewer bits.

    bfloat16 holds 8 significant bits: values on a grid of as many would leave it, and the gradient of the step, which
    is what rounding leaves, would be the type's own rounding.
    """

    @functools.wraps(forward)
    def in_single_precision(module: Any, x: Tensor) -> Tensor:
        device = x.device.type
        # Shapes are traced on the meta device, which knows no autocast.
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return forward(module, x)
        with torch.autocast(device, enabled=False):
            return forward(module, x.float())

    return in_single_precision


class ActQuantizer(nn.Module):
    """Values on one grid of ``2 ** bits`` levels with a learned step size.

    Attributes:
        bits: 1 to 8.
        place: whose values these are, for messages.
        step: learned, a single value; its gradient is scaled by ``1 / sqrt(values of an image * levels above zero)``
            (Esser et al. 2020, section 2.2).
        zero_point: the integer that stands for zero; 0 where no value is negative.
        ceiling: the grid reaches no higher, whatever is learned; what a ReLU6 writes needs no more, and behind a grid
            that does, ONNX Runtime keeps the clip and computes the layer before it in floats.
        observer: where not None, values pass unchanged and are looked at.
    """

    step: nn.Parameter
    zero_point: Tensor

    def __init__(self, bits: int, place: str, ceiling: float = math.inf) -> None:
        super().__init__()
        self.bits = bits
        self.place = place
        self.ceiling = ceiling
        self.observer: Observer | None = None
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    @property
    def top(self) -> int:
        """The highest integer."""
        return int(2**self.bits - 1)

    @property
    def scale(self) -> Tensor:
        """The distance of neighbours on the grid, above 0; beyond the ceiling it keeps a gradient, to sink again."""
        step = _positive(self.step)
        highest = self.ceiling / self.top
        return torch.where(step > highest, highest + (step - step.detach()), step)

    @_single_precision
    def forward(self, x: Tensor) -> Tensor:
        """Values of the shape of ``x``, each on the grid."""
        if self.observer is not None:
            self.observer.see(x)
            return x
        gradient_scale = 1.0
        if self.training and torch.is_grad_enabled():
            above_zero = max(self.top - int(self.zero_point), 1)
            gradient_scale = 1 / math.sqrt(max(x.numel() / max(len(x), 1), 1) * above_zero)
        return _fake_quantize(x, self.scale, self.zero_point, 0, self.top, gradient_scale)

    def calibrate(self, method: RangeMethod) -> None:
        """Take the grid that ``method`` chooses for what the observer saw, and stop observing."""
        assert self.observer is not None
        grid = self.observer.grid(self.top + 1, method)
        with torch.no_grad():
            self.step.fill_(grid.step)
            self.zero_point.fill_(grid.zero_point)
        self.observer = None

    def extra_repr(self) -> str:
        """Shown when the network is printed."""
        return f"bits={self.bits}"


class _RoundToHalf(torch.autograd.Function):
    """Values rounded to float16; the gradient, whose small values float16 does not hold, is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient


class HalfPrecision(nn.Module):
    """Values rounded to half precision (float16); the gradient passes straight through."""

    def forward(self, x: Tensor) -> Tensor:
        """Values of the shape and the type of ``x``."""
        if torch.is_grad_enabled() and x.requires_grad:
            rounded: Tensor = _RoundToHalf.apply(x)
            return rounded
        return x.to(torch.float16).to(x.dtype)


class LinearWeightQuantizer(nn.Module):
    """Weights on a symmetric grid with a learned step size for each output channel.

    Two bits and more have the levels ``-n`` to ``n``, ``n = 2 ** (bits - 1) - 1``: a level fewer than there could
    be, so that a weight and its negative are quantized alike and a zero stays a zero. One bit keeps the signs, and
    the zeros of a sparse layer.

    Attributes:
        bits: 1 to 8.
        step: learned, of shape ``(out, 1, ...)``.
    """

    step: nn.Parameter
    zero: Tensor

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(weight.new_ones((len(weight), *[1] * (weight.dim() - 1))))
        self.register_buffer("zero", weight.new_zeros(()), persistent=False)

    @property
    def top(self) -> int:
        """The highest level."""
        return max(int(2 ** (self.bits - 1)) - 1, 1)

    @property
    def scale(self) -> Tensor:
        """The distance of neighbours on the grid of each channel, above 0, of shape ``(out, 1, ...)``."""
        return _positive(self.step)

    def forward(self, weight: Tensor) -> Tensor:
        """Weights of the shape of ``weight``, each on the grid of its channel."""
        gradient_scale = 1 / math.sqrt(weight[0].numel() * self.top)
        if self.bits == 1:
            signs: Tensor = _KeepSign.apply(weight, self.scale, gradient_scale)
            return signs
        return _fake_quantize(weight, self.scale, self.zero, -self.top, self.top, gradient_scale)

    def calibrate(self, weight: Tensor, method: RangeMethod) -> None:
        """Choose the step sizes for these weights."""
        with torch.no_grad():
            self.step.copy_(weight_steps(weight, self.bits, method))

    def extra_repr(self) -> str:
        """Shown when the network is printed."""
        return f"bits={self.bits}"


class SharedWeightQuantizer(nn.Module):
    """Weights that share ``2 ** bits`` learned values; which weight has which value stays as calibrated.

    The gradient of a value is the sum over the weights that share it; zeros stay zeros.

    Attributes:
        bits: 1 to 8.
        values: learned, of shape ``(2 ** bits,)``.
        index: uint8 of the weight's shape, the value of each weight.

    Source: Han et al., "Deep Compression" (2016), section 3.
    """

    values: nn.Parameter
    index: Tensor

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.values = nn.Parameter(weight.new_zeros(2**bits))
        self.register_buffer("index", torch.zeros_like(weight, dtype=torch.uint8))

    def forward(self, weight: Tensor) -> Tensor:
        """Weights of the shape of ``weight``, each the value that it shares."""
        return torch.where(weight == 0, 0.0, self.values[self.index.long()])

    def calibrate(self, weight: Tensor, method: RangeMethod) -> None:
        """Cluster these weights; there is one way to."""
        values, index = shared_values(weight.cpu(), 2**self.bits)
        with torch.no_grad():
            self.values.copy_(values)
            self.index.copy_(index)

    def extra_repr(self) -> str:
        """Shown when the network is printed."""
        return f"bits={self.bits}"


def _positive(step: Tensor) -> Tensor:
    # A learned step that crosses zero would turn the grid over; its magnitude is what counts.
    return step.abs().clamp(min=max(_SMALLEST_STEP, torch.finfo(step.dtype).tiny))


class QuantizedLayer(nn.Module):
    """What all quantized layers have beside what they are. Under autocast, too, they compute in single precision.

    Attributes:
        policy: bits of the layer.
        weight: in full precision, trainable.
        weight_quantizer: from the weight to the weight that is computed with.
        act_quantizer: from what the layer is given to what it reads; the identity where that is quantized before.
    """

    policy: LayerPolicy
    weight: Tensor
    weight_quantizer: nn.Module
    act_quantizer: nn.Module

    def quantized_weight(self) -> Tensor:
        """The weight that is computed with."""
        weight: Tensor = self.weight_quantizer(self.weight)
        return weight


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with fewer bits."""

    @_single_precision
    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return F.linear(self.act_quantizer(input), self.quantized_weight(), self.bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A convolution over sequences with fewer bits."""

    @_single_precision
    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in, L)`` to ``(N, out, L')``."""
        out: Tensor = self._conv_forward(self.act_quantizer(input), self.quantized_weight(), self.bias)
        return out


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution over images with fewer bits."""

    @_single_precision
    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in, H, W)`` to ``(N, out, H', W')``."""
        out: Tensor = self._conv_forward(self.act_quantizer(input), self.quantized_weight(), self.bias)
        return out


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """A convolution over volumes with fewer bits."""

    @_single_precision
    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in, D, H, W)`` to ``(N, out, D', H', W')``."""
        out: Tensor = self._conv_forward(self.act_quantizer(input), self.quantized_weight(), self.bias)
        return out


_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
}


def quantize_layers(
    model: nn.Module,
    layers: Mapping[str, LayerPolicy],
    batches: Iterable[Batch],
    *,
    method: RangeMethod = "mse",
    weight_method: RangeMethod = "mse",
) -> nn.Module:
    """A copy of ``model`` whose layers compute with the bits that ``layers`` gives them, calibrated on ``batches``.

    The copy has the parameters of the model under their names, and the step sizes beside them; all of them can be
    trained (`pruning.finetune.finetune` as it is). `insert_quantizers` says where quantizers are put.

    Args:
        model: the network; neither it nor its tensors are touched or shared.
        layers: bits by qualified layer name; sparsity is not looked at here, and layers without bits are left alone.
        batches: inputs on the model's device, as the network will see them in use (not augmented); tuples where
            forward takes several. Read twice. A few hundred images will do.
        method: how ranges of activations are chosen.
        weight_method: how step sizes of weights are chosen: ``"minmax"``, ``"mse"``, or ``"lsq"`` before training.

    Raises:
        PolicyError: if a layer is not there, or cannot be quantized.
        CalibrationError: if there is no batch, a value is not finite, or a layer that is to quantize what it reads
            never runs.
    """
    held = _held(batches)
    quantized = insert_quantizers(model, layers, example=next(iter(first_images(held, 2)), None))
    calibrate(quantized, held, method=method, weight_method=weight_method)
    return quantized


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: RangeMethod = "mse",
    weight_method: RangeMethod = "mse",
) -> None:
    """Choose the ranges of all quantizers of ``model``, in place; the arguments are those of `quantize_layers`.

    Activations are looked at in the network with full precision, so that no range depends on another.
    """
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.weight_quantizer, LinearWeightQuantizer | SharedWeightQuantizer):
            try:
                layer.weight_quantizer.calibrate(layer.weight, weight_method)
            except CalibrationError as error:
                msg = f"layer '{name}': {error}"
                raise CalibrationError(msg) from error
    quantizers = [module for module in model.modules() if isinstance(module, ActQuantizer)]
    if not quantizers:
        return
    held = _held(batches)
    if not held:
        msg = (
            "no calibration data: ranges of activations were to be chosen on no batches; hand in at least one batch "
            "of training images"
        )
        raise CalibrationError(msg)
    try:
        for quantizer in quantizers:
            quantizer.observer = Observer(quantizer.place)
        with evaluation_mode(model), torch.no_grad(), _full_precision_weights(model):
            _run(model, held)
            if method != "minmax":
                for quantizer in quantizers:
                    assert quantizer.observer is not None
                    quantizer.observer.count_from_now_on()
                _run(model, held)
        for quantizer in quantizers:
            quantizer.calibrate(method)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


def _held(batches: Iterable[Batch]) -> Sequence[Batch]:
    """All batches; what one is drawn into may be written over when the next is drawn."""
    if isinstance(batches, list | tuple):
        return batches
    return [tree_map_only(Tensor, Tensor.clone, batch) for batch in batches]


def _compute_alike(traced: nn.Module, model: nn.Module, example: Batch) -> bool:
    """Whether a trace computes what the module does, up to the order of sums."""

    def outputs(network: nn.Module) -> list[Tensor]:
        with evaluation_mode(network), torch.no_grad(), attributes_kept(network), kept_randomness():
            torch.manual_seed(0)
            return tensors_of(network(*inputs_of(example)))

    expected = outputs(model)
    try:
        found = outputs(traced)
    except Exception:  # whatever stops a trace that took another branch
        return False
    return len(found) == len(expected) and all(map(_are_near, found, expected))


def _are_near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape
    values = other[other.isfinite()].abs()
    scale = float(values.max()) if values.numel() else 0.0
    return torch.allclose(one, other, _ALIKE, _ALIKE * scale, equal_nan=True)


def _run(model: nn.Module, batches: Iterable[Batch]) -> None:
    for batch in batches:
        model(*inputs_of(batch))


@contextmanager
def _full_precision_weights(model: nn.Module) -> Iterator[None]:
    """Run the layers of a model with their weights in full precision for a while."""
    layers = list(quantized_layers(model).values())
    quantizers = [layer.weight_quantizer for layer in layers]
    for layer in layers:
        layer.weight_quantizer = nn.Identity()
    try:
        yield
    finally:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.weight_quantizer = quantizer


def insert_quantizers(
    model: nn.Module, layers: Mapping[str, LayerPolicy], *, whole_tensors: bool = True, example: Batch | None = None
) -> nn.Module:
    """A copy of ``model`` with quantizers that are yet to be calibrated, or loaded.

    Where all bits are such that a runtime has them (`is_deployable`) and a layer is in integers, whole tensors are
    quantized, for all that read them, where an integer kernel writes or reads them: sums of a residual network too.
    That takes the symbolic trace of the network, which the copy then is. Where the network cannot be traced, or has
    hooks of its own, which a trace has not, and for fewer than 8 bits, each layer quantizes what it reads, and the copy
    is the user's own module; so it is without ``whole_tensors``.

    Raises:
        PolicyError: if a layer is not there, or cannot be quantized.
        CalibrationError: if the trace does not call a layer.
    """
    layers = {name: layer for name, layer in layers.items() if layer.is_quantized}
    quantized = copied(model)
    modules = dict(quantized.named_modules(remove_duplicate=False))
    _check(layers, modules)
    layers = by_first_name(layers, quantized)
    is_traceable = is_deployable(layers) and any(map(is_integer, layers.values())) and not has_hooks(quantized)
    traced = symbolic_trace(quantized) if whole_tensors and is_traceable else None
    if traced is not None and example is not None and not _compute_alike(traced, quantized, example):
        traced = None
    if traced is not None:
        integer = {name for name, layer in layers.items() if is_integer(layer)}
        _quantize_tensors(traced, integer)
        quantized = traced
    # Inside a module that the trace calls as one, or where a function takes the weight, no tensor of the trace is read.
    called = set() if traced is None else {id(modules.get(str(node.target))) for node in traced.graph.nodes}
    held = {id(module) for module in quantized.modules()}
    done: set[int] = set()
    for name, policy in layers.items():
        layer = modules[name]
        if id(layer) not in held:
            raise CalibrationError(nothing_seen(f"what '{name}' reads"))
        if id(layer) not in done:
            _quantize_layer(layer, name, policy, reads_quantized=id(layer) in called and is_integer(policy))
            done.add(id(layer))
    for module in quantized.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and quantized_layers(module):
            # Its fast path in evaluation takes the weights of its layers and does not call them.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and quantized_layers(module):
            # The tensors of that path are no such as others are.
            module.use_nested_tensor = False
    return quantized


def by_first_name(layers: Mapping[str, LayerPolicy], model: nn.Module) -> dict[str, LayerPolicy]:
    """What is given to the layers of ``model``, each by the first of its names: a module may have several."""
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in model.named_modules()}
    return {first[id(modules[name])] if name in modules else name: layer for name, layer in layers.items()}


def without_quantizers(model: nn.Module) -> nn.Module:
    """A copy of a quantized network without bits: its weights, or what they were trained to where they share values."""
    plain = copied(model)
    kinds: dict[type[nn.Module], Any] = {quantized: kind for kind, quantized in _QUANTIZED.items()}
    for layer in quantized_layers(plain).values():
        if isinstance(layer.weight_quantizer, SharedWeightQuantizer):
            layer.weight.data = layer.quantized_weight().detach()
        del layer.policy, layer.weight_quantizer, layer.act_quantizer
        layer.__class__ = kinds[type(layer)]
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ActQuantizer):
                setattr(parent, name, nn.Identity())
    return plain


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_integer(layer: LayerPolicy) -> bool:
    """Whether the layer is one that a runtime computes in 8-bit integers."""
    return (layer.weight_bits, layer.act_bits, layer.quantizer) == (INTEGER_BITS, INTEGER_BITS, "linear")


def is_deployable(layers: Mapping[str, LayerPolicy]) -> bool:
    """Whether all bits are such that a runtime may have them: 8 and 8, 16 and 16, or full."""
    whole = ((FULL_BITS, FULL_BITS), (HALF_BITS, HALF_BITS))
    return all(is_integer(layer) or (layer.weight_bits, layer.act_bits) in whole for layer in layers.values())


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of ``model`` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def step_sizes(model: nn.Module) -> list[nn.Parameter]:
    """The learned step sizes of all quantizers of ``model``, each once."""
    quantizers = [module for module in model.modules() if isinstance(module, ActQuantizer | LinearWeightQuantizer)]
    return [quantizer.step for quantizer in quantizers]


def quantizable_layers(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the layers of ``model`` that can be given bits; a module with several names counts once."""
    return tuple(
        name for name, module in model.named_modules() if type(module) in _QUANTIZED and not _computes_weight(module)
    )


def _computes_weight(layer: nn.Module) -> bool:
    return layer._parameters.get("weight") is None


def _check(layers: Mapping[str, LayerPolicy], modules: Mapping[str, nn.Module]) -> None:
    for name in layers:
        layer = modules.get(name)
        if layer is None:
            msg = f"the policy gives bits to '{name}', and the network has no such layer; name one of its layers"
            raise PolicyError(msg)
        if type(layer) not in _QUANTIZED:
            kinds = ", ".join(f"nn.{kind.__name__}" for kind in _QUANTIZED)
            found = f"a {type(layer).__name__}" if not isinstance(layer, QuantizedLayer) else "quantized already"
            msg = f"layer '{name}' is {found}, which cannot be quantized; only {kinds} can, so leave it out"
            raise PolicyError(msg)
        if _computes_weight(layer):  # what it is set to now need not be what it will be
            msg = f"layer '{name}' computes its weight (a parametrization); make it a plain parameter first"
            raise PolicyError(msg)
    shared: dict[int, str] = {}
    for name, policy in layers.items():
        first = shared.setdefault(id(modules[name]), name)
        if layers[first] != policy:
            msg = f"layers '{first}' and '{name}' are one module, and the policy gives them different bits; give equal"
            raise PolicyError(msg)


def _quantize_layer(layer: nn.Module, name: str, policy: LayerPolicy, *, reads_quantized: bool) -> None:
    """Make a layer a quantized one, in place: hooks, ties and the names of its tensors stay."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.__class__ = _QUANTIZED[type(layer)]
    assert isinstance(layer, QuantizedLayer)
    layer.policy = policy
    layer.weight_quantizer = _weight_quantizer(policy, weight.detach())
    layer.act_quantizer = (
        nn.Identity() if reads_quantized else _act_quantizer(policy.act_bits, f"what '{name}' reads").to(weight.device)
    )


def _weight_quantizer(policy: LayerPolicy, weight: Tensor) -> nn.Module:
    if policy.weight_bits == FULL_BITS:
        return nn.Identity()
    if policy.weight_bits == HALF_BITS:
        return HalfPrecision()
    if policy.quantizer == "kmeans":
        return SharedWeightQuantizer(policy.weight_bits, weight)
    # Half the levels of a symmetric grid are those of one bit fewer.
    return LinearWeightQuantizer(7 if policy.reduce_range else policy.weight_bits, weight)


def _act_quantizer(bits: int, place: str) -> nn.Module:
    if bits == FULL_BITS:
        return nn.Identity()
    return HalfPrecision() if bits == HALF_BITS else ActQuantizer(bits, place)


def _quantize_tensors(traced: fx.GraphModule, integer: set[str]) -> None:
    """Put a quantizer behind every tensor that integer kernels write or read, for all that read it."""
    device = next((tensor.device for tensor in traced.parameters()), torch.device("cpu"))
    chosen, modules = tensors_to_quantize(traced, integer), dict(traced.named_modules(remove_duplicate=False))
    traced.add_module(ACT_QUANTIZERS, quantizers := nn.ModuleDict())
    for node in chosen:
        ceiling = _RELU6 if kind_of(node, modules) in (nn.ReLU6, F.relu6) else math.inf
        quantizer = ActQuantizer(INTEGER_BITS, f"the output of '{node.name}'", ceiling).to(device)
        quantizers[name_within(nn.ModuleDict, node.name)] = quantizer
    for node in chosen:
        readers = [reader for reader in node.users if reader.op != "output"]
        with traced.graph.inserting_after(node):
            place = f"{ACT_QUANTIZERS}.{name_within(nn.ModuleDict, node.name)}"
            quantized = traced.graph.call_module(place, (node,))
        for reader in readers:
            reader.replace_input_with(node, quantized)
    traced.recompile()
