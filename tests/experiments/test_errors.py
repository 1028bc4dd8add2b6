"""What a user reads when something is wrong: whole messages."""

import errno
import inspect
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn

import secateur
from envs.evaluator import EvaluateError
from experiments.config import RunConfig
from experiments.interrupt import Interrupted
from experiments.progress import RunDisplay
from experiments.search import start_run
from secateur import TraceError

from .stopping import StopWhen
from .tiny import network

pytestmark = pytest.mark.filterwarnings("ignore:the network has batch norms and no calibration")

# ruff: noqa: E501 - a message reads better in one piece

Command = Callable[..., Any]


class Branching(nn.Module):
    """Takes another way for another image, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).mean(dim=(2, 3))
        return self.head(features) if float(features.sum()) > 0 else -self.head(features)


def branching(num_classes: int) -> nn.Module:
    return Branching()


def two_classes(in_channels: int) -> nn.Module:
    return network(2, in_channels)


def for_colour() -> nn.Module:
    return network(10, 3)


def of_width(num_classes: int, width: int) -> nn.Module:
    return network(num_classes, width)


def mistaken(num_classes: int) -> nn.Module:
    return nn.Linear(4, num_classes, width=3)  # type: ignore[call-arg]


def no_images() -> None:
    raise FileNotFoundError("no images today")  # noqa: EM101


def accuracy(_model: nn.Module) -> float:
    return 0.5


def test_impossible_budget_names_the_reachable_minimum(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    done = command("search", tiny_yaml, "--budget", "1%", "--out", tmp_path / "run")

    assert done.code == 1
    assert re.search(
        r"^error: a budget of [\d,]+ macs \(1\.0% of the dense [\d,]+ macs\) cannot be met: with every decision at its least "
        r"the network still costs [\d,]+ macs \([\d.]+%\)\. Pass at least [\d,]+ macs, or spare fewer "
        r"groups \(search\.protect_first, search\.protected\), or lower search\.min_keep_ratio or search\.rounding$",
        done.err,
        re.MULTILINE,
    )


def test_run_that_was_refused_leaves_no_folder(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    command("search", tiny_yaml, "--budget", "1%", "--out", tmp_path / "run")

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "budget=1%",
            "error: a budget of 818 macs (1.0% of the dense 81,828 macs) cannot be met: with every decision at its least",
        ),
        ("budget=9M macs", "error: the budget of 9,000,000 macs is above what the dense network costs, 81,828"),
        (
            "search={decide: [density], methods: [uniform, magnitude]}",
            "error: the method 'magnitude' ranks channels, and no channel group is decided here: let channels be "
            "decided (search.decide, search.protect_first, search.protected), or choose another method",
        ),
        ("search.protected=[stem]", "error: protected names no channel group of this network: ['stem']"),
        (
            "data.validation.folder=val",
            "error: no validation data: 'tests.experiments.tiny:images' returned no split 'val'",
        ),
        (
            "search.evaluations=6",
            "error: random is granted 6 evaluations, but the sensitivity probes take 4 and rescoring 1 finalist takes 2, which "
            "leaves less than one; grant at least 7, or lower search.probe_share, or set search.start to uniform, or raise "
            "search.search_images, so that fewer images are left for rescoring",
        ),
        (
            "data.test.folder=tset",
            "error: no test data: 'tests.experiments.tiny:images' returned no split 'tset'; it has train, validation, test",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_network_is_trained(
    command: Command, tiny_yaml: Path, tmp_path: Path, option: str, message: str
) -> None:
    untrained = ["--set", "train.epochs=7"]
    done = command("search", tiny_yaml, *untrained, "--set", option, "--out", tmp_path / "run")

    assert done.code == 1
    run_folder, error = done.err.splitlines()
    assert run_folder.startswith("run folder: ")
    assert error.startswith(message)


def test_network_with_too_few_outputs_is_told(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    model = "tests.experiments.test_errors:two_classes"
    done = command("search", tiny_yaml, "--model", model, "--out", tmp_path / "run")

    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        "error: the network returns outputs (2, 2) for 2 images, the data has 3 classes (0, 1, 2); a tensor (images, "
        "classes) is needed, so build the network for these classes, or name the data that it was trained on"
    )


class Labelled(nn.Module):
    """Gives its scores beside something else."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.network = network(num_classes, in_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(x)}


def test_network_that_returns_no_tensor_is_told_to_be_wrapped(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    model = "tests.experiments.test_errors:Labelled"
    searched = command("search", tiny_yaml, "--model", model, "--out", tmp_path / "run")
    checked = command("check", model, "--shape", "1,8,8", "--classes", "3")

    advice = "a search scores one tensor (images, classes): wrap the network in a module that returns the logits alone"
    assert (searched.code, searched.err.splitlines()[-1]) == (1, f"error: the network returns a dict; {advice}")
    assert f"outputs         a dict; {advice}" in checked.out.splitlines()


def test_images_that_nobody_chose_are_told_and_blamed(command: Command, tmp_path: Path) -> None:
    arguments = ["--model", "tests.experiments.test_errors:for_colour", "--out", tmp_path / "run"]
    done = command("search", *arguments)
    first, *_, error, note = done.err.splitlines()

    assert done.code == 1
    assert first == "no --data given: taking the bundled digits (gray, 28x28 pixels, 10 classes)"
    assert error.startswith("error: '0' cannot be captured: ")
    assert note == (
        "no --data was given, so the images were the bundled digits (gray, 28x28 pixels, 10 classes); is this a network "
        "for them?"
    )


def test_constructor_that_wants_other_arguments_is_told_what_it_gets(command: Command) -> None:
    done = command("check", "tests.experiments.test_errors:of_width", "--shape", "1,8,8", "--classes", "3")

    assert (done.code, done.err) == (
        1,
        "error: 'tests.experiments.test_errors:of_width' cannot be called: missing a required argument: 'width'. Secateur "
        "passes num_classes=3, in_channels=1 as keywords, each if there is a parameter of that name; give the others a "
        "default, or name a function that sets them\n",
    )


def test_constructor_that_fails_is_told_with_its_line(command: Command) -> None:
    done = command("check", "tests.experiments.test_errors:mistaken", "--shape", "1,8,8", "--classes", "3")
    line = inspect.getsourcelines(mistaken)[1] + 1

    assert (done.code, done.err) == (
        1,
        f"error: 'tests.experiments.test_errors:mistaken', called with num_classes=3, failed at {__file__}:{line} with "
        "TypeError: Linear.__init__() got an unexpected keyword argument 'width'\n",
    )


@pytest.mark.parametrize(
    ("data", "lack"),
    [
        ("tests.experiments.test_errors:of_width", "missing a required argument: 'num_classes'"),
        ("builtins:dict", "no signature found for builtin type <class 'dict'>"),
    ],
)
def test_data_function_that_wants_arguments_is_told_that_it_gets_none(
    command: Command, tmp_path: Path, data: str, lack: str
) -> None:
    done = command("train", "--data", data, "--out", tmp_path / "weights.safetensors")

    assert (done.code, done.err) == (
        1,
        f"error: '{data}' cannot be called: {lack}. Secateur passes no arguments; give every parameter a default, or "
        "name a function that sets them\n",
    )


def test_data_function_that_fails_is_told_with_its_line(command: Command, tmp_path: Path) -> None:
    data = "tests.experiments.test_errors:no_images"
    done = command("search", "--data", data, "--out", tmp_path / "run")
    line = inspect.getsourcelines(no_images)[1] + 1

    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        f"error: '{data}', called with no arguments, failed at {__file__}:{line} with FileNotFoundError: no images today"
    )
    assert not (tmp_path / "run").exists()


def test_training_without_validation_images_is_refused_before_it_starts(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    done = command("train", tiny_yaml, "--set", "data.validation.folder=val", "--out", tmp_path / "weights.safetensors")

    assert done.code == 1
    assert done.err.startswith("error: no validation data: ")


def test_mistyped_option_names_the_nearest(command: Command) -> None:
    done = command("search", "--evalutions", "3")

    assert done.code == 2
    assert done.err.endswith("Error: No such option: --evalutions (Possible options: --evaluations)\n")


def test_mistyped_command_names_the_nearest(command: Command) -> None:
    done = command("serch")

    assert done.code == 2
    assert done.err.endswith("Error: No such command 'serch'. Did you mean 'search'?\n")


def test_mistyped_key_names_the_nearest(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("serach:\n  seed: 1\n")

    done = command("search", path)

    assert (done.code, done.err) == (
        1,
        f"error: {path}: unknown key 'serach' in the top level; did you mean 'search'? Allowed: model, data, budget, "
        "search, train, finetune, ppo, ddpg, latency, measure, device, threads\n",
    )


@pytest.mark.parametrize(("content", "reason"), [(b"\x89PNG\xff", "it is no text"), (None, "Is a directory")])
def test_configuration_that_is_no_text_is_told(
    command: Command, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "images.zip"
    path.mkdir() if content is None else path.write_bytes(content)

    assert command("search", path).err == (
        f"error: cannot read the configuration file {path}: {reason}; data is named with --data\n"
    )


def test_run_that_was_refused_empties_a_folder_behind_a_link(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")

    done = command("search", tiny_yaml, "--budget", "1%", "--out", tmp_path / "run")

    assert "cannot be met" in done.err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_folder_that_cannot_hold_trained_weights_is_told(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))

    done = command("search", tiny_yaml, "--out", tmp_path / "run")

    assert (
        f"cannot make the folder '{tmp_path / 'file' / 'networks'}', where trained weights are kept: Not a directory; set "
        "SECATEUR_CACHE to a folder that can be written"
    ) in done.err


def test_mistyped_method_names_what_is_allowed(command: Command) -> None:
    done = command("search", "--methods", "uniform,pppo")

    assert (done.code, done.err) == (
        1,
        "error: the options: search.methods.1: 'pppo' is not allowed; did you mean 'ppo'? Allowed: uniform, magnitude, "
        "sensitivity, greedy, knapsack, random, cem, ppo, ddpg\n",
    )


def test_unknown_model_names_the_nearest(command: Command, tmp_path: Path) -> None:
    done = command("search", "--model", "resnet5", "--out", tmp_path / "run")

    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: unknown model 'resnet5'; did you mean resnet56 or ")


def test_network_that_cannot_be_captured_is_told(command: Command) -> None:
    done = command("check", "tests.experiments.test_errors:branching", "--shape", "1,8,8", "--classes", "3")

    assert done.code == 1
    assert re.fullmatch(
        r"error: 'the network itself' cannot be captured: .+\(aten\._local_scalar_dense.+ must accept inputs of the shapes "
        r"\[\(2, 1, 8, 8\)\]; move what depends on values out of the network\n",
        done.err,
    )


def test_example_input_of_the_wrong_shape_is_told() -> None:
    with pytest.raises(TraceError) as caught:
        secateur.compress(network(3, 1), torch.zeros(2, 3, 8, 8), evaluate=accuracy, budget="50%")

    assert re.fullmatch(
        r"'0' cannot be captured: .+\(aten\.conv2d\.default on shapes \[\(2, 3, 8, 8\), \(6, 1, 3, 3\)\]\)\. The forward "
        r"pass was given inputs of the shapes \[\(2, 3, 8, 8\)\]; their number and shapes must be those that it takes",
        str(caught.value),
    )


def test_weights_that_do_not_fit_are_told(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(6, 1, 3, 3), "extra": torch.zeros(1)}, path)

    done = command("search", tiny_yaml, "--weights", path, "--out", tmp_path / "run")

    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        f"error: weights '{path}' do not fit Sequential: 21 missing (1.weight, 1.bias, 1.running_mean, ...); 1 unexpected "
        "(extra); name the model that they were trained with, and the data with the same classes"
    )


def test_empty_image_folder_is_told(command: Command, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)

    done = command("search", "--data", tmp_path / "images", "--out", tmp_path / "run")

    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        f"error: no images in 'train' of '{tmp_path / 'images'}'; expected train/<class>/<image> with one of the suffixes "
        ".bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    )


def test_broken_image_is_named(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(b"no image")

    done = command("search", "--data", tmp_path / "images", "--out", tmp_path / "run")

    assert done.code == 1
    assert re.fullmatch(
        rf"error: broken image 'train/cat/1\.png' in '{tmp_path}/images' \(.+\); replace it, or leave it out with a list file",
        done.err.splitlines()[-1],
    )


def test_data_without_validation_images_say_why_they_are_needed(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    for label in ("a", "b", "c"):
        (root / "train" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), i).save(root / "train" / label / f"{i}.png")

    done = command("search", tiny_yaml, "--data", root, "--set", "data.grayscale=true", "--out", tmp_path / "run")

    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        f"error: no validation data: no folder 'validation' in '{root}'; it has train. The search must score plans on "
        "images that the network was not trained on: on its training images the best of many plans is mostly the one that "
        "remembers them best. Name a folder of unseen images with data.validation.folder, or hold some out with lists of files "
        "(`secateur split` writes the even and the odd files of a folder)"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            math.nan,
            "evaluate returned nan, but an accuracy lies in [0, 1]; were there any images, and are the network's outputs "
            "finite?",
        ),
        (81.5, "evaluate returned 81.5, but an accuracy lies in [0, 1]; is it a percentage? divide by 100"),
    ],
)
def test_accuracy_that_is_none_is_refused(value: float, message: str) -> None:
    with pytest.raises(EvaluateError) as caught:
        secateur.compress(
            network(3, 1), torch.zeros(2, 1, 8, 8), evaluate=lambda _: value, budget="50%", method="uniform"
        )

    assert str(caught.value) == message


def test_network_that_guesses_is_not_searched(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    path = tmp_path / "random.safetensors"
    torch.manual_seed(0)
    save_file(network(3, 1).state_dict(), path)

    done = command("search", tiny_yaml, "--weights", path, "--out", tmp_path / "run")

    assert done.code == 1
    assert re.fullmatch(
        r"error: the dense network scores [\d.]+ % on the validation images, where guessing scores 33\.33 %; below 50\.00 % "
        r"there is nothing to compress\. Check the weights, the normalisation \(data\.mean, data\.std\), and that the class "
        r"folders sort into the order that the network was trained with",
        done.err.splitlines()[-1],
    )


def test_network_that_was_trained_and_guesses_tells_where_its_weights_are_kept(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    options = ["--set", "train.epochs=1", "--set", "train.learning_rate=1e-6"]

    first, again = (command("search", tiny_yaml, *options, "--out", tmp_path / "run") for _ in range(2))

    (kept,) = (tmp_path / "cache" / "networks").glob("*.safetensors")
    assert first.err.splitlines()[-1] == again.err.splitlines()[-1]
    assert again.err.splitlines()[-1].endswith(
        "below 50.00 % there is nothing to compress. It was trained here, for 1 epochs, and whoever asks for the same "
        f"training gets the weights kept in '{kept}': train it longer or otherwise (train.epochs, train.learning_rate, "
        "train.batch_size), or pass --weights"
    )


def test_existing_run_is_refused(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()

    done = command("search", tiny_yaml, "--out", tmp_path / "run")

    assert (done.code, done.err) == (
        1,
        f"error: {tmp_path / 'run'} exists already; continue it with 'secateur resume {tmp_path / 'run'}', or choose "
        "another name with --out\n",
    )


def test_device_that_is_not_there_is_told(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    done = command("search", tiny_yaml, "--device", "gpu0", "--out", tmp_path / "run")

    assert done.code == 1
    assert re.fullmatch(r"error: device 'gpu0' cannot be used here \(.+\); available: cpu.*\n", done.err)


def test_full_disk_ends_a_run_that_can_be_continued(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    really = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "journal.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        done = command("search", tiny_yaml, "--out", run)
    continued = command("resume", run)

    assert done.code == 1
    assert done.err.splitlines()[-2:] == [
        f"error: evaluation 0 could not be written to '{run / 'journal.jsonl'}': No space left on device. Everything before "
        "it is safe: make room and resume the run",
        f"everything before is saved: continue with 'secateur resume {run}'",
    ]
    assert continued.code == 0
    assert (run / "report.html").exists()


@pytest.mark.parametrize("writer", ["tensorboard/random", "tensorboard/ppo/agent"])
def test_full_disk_met_by_tensorboard_ends_a_run_that_can_be_continued(
    command: Command, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    run = tmp_path / "run"
    options = ("--set", f"search.methods=[{writer.split('/')[1]}]", "--evaluations", 8)
    really = RecordWriter.write

    def full(self: RecordWriter, event: bytes) -> None:
        if Path(os.fsdecode(self._writer.filename)).parent == run / writer:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(self, event)

    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "write", full)
        done = command("search", tiny_yaml, *options, "--out", run)
    continued = command("resume", run)

    assert done.code == 1
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-2:] == [
        f"error: cannot write '{run}': no space left on the disk; free some",
        f"everything before is saved: continue with 'secateur resume {run}'",
    ]
    assert continued.code == 0
    assert (run / "report.html").exists()


@pytest.mark.parametrize("damage", ["truncated", "corrupted"])
def test_damaged_checkpoint_is_told_and_the_one_before_is_used(
    command: Command, tiny_config: Callable[..., RunConfig], tmp_path: Path, damage: str
) -> None:
    options = {"search__methods": ["ppo"], "search__evaluations": 40, "ppo__rollout": 4, "ppo__checkpoint_every": 4}
    checkpoints = tmp_path / "run" / "methods" / "ppo" / "checkpoints"
    stop = StopWhen(lambda: len(list(checkpoints.glob("*.pt"))) == 2)
    with pytest.raises(Interrupted), RunDisplay(quiet=True) as display:
        start_run(tiny_config(**options), tmp_path / "run", ["secateur"], display, stop)
    _, newest = sorted(checkpoints.glob("*.pt"))
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"x" * len(content))

    done = command("resume", tmp_path / "run")

    assert done.code == 0
    assert re.search(
        rf"^warning: '{newest}' cannot be read as an agent's state: .+; the checkpoint before it is used instead$",
        done.err,
        re.MULTILINE,
    )


def test_policy_that_does_not_fit_is_named_and_nothing_is_written(
    command: Command, tiny_yaml: Path, tmp_path: Path
) -> None:
    secateur.CompressionPolicy({"3": (0, 1), "99": (0,)}, {"3": 12, "99": 4}).save(tmp_path / "policy.json")

    untrained = ["--set", "train.epochs=7"]
    done = command("apply", tmp_path / "policy.json", tiny_yaml, *untrained, "--out", tmp_path / "out")

    # Nothing else: the network was not trained for a policy that does not fit.
    assert (done.code, done.err) == (
        1,
        "error: the policy does not fit the network: group '3' has 16 units, the policy was made for 12; the network has "
        "no channel group '99'\n",
    )
    assert not (tmp_path / "out").exists()
