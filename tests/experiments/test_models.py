import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import agent
from experiments.data import DataRecipe, ImageData, SplitRecipe, make_evaluate
from experiments.image_folder import write_split_lists
from experiments.models import ModelError, build_model, check_outputs, check_trains, input_sizes, load_weights
from experiments.user_function import UserFunctionError
from pruning.export import unique_tensors

SHARED = Path(__file__).parents[2].parent / "shared"


def n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "n_million"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_cifar_networks_have_the_parameters_of_he_et_al_table_6(name: str, n_million: float) -> None:
    assert n_parameters(build_model(name, 10)) / 1e6 == pytest.approx(n_million, rel=0.02)


def test_resnet56_does_the_published_125_million_multiply_adds() -> None:
    model = build_model("resnet56", 10).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() / 2 == pytest.approx(125.5e6, rel=0.005)


def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    block = build_model("resnet20", 10).eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    out = block(x)

    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_small_resnet_reads_digits() -> None:
    model = build_model("small_resnet", 10, in_channels=1).eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_torchvision_names_are_built_with_the_asked_classes() -> None:
    assert build_model("squeezenet1_1", 7).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def failure(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    return str(caught.value)


def test_unknown_name_gets_the_nearest_ones() -> None:
    assert failure(lambda: build_model("resnet65", 10)) == (
        "unknown model 'resnet65'; did you mean resnet56 or resnet50 or resnet152? Allowed: small_resnet, resnet20, "
        "resnet32, resnet44, resnet56, resnet110, resnet18_cifar, mobilenet_v2_cifar, a classification model of "
        "torchvision, or package.module:function"
    )


def test_torchvision_network_does_not_read_gray_images() -> None:
    assert failure(lambda: build_model("resnet50", 10, in_channels=1)) == (
        "torchvision's 'resnet50' reads images of 3 channels, the data has 1; use one of small_resnet, resnet20, "
        "resnet32, resnet44, resnet56, resnet110, resnet18_cifar, mobilenet_v2_cifar, or package.module:function"
    )


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "def head(num_classes):\n"
        "    return torch.nn.Linear(5, num_classes)\n"
        "def fixed():\n"
        "    return torch.nn.Linear(5, 3)\n"
        "def passed_on(pretrained=False, **options):\n"
        "    return torch.nn.Linear(options.pop('in_channels', 5), options.pop('num_classes'), **options)\n"
        "def number():\n"
        "    return 3\n"
    )
    # A module of the standard library's name in the working directory must not shadow it.
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return "my_networks"


def test_function_of_the_user_gets_what_it_asks_for(user_module: str) -> None:
    head, fixed = (build_model(f"{user_module}:{name}", 7) for name in ("head", "fixed"))
    assert isinstance(head, nn.Linear)
    assert isinstance(fixed, nn.Linear)
    assert (head.out_features, fixed.out_features) == (7, 3)
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)


def test_function_of_the_user_that_takes_any_keywords_is_told_of_channels_where_they_are_not_3(
    user_module: str,
) -> None:
    usual, grey = (build_model(f"{user_module}:passed_on", 7, in_channels) for in_channels in (3, 1))
    assert isinstance(usual, nn.Linear)
    assert isinstance(grey, nn.Linear)
    assert ((usual.in_features, usual.out_features), grey.in_features) == ((5, 7), 1)


def test_function_that_returns_no_network(user_module: str) -> None:
    assert failure(lambda: build_model(f"{user_module}:number", 7)) == (
        "'my_networks:number' returned int; it must return a torch.nn.Module"
    )


def test_missing_function_and_module_are_named(user_module: str, tmp_path: Path) -> None:
    with pytest.raises(UserFunctionError) as caught:
        build_model(f"{user_module}:haed", 7)
    assert str(caught.value) == (
        f"module 'my_networks' ({tmp_path / 'my_networks.py'}) has no function 'haed'; did you mean head?"
    )
    with pytest.raises(UserFunctionError) as caught:
        build_model("my_netwroks:head", 7)
    assert str(caught.value) == (
        f"no module 'my_netwroks' for 'my_netwroks:head': it must be installed or lie in the working directory "
        f"'{tmp_path}'"
    )


def test_module_that_hides_behind_a_package_of_this_project_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "mine.py").write_text("def network():\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(UserFunctionError) as caught:
        build_model("agent.mine:network", 7)
    own = Path(agent.__file__).parent
    assert str(caught.value) == (
        "no module 'agent.mine' for 'agent.mine:network': it must be installed or lie in the working directory "
        f"'{tmp_path}'; 'agent' is Secateur's own package '{own}': give yours in the working directory another name"
    )


class Aliased(nn.Module):
    """A layer of two names, and a weight of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.features = nn.Sequential(self.first)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_a_network_with_shared_layers_are_saved_and_loaded(tmp_path: Path, suffix: str) -> None:
    trained, fresh, path = Aliased(), Aliased(), tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(trained.state_dict(), path)
    else:
        save_file(unique_tensors(trained), path)

    load_weights(fresh, path)

    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in trained.state_dict().items())
    if suffix != ".pt":
        assert sorted(load_file(path)) == ["first.bias", "first.weight", "second.bias"]


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", 10).eval()


def loads_into_a_new_network(trained: nn.Module, path: Path) -> bool:
    model = build_model("resnet20", 10).eval()
    load_weights(model, path)
    pairs = zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_pt_weights_are_found_alone_or_wrapped(trained: nn.Module, tmp_path: Path, wrapper: str | None) -> None:
    state = trained.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pt")
    assert loads_into_a_new_network(trained, tmp_path / "weights.pt")


def test_module_prefix_is_stripped_with_a_notice(
    trained: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({f"module.{name}": tensor for name, tensor in trained.state_dict().items()}, path)

    with caplog.at_level(logging.WARNING):
        assert loads_into_a_new_network(trained, path)

    assert caplog.messages == [f"weights '{path}': the prefix 'module.' of every name was stripped"]


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = OrderedDict(trained.state_dict())
    state["linear.weight"] = torch.zeros(100, 64)
    state["fc.bias"] = state.pop("linear.bias")
    safetensors.torch.save_file(state, path)
    model = build_model("resnet20", 10)
    before = model.conv1.weight.detach().clone()

    assert failure(lambda: load_weights(model, path)) == (
        f"weights '{path}' do not fit CifarResNet: 1 missing (linear.bias); 1 unexpected (fc.bias); 1 of another shape "
        "(linear.weight (100, 64), not (10, 64)); name the model that they were trained with, and the data with the "
        "same classes"
    )
    assert torch.equal(model.conv1.weight, before)


def test_poisoned_weights_are_refused_and_their_payload_not_run(trained: nn.Module, tmp_path: Path) -> None:
    path, touched = tmp_path / "weights.pt", tmp_path / "touched"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (touched,)

    torch.save({"state_dict": trained.state_dict(), "epoch": Payload()}, path)

    assert failure(lambda: load_weights(trained, path)) == (
        f"weights '{path}' are refused: they hold Python objects, and loading those may run any code; save the tensors "
        "alone, torch.save(model.state_dict(), ...), or as safetensors"
    )
    path.rename(tmp_path / "weights.safetensors")
    assert "cannot read the weights" in failure(lambda: load_weights(trained, tmp_path / "weights.safetensors"))
    assert not touched.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "begins with b'version https://git-'"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE html>'"),
        (b"", "is empty"),
    ],
    ids=["a pointer of Git LFS", "a web page", "nothing"],
)
def test_weights_that_are_no_file_of_pytorch_are_named(
    trained: nn.Module, tmp_path: Path, content: bytes, found: str
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)

    assert failure(lambda: load_weights(trained, path)) == (
        f"cannot read the weights '{path}': the file {found}, so it was not written by torch.save; is it a web page or "
        "a pointer in place of the weights?"
    )


class WithAnotherHead(nn.Module):
    """Returns the scores of an auxiliary head too while it is trained, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.other = nn.BatchNorm2d(3), nn.Linear(3, 10), nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> object:
        x = self.norm(x).mean((2, 3))
        return (self.head(x), self.other(x)) if self.training else self.head(x)


def test_network_that_returns_more_while_it_is_trained_is_refused() -> None:
    model, images = WithAnotherHead().eval(), torch.randn(2, 3, 8, 8)

    check_outputs(model, images, [str(i) for i in range(10)])
    assert failure(lambda: check_trains(model, images)) == (
        "in training mode the network returns a tuple; wrap it in a module that returns the logits alone, or pass its "
        "weights and do not fine-tune it (finetune.epochs 0)"
    )
    assert not model.training
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_weights_are_named(trained: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(trained.state_dict(), path)
    else:
        safetensors.torch.save_file(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])

    assert re.fullmatch(
        rf"cannot read the weights '{path}': [\s\S]+; the file (was not written by torch.save|is not safetensors), or "
        r"was cut short",
        failure(lambda: load_weights(trained, path)),
    )


def test_other_suffixes_and_missing_files_are_named(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.h5"
    assert failure(lambda: load_weights(trained, path)) == f"no weights file '{path}'"
    path.touch()
    assert failure(lambda: load_weights(trained, path)) == (
        f"weights '{path}' have the suffix '.h5'; expected .safetensors, .pt or .pth"
    )


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the networks and images in ../shared")
def test_shared_resnet20_reaches_its_documented_accuracy_on_the_even_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    archive = SHARED / "data" / "cifar10-jpeg.tar.gz"
    even, odd = write_split_lists(archive, "test", tmp_path)
    recipe = DataRecipe(
        source=str(archive),
        validation=SplitRecipe(folder="test", list_file=even),
        test=SplitRecipe(folder="test", list_file=odd),
    )
    model = build_model("resnet20", 10)
    load_weights(model, SHARED / "models" / "resnet20-cifar10.safetensors")

    assert make_evaluate(ImageData(recipe).validation, recipe)(model) == pytest.approx(0.888, abs=1e-3)


def test_mobilenet_for_small_images_ends_at_an_eighth_of_their_size() -> None:
    model = build_model("mobilenet_v2_cifar", 10, in_channels=1).eval()
    assert isinstance(model.features, nn.Sequential)
    with torch.inference_mode():
        assert model.features(torch.zeros(1, 1, 32, 32)).shape == (1, 1280, 4, 4)
        assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("resnet20", None, (3, 32, 32)),
        ("resnet18", None, (3, 224, 224)),
        ("resnet20", "1,28,20", (1, 28, 20)),
        ("resnet18", "3x64x64", (3, 64, 64)),
        ("own:audio", "2,16000", (2, 16000)),
        ("own:mlp", "784", (784,)),
        ("own:video", "3,8,32,32", (3, 8, 32, 32)),
    ],
)
def test_input_sizes_are_the_text_or_those_of_the_network(name: str, shape: str | None, sizes: tuple[int, ...]) -> None:
    assert input_sizes(name, shape) == sizes


@pytest.mark.parametrize("shape", ["3,32,-1", "3,0,32", "a,b,c", "", "3,", "1,2,3,4,5"])
def test_a_shape_that_is_not_numbers_is_refused(shape: str) -> None:
    msg = (
        f"shape '{shape}' is not understood; give channels, height and width, for example 3,224,224 (of a signal "
        "channels and length)"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(msg)}$"):
        input_sizes("resnet20", shape)
