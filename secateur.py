"""Secateur: compress PyTorch networks under a budget, by an agent that reads them as graphs.

The project's public functions in one place::

    import secateur

    compressed = secateur.compress(model, example_inputs, evaluate=accuracy, budget="50%", calibration=batches)
    compressed.model            # the smaller network, ready to fine-tune
    compressed.policy.save("policy.json")
"""

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

ROOMS = ("graph_encoder", "pruning", "latency", "envs", "agent", "experiments")


def _check_rooms() -> None:
    """Raise `ImportError` if a package of this project is hidden by a folder of the same name."""
    here = Path(__file__).resolve().parent
    for room in ROOMS:
        spec = find_spec(room)
        folders = _folders(spec)
        if here / room not in folders:
            found = ", ".join(map(str, folders)) or (spec.origin if spec and spec.origin else "nothing")
            msg = (
                f"secateur needs its own package '{room}' in {here}, but Python finds {found} first; "
                f"rename that folder, or start Python from another one"
            )
            raise ImportError(msg)


def _folders(spec: ModuleSpec | None) -> list[Path]:
    return [Path(folder).resolve() for folder in (spec.submodule_search_locations if spec else None) or ()]


_check_rooms()

from envs.evaluator import CandidateEvaluator  # noqa: E402 - only once the rooms are known to be ours
from envs.space import SearchSpace  # noqa: E402
from experiments.compress import Compressed, compress  # noqa: E402
from graph_encoder.capture import capture  # noqa: E402
from graph_encoder.errors import SecateurError  # noqa: E402
from graph_encoder.network import NetworkGraph, TraceError  # noqa: E402
from latency.budget import Budget, BudgetError  # noqa: E402
from latency.cost import count_macs, count_params, size_bytes  # noqa: E402
from latency.measure import measure_latency  # noqa: E402
from latency.table import LatencyTable  # noqa: E402
from pruning.batch_norm import reestimate_batch_norm  # noqa: E402
from pruning.export import (  # noqa: E402
    export_onnx,
    export_program,
    load_compressed,
    load_program,
    save_compressed,
)
from pruning.finetune import finetune  # noqa: E402
from pruning.importance import rank_units  # noqa: E402
from pruning.policy import CompressionPolicy, LayerPolicy, PolicyError  # noqa: E402
from pruning.proof import Proof, prove  # noqa: E402
from pruning.quantize import quantize_layers  # noqa: E402
from pruning.sparse_network import sparsify  # noqa: E402
from pruning.sparse_training import hold_zeros  # noqa: E402
from pruning.surgery import apply_policy  # noqa: E402

__all__ = [
    "Budget",
    "BudgetError",
    "CandidateEvaluator",
    "Compressed",
    "CompressionPolicy",
    "LatencyTable",
    "LayerPolicy",
    "NetworkGraph",
    "PolicyError",
    "Proof",
    "SearchSpace",
    "SecateurError",
    "TraceError",
    "apply_policy",
    "capture",
    "compress",
    "count_macs",
    "count_params",
    "export_onnx",
    "export_program",
    "finetune",
    "hold_zeros",
    "load_compressed",
    "load_program",
    "measure_latency",
    "prove",
    "quantize_layers",
    "rank_units",
    "reestimate_batch_norm",
    "save_compressed",
    "size_bytes",
    "sparsify",
]
