"""The ONNX file of a plan for the stopwatch, sliced out of the dense network's in milliseconds.

Exporting takes seconds a network, and a table is calibrated and checked with dozens of them. What is sliced here has
the operators and the shapes of the exported network, which its time depends on; it is never handed to a user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

from graph_encoder.network import NetworkGraph
from graph_encoder.resize import removed_positions
from pruning.policy import CompressionPolicy


def sliced_onnx(
    dense: onnx.ModelProto,
    graph: NetworkGraph,
    policy: CompressionPolicy,
    finish: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda sliced: sliced,
) -> bytes | None:
    """The dense network's ONNX file with the tensors of a plan, for one image at a time.

    Args:
        dense: exported dense network, whose initializers have the names of the parameters; untouched.
        graph: captured network.
        policy: the units that stay.
        finish: changes what was sliced, for example `pruning.qdq.MarkedNetwork.with_integers`.

    Returns:
        The file, or None where slicing is not enough: a number in ``forward`` would have to change, the exporter gave
        a weight another name, or the runtime does not accept the result.
    """
    masks = policy.masks(graph)
    weights = {operator.weight for operator in graph.operators if operator.weight}
    if graph.is_rewritten(masks.keys()) or not weights <= {tensor.name for tensor in dense.graph.initializer}:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(dense)
    del model.graph.value_info[:]
    removed = removed_positions(graph, masks)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    before = {name: tuple(tensor.dims) for name, tensor in tensors.items()}
    for name in tensors.keys() & removed.keys():
        tensors[name].CopyFrom(numpy_helper.from_array(_without(tensors[name], removed[name]), name))
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1] in weights:
            _fit(node, tensors, before, removed.get(node.input[1], {}).get(0))
        elif node.op_type == "Reshape" and node.input[1] in tensors:
            _flatten_whatever_comes(tensors[node.input[1]])
    try:
        content: bytes = finish(model).SerializeToString()
        # What holds a width in a way that is not known above does not fit, which shows in inferred shapes or in a run.
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        session.run(None, {put.name: _zeros(put.shape, put.type) for put in session.get_inputs()})
    except Exception:  # their errors share no base class
        return None
    return content


def _zeros(shape: Sequence[int | str], kind: str) -> np.ndarray:
    """An input of one image; the runtime calls its type ``tensor(float)`` or such."""
    name = kind.removeprefix("tensor(").removesuffix(")").upper()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(name))
    return np.zeros([size if isinstance(size, int) else 1 for size in shape], dtype)


def _flatten_whatever_comes(shape: Any) -> None:
    """A flatten before a linear layer is exported as a reshape to the dense network's width."""
    sizes = numpy_helper.to_array(shape)
    if len(sizes) == 2 and sizes[0] <= 0:
        shape.CopyFrom(numpy_helper.from_array(np.array([1, -1], dtype=sizes.dtype), shape.name))


def _without(tensor: Any, positions: Mapping[int, Tensor]) -> np.ndarray:
    array = numpy_helper.to_array(tensor)
    for dim, removed in positions.items():
        array = np.delete(array, removed.numpy(), axis=dim)
    return np.ascontiguousarray(array)


def _fit(node: Any, tensors: Mapping[str, Any], before: Mapping[str, tuple[int, ...]], removed: Tensor | None) -> None:
    """Give a layer as many biases as it has outputs, and as many convolution groups as are left of them."""
    name = node.input[1]
    outputs, whole = tensors[name].dims[0], before[name][0]
    groups = next((attribute for attribute in node.attribute if attribute.name == "group"), None)
    if removed is not None and groups is not None and groups.i > 1:
        size = whole // groups.i
        touched = len(torch.unique(removed // size))
        # Groups that lose some of their channels stay.
        groups.i -= touched if touched * size == len(removed) else 0
    if len(node.input) > 2 and node.input[2] in tensors:
        # Made by the exporter from a batch norm, under a name of its own; its values do not matter to time.
        bias = tensors[node.input[2]]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias)[:outputs].copy(), bias.name))
