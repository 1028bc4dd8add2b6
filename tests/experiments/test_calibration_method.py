"""How and on what ranges of activations are chosen, from the configuration to the saved network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from envs.journal import Journal
from experiments.apply import apply_saved
from experiments.config import ConfigError, RunConfig, load_config
from experiments.data import ImageData, normalise
from experiments.interrupt import StopFlag
from experiments.progress import RunDisplay
from experiments.search import build_problem, importance_of
from experiments.subject import Subject
from graph_encoder.capture import capture
from pruning.export import load_compressed
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy

from .tiny import network

FOUR = LayerPolicy(weight_bits=4, act_bits=4)


def subject_of(config: RunConfig) -> Subject:
    model = network(3, 1).eval()
    graph = capture(model, torch.zeros(2, 1, 8, 8))
    return Subject(config, ImageData(config.data), model, graph, torch.device("cpu"))


def test_candidates_are_calibrated_by_the_method_on_images_without_augmentation(
    tiny_config: Callable[..., RunConfig],
) -> None:
    config = tiny_config(search__calibration_method="entropy", search__calibration_images=50)
    augmenting = config.model_copy(update={"data": config.data.model_copy(update={"crop_padding": 2, "flip": True})})
    subject = subject_of(augmenting)
    scoring = build_problem(subject, importance_of(subject), Journal()).scoring

    assert scoring.calibration_method == "entropy"
    assert scoring.range_images is not None
    ranges = torch.cat(list(scoring.range_images))
    there = {tuple(image.flatten().tolist()) for image in normalise(subject.data.train.images, config.data)}
    assert len(ranges) == 50
    assert all(tuple(image.flatten().tolist()) in there for image in ranges)
    # What batch norms see is augmented as before.
    assert not all(tuple(image.flatten().tolist()) in there for image in torch.cat(list(scoring.calibration)))


def test_saved_network_has_the_ranges_of_the_method(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    policy = CompressionPolicy({}, {}, {"0": FOUR})
    policy.save(tmp_path / "policy.json")
    steps = {}
    for method in ("minmax", "mse"):
        config, out = tiny_config(search__calibration_method=method), tmp_path / method
        with RunDisplay(quiet=True) as display:
            apply_saved(tmp_path / "policy.json", config, out, 0, display, StopFlag())
        model = load_compressed(out, lambda: network(num_classes=3, in_channels=1))
        steps[method] = model.get_parameter("0.act_quantizer.step").item()

    x = torch.cat(subject_of(tiny_config()).range_images())
    assert steps["minmax"] == pytest.approx(float(x.max() - x.min()) / 15)
    assert steps["mse"] < steps["minmax"]


def test_unknown_method_is_refused_with_those_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"search.calibration_method": "median"})

    assert str(caught.value) == (
        "the options: search.calibration_method: 'median' is not allowed; did you mean 'minmax'? Allowed: minmax, "
        "percentile, entropy, mse, lsq"
    )
