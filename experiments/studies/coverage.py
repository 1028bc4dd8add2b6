"""How many networks are captured right: torchvision's classifiers, with Torch-Pruning beside them, and timm's.

Run as ``python -m experiments.studies.coverage``. Finished models are kept in ``docs/coverage``, under version control,
and skipped, so that the run can be stopped at any time; the page is rendered from them. To have a model measured again,
delete its file; ``--models`` without names measures none, and renders the page alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from latency.cost import count_macs, predict_cost
from pruning.files import write_atomic
from pruning.policy import CompressionPolicy
from pruning.proof import prove, random_policy
from pruning.surgery import apply_policy

from ..pages import Table

SIZES = (64, 128, 224, 240, 256, 299, 384)
"""Image sizes in pixels; the first that a network accepts is used."""
SEEDS = (0, 1, 2)
"""Seeds of the random keep ratios."""
_OF_TIMM = "timm/"
# fmt: off
TIMM = (
    "beit_base_patch16_224", "halonet_h1", "mobileone_s1", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "convnext_zepto_rms", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s",
    "cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "mobilenetv2_035", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0",
    "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t", "inception_next_atto",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s", "lowformer_b0",
    "mambaout_femto", "maxvit_pico_rw_256", "poolformerv2_s12", "gmlp_ti16_224", "mobilenetv3_small_050",
    "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge",
    "nest_tiny", "nextvit_small", "nf_regnet_b0", "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m",
    "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "resnet10t",
    "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11",
    "visformer_tiny", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "vit_srelpos_small_patch16_224",
    "samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception",
    "xception41p", "xcit_nano_12_p8_224",
)
# fmt: on
"""The smallest network of each family of timm 1.0.31, by parameters."""
PEER_LIMIT = 120
"""Seconds of processor time after which Torch-Pruning is stopped, in each of its two tasks."""


@dataclass(frozen=True)
class Cell:
    """What was measured on one model; seconds are of one run, MACs for a batch of one."""

    model: str
    measured_with: str
    size: int
    macs: int
    groups: int
    offered: int
    prunable_share: float
    left_at_half: float
    capture_seconds: float
    slice_seconds: float
    worst_error: float
    cost_agrees: bool
    unnamed: int
    failure: str
    peer_seconds: float
    peer_left_at_half: float
    peer_failure: str

    @property
    def passes(self) -> bool:
        """Whether every group offered passed the proof, every other one is named, and the cost was predicted."""
        return not self.failure and self.worst_error <= 1e-4 and self.cost_agrees and not self.unnamed


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights and the smallest input that it accepts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _is_timms(name):
            import timm

            model = timm.create_model(name.removeprefix(_OF_TIMM)).eval()
        else:
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(name, weights=None, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        image = torch.randn(2, 3, size, size, generator=generator)
        try:
            with torch.inference_mode():
                model(image)
        except (AssertionError, RuntimeError):
            continue
        return model, image
    msg = f"'{name}' accepts none of the image sizes {SIZES}"
    raise ValueError(msg)


def measure(name: str) -> Cell:
    """Capture, prove and slice one model, and ask Torch-Pruning for the same of torchvision's, in one run."""
    torch.manual_seed(0)
    model, image = build(name)
    ours, theirs = [], []
    peer_failure = ""
    graph = capture(model, image)
    for _ in range(3):
        start = time.perf_counter()
        graph = capture(model, image)
        ours.append(time.perf_counter() - start)
        if not peer_failure and not _is_timms(name):
            seconds, peer_failure = _peer_groups(model, image)
            theirs.append(seconds)
    worst, cost_agrees, failure, sliced = 0.0, True, "", []
    for seed in SEEDS:
        proof = prove(model, graph, image, generator=torch.Generator().manual_seed(seed), each_group=False)[0]
        worst, failure = max(worst, proof.error), failure or proof.message
        if not failure:
            policy = random_policy(graph, torch.Generator().manual_seed(seed))
            start = time.perf_counter()
            small = apply_policy(model, graph, policy)
            sliced.append(time.perf_counter() - start)
            cost_agrees &= count_macs(small, image) == predict_cost(graph, policy)
    floor = CompressionPolicy({g.name: (0,) for g in graph.prunable}, {g.name: g.size for g in graph.prunable})
    left, peer_left_failure = (math.nan, peer_failure)
    if not peer_failure and not _is_timms(name):
        left, peer_left_failure = _peer_half(model, image)
    return Cell(
        model=name, measured_with=_versions(name), size=image.shape[-1], macs=graph.macs,
        groups=len(graph.groups), offered=len(graph.prunable),
        prunable_share=1 - predict_cost(graph, floor) / graph.macs,
        left_at_half=predict_cost(graph, _half(graph)) / graph.macs,
        capture_seconds=statistics.median(ours), slice_seconds=statistics.median(sliced) if sliced else math.nan,
        worst_error=worst, cost_agrees=cost_agrees,
        unnamed=sum(not g.is_prunable and not g.reason for g in graph.groups),
        failure=failure, peer_seconds=statistics.median(theirs) if theirs and not peer_failure else math.nan,
        peer_left_at_half=left, peer_failure=peer_left_failure,
    )  # fmt: skip


def _is_timms(name: str) -> bool:
    return name.startswith(_OF_TIMM)


def _half(graph: NetworkGraph) -> CompressionPolicy:
    kept = {g.name: tuple(range(-(-g.size // 2))) for g in graph.prunable}
    return CompressionPolicy(kept, {g.name: g.size for g in graph.prunable})


def _peer_groups(model: nn.Module, image: Tensor) -> tuple[float, str]:
    """Seconds that Torch-Pruning's graph and groups take, and why they failed."""
    import torch_pruning

    start = time.perf_counter()

    def run() -> None:
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=image)
        list(graph.get_all_groups(ignored_layers=_last_linear(model)))

    failure = _failure_of(run)
    return time.perf_counter() - start, failure


def _peer_half(model: nn.Module, image: Tensor) -> tuple[float, str]:
    """Share of MACs that Torch-Pruning's default pruner leaves at half the channels, and why it failed."""
    import copy

    import torch_pruning

    small = copy.deepcopy(model)

    def run() -> None:
        pruner = torch_pruning.pruner.BasePruner(
            small, image, importance=torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
            ignored_layers=_last_linear(small),
        )  # fmt: skip
        pruner.step()
        with torch.inference_mode():
            small.eval()(image)

    failure = _failure_of(run)
    return (math.nan, failure) if failure else (count_macs(small, image) / count_macs(model, image), "")


def _failure_of(run: Callable[[], None]) -> str:
    def stop(*_: object) -> None:
        msg = f"stopped after {PEER_LIMIT} seconds"
        raise TimeoutError(msg)

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, PEER_LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except Exception as error:  # a peer may fail in any way; that it does is the result
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:120]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return ""


def _last_linear(model: nn.Module) -> list[nn.Module]:
    return [[m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]]


def render(cells: list[Cell], missing: list[str]) -> str:
    """The page, in Markdown; ``missing`` names the models not measured yet."""
    timms = [cell for cell in cells if _is_timms(cell.model)]
    cells = [cell for cell in cells if not _is_timms(cell.model)]
    timms_missing = sum(map(_is_timms, missing))
    of_torchvision = f"{len(cells)} of {len(cells) + len(missing) - timms_missing}"
    of_timm = f"{len(timms)} of {len(timms) + timms_missing}"
    peer_passed = sum(not cell.peer_failure for cell in cells)
    both = [cell for cell in cells if not math.isnan(cell.peer_seconds)]
    ratio = statistics.median(cell.capture_seconds / cell.peer_seconds for cell in both) if both else math.nan
    heads = ["model", "pixels", "GMACs", "groups, offered", "prunable", "worst error", "passes", "left"]
    table = Table(
        [*heads, "capture s", "slice ms", "peer"],
        [[*_found(cell), *_beside_the_peer(cell)] for cell in cells],
        words=("passes",),
    ).markdown()
    # Times are shown where the peer's are beside them.
    table_of_timm = Table(heads, list(map(_found, timms)), words=("passes",)).markdown()
    failures = "\n".join(
        f"- `{c.model}`{who}: {why}"
        for c in [*cells, *timms]
        for who, why in (("", c.failure), (", Torch-Pruning", c.peer_failure))
        if why
    )
    return f"""# Coverage

The classification models of torchvision ({of_torchvision}) and the smallest network of each family of timm ({of_timm}),
random weights, random keep ratios (seeds {", ".join(map(str, SEEDS))}). What is not measured yet is named at the end.
A model passes if removing random units of all offered groups computes what silencing them computes (largest difference
at most 1e-4 of the output's scale), every group that is not offered has a reason, and the MACs predicted for the policy
are those of the model that was built.

    make coverage

- torchvision: {_passed(cells)}
- timm: {_passed(timms)}
- Torch-Pruning: its default pruner finishes, and the pruned network runs, on
  {peer_passed} of torchvision's {len(cells)} (no comparison of outputs). At the same request, half of the channels of
  everything but the last layer, the column "left" shows the share of MACs left by each. It is given {PEER_LIMIT}
  seconds of processor time for either.
- Capture with groups takes {ratio:.2f} of Torch-Pruning's graph with groups (median of ratios over the {len(both)}
  models that both capture, interleaved in one run, median of 3).
- "prunable" is the share of MACs that goes when every offered group keeps one unit.

## torchvision

Measured with {_measured_with(cells)}.

{table}

## timm

What is not offered is mostly the width that residual branches add up to under layer norms, whose statistics a removed
channel would change. Measured with {_measured_with(timms)}.

{table_of_timm}

## Failures
{failures or "None."}

## Not measured yet
{", ".join(missing) or "None."}
"""


def _passed(cells: Sequence[Cell]) -> str:
    wrong = sum(not cell.failure and cell.worst_error > 1e-4 for cell in cells)
    return f"{sum(cell.passes for cell in cells)} of {len(cells)} models pass; {wrong} silently wrong."


def _measured_with(cells: Sequence[Cell]) -> str:
    return " and ".join(sorted({cell.measured_with for cell in cells})) or "nothing yet"


def _found(cell: Cell) -> list[str]:
    return [
        cell.model,
        str(cell.size),
        f"{cell.macs / 1e9:.2f}",
        f"{cell.groups}, {cell.offered}",
        f"{cell.prunable_share:.0%}",
        f"{cell.worst_error:.1e}",
        "yes" if cell.passes else "**no**",
        f"{cell.left_at_half:.2f}",
    ]


def _beside_the_peer(cell: Cell) -> list[str]:
    left = "fails" if cell.peer_failure else f"{cell.peer_left_at_half:.2f}"
    peer = left if math.isnan(cell.peer_seconds) else f"{cell.peer_seconds:.2f}, {left}"
    return [f"{cell.capture_seconds:.2f}", f"{cell.slice_seconds * 1e3:.0f}", peer]


def _versions(name: str) -> str:
    others = ("timm",) if _is_timms(name) else ("torchvision", "torch-pruning")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", *others))
    return f"Python {platform.python_version()}, {packages}, {torch.get_num_threads()} threads, {platform.machine()}"


def main() -> None:
    """Measure what is missing and render the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, default=Path("docs/coverage"), help="folder of finished models")
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"), help="page to write")
    parser.add_argument("--models", nargs="*", help="models to measure now, timm's as timm/NAME; all")
    options = parser.parse_args()
    names = torchvision.models.list_models(module=torchvision.models) + [_OF_TIMM + name for name in TIMM]
    for name in names if options.models is None else options.models:
        path = options.cells / f"{name}.json"
        if not path.exists():
            write_atomic(path, json.dumps(asdict(measure(name)), indent=2).encode())
            gc.collect()  # graphs that refer to themselves keep whole networks until then
    found: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(options.cells.rglob("*.json"))]
    cells = [Cell(**values) for values in found]
    missing = sorted(set(names) - {cell.model for cell in cells})
    write_atomic(options.page, render(cells, missing).encode())


if __name__ == "__main__":
    main()
