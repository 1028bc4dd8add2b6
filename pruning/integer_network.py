"""A network in 8 bits as integer kernels compute it: for scoring, where fake quantization takes twice as long."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .integer_flow import is_join, keeps_values, kind_of, source_of
from .layer_policy import INTEGER_BITS, LayerPolicy
from .quantize import (
    ActQuantizer,
    LinearWeightQuantizer,
    QuantizedConv2d,
    has_hooks,
    is_integer,
    quantize_layers,
)

_CLIPS: dict[Any, tuple[float, ...]] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), ()),
    **dict.fromkeys((nn.ReLU6, F.relu6), (0.0, 6.0)),
}
"""What a kernel computes on its sums as well, and the bounds of those that have two."""


class ToIntegers(nn.Module):
    """The integers that an `ActQuantizer` of 8 bits rounds values to."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        super().__init__()
        self.step, self.zero_point = float(quantizer.scale.detach()), int(quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Map values to uint8 of the same shape; what lies on the grid already stays where it is."""
        return (x.float() / self.step).round_().add_(self.zero_point).clamp_(0, 255).to(torch.uint8)


class FromIntegers(nn.Module):
    """The values on the grid that `ToIntegers` numbers."""

    def __init__(self, grid: ToIntegers) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Map uint8 to float32 of the same shape."""
        values = x.float()
        return (values.sub_(self.grid.zero_point) if self.grid.zero_point else values).mul_(self.grid.step)


@dataclass(frozen=True)
class _End:
    """What a kernel does with the sums of a convolution.

    Attributes:
        nodes: that compute it in the network, in their order.
        norm: a batch norm of the sums.
        clip: key of `_CLIPS` that comes after it, None for none.
        writes: the grid that the result is written on as integers; None to write floats, without ``clip``.
    """

    nodes: tuple[fx.Node, ...] = ()
    norm: nn.BatchNorm2d | None = None
    clip: Any = None
    writes: ToIntegers | None = None

    @property
    def of_kernel(self) -> tuple[Any, ...]:
        """Scale, zero point and type of what is written, and what comes before: an operator and its numbers."""
        if self.writes is None:
            return 1.0, 0, torch.float32, "none", [], ""
        bounds = list(_CLIPS.get(self.clip, ()))
        name = "none" if self.clip is None else "hardtanh" if bounds else "relu"
        return self.writes.step, self.writes.zero_point, torch.uint8, name, bounds, ""


class IntegerConv2d(nn.Module):
    """The convolution that a `QuantizedConv2d` of 8 bits simulates, in integers by oneDNN's kernel; for inference.

    Sums of products are exact, where single precision rounds them: the two agree to about 1e-6 of the largest output.
    Where the outputs become integers in turn, the kernel rounds them, and those that lie between two get the other one
    in about one of a million cases.
    """

    def __init__(self, layer: QuantizedConv2d, reads: ToIntegers, end: _End) -> None:
        """Take the weights as they are now.

        Args:
            layer: whose weights are on grids of 8 bits, padded with zeros, on the CPU.
            reads: makes its inputs.
            end: what is done with its outputs as well.
        """
        super().__init__()
        of_weight = layer.weight_quantizer
        assert isinstance(of_weight, LinearWeightQuantizer)
        integers = (of_weight(layer.weight) / of_weight.scale).round().to(torch.int8)
        scales, bias = of_weight.scale, layer.bias
        if (norm := end.norm) is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            statistics = (norm.running_mean, norm.running_var, norm.eps)
            scales, bias = fuse_conv_bn_weights(scales, bias, *statistics, norm.weight, norm.bias)
        self._scales = scales.detach().flatten()
        self._bias = None if bias is None else bias.detach()
        self._grid = reads.step, reads.zero_point
        self._end = end.of_kernel
        self._zero_points = torch.zeros(len(layer.weight), dtype=torch.int32)
        self._geometry = list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
        self._weight = torch.ops.onednn.qconv_prepack(integers, self._scales, *self._grid, *self._geometry, None)

    def forward(self, x: Tensor) -> Tensor:
        """Map uint8 ``(N, in, H, W)`` to float32 or uint8 ``(N, out, H', W')`` in the same memory format."""
        weight = self._weight, self._scales, self._zero_points, self._bias
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(x, *self._grid, *weight, *self._geometry, *self._end)
        return out.contiguous() if x.is_contiguous() else out


def in_integers(model: nn.Module) -> nn.Module:
    """``model``, in evaluation mode, for inference, with its 8-bit convolutions over images in integer kernels.

    It is handed back as it is where none can be: whole tensors have to be quantized (`insert_quantizers` says when),
    the network be on the CPU, and PyTorch have integer kernels whose sums do not saturate: x86 with VNNI, or without
    it weights of a reduced range. Layers with hooks stay simulated, and so does a network that changes a tensor in
    place that something else reads.

    Returns:
        A network that shares everything with ``model`` but these layers, whose weights and batch norms are those of
        now.
    """
    if not isinstance(model, fx.GraphModule) or has_hooks(model):
        return model
    found = _layers_with_a_kernel(model)
    layers = {name: one for name, one in found.items() if kernels_are_exact(one[0].policy.reduce_range)}
    return _converted(model, layers) if layers else model


@functools.cache
def kernels_are_exact(reduce_range: bool) -> bool:
    """Whether PyTorch has integer kernels here, and their sums are right where all products are the largest.

    Tried out on a layer of one group and on a depthwise one, 3x3, with a zero point and without.

    Args:
        reduce_range: whether weights take half of their levels.
    """
    try:
        return all(_is_exact(groups, lowest, reduce_range) for groups in (1, 64) for lowest in (0.0, -1.0))
    except (AttributeError, RuntimeError, TypeError):  # no such operator, none for this processor, or other arguments
        return False


def _is_exact(groups: int, lowest: float, reduce_range: bool) -> bool:
    images = torch.ones(1, 64, 4, 4, dtype=torch.float32)
    images[..., 0, 0] = lowest
    plain = nn.Sequential()
    with torch.no_grad():
        for _ in range(2):  # one that writes integers, and one that writes floats
            # Weights that are not drawn, for what is drawn next is someone else's.
            layer = skip_init(nn.Conv2d, 64, 64, 3, padding=1, bias=False, groups=groups, dtype=torch.float32)
            layer.weight.fill_(1.0)[::2].neg_()
            plain.append(layer).append(nn.ReLU())
        policy = LayerPolicy(weight_bits=8, act_bits=8, reduce_range=reduce_range)
        network = quantize_layers(plain, dict.fromkeys("02", policy), [images])
        assert isinstance(network, fx.GraphModule)
        layers = _layers_with_a_kernel(network)
        return len(layers) == 2 and torch.allclose(_converted(network, layers)(images), network(images), 1e-4, 1e-3)


_Layers = dict[str, tuple[QuantizedConv2d, ActQuantizer]]
"""By name of the node that calls it: a layer, and the quantizer of what it reads."""


def _layers_with_a_kernel(model: fx.GraphModule) -> _Layers:
    modules = dict(model.named_modules(remove_duplicate=False))
    found: _Layers = {}
    for node in model.graph.nodes:
        if _disturbs_others(node, modules):
            return {}
        layer = _called(node, modules)
        if isinstance(layer, QuantizedConv2d) and _is_plain(layer):
            quantizer = _called(source_of(node.all_input_nodes[0], modules), modules)
            if isinstance(quantizer, ActQuantizer) and not has_hooks(quantizer):
                found[node.name] = layer, quantizer
    return found


def _is_plain(layer: QuantizedConv2d) -> bool:
    """Whether the kernel computes all that the layer does."""
    pads_with_zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    has_floats = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    return is_integer(layer.policy) and pads_with_zeros and has_floats and not has_hooks(layer)


def _called(node: fx.Node | None, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node is not None and node.op == "call_module" else None


def _disturbs_others(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node may change a tensor in place that something else reads, so that the order of nodes matters."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = bool(node.kwargs.get("inplace")) or getattr(_called(node, modules), "inplace", False)
    if node.op in ("call_function", "call_method"):
        in_place |= name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if not in_place:
        return "out" in node.kwargs
    # What a module or a sum has just computed is no other tensor's memory; of all else that is not known.
    written = node.all_input_nodes[0]
    while keeps_values(written, modules) and len(written.users) == 1:
        written = written.all_input_nodes[0]
    is_new = written.op == "call_module" or is_join(written, modules)
    return not (is_new and len(written.users) == 1 and node.users)


def _converted(model: fx.GraphModule, layers: _Layers) -> fx.GraphModule:
    converted = fx.GraphModule(model, copy.deepcopy(model.graph))
    graph, modules = converted.graph, dict(converted.named_modules(remove_duplicate=False))
    integers: dict[fx.Node, tuple[fx.Node, ToIntegers]] = {}

    def called(name: str, module: nn.Module, reads: fx.Node, after: fx.Node) -> fx.Node:
        converted.add_module(name, module)
        with graph.inserting_after(after):
            return graph.call_module(name, (reads,))

    def values_of(made: fx.Node, grid: ToIntegers) -> fx.Node:
        """The same for those that read floats; who is found to read integers later takes ``made`` itself."""
        values = called(f"floats_{made.name}", FromIntegers(grid), made, made)
        integers[values] = made, grid
        return values

    for node in list(graph.nodes):
        if node.name not in layers:
            continue
        layer, quantizer = layers[node.name]
        read = node.all_input_nodes[0]
        if read not in integers:
            grid, is_own = ToIntegers(quantizer), _called(read, modules) is quantizer
            # Straight from what the quantizer reads, where nothing lies between.
            source = read.all_input_nodes[0] if is_own else read
            integers[read] = called(f"integers_{read.name}", grid, source, read), grid
            if is_own:
                read.replace_all_uses_with(values_of(*integers[read]))
        made, grid = integers[read]
        end = _end_of(node, modules)
        node.target, node.args = f"integer_{node.name}", (made,)
        converted.add_module(node.target, IntegerConv2d(layer, grid, end))
        if end.nodes:
            end.nodes[-1].replace_all_uses_with(node if end.writes is None else values_of(node, end.writes))
        for absorbed in reversed(end.nodes):
            graph.erase_node(absorbed)
    graph.eliminate_dead_code()
    converted.recompile()
    return converted


def _end_of(layer: fx.Node, modules: Mapping[str, nn.Module]) -> _End:
    """All that the kernel of ``layer`` computes."""
    end, reader = _End(), _sole_reader(layer)
    norm = _called(reader, modules)
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and not norm.training and not has_hooks(norm):
        assert reader is not None
        end = _End((reader,), norm)
        reader = _sole_reader(reader)
    nodes, clip = end.nodes, None
    if reader is not None and kind_of(reader, modules) in _CLIPS and not _is_hooked(reader, modules):
        nodes, clip = (*nodes, reader), kind_of(reader, modules)
        reader = _sole_reader(reader)
    quantizer = _called(reader, modules)
    if isinstance(quantizer, ActQuantizer) and quantizer.bits == INTEGER_BITS and not has_hooks(quantizer):
        assert reader is not None
        return _End((*nodes, reader), end.norm, clip, ToIntegers(quantizer))
    return end


def _sole_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_hooked(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    module = _called(node, modules)
    return module is not None and has_hooks(module)


_IN_PLACE = frozenset(name for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator))
"""`operator.iadd` and the like."""
