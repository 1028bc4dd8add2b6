"""Channels, zeros and bits in one network: applied, saved, loaded, exported and fine-tuned as one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from experiments.apply import apply_saved
from experiments.config import RunConfig
from experiments.data import ImageData, normalise
from experiments.interrupt import Interrupted, StopFlag
from experiments.progress import RunDisplay
from experiments.standalone_training import finetune_saved
from pruning.export import load_compressed, save_compressed
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy
from pruning.qdq import EXACT_SUMS

from .stopping import StopAfter
from .tiny import network

INT8 = {"weight_bits": 8, "act_bits": 8}
HALF = INT8 | {"reduce_range": True}
POLICY = CompressionPolicy(
    {"3": tuple(range(12)), "6": tuple(range(4, 16))},
    {"3": 16, "6": 16},
    {
        "0": LayerPolicy(**INT8),
        "3": LayerPolicy("block4", 0.75, **HALF),
        "6": LayerPolicy("block4", 0.5, **HALF),
        "9": LayerPolicy("unstructured", 0.5, **INT8),
        "14": LayerPolicy(**INT8),
    },
)
SIMULATED = CompressionPolicy({}, {}, {"6": LayerPolicy(weight_bits=4, act_bits=8)})

Step = Callable[[RunDisplay], dict[str, Any]]


def told(step: Step) -> tuple[dict[str, Any], list[str]]:
    """What a step returned, and what it said on the way."""
    said: list[str] = []
    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        return step(display), said


def applied(policy: CompressionPolicy, config: RunConfig, folder: Path) -> tuple[dict[str, Any], list[str]]:
    policy.save(folder / "asked.json")
    return told(lambda display: apply_saved(folder / "asked.json", config, folder / "applied", 0, display, StopFlag()))


def loaded(folder: Path) -> torch.nn.Module:
    return load_compressed(folder, lambda: network(num_classes=3, in_channels=1))


def images_of(config: RunConfig) -> Tensor:
    return normalise(ImageData(config.data).validation.images, config.data).contiguous()


def assert_is_the_policy_in_integers(folder: Path, config: RunConfig) -> None:
    model = loaded(folder)
    for name in POLICY.sparse_layers:
        weight = model.get_parameter(f"{name}.weight")
        # A block more or less is rounding.
        assert float((weight != 0).float().mean()) == pytest.approx(POLICY.layers[name].density, abs=4 / len(weight))
    assert model.get_parameter("6.weight").shape[:2] == (12, 12)
    x = images_of(config)
    options = onnxruntime.SessionOptions()
    for name, value in EXACT_SUMS.items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        expected = model(x)
    difference = torch.from_numpy(np.asarray(found)) - expected
    assert float(difference.norm() / expected.norm()) < 0.02


@pytest.fixture(scope="module")
def product(
    tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunConfig, list[str]]:
    folder, config = tmp_path_factory.mktemp("product"), tiny_config(measure__onnx=True)
    _, said = applied(POLICY, config, folder)
    return folder / "applied", config, said


def test_channels_zeros_and_bits_are_applied_saved_loaded_and_exported_as_one(
    product: tuple[Path, RunConfig, list[str]],
) -> None:
    folder, config, said = product

    assert_is_the_policy_in_integers(folder, config)
    assert any("as ONNX: 5 of 5 8-bit layers run in integers;" in line for line in said)


@pytest.mark.parametrize("with_bits", [1, 0])
def test_finetuning_a_saved_network_keeps_its_channels_zeros_and_bits(
    product: tuple[Path, RunConfig, list[str]], tiny_config: Callable[..., RunConfig], tmp_path: Path, with_bits: int
) -> None:
    folder, config, _ = product
    config = tiny_config(finetune__epochs=1, finetune__quantized_epochs=with_bits, measure__onnx=True)
    out = tmp_path / "tuned"
    _, said = told(lambda display: finetune_saved(folder, config, out, display, StopFlag()))

    before, after = loaded(folder), loaded(out)
    for name in POLICY.sparse_layers:
        old, new = before.get_parameter(f"{name}.weight"), after.get_parameter(f"{name}.weight")
        assert not torch.equal(old, new)
        assert torch.equal(old == 0, new == 0)
    assert CompressionPolicy.load(out / "policy.json") == POLICY
    assert_is_the_policy_in_integers(out, config)
    assert any(line.startswith("the fine-tuned network as ONNX: 5 of 5 8-bit layers run in integers;") for line in said)


def test_fine_tuning_that_was_stopped_is_not_taken_for_another_networks(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_config(finetune__epochs=2)
    for seed in (0, 1):
        torch.manual_seed(seed)
        example = torch.zeros(2, 1, 8, 8)
        save_compressed(
            network(3, 1), CompressionPolicy(), tmp_path / str(seed), constructor="tiny", example_inputs=example
        )

    def tuned(seed: int, out: str, stop: StopFlag) -> Path:
        with RunDisplay(quiet=True) as display:
            finetune_saved(tmp_path / str(seed), config, tmp_path / out, display, stop)
        return tmp_path / out / "model.safetensors"

    with pytest.raises(Interrupted):
        tuned(0, "out", StopAfter(1))

    assert tuned(1, "out", StopFlag()).read_bytes() == tuned(1, "alone", StopFlag()).read_bytes()
    assert tuned(0, "again", StopFlag()).read_bytes() != (tmp_path / "out" / "model.safetensors").read_bytes()


def test_simulated_bits_leave_only_the_onnx_file_and_the_times_out(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    facts, said = applied(SIMULATED, tiny_config(measure__onnx=True), tmp_path)

    why = "layer '6' has 4-bit weights and 8-bit activations, which are simulated: no runtime has kernels for them; "
    warning = next(line for line in said if line.startswith("warning: the compressed network is not written as ONNX"))
    assert warning.startswith(f"warning: the compressed network is not written as ONNX: {why}")
    assert {"accuracy", "macs", "params", "bytes", "bops"} <= facts.keys()
    assert facts["bytes"] < facts["dense_bytes"] and facts["bops"] < facts["dense_bops"]
    assert facts["no_speedup"] == "the compressed network: not timed on any runtime"
    assert not [name for name in facts if name.startswith("speed_on")]
    assert sorted(path.name for path in (tmp_path / "applied").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "policy.json",
    ]

    config, out = tiny_config(finetune__epochs=1, measure__onnx=True), tmp_path / "tuned"
    facts, said = told(lambda display: finetune_saved(tmp_path / "applied", config, out, display, StopFlag()))
    assert f"warning: the fine-tuned network is not written as ONNX: {why}" in " ".join(said)
    assert (out / "manifest.json").exists() and not (out / "model.onnx").exists()
    assert facts["validation_accuracy"] > 0
