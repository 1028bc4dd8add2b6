"""Where bits are decided or trained, autocast is left out of scores and of training, and said to be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from envs.journal import Journal
from experiments.config import RunConfig
from experiments.data import ImageData, TrainBatches, make_judge
from experiments.interrupt import StopFlag
from experiments.progress import RunDisplay
from experiments.search import build_problem, importance_of, tell_precision
from experiments.subject import Subject
from experiments.training import tune
from graph_encoder.capture import capture
from pruning.layer_policy import LayerPolicy
from pruning.quantize import quantize_layers

from .tiny import network

NOT_FOR_SCORES = (
    "search.autocast: statistics are re-estimated in bfloat16, and candidates are not scored in it, as bits "
    "are decided, and bfloat16 rounds about as much as 8 bits do"
)


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
        tell_precision(config.search, display)
    subject.evaluate_on_search_images()(recorder)

    assert recorder.seen == {is_on}
    assert build_problem(subject, importance_of(subject), Journal()).scoring.autocast
    assert said == ([] if is_on else [NOT_FOR_SCORES])


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
