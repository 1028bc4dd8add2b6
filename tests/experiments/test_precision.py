"""Where bits are decided or trained, or bfloat16 is slow or not there, autocast is left out, and said to be."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from envs.journal import Journal
from experiments import standalone_training, training
from experiments.config import ConfigError, RunConfig
from experiments.data import ImageData, TrainBatches, make_judge, normalise
from experiments.interrupt import Interrupted, StopFlag
from experiments.progress import RunDisplay
from experiments.run import RunFolder
from experiments.search import build_problem, create_run, importance_of, tell_precision
from experiments.subject import Subject
from experiments.training import tune
from graph_encoder import modes
from graph_encoder.capture import capture
from graph_encoder.modes import bfloat16_pays, has_bfloat16
from pruning.batch_norm import reestimate_batch_norm
from pruning.files import CheckpointError
from pruning.finetune import FinetuneReport, finetune
from pruning.layer_policy import LayerPolicy
from pruning.quantize import calibrate, quantize_layers, quantized_layers
from pruning.sparsity import apply_masks, layer_masks

from .stopping import StopAfter
from .tiny import network

NOT_FOR_SCORES = (
    "search.autocast: statistics are re-estimated in bfloat16, and candidates are not scored in it, as bits "
    "are decided, and bfloat16 rounds about as much as 8 bits do"
)

NO_KERNELS = "as PyTorch has no kernels in bfloat16 for this processor, and would take many times as long"
NOT_FASTER = "as convolutions in bfloat16 are not faster on this processor"


class Recorder(nn.Module):
    """A network that notes whether autocast is on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.is_autocast_enabled("cpu"))
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.usefixtures("with_bfloat16")
@pytest.mark.parametrize(
    ("decide", "is_on"),
    [(["channels"], True), (["channels", "density"], True), (["channels", "bits"], False), (["act_bits"], False)],
)
def test_candidates_are_scored_in_bfloat16_only_where_no_bits_are_decided(
    tiny_config: Callable[..., RunConfig], decide: list[str], is_on: bool
) -> None:
    config = tiny_config(search__decide=decide, search__autocast=True, budget="50% bops")
    model, said = network(3, 1).eval(), []
    graph = capture(model, torch.zeros(2, 1, 8, 8))
    subject = Subject(config, ImageData(config.data), model, graph, torch.device("cpu"))
    recorder = Recorder(model)

    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        tell_precision(config.search, torch.device("cpu"), display)
    subject.evaluate_on_search_images()(recorder)

    assert recorder.seen == {is_on}
    assert build_problem(subject, importance_of(subject), Journal()).scoring.autocast
    assert said == ([] if is_on else [NOT_FOR_SCORES])


@pytest.mark.usefixtures("settled", "with_bfloat16")
@pytest.mark.parametrize("bits", [8, 32])
def test_networks_with_bits_are_finetuned_in_single_precision(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, bits: int
) -> None:
    config = tiny_config(finetune__epochs=1, finetune__autocast=True)
    data, layers = ImageData(config.data), {"3": LayerPolicy(weight_bits=bits, act_bits=bits)}
    recorder = Recorder(quantize_layers(network(3, 1), layers, [torch.rand(8, 1, 8, 8)]))
    batches, said = TrainBatches(data.train, config.data, batch_size=120), []

    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        recipe = config.finetune
        tune(recorder, batches, recipe, 0, "fine-tuning it", display, StopFlag(), scratch=tmp_path / "training")

    assert recorder.seen == {bits == 32}
    words = "fine-tuning it: in single precision, as bfloat16 would round about as much as the network's bits do"
    assert said[:-1] == ([] if bits == 32 else [words])  # the last line tells what the training came to


def test_a_processor_without_bfloat16_computes_in_single_precision(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, without_bfloat16: None
) -> None:
    config = tiny_config(search__autocast=True, finetune__epochs=1, finetune__autocast=True)
    model, said = Recorder(network(3, 1)), []
    data = ImageData(config.data)
    graph = capture(model.eval(), torch.zeros(2, 1, 8, 8))
    subject = Subject(config, data, model, graph, torch.device("cpu"))

    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        tell_precision(config.search, subject.device, display)
        subject.evaluate_on_search_images()(model)
        reestimate_batch_norm(model, subject.calibration(), autocast=True)
        batches, scratch = TrainBatches(data.train, config.data, batch_size=120), tmp_path / "training"
        tune(model, batches, config.finetune, 0, "fine-tuning it", display, StopFlag(), scratch=scratch)

    assert model.seen == {False}
    assert said[:2] == [
        f"search.autocast: candidates are scored in single precision, {NO_KERNELS}",
        f"fine-tuning it: in single precision, {NO_KERNELS}",
    ]


ASKED = {"search__autocast": True, "train__autocast": True, "finetune__autocast": True}


def settled_configuration(config: RunConfig, root: Path) -> tuple[RunConfig, list[str]]:
    """What a new run writes down, and what it says of it."""
    said: list[str] = []
    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        run = create_run(config, root, ["secateur"], display)
    return RunFolder.open(run.root).config, said


@pytest.mark.parametrize(
    ("processor", "reason"), [("with_slow_bfloat16", NOT_FASTER), ("without_bfloat16", NO_KERNELS)]
)
def test_a_new_run_leaves_bfloat16_out_for_good_where_it_is_not_faster(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, request: pytest.FixtureRequest, processor: str, reason: str
) -> None:
    request.getfixturevalue(processor)

    config, said = settled_configuration(tiny_config(**ASKED), tmp_path / "run")

    assert not any((config.search.autocast, config.train.autocast, config.finetune.autocast))
    assert said == [f"search.autocast, train.autocast, finetune.autocast: left out, {reason}"]


@pytest.mark.parametrize(("processor", "asked"), [("with_bfloat16", ASKED), ("with_slow_bfloat16", {})])
def test_a_new_run_takes_the_precision_that_it_was_asked_for_otherwise(
    tiny_config: Callable[..., RunConfig],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    processor: str,
    asked: dict[str, bool],
) -> None:
    request.getfixturevalue(processor)
    before = tiny_config(**asked)

    assert settled_configuration(before, tmp_path / "run") == (before, [])


@pytest.mark.usefixtures("with_slow_bfloat16")
def test_a_training_outside_a_run_leaves_bfloat16_out_too(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, in_use = tiny_config(train__autocast=True, train__epochs=1), []
    train = standalone_training.train_from_scratch
    monkeypatch.setattr(
        standalone_training,
        "train_from_scratch",
        lambda config, *others: in_use.append(config) or train(config, *others),
    )
    with RunDisplay(quiet=True) as display:
        standalone_training.train_named(config, tmp_path / "weights.safetensors", display, StopFlag())

    assert [config.train.autocast for config in in_use] == [False]


@pytest.mark.parametrize(
    ("seconds", "pays"),
    [
        ({"bfloat16": 1.0, "float32": 2.0}, True),
        ({"bfloat16": 2.0, "float32": 1.2}, False),
        ({"bfloat16": 1.0, "float32": 1.05}, False),  # nor where another moment might say otherwise
    ],
)
def test_bfloat16_pays_where_the_best_of_its_times_is_shorter(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], pays: bool
) -> None:
    tried: list[str] = []

    def timed(dtype: torch.dtype) -> float:
        tried.append(str(dtype).removeprefix("torch."))
        # The first of each waits for the other's memory, as a clock sees it.
        return 5.0 if len(tried) < 3 else seconds[tried[-1]]

    monkeypatch.setattr(modes, "has_bfloat16", lambda _: True)
    monkeypatch.setattr(modes, "_seconds_to_convolve", timed)

    assert bfloat16_pays.__wrapped__("cpu") is pays
    assert tried[:4] == ["bfloat16", "float32"] * 2


def test_what_has_no_kernels_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(modes, "_seconds_to_convolve", lambda _: pytest.fail("it would take very long"))

    assert not bfloat16_pays.__wrapped__("cpu")


def test_bfloat16_is_there_where_convolutions_have_a_kernel_for_it() -> None:
    images, weight = torch.ones(1, 8, 6, 6, dtype=torch.bfloat16), torch.ones(8, 8, 3, 3, dtype=torch.bfloat16)
    with torch.profiler.profile() as profile:
        torch.conv2d(images, weight)

    ran = {event.name for event in profile.events()}
    assert has_bfloat16("cpu") == ("aten::mkldnn_convolution" in ran), ran


PER_EPOCH = 2
FOUR = LayerPolicy(weight_bits=4, act_bits=4)
HALF_OF_THEM = LayerPolicy("unstructured", 0.5, weight_bits=8, act_bits=8)


class Tuning:
    """Fine-tuning of the tiny network, with notes of what was asked for."""

    def __init__(self, config: RunConfig, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.scratch, self.data = config, scratch, ImageData(config.data)
        self.in_use = [normalise(self.data.train.images, config.data)]
        self.batches = TrainBatches(self.data.train, config.data, batch_size=240 // PER_EPOCH)
        self.in_bfloat16: list[bool] = []
        self.epochs: list[int] = []
        self.rates: list[float] = []
        draw = self.batches.__call__
        monkeypatch.setattr(TrainBatches, "__call__", lambda _, epoch: self.epochs.append(epoch) or draw(epoch))

        def finetuned(*arguments: Any, **options: Any) -> FinetuneReport:
            self.rates.append(options["learning_rate"])
            return finetune(*arguments, **options)

        monkeypatch.setattr("experiments.training.finetune", finetuned)

    def __call__(self, layers: Mapping[str, LayerPolicy], stop: StopFlag | None = None) -> nn.Module:
        torch.manual_seed(0)
        self.in_bfloat16, self.epochs, self.rates = [], [], []
        sparse = {name: layer for name, layer in layers.items() if layer.is_sparse}
        dense = network(3, 1)
        apply_masks(dense, layer_masks(dense, sparse))
        model = quantize_layers(dense, layers, self.in_use)
        model.get_submodule("0").register_forward_pre_hook(lambda *_: self._note())  # copies keep it
        with RunDisplay(quiet=True) as display:
            tune(
                model,
                self.batches,
                self.config.finetune,
                0,
                "it",
                display,
                stop or StopFlag(),
                scratch=self.scratch,
                sparse_layers=tuple(sparse),
                calibrate_ranges=partial(calibrate, batches=self.in_use),
            )
        shutil.rmtree(self.scratch)
        return model

    def _note(self) -> None:
        if torch.is_grad_enabled():
            self.in_bfloat16.append(torch.is_autocast_enabled("cpu"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps are enough for batch norms."""
    monkeypatch.setattr(training, "SETTLING_STEPS", 0)


@pytest.fixture
def tuning(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int | None], Tuning]:
    def of_recipe(with_bits: int | None) -> Tuning:
        options = {} if with_bits is None else {"finetune__quantized_epochs": with_bits}
        config = tiny_config(finetune__epochs=3, finetune__autocast=True, **options)
        return Tuning(config, tmp_path / "training", monkeypatch)

    return of_recipe


@pytest.mark.usefixtures("settled", "with_bfloat16")
@pytest.mark.parametrize(("with_bits", "rates"), [(0, [0.02]), (1, [0.02, 0.002]), (3, [0.02]), (None, [0.02])])
@pytest.mark.parametrize("layer", [FOUR, HALF_OF_THEM, replace(FOUR, quantizer="kmeans")])
def test_the_last_epochs_alone_can_be_trained_with_bits(
    tuning: Callable[[int | None], Tuning], layer: LayerPolicy, with_bits: int | None, rates: list[float]
) -> None:
    tuned, layers = tuning(with_bits), dict.fromkeys(("3", "6"), layer)
    without = 3 - (3 if with_bits is None else with_bits)

    whole = tuned(layers)

    assert tuned.in_bfloat16 == [epoch < without for epoch in range(3) for _ in range(PER_EPOCH)]
    assert tuned.epochs == [0, 1, 2]
    assert tuned.rates == pytest.approx(rates)
    for place in quantized_layers(whole).values():
        assert float((place.weight == 0).float().mean()) == pytest.approx(1 - layer.density, abs=0.01)
    if with_bits == 0:
        # Weights and statistics of a network without bits (shared values start from clusters), and ranges of those.
        plain = tuned({name: replace(layer, weight_bits=32, act_bits=32, quantizer="linear") for name in layers})
        state = whole.state_dict()
        assert layer.quantizer == "kmeans" or all(
            torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items()
        )
        ranges = {name: tensor for name, tensor in state.items() if name not in plain.state_dict()}
        calibrate(whole, tuned.in_use)
        assert ranges
        assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in ranges.items())


@pytest.mark.usefixtures("settled", "with_bfloat16")
@pytest.mark.parametrize("with_bits", [0, 1, 3])
def test_fine_tuning_that_was_stopped_ends_as_if_it_was_not(
    tuning: Callable[[int | None], Tuning], with_bits: int
) -> None:
    tuned, layers = tuning(with_bits), dict.fromkeys(("3", "6"), FOUR)
    whole = tuned(layers).state_dict()

    for epochs in range(3):
        with pytest.raises(Interrupted):
            tuned(layers, StopAfter(epochs))
        again = tuned(layers).state_dict()
        assert len(tuned.epochs) == 2 - epochs
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("before", "after"), [(None, 1), (1, None)])
def test_fine_tuning_is_not_continued_with_other_quantized_epochs(
    tuning: Callable[[int | None], Tuning], before: int | None, after: int | None
) -> None:
    layers = dict.fromkeys(("3", "6"), FOUR)
    with pytest.raises(Interrupted):
        tuning(before)(layers, StopAfter(1))
    again = tuning(after)

    with pytest.raises(CheckpointError) as caught:
        again(layers)

    assert str(caught.value) == (
        f"'{again.scratch}' holds a training with another finetune.quantized_epochs; use the same settings, or delete "
        "the folder to train from the start"
    )
    assert not again.epochs


def test_more_quantized_epochs_than_epochs_are_refused(tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(finetune__epochs=2, finetune__quantized_epochs=3)

    assert str(caught.value) == (
        "the options: finetune: quantized_epochs is 3, and epochs, which they are the last of, 2; ask for at most 2 of "
        "them, or for more epochs"
    )


def test_networks_with_bits_are_judged_in_integers_and_left_as_they_were(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    data = ImageData(config.data)
    judge = make_judge(data.validation, config.data)
    model, modes = network(3, 1).train(), []

    def always_the_first(given: nn.Module) -> nn.Module:
        modes.append(given.training)
        return FirstClass()

    monkeypatch.setattr("experiments.data.in_integers", always_the_first)

    assert torch.equal(judge(model), data.validation.labels == 0)
    assert modes == [False]
    assert model.training


class FirstClass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)


def test_batch_norms_follow_the_weights_after_however_few_steps(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, said = tiny_config(finetune__epochs=1, finetune__learning_rate=0.5), []
    batches = TrainBatches(ImageData(config.data).train, config.data, batch_size=8, seed=0)
    torch.manual_seed(0)
    model = network(3, 1)

    with RunDisplay(quiet=True) as display:
        display.say = said.append  # type: ignore[method-assign]
        tune(model, batches, config.finetune, 0, "it", display, StopFlag(), scratch=tmp_path / "training")

    steps = len(batches)
    assert f"it: {steps} steps are too few for batch norms to follow the weights; re-estimated" in said
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reestimate_batch_norm(model, [images for images, _ in batches(1)][:10])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor)
