"""Layers in half precision, and whether the runtime has kernels for them on this processor."""

from __future__ import annotations

import functools

import onnx
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as MissingKernel
from torch import Tensor, nn

from .qdq import count_operators


class InHalfPrecision(nn.Module):
    """A layer that computes in float16 inside a network in single precision."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.half()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes, in the type of ``x``."""
        out: Tensor = self.layer(x.half())
        return out.to(x.dtype)


@functools.cache
def has_half_precision(element_type: int = TensorProto.FLOAT16) -> bool:
    """Whether ONNX Runtime has a convolution of this type for this processor, tried out on a small one.

    Where it has none it casts to float32 and back (float16), or refuses (bfloat16).

    Args:
        element_type: of `onnx.TensorProto`, ``FLOAT16`` or ``BFLOAT16``.
    """
    image = helper.make_tensor_value_info("x", element_type, [1, 4, 8, 8])
    result = helper.make_tensor_value_info("y", element_type, None)
    weight = helper.make_tensor("w", element_type, [4, 4, 3, 3], [1.0] * 144)
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "probe", [image], [result], [weight])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    try:
        return "Cast" not in count_operators(model.SerializeToString())
    except MissingKernel:
        return False
