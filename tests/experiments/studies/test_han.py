import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn

from experiments.config import ConfigError, config_file, load_as
from experiments.data import ImageData
from experiments.images import DataError
from experiments.interrupt import Interrupted, StopFlag
from experiments.lenet import lenet_5, lenet_300_100
from experiments.mnist import splits
from experiments.studies.han import BUNDLED, main
from experiments.studies.han_config import HanConfig
from experiments.studies.han_page import interval_over_images
from experiments.studies.han_study import DENSITIES, Images, Outcome, Trial, common_factor, crossing, relative_quality
from pruning.sparsity import sparse_weight, zero_weights


def test_networks_have_the_papers_numbers_of_weights() -> None:
    def sizes(model: nn.Module) -> list[int]:
        return [weight.numel() for name, weight in model.named_parameters() if name.endswith("weight")]

    assert sizes(lenet_300_100()) == [235_200, 30_000, 1_000]
    assert sizes(lenet_5()) == [500, 25_000, 400_000, 5_000]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_configurations_are_read_and_differ_from_the_paper_in_nothing_that_they_can_keep(name: str) -> None:
    config = load_as(HanConfig, config_file(name, "han"))
    assert config.prune.density == 1 / 12
    assert (config.data.crop_padding, config.data.flip) == (0, False)
    assert list(config.trials) == [0, 1, 2]


def test_a_mistyped_key_is_answered_with_the_nearest_one() -> None:
    message = "unknown key 'round' in 'prune'; did you mean 'rounds'? Allowed: density, rounds, tolerance, layers"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_as(HanConfig, config_file("lenet5", "han"), {"prune.round": 3})


def test_a_curve_crosses_the_line_between_two_densities() -> None:
    curve = [0.9] * 5 + [0.8] * (len(DENSITIES) - 5)
    # Densities 0.4 and 0.3 come fifth and sixth; three quarters of the way down is three quarters of the way there.
    assert crossing(curve, 0.825) == pytest.approx(0.4 - 0.75 * 0.1)
    assert crossing(curve, 0.95) == 1.0
    assert crossing(curve, 0.5) == DENSITIES[-1]


def two_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 20), nn.Linear(20, 10))
    with torch.no_grad():
        for layer, scale in ((model[0], 1.0), (model[1], 5.0)):
            layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3)))
    return model


def test_a_sensitive_layer_gets_the_smaller_quality_parameter() -> None:
    robust = [0.9] * len(DENSITIES)
    sensitive = [0.9] * 3 + [0.5] * (len(DENSITIES) - 3)
    quality = relative_quality(two_layers(), {"0": robust, "1": sensitive}, 0.88)
    # Of a Gaussian, one weight in a hundred lies beyond 2.576 deviations, whatever its scale; 60 % beyond 0.524.
    assert quality["0"] == pytest.approx(2.576, rel=0.1)
    assert quality["1"] == pytest.approx(0.524, rel=0.25)


def test_common_factor_leaves_the_wanted_share_by_the_threshold_rule() -> None:
    model = two_layers()
    factor, layers = common_factor(model, {"0": 1.0, "1": 0.5}, 0.25)
    weights = [sparse_weight(model, name)[0].detach().clone() for name in ("0", "1")]
    expected = [w.abs() >= factor * q * float(w.std(correction=0)) for w, q in zip(weights, (1.0, 0.5), strict=True)]

    zero_weights(model, layers)

    for name, mask in zip(("0", "1"), expected, strict=True):
        assert torch.equal(sparse_weight(model, name)[0] != 0, mask)
    assert sum(int(mask.sum()) for mask in expected) == 250


def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A few of the bundled digits, as a function source gives them."""
    data = ImageData(load_as(HanConfig, config_file("lenet5", "han")).data)
    return {
        "train": (data.train.images[::25], data.train.labels[::25]),
        "validation": (data.validation.images[::5], data.validation.labels[::5]),
        "test": (data.test.images[::5], data.test.labels[::5]),
    }


def small(**changes: object) -> HanConfig:
    options = {"data.source": "tests.experiments.studies.test_han:digits", "train.epochs": 2, "finetune.epochs": 1}
    return load_as(
        HanConfig, config_file("lenet_300_100", "han"), {**options, "prune.rounds": 2, "seeds": 1, **changes}
    )


def test_a_trial_ends_at_the_density_and_goes_on_from_what_is_trained(tmp_path: Path) -> None:
    config = small()
    images = Images(config)
    whole = Trial(config, images, 0, tmp_path / "whole", StopFlag()).run()

    stop = StopFlag()
    broken = Trial(config, images, 0, tmp_path / "broken", stop)
    broken.dense()
    stop.signal_name = "SIGTERM"
    with pytest.raises(Interrupted):
        broken.run()
    stop.signal_name = ""
    resumed = broken.run()

    assert resumed == whole
    assert sum(whole.weights.values()) == 266_200
    assert sum(whole.kept.values()) == pytest.approx(266_200 / 12, rel=1e-3)
    assert [row[0] for row in whole.rounds] == pytest.approx([12**-0.5, 1 / 12])
    assert len(whole.judged["iterative"]) == 150


def test_trainings_of_another_configuration_are_not_taken(tmp_path: Path) -> None:
    Trial(small(), Images(small()), 0, tmp_path, StopFlag())
    Trial(small(seeds=5), Images(small()), 0, tmp_path, StopFlag())
    changed = small(**{"data.flip": True})
    with pytest.raises(
        ConfigError, match=r"^'.*' holds trainings of another configuration: data \{.*; name another --"
    ):
        Trial(changed, Images(changed), 0, tmp_path, StopFlag())


def test_folds_hold_every_known_image_once_and_none_of_the_test() -> None:
    config = small(folds=3)
    images = Images(config)
    parts = [images.splits(seed) for seed in config.trials]

    known = {*images.splits(0)[0].paths, *images.splits(0)[1].paths}
    assert sum(len(validation) for _, validation in parts) == 140 + 150
    assert all(len(train) + len(validation) == 290 for train, validation in parts)
    assert torch.equal(images.judges(1).images, parts[1][1].images)
    assert "_data" in vars(images)
    assert "test" not in vars(images._data)
    assert known


def outcome(dense: str, pruned: str) -> Outcome:
    return Outcome({}, {}, {}, {}, [], {}, {"dense": dense, "iterative": pruned})


def test_a_difference_has_the_interval_of_the_images_it_was_seen_on() -> None:
    # Of four images the second seed loses one: mean over seeds 0, 0, 0, 1/2.
    seeds = [outcome("1111", "1111"), outcome("1111", "1110")]
    half = 196 * np.std([0, 0, 0, 0.5], ddof=1) / 2
    assert interval_over_images(seeds, "iterative", pooled=False) == f"+12.50 ± {half:.2f} %"
    # As folds these are eight images, one of which is lost.
    half = 196 * np.std([0] * 7 + [1], ddof=1) / 8**0.5
    assert interval_over_images(seeds, "iterative", pooled=True) == f"+12.50 ± {half:.2f} %"


def test_the_command_writes_a_report_that_opens_offline_and_the_same_as_a_page(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(small(**{"prune.curves": False}).model_dump_json())

    main([str(tmp_path / "mine.yaml")], ["finetune.epochs=1"], tmp_path / "runs", tmp_path / "page.md")

    html, page = (tmp_path / "runs" / "report.html").read_text(), (tmp_path / "page.md").read_text()
    assert "http" not in html
    assert html.count("<img") == page.count("![") == 3
    for title in ("Errors", "LeNet-300-100, layer by layer", "Sensitivity", "Weights before and after"):
        assert f"## {title}\n" in page
        assert f"<h2>{title}</h2>" in html
    assert "| fc1 | 235,200 | 8% |" in page
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == [
        "first-layer.png",
        "sensitivity.png",
        "weights.png",
    ]


def test_the_command_says_what_is_wrong_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        main(["lenet6"], None, tmp_path, None)
    assert caught.value.exit_code == 1
    assert (
        "there is no file and no bundled configuration called 'lenet6'; did you mean 'lenet5'?"
        in capsys.readouterr().err
    )


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], np.ndarray]:
    """A folder such as torchvision keeps, of 36 and 5 images; writes them and returns those of the test."""
    monkeypatch.setenv("SECATEUR_MNIST", str(tmp_path))

    def write() -> np.ndarray:
        folder = tmp_path / "MNIST" / "raw"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name, n in (("train", 36), ("t10k", 5)):
            images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
            (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.tobytes())
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())
        return images

    return write


def test_full_mnist_is_read_as_torchvision_keeps_it(mnist: Callable[[], np.ndarray]) -> None:
    images = mnist()
    found = splits()
    assert (len(found["train"][0]), len(found["validation"][0])) == (33, 3)  # type: ignore[index]
    data = ImageData(load_as(HanConfig, config_file("lenet5", "han"), {"data.source": "experiments.mnist:splits"}).data)
    assert data.train.images.shape == (33, 1, 28, 28)
    assert np.array_equal(data.test.images[:, 0].numpy(), images)


def test_missing_mnist_says_how_to_get_it(mnist: Callable[[], np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^no MNIST in '{tmp_path}' \(.*\); torchvision.datasets.MNIST\('{tmp_path}'"):
        splits()
