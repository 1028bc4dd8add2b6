import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.han_study import (
    DENSITIES,
    STUDIES,
    Digits,
    Trial,
    bundled_digits,
    common_factor,
    crossing,
    full_mnist,
    relative_quality,
)
from experiments.images import DataError
from experiments.interrupt import Interrupted, StopFlag
from pruning.sparsity import sparse_weight, zero_weights


def test_networks_have_the_papers_numbers_of_weights() -> None:
    sizes = {study.name: [sparse_weight(study.build(), name)[0].numel() for name in study.layers] for study in STUDIES}
    assert sizes == {"LeNet-300-100": [235_200, 30_000, 1_000], "LeNet-5": [500, 25_000, 400_000, 5_000]}


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


def few(digits: Digits) -> Digits:
    part = torch.arange(0, 3500, 25)
    return replace(digits, train=digits.train.take(part), validation=digits.validation.take(torch.arange(0, 750, 5)))


def test_a_trial_ends_at_the_density_and_goes_on_from_what_is_trained(tmp_path: Path) -> None:
    study = replace(STUDIES[0], epochs=2, retrain_epochs=1, rounds=2)
    digits = few(bundled_digits())
    whole = Trial(study, digits, 0, tmp_path / "whole", StopFlag()).run()

    stop = StopFlag()
    broken = Trial(study, digits, 0, tmp_path / "broken", stop)
    broken.trained("dense", broken.untrained(), study.epochs)
    stop.signal_name = "SIGTERM"
    with pytest.raises(Interrupted):
        broken.run()
    stop.signal_name = ""
    resumed = broken.run()

    assert resumed == whole
    assert sum(whole.weights.values()) == 266_200
    assert sum(whole.kept.values()) == pytest.approx(266_200 / 12, rel=1e-3)
    assert [row[0] for row in whole.rounds] == pytest.approx([12**-0.5, 1 / 12])


def test_full_mnist_is_read_as_torchvision_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", 36), ("t10k", 5)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())

    digits = full_mnist(tmp_path)

    assert (len(digits.train), len(digits.validation), len(digits.test())) == (33, 3, 5)
    assert digits.train.images.shape == (33, 1, 28, 28)
    assert digits.validation.paths == ("train/00033", "train/00034", "train/00035")
    assert np.array_equal(digits.test().images[:, 0].numpy(), images)


def test_missing_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^no MNIST in '{tmp_path}' \(.*\); torchvision.datasets.MNIST\('{tmp_path}'"):
        full_mnist(tmp_path)
