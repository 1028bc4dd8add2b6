"""What a network is timed on: PyTorch, ONNX Runtime, OpenVINO, our sparse plan, and what another package adds."""

from __future__ import annotations

import difflib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graph_encoder.copies import copied
from graph_encoder.errors import SecateurError, first_line
from graph_encoder.modes import lay_channels_last
from pruning.kernels.lowering import LoweringError
from pruning.kernels.native import library
from pruning.sparse_network import SparseNetwork, SparseNetworkError, sparsify

from .worker import Stopwatch, Timer, interleave, onnx_call, without_waits

Artifact = nn.Module | bytes | Path
"""A network as a runtime takes it: a module, or an ONNX file by content or path."""
Fed = tuple[Artifact, tuple[Tensor, ...]]
"""A network with its inputs."""

PYTORCH = "pytorch-eager"
COMPILED = "pytorch-compile"
CUDA = "pytorch-cuda"
ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
SPARSE = "sparse"
ENTRY_POINTS = "secateur.runtimes"
"""Group of entry points under which a package offers its own `Runtime` classes, by name."""


class LatencyError(SecateurError, RuntimeError):
    """A time that cannot be measured or predicted; the message says what is missing."""


class Runtime(ABC):
    """Something that runs networks. A package adds one as an entry point in the group `ENTRY_POINTS`.

    Attributes:
        name: what a person types.
        takes: ``"module"`` for a `torch.nn.Module` in evaluation mode, ``"onnx"`` for an ONNX file.
        module: Python module that it needs.
        extra: the extra of this package that installs it, empty where it is always there.
    """

    name: ClassVar[str]
    takes: ClassVar[Literal["module", "onnx"]]
    module: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""

    def version(self) -> str:
        """Version of what runs the network."""
        try:
            return str(import_module(self.module).__version__)
        except AttributeError:
            msg = f"the runtime '{self.name}': '{self.module}' has no __version__; give the class a version()"
            raise LatencyError(msg) from None

    def check_installed(self) -> None:
        """Raise `LatencyError`, naming what to install, if the runtime cannot be used here."""
        try:
            is_missing = find_spec(self.module) is None
        except ModuleNotFoundError:  # the package around it
            is_missing = True
        if is_missing:
            source = f"pip install 'secateur[{self.extra}]'" if self.extra else f"pip install {self.module}"
            msg = f"the runtime '{self.name}' needs the package '{self.module}', which is not installed; {source}"
            raise LatencyError(msg)

    @abstractmethod
    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        """Make a network ready and return one call of it on ``inputs``.

        Args:
            artifact: what `takes` says; not touched.
            inputs: the network's positional inputs, on the CPU, batch first.
            threads: CPU threads; PyTorch's own number is set around all calls by the measurement.
        """

    def timer(self, call: Callable[[], object], stopwatch: Stopwatch) -> Timer:
        """How a call is timed: by the clock, unless the runtime returns before the work is done."""
        return stopwatch.timer(call)


class PyTorchEager(Runtime):
    """PyTorch, operator by operator, channels last."""

    name = PYTORCH
    takes = "module"

    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        """A call of a channels-last copy, so that the caller's network keeps its mode and layout."""
        timed, values = _channels_last(self.name, artifact, inputs, torch.device("cpu"))
        return lambda: timed(*values)


class PyTorchCompiled(Runtime):
    """PyTorch through `torch.compile`; needs a C++ compiler, and takes a minute for a large network."""

    name = COMPILED
    takes = "module"

    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        """A call of a compiled channels-last copy; compiles now, so that no warm-up call does."""
        timed, values = _channels_last(self.name, artifact, inputs, torch.device("cpu"))
        compiled = torch.compile(_with_own_code(timed))
        with torch.inference_mode():
            try:
                compiled(*values)
            except Exception as error:  # the compiler raises whatever the step at fault raises
                msg = f"torch.compile cannot compile {type(timed).__name__}: {first_line(error)}"
                raise LatencyError(msg) from error
        return lambda: compiled(*values)


_NUMBERS = itertools.count()


def _with_own_code(module: nn.Module) -> Callable[..., object]:
    """A call of ``module`` from code that no other network runs.

    Dynamo keeps what it compiled by the code that runs, up to eight of each, and leaves the ninth network of a class
    uncompiled with no more than a line in the log.
    """

    def call(*values: object) -> object:
        return module(*values)

    code = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


class PyTorchCuda(Runtime):
    """PyTorch on the first CUDA device, timed by events on the device's own clock. Never run so far: no device."""

    name = CUDA
    takes = "module"

    def check_installed(self) -> None:
        """Raise `LatencyError` if PyTorch sees no CUDA device."""
        if not torch.cuda.is_available():
            msg = f"the runtime '{self.name}' needs a CUDA device that PyTorch can use, and there is none"
            raise LatencyError(msg)

    def version(self) -> str:
        """Version of PyTorch, of CUDA, and the name of the device."""
        return f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"

    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        """A call of a channels-last copy on the device, on inputs that lie there."""
        timed, values = _channels_last(self.name, artifact, inputs, torch.device("cuda"))
        return lambda: timed(*values)

    def timer(self, call: Callable[[], object], stopwatch: Stopwatch) -> Timer:
        """Time between two events around the call: a launch returns before the device has worked."""

        def timed() -> tuple[int, int]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return round(begin.elapsed_time(end) * 1e6), 0

        return timed


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU: the default for deployment."""

    name = ONNXRUNTIME
    takes = "onnx"
    module = "onnxruntime"

    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        """A call of a session of its own."""
        content = _onnx(self.name, artifact)
        values = [x.contiguous().numpy() for x in inputs]
        return onnx_call(content if isinstance(content, bytes) else str(content), values, threads)


class OpenVino(Runtime):
    """OpenVINO on the CPU, tuned for the latency of single calls."""

    name = OPENVINO
    takes = "onnx"
    module = "openvino"
    extra = "openvino"

    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        """A call of an inference request of its own."""
        self.check_installed()
        openvino: Any = import_module("openvino")
        content = _onnx(self.name, artifact)
        core = openvino.Core()
        model = core.read_model(content if isinstance(content, bytes) else str(content))
        # A free batch dimension would leave the layouts open.
        model.reshape({index: openvino.PartialShape(list(x.shape)) for index, x in enumerate(inputs)})
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        values = [openvino.Tensor(x.contiguous().numpy()) for x in inputs]
        for position, value in enumerate(values):
            request.set_input_tensor(position, value)
        return lambda: request.infer()


class Sparse(Runtime):
    """Our own plan of sparse and dense kernels in one native call, chosen layer by layer: `pruning.sparse_network`."""

    name = SPARSE
    takes = "module"

    def check_installed(self) -> None:
        """Raise `LatencyError` if the kernels are not compiled."""
        if library() is None:
            msg = (
                f"the runtime '{self.name}' needs the compiled kernels, which the install makes where it finds a C++ "
                f"compiler; install g++ or clang++ and secateur again"
            )
            raise LatencyError(msg)

    def version(self) -> str:
        """Version of PyTorch, whose threads it uses, and the instruction set of the kernels."""
        native = library()
        return f"{torch.__version__}, kernels for {native.instruction_set}" if native else str(torch.__version__)

    def load(self, artifact: Artifact, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
        """A call of the prepared network; one that is prepared already is taken as it is."""
        if not isinstance(artifact, nn.Module):
            msg = f"the runtime '{self.name}' takes a torch.nn.Module, got {type(artifact).__name__}"
            raise LatencyError(msg)
        is_prepared = isinstance(artifact, SparseNetwork)
        prepared = artifact if is_prepared else prepare_sparse(copied(artifact).eval(), inputs)
        return lambda: prepared(*inputs)


def prepare_sparse(model: nn.Module, inputs: tuple[Tensor, ...]) -> SparseNetwork:
    """Prepare a network as the runtime ``sparse`` runs it, each layer in the form that `fastest_calls` finds.

    Args:
        model: network in evaluation mode, in float32 on the CPU; untouched.
        inputs: its positional inputs; it takes such sizes only.

    Raises:
        LatencyError: if the network cannot be prepared.
    """
    try:
        with torch.inference_mode(mode=False):  # the exporter needs tensors that can be traced
            return sparsify(model, [x.clone() for x in inputs], measure=fastest_calls)
    except (SparseNetworkError, LoweringError) as error:
        msg = f"the runtime '{SPARSE}' cannot prepare {type(model).__name__}: {first_line(error)}"
        raise LatencyError(msg) from error


def fastest_calls(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of 15 calls of each candidate, called in turn, for `sparsify` to choose by.

    With one thread, the time that a call waited for a processor is taken off, as in all times of this room. Calls do
    not settle: in a network other layers run in between.
    """
    stopwatch = Stopwatch()
    timers = [stopwatch.timer(call) for call in candidates.values()]
    elapsed, waited = interleave(timers, n_runs=15, n_warmup=3, settled=False)
    threads = torch.get_num_threads()
    return {
        name: min(without_waits(own, waits, threads)) / 1e9
        for name, own, waits in zip(candidates, elapsed, waited, strict=True)
    }


_BUILT_IN: tuple[type[Runtime], ...] = (PyTorchEager, PyTorchCompiled, PyTorchCuda, OnnxRuntime, OpenVino, Sparse)


def runtime_names() -> tuple[str, ...]:
    """Names of all runtimes, installed or not: this package's own, then those of other packages."""
    return (*(kind.name for kind in _BUILT_IN), *sorted(entry.name for entry in entry_points(group=ENTRY_POINTS)))


def find_runtime(name: str) -> Runtime:
    """The runtime called ``name``, ready to be used.

    Raises:
        LatencyError: if there is none, with the nearest name; if it is not installed, with the extra that installs
            it; or if another package offers it and it cannot be loaded.
    """
    runtime = next((kind() for kind in _BUILT_IN if kind.name == name), None) or _added(name)
    if runtime is None:
        nearest = difflib.get_close_matches(name, runtime_names(), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else "."
        msg = f"unknown runtime '{name}'{hint} Allowed: {', '.join(runtime_names())}"
        raise LatencyError(msg)
    runtime.check_installed()
    return runtime


def _added(name: str) -> Runtime | None:
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            runtime = entry.load()()
        except Exception as error:  # another package's code fails as it likes
            msg = f"the runtime '{name}' of '{entry.value}' cannot be loaded: {first_line(error)}"
            raise LatencyError(msg) from error
        if not isinstance(runtime, Runtime):
            msg = (
                f"the runtime '{name}' of '{entry.value}' is a {type(runtime).__name__}; it must derive from "
                f"latency.runtimes.Runtime"
            )
            raise LatencyError(msg)
        if (own := getattr(runtime, "name", None)) != name:
            # Tables and reports name a runtime by its own name, and it is looked up by that of the entry point.
            msg = f"the runtime '{name}' of '{entry.value}' has the name {own!r}; give its class the same name"
            raise LatencyError(msg)
        return runtime
    return None


def _channels_last(
    name: str, artifact: Artifact, inputs: tuple[Tensor, ...], device: torch.device
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if not isinstance(artifact, nn.Module):
        msg = f"the runtime '{name}' takes a torch.nn.Module, got {type(artifact).__name__}"
        raise LatencyError(msg)
    timed = copied(artifact).eval().to(device)
    if not any(x.dim() == 4 for x in inputs):
        return timed, tuple(x.to(device) for x in inputs)
    values = (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
    lay_channels_last(timed)
    return timed, tuple(x.to(device) for x in values)


def _onnx(name: str, artifact: Artifact) -> bytes | Path:
    if isinstance(artifact, nn.Module):
        msg = f"the runtime '{name}' takes an ONNX file (bytes or path), got {type(artifact).__name__}; export it first"
        raise LatencyError(msg)
    return artifact
