import contextlib
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from graph_encoder.capture import capture
from pruning.export import (
    ExportError,
    export_onnx,
    export_program,
    load_compressed,
    load_program,
    read_manifest,
    save_compressed,
)
from pruning.files import FileWriteError
from pruning.policy import CompressionPolicy, LayerPolicy
from pruning.program_archive import ArchiveError
from pruning.quantize import quantize_layers
from pruning.sparse_training import hold_zeros
from pruning.sparsity import zero_weights
from pruning.surgery import apply_policy


class Residual(nn.Module):
    """Two convolutions around a sum, and a classifier tied to nothing."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 12, 1)
        self.outer = nn.Conv2d(12, width, 1)
        self.linear = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.norm(self.conv(x))
        x = x + self.outer(self.inner(x).relu())
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


EXAMPLE = torch.zeros(1, 3, 8, 8)
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compressed() -> tuple[nn.Module, CompressionPolicy]:
    torch.manual_seed(0)
    dense = Residual().eval()
    policy = CompressionPolicy({"inner": (1, 2, 5, 7, 11)}, {"inner": 12})
    return apply_policy(dense, capture(dense, EXAMPLE), policy), policy


def test_saved_network_computes_the_same_when_loaded(
    tmp_path: Path, compressed: tuple[nn.Module, CompressionPolicy]
) -> None:
    model, policy = compressed
    save_compressed(model, policy, tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)
    loaded = load_compressed(tmp_path, Residual)

    assert loaded.inner.out_channels == 5
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert read_manifest(tmp_path).constructor == "tests:Residual"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "model.safetensors", "policy.json"]


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    model = tied()
    save_compressed(model, CompressionPolicy(), tmp_path, constructor="tied", example_inputs=torch.zeros(1, 6))
    loaded = load_compressed(tmp_path, tied)

    assert loaded[0].weight is loaded[2].weight
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_tied_layers_with_bits_are_loaded(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model.eval()

    x, policy = torch.randn(5, 6), CompressionPolicy(layers=dict.fromkeys("02", LayerPolicy(weight_bits=4, act_bits=4)))
    model = quantize_layers(tied(), policy.layers, [x])
    save_compressed(model, policy, tmp_path, constructor="tied", example_inputs=x)

    assert torch.equal(load_compressed(tmp_path, tied)(x), model(x))


def test_network_that_is_saved_while_its_zeros_are_held_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sparse = Residual().eval()
    policy = CompressionPolicy(layers={"conv": LayerPolicy("unstructured", 0.5)})
    zero_weights(sparse, policy.layers)
    with hold_zeros(sparse, policy.sparse_layers):
        save_compressed(sparse, policy, tmp_path, constructor="residual", example_inputs=EXAMPLE)

    torch.testing.assert_close(load_compressed(tmp_path, Residual)(IMAGES), sparse(IMAGES))


@pytest.mark.parametrize(
    "layers",
    [
        {"stem": LayerPolicy(weight_bits=8, act_bits=8), "conv": LayerPolicy(weight_bits=8, act_bits=8)},
        {
            "stem": LayerPolicy(weight_bits=3, act_bits=5),
            "inner": LayerPolicy(weight_bits=2, quantizer="kmeans"),
            "linear": LayerPolicy(weight_bits=1, act_bits=4),
        },
    ],
)
def test_channels_and_bits_are_saved_and_loaded_as_one(tmp_path: Path, layers: dict[str, LayerPolicy]) -> None:
    torch.manual_seed(0)
    dense = Residual().eval()
    policy = CompressionPolicy({"inner": (1, 2, 5, 7, 11)}, {"inner": 12}, layers)
    small = apply_policy(dense, capture(dense, EXAMPLE), policy)
    model = quantize_layers(small, layers, [IMAGES])
    save_compressed(model, policy, tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)
    loaded = load_compressed(tmp_path, Residual)

    assert loaded.inner.out_channels == 5
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert not torch.allclose(model(IMAGES), small(IMAGES), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("of_network", [True, False])
def test_network_with_another_range_than_its_policy_is_not_saved(tmp_path: Path, of_network: bool) -> None:
    whole = LayerPolicy(weight_bits=8, act_bits=8)
    half = replace(whole, reduce_range=True)
    own, asked = (half, whole) if of_network else (whole, half)
    model, policy = quantize_layers(Residual(), {"stem": own}, [IMAGES]), CompressionPolicy(layers={"stem": asked})

    with pytest.raises(ExportError, match="8-bit linear weights of half the range and 8-bit activations"):
        save_compressed(model, policy, tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)
    assert not list(tmp_path.iterdir())


def test_network_with_other_bits_than_its_policy_is_not_saved(tmp_path: Path) -> None:
    model = quantize_layers(Residual(), {"stem": LayerPolicy(weight_bits=4, act_bits=8)}, [IMAGES])

    with pytest.raises(ExportError) as caught:
        save_compressed(model, CompressionPolicy(), tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)

    assert str(caught.value) == (
        "layer 'stem' of the network has 4-bit linear weights and 8-bit activations, and the policy gives it 32-bit "
        "linear weights and 32-bit activations; save it with the policy that it was quantized with"
    )
    assert not list(tmp_path.iterdir())


def test_simulated_bits_are_exported_as_a_program(tmp_path: Path) -> None:
    layers = {"stem": LayerPolicy(weight_bits=3, act_bits=5), "inner": LayerPolicy(weight_bits=2, quantizer="kmeans")}
    model = quantize_layers(Residual().eval(), layers, [IMAGES])
    export_program(model, EXAMPLE, tmp_path / "model.pt2")

    torch.testing.assert_close(load_program(tmp_path / "model.pt2").module()(IMAGES), model(IMAGES))


def test_constructor_of_another_width_is_named(tmp_path: Path, compressed: tuple[nn.Module, CompressionPolicy]) -> None:
    model, policy = compressed
    save_compressed(model, policy, tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)

    with pytest.raises(ExportError) as caught:
        load_compressed(tmp_path, lambda: Residual(width=9))

    assert str(caught.value) == (
        f"the weights '{tmp_path / 'model.safetensors'}' do not fit the network that the constructor builds: 11 of "
        "another shape (stem.weight (8, 3, 3, 3), not (9, 3, 3, 3), stem.bias (8,), not (9,), conv.weight (8, 8, 3, "
        "3), not (9, 9, 3, 3), ...); they were saved from 'tests:Residual'"
    )


def test_files_of_two_saves_are_told_apart(tmp_path: Path, compressed: tuple[nn.Module, CompressionPolicy]) -> None:
    model, policy = compressed
    save_compressed(model, policy, tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)
    CompressionPolicy({"inner": (0, 1, 2, 3, 4)}, {"inner": 12}).save(tmp_path / "policy.json")

    with pytest.raises(ExportError) as caught:
        load_compressed(tmp_path, Residual)

    assert str(caught.value) == (
        f"'{tmp_path}' is not whole: model.safetensors, policy.json and manifest.json are not of the same save, or one "
        "was changed or cut short; save the network again"
    )


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        load_compressed(tmp_path, Residual)
    assert str(caught.value) == f"cannot read '{tmp_path / 'manifest.json'}': No such file or directory"


@pytest.mark.slow
def test_onnx_file_agrees_with_pytorch_at_any_batch_size(
    tmp_path: Path, compressed: tuple[nn.Module, CompressionPolicy]
) -> None:
    import onnxruntime

    model, _ = compressed
    model.train()
    export_onnx(model, EXAMPLE, tmp_path / "model.onnx")

    assert model.training
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    model.eval()
    for images in (IMAGES[:1], IMAGES):
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def program_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    export_program(Residual().eval(), EXAMPLE, path)
    return path


def test_onnx_file_does_not_depend_on_the_layout_of_the_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    operators = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        export_onnx(copy.deepcopy(model).to(memory_format=layout), EXAMPLE, tmp_path / "model.onnx")
        operators[layout] = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]

    assert operators[torch.channels_last] == operators[torch.contiguous_format]


def test_paths_may_be_text(tmp_path: Path) -> None:
    export_onnx(nn.Linear(3, 2), torch.zeros(1, 3), str(tmp_path / "model.onnx"))
    export_program(nn.Linear(3, 2), torch.zeros(1, 3), str(tmp_path / "model.pt2"))

    load_program(str(tmp_path / "model.pt2"))
    assert (tmp_path / "model.onnx").exists()


def test_program_agrees_with_pytorch_at_any_batch_size(program_file: Path) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    program = load_program(program_file).module()

    for images in (IMAGES[:1], IMAGES):
        torch.testing.assert_close(program(images), model(images))


def test_program_file_holds_no_path_of_the_machine(program_file: Path) -> None:
    with zipfile.ZipFile(program_file) as archive:
        assert not any(b"test_export" in archive.read(name) for name in archive.namelist())


def test_network_with_a_fixed_batch_cannot_be_exported(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1)

    with pytest.raises(ExportError, match="Fixed cannot be exported: "):
        export_program(Fixed(), EXAMPLE, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


class Pair(nn.Module):
    """The distance of two images' features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.conv(one) - self.conv(other)).square().mean((2, 3))


def test_program_of_several_inputs_takes_any_batch_that_they_share(tmp_path: Path) -> None:
    model, others = Pair().eval(), IMAGES.flip(0)
    export_program(model, (EXAMPLE, EXAMPLE), tmp_path / "model.pt2")

    program = load_program(tmp_path / "model.pt2").module()

    torch.testing.assert_close(program(IMAGES, others), model(IMAGES, others))
    with pytest.raises(AssertionError, match=r"Guard failed: other.size\(\)\[0\] == one.size\(\)\[0\]"):
        program(IMAGES, others[:3])


@pytest.mark.parametrize(
    ("export", "loader", "what"),
    [(export_onnx, "pruning.export._session", "ONNX"), (export_program, "torch.export.load", "exported program")],
)
def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Callable[..., object], loader: str, what: str
) -> None:
    model = Residual().eval()

    def wrong(*inputs: Tensor) -> Tensor:
        return 1.01 * model(*inputs)

    as_loaded = {"ONNX": wrong, "exported program": SimpleNamespace(module=lambda: wrong)}[what]
    monkeypatch.setattr(loader, lambda *_: as_loaded)

    with pytest.raises(
        ExportError, match=rf"the {what} of Residual differs from PyTorch at batch size 1: by .+; nothing"
    ):
        export(model, EXAMPLE, tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Scaled(nn.Module):
    """An image times a number that holds for all of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return (self.conv(x) * scale).mean((2, 3))


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor(2)], ids=["float", "integer"])
def test_a_number_among_the_inputs_stays_one(tmp_path: Path, scale: Tensor) -> None:
    model = Scaled().eval()
    export_program(model, (EXAMPLE, scale), tmp_path / "model.pt2")
    export_onnx(model, (EXAMPLE, scale), tmp_path / "model.onnx")

    program = load_program(tmp_path / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (IMAGES.numpy(), (3 * scale).numpy()), strict=True)))

    torch.testing.assert_close(program(IMAGES, 3 * scale), model(IMAGES, 3 * scale))
    torch.testing.assert_close(torch.from_numpy(out), model(IMAGES, 3 * scale), rtol=1e-4, atol=1e-5)


class Stacked(Pair):
    """The features of both images, computed as one batch."""

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.conv(torch.cat([one, other])).mean((2, 3)).chunk(2)


def test_onnx_network_whose_batch_is_fixed_is_refused(tmp_path: Path) -> None:
    message = (
        "Stacked cannot be exported to ONNX: its operators fix the batch of input 'one' at 2; let forward take any "
        "batch size"
    )
    with pytest.raises(ExportError, match=f"^{message}$"):
        export_onnx(Stacked().eval(), (EXAMPLE, EXAMPLE), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [32, 8])
def test_onnx_network_in_a_type_without_kernels_is_refused(tmp_path: Path, bits: int) -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double().eval(), IMAGES.double()
    if bits == 8:
        model = quantize_layers(model, {"0": LayerPolicy(weight_bits=8, act_bits=8)}, [images])
    with pytest.raises(ExportError, match=r"^ONNX Runtime cannot run \w+: .* implementation for Conv\(22\) .*"):
        export_onnx(model, EXAMPLE.double(), tmp_path / "model.onnx", images=images)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_network_that_onnx_and_pytorch_both_cannot_export_is_refused(tmp_path: Path) -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(np.sort(x.detach().numpy()))

    with pytest.raises(ExportError, match=r"^Sorts cannot be exported to ONNX: the network calls '\w+', which has no "):
        export_onnx(Sorts(), EXAMPLE, tmp_path / "model.onnx")


def test_full_disk_leaves_no_half_written_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: tuple[nn.Module, CompressionPolicy]
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, policy = compressed
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(FileWriteError, match="no space left on the disk"):
        save_compressed(model, policy, tmp_path, constructor="tests:Residual", example_inputs=EXAMPLE)

    assert not list(tmp_path.iterdir())


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return Path.touch, (self.path,)


def rewritten(program_file: Path, path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write a copy of an archive with other records."""
    reader = PT2ArchiveReader(io.BytesIO(program_file.read_bytes()))
    own = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
    records = {name: reader.read_bytes(name) for name in reader.get_file_names() if name not in own}
    change(records)
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in records.items():
            writer.write_bytes(name, content)
    path.write_bytes(buffer.getvalue())


def edit_json(records: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    content = json.loads(records[name])
    change(content)
    records[name] = json.dumps(content).encode()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def poisons(touched: Path) -> dict[str, tuple[Callable[[dict[str, bytes]], None], str]]:
    """Ways to run code from an archive, each with what the refusal says."""
    source = f"__import__('pathlib').Path({str(touched)!r}).touch()"

    def inputs(records: dict[str, bytes]) -> None:
        records["data/sample_inputs/model.pt"] = saved(((Touch(touched),), {}))

    def weight(records: dict[str, bytes]) -> None:
        records["data/weights/weight_0"] = saved(Touch(touched))

        def pickled(config: Any) -> None:
            next(iter(config["config"].values()))["use_pickle"] = True

        edit_json(records, "data/weights/model_weights_config.json", pickled)

    def constant(records: dict[str, bytes]) -> None:
        records["data/constants/opaque_obj_0"] = pickle.dumps(Touch(touched))
        meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
        edit_json(records, "data/constants/model_constants_config.json", lambda config: config["config"].update(c=meta))

    def legacy(records: dict[str, bytes]) -> None:
        records["data/weights/model.pt"] = saved({"stem.weight": Touch(touched)})

    def library(records: dict[str, bytes]) -> None:
        records["data/aotinductor/model/model.so"] = b"\x7fELF"

    def model(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
        return lambda records: edit_json(records, "models/model.json", change)

    def first_size(content: Any) -> None:
        content["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = source

    def rename(content: Any) -> None:
        content["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = f"x={source}"

    def retarget(target: str) -> Callable[[Any], None]:
        return lambda content: content["graph_module"]["graph"]["nodes"][0].update(target=target)

    def spec(content: Any) -> None:
        tree = {"type": "collections.defaultdict", "context": "{}", "children_spec": []}
        content["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, tree])

    return {
        "sample inputs": (inputs, "its sample inputs are pickled Python objects"),
        "weight": (weight, "'stem.weight' is a pickled Python object"),
        "constant": (constant, "'c' is a pickled Python object"),
        "legacy weights": (legacy, "it holds 'data/weights/model.pt', which is no part of a plain program"),
        "library": (library, "it holds 'data/aotinductor/model/model.so', which is no part of a plain program"),
        "guard": (
            model(lambda content: content.update(guards_code=[source])),
            "it has guards, which are Python source",
        ),
        "shape": (model(first_size), f"the shape {source[:80]!r} is more than arithmetic on sizes"),
        "name": (model(rename), f"'name' holds the text {f'x={source}'[:80]!r}, which could be source code"),
        "function": (model(retarget("torch.hub.load")), "it calls 'torch.hub.load', which is no operator of a network"),
        "file": (
            model(retarget("torch.ops.aten.save.default")),
            "it calls 'torch.ops.aten.save.default', which is no operator of a network",
        ),
        "container": (model(spec), "its inputs or outputs are of the type 'collections.defaultdict'"),
    }


@pytest.mark.parametrize("way", sorted(poisons(Path("touched"))))
def test_poisoned_program_is_refused_and_its_payload_not_run(tmp_path: Path, program_file: Path, way: str) -> None:
    path, touched = tmp_path / "model.pt2", tmp_path / "touched"
    change, what = poisons(touched)[way]
    rewritten(program_file, path, change)

    with pytest.raises(ArchiveError) as caught:
        load_program(path)

    assert str(caught.value) == (
        f"the program '{path}' is refused: {what}; loading it could run any code. Write it with `export_program`"
    )
    assert not touched.exists()


@pytest.mark.parametrize("way", ["sample inputs", "shape", "weight"])
@pytest.mark.filterwarnings("ignore")
def test_the_poisons_do_work_in_pytorchs_own_loader(tmp_path: Path, program_file: Path, way: str) -> None:
    path, touched = tmp_path / "model.pt2", tmp_path / "touched"
    rewritten(program_file, path, poisons(touched)[way][0])

    with contextlib.suppress(Exception):  # it may fail afterwards; the payload has run by then
        torch.export.load(path)

    assert touched.exists()


def test_poisoned_weights_of_a_compressed_network_are_refused(
    tmp_path: Path, compressed: tuple[nn.Module, CompressionPolicy]
) -> None:
    model, policy = compressed
    touched = tmp_path / "touched"
    folder = tmp_path / "saved"
    save_compressed(model, policy, folder, constructor="tests:Residual", example_inputs=EXAMPLE)
    weights = saved({"stem.weight": Touch(touched)})
    (folder / "model.safetensors").write_bytes(weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ExportError, match=f"cannot read the weights '{folder / 'model.safetensors'}': "):
        load_compressed(folder, Residual)
    assert not touched.exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_file_that_is_no_program_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match=f"cannot read the program '{path}': .*; it is no exported program, or was"):
        load_program(path)


def test_truncated_program_is_named(tmp_path: Path, program_file: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(program_file.read_bytes()[:-2000])
    with pytest.raises(ArchiveError, match=f"cannot read the program '{path}': "):
        load_program(path)


def test_plain_program_that_makes_no_sense_is_named(tmp_path: Path, program_file: Path) -> None:
    path = tmp_path / "model.pt2"

    def wrong(content: Any) -> None:
        content["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.conv2d.nothing"

    rewritten(program_file, path, lambda records: edit_json(records, "models/model.json", wrong))
    with pytest.raises(ExportError, match=f"cannot rebuild the program '{path}': .*; export the network again"):
        load_program(path)


class Several(nn.Module):
    """Logits, the features that they are made of, and a decision, as a dictionary with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.conv(x).relu()
        logits = self.linear(features.flatten(2).amax(2))
        return {"logits": logits, "maps": [features, 2 * features], "positive": logits > 0}


def test_outputs_of_any_structure_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Several().eval(), torch.randn(4, 3, 8, 8)

    assert export_onnx(network, x, tmp_path / "floats.onnx") is None
    export_program(network, x, tmp_path / "floats.pt2")
    eight = LayerPolicy(weight_bits=8, act_bits=8)
    quantized = quantize_layers(network, {"conv": eight, "linear": eight}, [x]).eval()
    report = export_onnx(quantized, x, tmp_path / "integers.onnx", images=x)

    assert report is not None and report.layers == 2
    # Only those who read the features inside read them rounded.
    assert len(quantized(x)["maps"][0].unique()) > 256 >= len(quantized(x)["maps"][1].unique())


def test_tensors_are_loaded_in_the_type_that_they_were_saved_in(tmp_path: Path) -> None:
    dense, x = Residual().half().eval(), torch.randn(2, 3, 8, 8).half()
    graph = capture(dense, x)
    policy = CompressionPolicy({"inner": (0, 1, 2)}, {"inner": 12})
    small = apply_policy(dense, graph, policy)
    save_compressed(small, policy, tmp_path, constructor="Residual", example_inputs=x)

    loaded = load_compressed(tmp_path, Residual)

    assert torch.equal(loaded(x), small(x))
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in small.state_dict().items()
    }


class Refuses(nn.Module):
    """Raises without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise NotImplementedError
        out: Tensor = self.layer(x)
        return out


def test_a_forward_that_fails_without_a_message_is_told_by_its_type(tmp_path: Path) -> None:
    for write in (export_onnx, export_program):
        with pytest.raises(ExportError, match=r"Refuses cannot be exported.*NotImplementedError"):
            write(Refuses().eval(), torch.ones(2, 4), tmp_path / "file")


class HoldsMeta(nn.Module):
    """Holds something by a name that programs of PyTorch have an attribute for."""

    def __init__(self, meta: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.meta = meta

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.meta(x) if isinstance(self.meta, nn.Module) else x * self.meta


@pytest.mark.parametrize("meta", [nn.Linear(3, 3), nn.Parameter(torch.ones(3))], ids=["module", "parameter"])
def test_a_name_that_programs_have_themselves_is_refused_as_such(
    tmp_path: Path, meta: nn.Module | nn.Parameter
) -> None:
    for write, what in (export_onnx, "exported to ONNX"), (export_program, "exported"):
        with pytest.raises(ExportError) as caught:
            write(HoldsMeta(meta).eval(), torch.ones(2, 4), tmp_path / "file")
        assert str(caught.value) == (
            f"HoldsMeta cannot be {what}: its 'meta' has the name of an attribute of PyTorch's programs, which nothing "
            "that the network itself holds may have; give it another name"
        )
    assert not list(tmp_path.iterdir())


class Masked(nn.Module):
    """Scores of minus infinity for what may not be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)
        return out


def test_infinite_outputs_that_agree_are_no_difference(tmp_path: Path) -> None:
    export_onnx(Masked().eval(), torch.ones(2, 4), tmp_path / "masked.onnx")

    assert (tmp_path / "masked.onnx").exists()


class Structured(nn.Module):
    """Returns an ordered mapping, part of it computed without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        with torch.no_grad():
            twice = 2 * x
        return OrderedDict(out=self.layer(x), aux=twice)


def test_programs_hold_ordered_mappings_and_parts_without_gradients(tmp_path: Path) -> None:
    model, x = Structured().eval(), torch.ones(3, 4)

    export_program(model, x, tmp_path / "model.pt2")

    found = load_program(tmp_path / "model.pt2").module()(x)
    assert list(found) == ["out", "aux"]
    torch.testing.assert_close(found["out"], model(x)["out"])


class InAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            out: Tensor = self.layer(x)
        return out


def test_what_no_plain_program_holds_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError) as caught:
        export_program(InAutocast().eval(), torch.ones(3, 4), tmp_path / "model.pt2")

    assert str(caught.value) == (
        "InAutocast cannot be written as tensors and a plain graph: it calls "
        "'torch.ops.higher_order.wrap_with_autocast', which is no operator of a network"
    )
    assert not (tmp_path / "model.pt2").exists()


def test_a_network_that_was_quantized_with_a_hook_is_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()

    model, images = build(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model.register_forward_hook(lambda *_: None)
    layers = dict.fromkeys("02", LayerPolicy(weight_bits=8, act_bits=8))
    quantized = quantize_layers(model, layers, [images])

    save_compressed(
        quantized, CompressionPolicy(layers=layers), tmp_path, constructor="build", example_inputs=images[:2]
    )

    assert torch.equal(load_compressed(tmp_path, build)(images), quantized(images))
