"""Compressed networks as files that run no code when they are loaded, and as programs for other runtimes."""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import safetensors
import safetensors.torch
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as MissingKernel
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from graph_encoder.batches import inputs_of, tensors_of
from graph_encoder.capture import capture
from graph_encoder.copies import copied
from graph_encoder.errors import SecateurError, first_line, why_not_exported

from .files import write_atomic
from .half_precision import InHalfPrecision, has_half_precision
from .layer_policy import HALF_BITS, INTEGER_BITS, LayerPolicy
from .policy import CompressionPolicy
from .program_archive import ArchiveError, vetted_copy
from .qdq import IntegerReport, MarkedNetwork, integer_model, integer_report, marked_network, saturates
from .quantize import ACT_QUANTIZERS, by_first_name, insert_quantizers, is_integer, quantized_layers
from .sparse_training import without_progress
from .surgery import apply_policy

FORMAT_VERSION = 1
ONNX_OPSET = 23
"""The newest operator set that both PyTorch's exporter and ONNX Runtime know."""
TOLERANCE = 1e-4
"""Largest difference to PyTorch's outputs that an export may have, relative to their largest value."""
HALF_TOLERANCE = 1e-2
"""The same for a network with layers in half precision."""
INTEGER_TOLERANCE = 0.1
"""Largest root-mean-square difference of an integer network to PyTorch's simulation, relative to the outputs', where
rounding itself changes them less: a value halfway between two integers may be rounded either way, and a deep network
carries that on."""

_WEIGHTS, _POLICY, _MANIFEST = "model.safetensors", "policy.json", "manifest.json"

Inputs = Tensor | tuple[Tensor, ...]


class ExportError(SecateurError, RuntimeError):
    """A network that cannot be saved or exported, or files that cannot be loaded back."""


@dataclass(frozen=True)
class Manifest:
    """What is needed besides the weights and the policy to build the network again.

    Attributes:
        constructor: the name that builds the dense network, for a person or the command to resolve; never imported
            by `load_compressed`, since a file must not choose what code runs.
        inputs: shape and dtype name of each example input, batch first.
        weights_sha256: digest of the weights file.
        policy_digest: digest of the policy.
        torch_version: PyTorch that wrote the files.
        format_version: version of this layout.
    """

    constructor: str
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    weights_sha256: str
    policy_digest: str
    torch_version: str
    format_version: int = FORMAT_VERSION

    def examples(self) -> tuple[Tensor, ...]:
        """Example inputs of the right shapes and dtypes, all zeros."""
        return tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in self.inputs)


def save_compressed(
    model: nn.Module, policy: CompressionPolicy, folder: Path | str, *, constructor: str, example_inputs: Inputs
) -> None:
    """Save a compressed network as weights (safetensors), policy and manifest (JSON).

    Args:
        model: what `apply_policy` and, where the policy has bits, `quantize_layers` made, maybe fine-tuned since.
        policy: the policy it was made with.
        folder: made if it is missing; files of the same names are replaced.
        constructor: name that builds the dense network (``"resnet20"``, ``"package.module:function"``).
        example_inputs: inputs that the dense network was captured with.

    Raises:
        ExportError: if the layers of the network have other bits than the policy gives them.
        FileWriteError: if a file cannot be written.
    """
    folder = Path(folder)
    _check_bits(model, policy)
    weights = safetensors.torch.save(without_progress(unique_tensors(model)))
    manifest = Manifest(
        constructor=constructor,
        inputs=tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs_of(example_inputs)),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        policy_digest=policy.digest,
        torch_version=torch.__version__,
    )
    write_atomic(folder / _WEIGHTS, weights)
    policy.save(folder / _POLICY)
    # Last, and with digests of the others: a folder whose writing was cut short is told from a whole one.
    write_atomic(folder / _MANIFEST, (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def load_compressed(folder: Path | str, constructor: Callable[[], nn.Module]) -> nn.Module:
    """Build the dense network, apply the saved policy, and load the saved weights, step sizes among them.

    Args:
        folder: what `save_compressed` wrote.
        constructor: builds the dense network; its weights do not matter. `read_manifest` has its name.

    Returns:
        The compressed network on the CPU, in evaluation mode.

    Raises:
        ExportError: if a file is missing or damaged, or the constructor builds another network.
        PolicyError: if the policy names groups that the network does not have.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    policy = CompressionPolicy.load(folder / _POLICY)
    path = folder / _WEIGHTS
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != manifest.weights_sha256 or policy.digest != manifest.policy_digest:
        msg = (
            f"'{folder}' is not whole: {_WEIGHTS}, {_POLICY} and {_MANIFEST} are not of the same save, or one was "
            f"changed or cut short; save the network again"
        )
        raise ExportError(msg)
    dense = constructor().cpu().eval()
    # Bits are checked where they are put in, by the layers' own names: a graph calls tied layers by the first of them.
    removed = replace(policy, layers={name: layer for name, layer in policy.layers.items() if layer.is_sparse})
    pruned = apply_policy(dense, capture(dense, manifest.examples()), removed)
    are_quantized = any(layer.is_quantized for layer in policy.layers.values())
    try:
        weights = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        msg = f"cannot read the weights '{path}': {error}"
        raise ExportError(msg) from error
    # Whether layers quantize what they read follows from more than the network that is built, hooks for one.
    whole_tensors = any(name.startswith(f"{ACT_QUANTIZERS}.") for name in weights)
    model = insert_quantizers(pruned, policy.layers, whole_tensors=whole_tensors) if are_quantized else pruned
    if misfit := describe_misfit(unique_tensors(model), weights):
        msg = (
            f"the weights '{path}' do not fit the network that the constructor builds: {misfit}; they were saved from "
            f"'{manifest.constructor}'"
        )
        raise ExportError(msg)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights:
            tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights, strict=False)
    return model


def read_manifest(folder: Path | str) -> Manifest:
    """Read what `save_compressed` noted about a network.

    Raises:
        ExportError: if it is missing, damaged, or of a newer format.
    """
    path = Path(folder) / _MANIFEST
    try:
        content = json.loads(_read(path))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            msg = f"'{path}' has format version {version}, this release reads {FORMAT_VERSION}; update secateur"
            raise ExportError(msg)
        content["inputs"] = tuple((tuple(map(int, shape)), str(dtype)) for shape, dtype in content["inputs"])
        if unknown := [
            dtype for _, dtype in content["inputs"] if not isinstance(getattr(torch, dtype, None), torch.dtype)
        ]:
            msg = f"'{path}' has an input of the unknown dtype '{unknown[0]}'"
            raise ExportError(msg)
        return Manifest(**content)
    except (ValueError, KeyError, TypeError) as error:
        msg = f"cannot read the manifest '{path}': {type(error).__name__}: {error}"
        raise ExportError(msg) from error


def export_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: Path | str,
    *,
    images: Inputs | None = None,
    metadata: Mapping[str, str] | None = None,
) -> IntegerReport | None:
    """Write the network as ONNX with a free batch dimension, once its outputs agree with PyTorch's.

    A network with 8-bit layers becomes one of integers, with the scales that it was calibrated or trained with.

    Args:
        model: network to export; untouched.
        example_inputs: inputs, batch first.
        path: file to write (.onnx).
        images: real inputs on which an integer network is compared with PyTorch's simulation; a few dozen will do.
        metadata: properties to write into the file, for whoever runs it.

    Returns:
        How many layers the runtime computes in integers and how far they agree; None for a network without any.

    Raises:
        ExportError: if the network cannot be exported, has bits that no runtime has, or ONNX Runtime's outputs differ
            by more than `TOLERANCE` (for integers `INTEGER_TOLERANCE`, or what rounding changes if that is more, with
            sums that do not saturate; what they do here is `IntegerReport.saturated`).
        FileWriteError: if the file cannot be written.
    """
    path, layers = Path(path), quantized_layers(model)
    for name, layer in layers.items():
        _check_deployable(name, layer.policy)
    frozen, inputs = _frozen(model), _batch(example_inputs, 2)
    if not any(is_integer(layer.policy) for layer in layers.values()):
        content = _with_metadata(_to_onnx(_in_half_precision(frozen), inputs), metadata)
        is_half = bool(layers) or any(tensor.dtype == torch.float16 for tensor in frozen.state_dict().values())
        with _missing_kernels_named(frozen):
            run = _session(content)
        _check_outputs(run, frozen, example_inputs, "ONNX", HALF_TOLERANCE if is_half else TOLERANCE)
        write_atomic(path, content)
        return None
    if images is None:
        msg = (
            f"{type(model).__name__} has 8-bit layers, and no images were given to compare the integers with PyTorch "
            f"on; pass a batch of real inputs as `images`"
        )
        raise ExportError(msg)
    proto = integer_model(_in_half_precision(frozen), lambda marked: _to_onnx(marked, inputs))
    content = _with_metadata(proto, metadata)
    with _missing_kernels_named(frozen):
        report = integer_report(content, frozen, tuple(x.cpu() for x in inputs_of(images)))
    allowed = max(INTEGER_TOLERANCE, report.rounding)
    if not report.error <= allowed:
        msg = (
            f"the integer ONNX of {type(model).__name__} differs from PyTorch's simulation by {report.error:.2e} of "
            f"the outputs (root mean square over {report.images} images), allowed {allowed:.2e}; nothing was written"
        )
        if saturates() and not all(layer.policy.reduce_range for layer in layers.values() if is_integer(layer.policy)):
            msg += ". This processor adds pairs of 8-bit products in 16 bits, which reduce_range of a layer allows for"
        raise ExportError(msg)
    write_atomic(path, content)
    return report


def _with_metadata(proto: onnx.ModelProto, metadata: Mapping[str, str] | None) -> bytes:
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    try:
        content: bytes = proto.SerializeToString()
    except Exception as error:  # of protobuf, which is asked for by no name here
        msg = f"the network is too large for one ONNX file, which holds 2 GB at most ({first_line(error)})"
        raise ExportError(msg) from error
    return content


def export_marked(model: nn.Module, example_inputs: Inputs) -> MarkedNetwork | None:
    """The network as ONNX, any of whose layers can be made integers in a moment; None where it cannot be traced.

    Raises:
        ExportError: if the network cannot be exported.
    """
    inputs = _batch(example_inputs, 2)
    return marked_network(_frozen(model), lambda marked: _to_onnx(marked, inputs))


def _check_deployable(name: str, layer: LayerPolicy) -> None:
    bits = f"{layer.weight_bits}-bit weights and {layer.act_bits}-bit activations"
    allowed = "ONNX files hold layers with 8 and 8 bits, 32 and 32, and where the runtime has it 16 and 16"
    if layer.quantizer == "kmeans":
        msg = (
            f"layer '{name}' has weights that share values (kmeans), which is simulated: no runtime has kernels for "
            f"them; {allowed}. Give it the quantizer 'linear', or save it with save_compressed"
        )
    elif min(layer.weight_bits, layer.act_bits) < INTEGER_BITS:
        msg = (
            f"layer '{name}' has {bits}, which are simulated: no runtime has kernels for them; {allowed}. Give it 8 "
            f"bits, or save it with save_compressed"
        )
    elif layer.weight_bits != layer.act_bits:
        msg = f"layer '{name}' has {bits}, and a kernel needs the same of both; {allowed}"
    elif layer.weight_bits == HALF_BITS and not has_half_precision():
        msg = (
            f"layer '{name}' has {bits}, and ONNX Runtime {onnxruntime.__version__} has no half-precision convolution "
            f"for this processor: it would cast to single precision and be slower. Give it 8 or 32 bits"
        )
    else:
        return
    raise ExportError(msg)


def _check_bits(model: nn.Module, policy: CompressionPolicy) -> None:
    own = {name: layer.policy for name, layer in quantized_layers(model).items()}
    asked = by_first_name({name: layer for name, layer in policy.layers.items() if layer.is_quantized}, model)
    for name in sorted(own.keys() | asked.keys()):
        one, other = own.get(name, LayerPolicy()), asked.get(name, LayerPolicy())
        if _bits(one) != _bits(other):
            msg = (
                f"layer '{name}' of the network has {_bits(one)}, and the policy gives it {_bits(other)}; save it with "
                f"the policy that it was quantized with"
            )
            raise ExportError(msg)


def _bits(layer: LayerPolicy) -> str:
    levels = " of half the range" if layer.reduce_range else ""
    return f"{layer.weight_bits}-bit {layer.quantizer} weights{levels} and {layer.act_bits}-bit activations"


def _in_half_precision(model: nn.Module) -> nn.Module:
    """Let the layers with 16 bits compute in them, in place."""
    for name, layer in quantized_layers(model).items():
        if layer.policy.weight_bits == HALF_BITS:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, InHalfPrecision(layer))
    return model


def _to_onnx(frozen: nn.Module, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    try:
        program = torch.onnx.export(
            frozen, inputs, dynamo=True, dynamic_shapes=_free_batch(inputs), opset_version=ONNX_OPSET, verbose=False
        )
    except Exception as error:  # the exporter raises whatever the step at fault raises
        what = _refused_operator(error, frozen, inputs) or why_not_exported(error, frozen)
        msg = f"{type(frozen).__name__} cannot be exported to ONNX: {what}"
        raise ExportError(msg) from error
    if program is None:
        msg = f"{type(frozen).__name__} cannot be exported to ONNX: the exporter returned nothing"
        raise ExportError(msg)
    proto: onnx.ModelProto = program.model_proto
    for entry in proto.graph.input:
        dims = entry.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value"):
            msg = (
                f"{type(frozen).__name__} cannot be exported to ONNX: its operators fix the batch of input "
                f"'{entry.name}' at {entry.type.tensor_type.shape.dim[0].dim_value}; let forward take any batch size"
            )
            raise ExportError(msg)
    return proto


def _refused_operator(error: Exception, frozen: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """The operator that ONNX has no translation for, and the layer that calls it; empty if that is not the trouble."""
    match = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
    if not match:
        return ""
    operator = match[1].rpartition(".")[2]
    try:
        nodes = list(torch.export.export(frozen, inputs, dynamic_shapes=_free_batch(inputs)).graph.nodes)
    except Exception:  # ONNX's exporter has ways of its own for what cannot be exported in this one
        nodes = []
    for node in nodes:
        name = str(node.target).removesuffix(".default").rpartition(".")[2]
        if node.op == "call_function" and (name == operator or name.endswith(f"_{operator}")):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            layer = f"layer '{stack[-1][0]}'" if stack and stack[-1][0] else "forward"
            return f"{layer} calls '{operator}', which has no counterpart in ONNX; replace that operator"
    return f"the network calls '{operator}', which has no counterpart in ONNX; replace that operator"


@contextmanager
def _missing_kernels_named(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except MissingKernel as error:
        msg = (
            f"ONNX Runtime cannot run {type(model).__name__}: {first_line(error)}; most of its kernels are for "
            f"float32, so convert a network in another type"
        )
        raise ExportError(msg) from error


def _session(content: bytes) -> Callable[..., tuple[Tensor, ...]]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*batch: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, batch, strict=True)})
        return tuple(torch.from_numpy(np.asarray(output)) for output in outputs)

    return run


def export_program(model: nn.Module, example_inputs: Inputs, path: Path | str) -> None:
    """Write the network as a PyTorch exported program with a free batch dimension, once its outputs agree.

    Args:
        model: network to export; untouched.
        example_inputs: inputs, batch first.
        path: file to write (.pt2); it holds no stack traces of this machine.

    Raises:
        ExportError: if the network cannot be exported, or the program's outputs differ by more than `TOLERANCE`.
        ArchiveError: if the program would need more than tensors and a plain graph.
        FileWriteError: if the file cannot be written.
    """
    frozen, inputs = _frozen(model), _batch(example_inputs, 2)
    buffer = io.BytesIO()
    # Without gradients, blocks of `torch.no_grad` in forward are no blocks of the graph.
    with _refusal_of_programs(frozen), torch.no_grad():
        program = torch.export.export(frozen, inputs, dynamic_shapes=_free_batch(inputs))
        # Of several inputs they say that their batches are equal, in Python source; the graph's shapes say so too.
        program._guards_code = []
        torch.export.save(program, buffer)
    try:
        content = vetted_copy(buffer.getvalue(), str(path))
    except ArchiveError as error:
        msg = f"{type(model).__name__} cannot be written as tensors and a plain graph: {error.what or error}"
        raise ArchiveError(msg, error.what) from error
    with _refusal_of_programs(frozen):
        loaded = torch.export.load(io.BytesIO(content)).module()
    _check_outputs(loaded, frozen, example_inputs, "exported program")
    write_atomic(Path(path), content)


@contextmanager
def _refusal_of_programs(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PyTorch raises whatever the step at fault raises
        msg = f"{type(model).__name__} cannot be exported: {why_not_exported(error, model)}"
        raise ExportError(msg) from error


def load_program(path: Path | str) -> ExportedProgram:
    """Open an exported program; one that could run code while it is loaded is refused.

    ``torch.export.load`` alone falls back to unlimited unpickling (`pruning.program_archive` lists what else).

    Raises:
        ExportError: if there is no such file, or PyTorch cannot make a program of it.
        ArchiveError: if the file is damaged or holds anything else than tensors and a plain graph.
    """
    content = vetted_copy(_read(Path(path)), str(path))
    try:
        return torch.export.load(io.BytesIO(content))
    except Exception as error:  # a graph that is plain but wrong fails wherever the deserializer trips over it
        msg = f"cannot rebuild the program '{path}': {first_line(error)}; export the network again"
        raise ExportError(msg) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        msg = f"cannot read '{path}': {error.strerror}"
        raise ExportError(msg) from error


def load_unique(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load what `unique_tensors` gave of a network like ``model``.

    Raises:
        ExportError: if names or shapes are others.
    """
    if misfit := describe_misfit(unique_tensors(model), weights):
        msg = f"the weights do not fit {type(model).__name__}: {misfit}"
        raise ExportError(msg)
    model.load_state_dict(dict(weights), strict=False)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU without second names of shared tensors, which the model's own structure brings back."""
    state = model.state_dict()
    return {names[0]: state[names[0]].detach().cpu().contiguous() for names in names_of_tensors(state)}


def names_of_tensors(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of each tensor of a state dict: several where modules or parameters are shared."""
    names: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    for name, tensor in state.items():
        # Empty tensors have no address of their own.
        address = tensor.data_ptr() or -len(names) - 1
        names.setdefault((address, tensor.shape, tensor.stride()), []).append(name)
    return list(names.values())


def describe_misfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What keeps ``weights`` from being loaded into a network with the tensors ``own``; empty if nothing does."""
    found = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in found.items()
        if names
    )


def _frozen(model: nn.Module) -> nn.Module:
    # With channels last, a pooled map is reshaped by sizes read at run time: seven operators more, two microseconds.
    return copied(model).cpu().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)


def _batch(example_inputs: Inputs, size: int) -> tuple[Tensor, ...]:
    """Inputs of another batch size: noise for floating point, the first example repeated for everything else.

    Inputs of no dimension are numbers that hold for all of a batch, and stay.
    """
    generator = torch.Generator().manual_seed(size)
    return tuple(
        x.cpu()
        if not x.dim()
        else torch.randn(size, *x.shape[1:], generator=generator, dtype=x.dtype)
        if x.is_floating_point()
        else x[:1].cpu().expand(size, *x.shape[1:]).contiguous()
        for x in inputs_of(example_inputs)
    )


def _free_batch(inputs: Sequence[Tensor]) -> tuple[dict[int, Any], ...]:
    batch = Dim("batch", min=1)
    return tuple({0: batch} if x.dim() else {} for x in inputs)


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference as a share of the largest value; where values are infinite or NaN, both have to be."""
    finite = one.isfinite()
    if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()) or not other[finite].isfinite().all():
        return math.nan
    if not finite.any():
        return 0.0
    one, other = one[finite], other[finite]
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


def _check_outputs(
    run: Callable[..., Any], model: nn.Module, example_inputs: Inputs, what: str, tolerance: float = TOLERANCE
) -> None:
    """Compare with PyTorch on two batch sizes, one of them 1, where a fixed dimension would show."""
    for size in (1, 3):
        inputs = _batch(example_inputs, size)
        with torch.inference_mode():
            expected = tensors_of(model(*inputs))
            try:
                found = tensors_of(run(*inputs))
            except Exception as raised:  # each runtime has errors of its own
                msg = (
                    f"the {what} of {type(model).__name__} does not run at batch size {size}: {first_line(raised)}; "
                    f"nothing was written"
                )
                raise ExportError(msg) from raised
        for one, other in zip(expected, found, strict=True):
            error = _difference(one.double(), other.double())
            if not error <= tolerance:
                msg = (
                    f"the {what} of {type(model).__name__} differs from PyTorch at batch size {size}: by {error:.2e} "
                    f"of the largest output, allowed {tolerance:.0e}; nothing was written"
                )
                raise ExportError(msg)
