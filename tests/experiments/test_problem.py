from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from envs.action import counts_of, project, start_plan
from envs.plans import uniform
from envs.space import SearchSpace
from experiments.config import ConfigError, RunConfig, SearchSettings
from experiments.methods import check_enough
from experiments.problem import (
    SearchProblem,
    check_calibration_is_like_training,
    evaluations_to_probe,
    probe,
    settle_range,
    space_by,
    started_uniformly,
)
from experiments.progress import count
from graph_encoder.capture import capture
from latency.budget import Budget
from latency.device import Fingerprint, TableError
from latency.table import Calibration, KindTimes, LatencyTable, build_table, needed_kinds, network_key, start_table
from latency.worker import Processor
from pruning.importance import rank_units
from pruning.policy import CompressionPolicy
from tests.latency.synthetic import IntegerFormulaDevice, as_calibrated

from .test_agents_elsewhere import problem_of
from .tiny import network


@pytest.mark.parametrize(
    "options",
    [
        {"search__probe_share": 0.5},
        # 0.4 images are one.
        {"search__probe_share": 0.1, "search__search_images": 4},
        {"search__decide": ["channels", "bits"], "search__search_images": 90, "budget": "30% bytes"},
        {"search__decide": ["channels", "bits"], "search__probe_share": 0.5, "budget": "60% bytes"},
        {"search__decide": ["bits"], "search__bits": [8], "budget": "60% bytes"},
        # A group of 12 units that keeps a multiple of 12 cannot be cut.
        {"search__decide": ["channels", "density"], "search__rounding": 12, "budget": "80% macs"},
    ],
)
def test_probes_take_the_evaluations_that_are_foreseen(
    tiny_config: Callable[..., RunConfig], options: dict[str, Any]
) -> None:
    config = tiny_config(**options)
    problem, share = problem_of(config), config.search.probe_share
    n_calibration = sum(map(len, problem.scoring.calibration))

    for as_start in (True, False):
        probed = probe(problem, share, lambda _: None, as_start=as_start, shown=True, notify=lambda _: None)

        foreseen = evaluations_to_probe(
            problem.space, share, problem.scoring.n_images, n_calibration, as_start=as_start
        )
        assert probed.probe_evaluations == pytest.approx(foreseen)


def probed_with_bits(config: RunConfig) -> tuple[SearchProblem, SearchProblem]:
    """A problem before and after its probes."""
    problem = problem_of(config)
    return problem, probe(problem, 1.0, lambda _: None, as_start=True, shown=False, notify=lambda _: None)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"search__decide": ["channels", "bits"]}, {8}),
        # The most bits below single precision are tried, and fewer stay on offer.
        ({"search__decide": ["channels", "weight_bits", "act_bits"], "search__bits": [4, 8, 32]}, {4, 8}),
        ({"search__decide": ["channels", "density", "bits"], "search__bits": [2, 8, 32]}, {2, 8}),
    ],
)
def test_single_precision_that_buys_nothing_is_not_offered(
    tiny_config: Callable[..., RunConfig], options: dict[str, Any], bits: set[int]
) -> None:
    problem, probed = probed_with_bits(tiny_config(budget=["80% bytes", "90% bops"], **options))
    before, after = problem.space, probed.space

    quantized = before.policy(before.quantized)
    assert {layer.weight_bits for layer in quantized.layers.values()} == {8}
    assert not quantized.kept
    scored = problem.evaluator("", lambda _: None)
    lost = scored.score(CompressionPolicy({})).accuracy - scored.score(quantized).accuracy
    assert probed.lost_when_quantized == lost < probed.noise_floor()
    assert (
        f"loses {100 * max(lost, 0):.2f} points of accuracy, which the 45 search images cannot tell" in probed.bits_note
    )
    assert {rung for index in after.rungs_of_bits for rung in after.ladders[index].tolist()} == bits
    for index in set(range(after.n)) - set(after.rungs_of_bits):
        assert after.ladders[index].tolist() == before.ladders[index].tolist()
    # All channels fit beside 8 bits, with room to spare that every plan leaves.
    assert after.has_one_plan
    assert not before.has_one_plan
    generator = np.random.default_rng(0)
    for action in (np.zeros(after.n), *generator.uniform(-1, 1, (5, after.n))):
        assert after.policy(counts_of(action, after)) == quantized
    assert after.cost_of(quantized) < 0.5 * (after.limit or 0)
    assert before.policy(start_plan(before)) != quantized


@pytest.mark.parametrize("bits", [[2, 32], [2, 8]])
def test_bits_stay_on_offer_where_they_buy_something_or_are_all_there_are(
    tiny_config: Callable[..., RunConfig], bits: list[int]
) -> None:
    config = tiny_config(search__decide=["channels", "bits"], search__bits=bits, budget="80% bytes")
    problem, probed = probed_with_bits(config)

    assert probed.bits_note == ""
    for before, after in zip(problem.space.ladders, probed.space.ladders, strict=True):
        assert before.tolist() == after.tolist()


def space_by_times(
    config: RunConfig, problem: SearchProblem, budgets: list[Budget], slower: Callable[[KindTimes], ArrayLike]
) -> SearchSpace:
    """The decisions by a table of times that follow a formula, but for a factor."""
    device = IntegerFormulaDevice()
    needed = needed_kinds(problem.graph, {group.name: 1 for group in problem.graph.prunable}, [8, 32])
    table = build_table(start_table(device), device, needed)
    for times in table.kinds.values():
        times.ratios[:] *= slower(times)
    importance = rank_units(problem.model, problem.graph)
    return space_by(config.search, problem.graph, importance, budgets, as_calibrated(table, problem.graph))


def test_layers_that_are_faster_in_single_precision_when_narrow_may_have_it(
    tiny_config: Callable[..., RunConfig],
) -> None:
    def slower(times: KindTimes) -> ArrayLike:
        # Floats take as much less as a layer is narrower, and integers always take as much.
        return np.array(times.outputs) / times.outputs[-1] if times.kind.bits == 32 else 1.0

    config = tiny_config(search__decide=["channels", "bits"], budget="80% bytes")
    problem = problem_of(config)
    space = space_by_times(config, problem, [Budget(kind="latency", share=1.0)], slower)
    layers = slice(len(space.groups), None)
    assert space.quantized[layers].tolist() == [8] * len(space.layers)
    assert 32 in space.fastest[layers]
    problem = replace(problem, space=started_uniformly(space.with_limit("latency", space.lowest_cost)))

    probed = probe(problem, 1.0, lambda _: None, as_start=True, shown=False, notify=lambda _: None)

    n_floats = space.fastest[layers].tolist().count(32)
    assert probed.bits_note.endswith(f"on single precision, but in {count(n_floats, 'layer')} that may be faster in it")
    for index, bits in enumerate(space.fastest[layers].tolist(), start=len(space.groups)):
        assert probed.space.ladders[index].tolist() == ([8, 32] if bits == 32 else [8])
    assert probed.space.cost(start_plan(probed.space)) <= space.lowest_cost

    # With room for all channels in 8 bits none has to be narrow.
    roomy = replace(problem, space=started_uniformly(space.with_limit("latency", space.cost(space.quantized))))
    probed = probe(roomy, 1.0, lambda _: None, as_start=True, shown=False, notify=lambda _: None)
    assert probed.bits_note.endswith("on single precision")
    assert probed.space.policy(start_plan(probed.space)) == space.policy(space.quantized)


@pytest.mark.parametrize("others", [[], [Budget(kind="macs", share=0.5)]])
def test_a_layer_that_is_faster_in_single_precision_keeps_it_whatever_other_budgets_say(
    tiny_config: Callable[..., RunConfig], others: list[Budget]
) -> None:
    def slower(times: KindTimes) -> ArrayLike:
        is_last = times.outputs[-1] == 3
        return 100.0 if is_last and times.kind.bits == 8 else 1.0

    config = tiny_config(search__decide=["channels", "bits"], budget="80% bytes")
    problem = problem_of(config)
    space = space_by_times(config, problem, [Budget(kind="latency", share=1.0), *others], slower)

    assert space.quantized[len(space.groups) :].tolist() == [8] * (len(space.layers) - 1) + [32]
    assert space.quantized[: len(space.groups)].tolist() == space.maximum[: len(space.groups)].tolist()
    assert space.fits(space.quantized) == (not others)


def test_the_range_of_eight_bits_goes_by_the_device_that_the_table_is_of(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_config(search__decide=["bits"], budget="20% bytes").search
    without, with_it = (Processor("a processor", "x86_64", "", features, 2) for features in ((), ("avx_vnni",)))
    for here, there, expected in ((with_it, without, True), (without, with_it, False)):
        monkeypatch.setattr(Processor, "here", classmethod(lambda _, here=here: here))
        table = LatencyTable(Fingerprint(there, "onnxruntime", "1.0", 1), 1.0, 0.0)
        assert settle_range(settings, table).reduce_range is expected
        assert settle_range(settings, None).reduce_range is not expected


@pytest.mark.parametrize("budget", ["10% bops", "15% bytes", "60% macs"])
def test_the_uniform_start_is_the_uniform_plan(tiny_config: Callable[..., RunConfig], budget: str) -> None:
    decide = ["channels"] if "macs" in budget else ["channels", "bits"]
    space = problem_of(tiny_config(search__decide=decide, search__start="uniform", budget=budget)).space

    assert start_plan(space).tolist() == project(uniform(space), space).tolist()


@pytest.mark.parametrize(
    ("method", "settings", "ways"),
    [
        ("uniform", {}, ["raise search.search_images"]),
        ("greedy", {}, ["lower search.probe_share", "raise search.search_images"]),
        (
            "cem",
            {},
            [
                "lower search.probe_share",
                "set search.start to uniform",
                "lower search.finalists",
                "raise search.search_images",
            ],
        ),
        (
            "ppo",
            {"start": "uniform", "show_sensitivity": True},
            [
                "lower search.probe_share",
                "set search.show_sensitivity to false",
                "lower search.finalists",
                "raise search.search_images",
            ],
        ),
    ],
)
def test_too_few_evaluations_are_told_with_what_helps_the_method(
    method: Any, settings: dict[str, Any], ways: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_enough(method, SearchSettings(evaluations=2, **settings), 4.0, 2.0)

    told = str(caught.value).removesuffix(", so that fewer images are left for rescoring").split(", or ")
    assert told[1:] == ways


def test_evaluations_left_are_those_granted_without_probes_and_finalists() -> None:
    settings = SearchSettings(evaluations=20, finalists=3)

    assert check_enough("cem", settings, 4.0, 2.0) == 10
    assert check_enough("uniform", settings, 4.0, 2.0) == 18
    assert check_enough("cem", settings, 4.0, 1.0) == 16


@pytest.mark.parametrize(
    ("known", "what", "option"),
    [
        (Calibration(), "whole networks", ""),
        (Calibration(n_networks=9), "networks with 8 bits", " --integers"),
    ],
)
def test_a_table_that_is_not_calibrated_is_refused(
    tiny_config: Callable[..., RunConfig], known: Calibration, what: str, option: str
) -> None:
    device = IntegerFormulaDevice()
    model = network(3, 1).eval()
    graph = capture(model, torch.zeros(2, 1, 8, 8))
    needed = needed_kinds(graph, {group.name: 1 for group in graph.prunable}, [8, 32])
    table = replace(build_table(start_table(device), device, needed), calibrations={network_key(graph): known})
    settings = tiny_config(search__decide=["channels", "bits"]).search
    importance = rank_units(model, graph)

    with pytest.raises(TableError) as caught:
        space_by(settings, graph, importance, [Budget(kind="latency", share=0.8)], table)

    assert str(caught.value) == (
        f"the latency table is not calibrated: no {what} of this kind were timed, and it would ask too little. "
        f"'secateur latency build{option}' into the same file, for this model with its shape and number of classes, "
        "goes on where it stopped"
    )
    assert space_by(settings, graph, importance, [Budget(kind="latency", share=0.8)], as_calibrated(table, graph)).timed


def test_calibration_unlike_training_is_warned_about() -> None:
    assert check_calibration_is_like_training(0.8968, 0.862, 5000) == (
        "with batch-norm statistics re-estimated the dense network scores 86.20% in place of 89.68%, so every plan "
        "will score below what it is worth. Prepare the calibration images as those it was trained on: the same "
        "normalisation and augmentation, and a few hundred of them"
    )
    assert check_calibration_is_like_training(0.8968, 0.889, 5000) is None
    # Four of 100 images are lost by chance.
    assert check_calibration_is_like_training(0.5, 0.46, 100) is None
