import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secateur
from envs.journal import JournalError
from experiments.config import ConfigError, Method
from pruning.importance import rank_units
from secateur import Budget, BudgetError, TraceError

from .tiny import ScaledByWidth, network

PROJECT = Path(secateur.__file__).parent
NO_CALIBRATION = "the network has batch norms and no calibration"
pytestmark = pytest.mark.filterwarnings(f"ignore:{NO_CALIBRATION}")


def small_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(num_classes=3, in_channels=1).eval()


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def share_of_channels(model: nn.Module) -> float:
    """A stand-in for accuracy with a known best plan: only the second convolution's width counts."""
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    return widths[1] / 16


def test_search_finds_the_plan_that_the_users_function_prefers() -> None:
    found = secateur.compress(
        small_net(), images(), evaluate=share_of_channels, budget="60%", method="random", evaluations=40, seed=1
    )

    assert found.cost <= 0.6 * found.dense_cost
    assert share_of_channels(found.model) == found.accuracy
    assert found.accuracy > share_of_channels(
        secateur.compress(small_net(), images(), evaluate=share_of_channels, budget="60%", method="uniform").model
    )


@pytest.mark.parametrize(
    ("rounding", "advice"),
    [(1, ""), (4, " or with coarse rounding; a lower search.rounding makes more of them")],
)
@pytest.mark.parametrize("method", ["random", "ppo"])
def test_a_search_that_runs_out_of_plans_is_advised_to_round_less_where_it_rounds(
    method: Method, rounding: int, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    secateur.compress(
        small_net(),
        images(),
        evaluate=share_of_channels,
        budget="80%",
        method=method,
        evaluations=20,
        start="uniform",
        rounding=rounding,
        protected=["6", "9"],
    )

    (told,) = caplog.messages
    assert told.endswith(f" plans were known before. Few plans fit a budget in a small network{advice}")


def test_model_of_the_user_is_bit_equal_afterwards() -> None:
    model = small_net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    secateur.compress(
        model, images(), evaluate=share_of_channels, budget=0.5, calibration=[images()], method="random", evaluations=9
    )

    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_of_a_compiled_network_the_one_inside_is_searched_and_returned() -> None:
    model = small_net()
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled a candidate"))
    assert isinstance(compiled, nn.Module)

    with pytest.warns(
        UserWarning, match="^the network was made by torch.compile, which would compile every plan"
    ) as told:
        found = secateur.compress(
            compiled, images(), evaluate=lambda m: float(m(images()).isfinite().all()), budget="60%", method="uniform"
        )

    assert told[0].filename == __file__
    assert type(found.model) is type(model)
    assert (
        found.policy
        == secateur.compress(model, images(), evaluate=lambda _: 1.0, budget="60%", method="uniform").policy
    )


def test_cost_told_is_that_of_the_model_returned() -> None:
    found = secateur.compress(
        small_net(), images(), evaluate=share_of_channels, budget=Budget(kind="params", share=0.5), method="magnitude"
    )

    assert found.cost == secateur.count_params(found.model) <= 0.5 * secateur.count_params(small_net())


def test_the_callers_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)

    torch.manual_seed(1)
    secateur.compress(small_net(), images(), evaluate=share_of_channels, budget="60%", method="ppo", evaluations=12)

    assert torch.equal(torch.rand(1), expected)


def test_journal_lets_a_second_call_go_on(tmp_path: Path) -> None:
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(1)
        return share_of_channels(model)

    def search(evaluations: int) -> secateur.Compressed:
        return secateur.compress(
            small_net(),
            images(),
            evaluate=evaluate,
            budget="50%",
            method="random",
            evaluations=evaluations,
            journal=tmp_path / "journal.jsonl",
        )

    first, n_first = search(10), len(calls)
    second = search(10)

    assert first.policy == second.policy
    assert len(calls) == n_first
    assert second.history == first.history


def search_into(journal: Path, model: nn.Module | None = None, **changes: Any) -> secateur.Compressed:
    options = {"budget": "50%", "method": "random", "evaluations": 9, "evaluate": share_of_channels} | changes
    return secateur.compress(model or small_net(), images(), journal=journal, **options)


def test_more_evaluations_go_on_from_those_recorded(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = search_into(path, budget=None, evaluations=8)
    calls: list[nn.Module] = []

    more = search_into(path, budget=None, evaluations=30, evaluate=lambda model: calls.append(model) or 0.5)

    assert len(calls) == more.evaluations - first.evaluations > 0


def test_one_journal_keeps_methods_and_seeds_apart(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"

    random, other_seed, cem = search_into(path), search_into(path, seed=1), search_into(path, method="cem")

    for found, method, seed in ((random, "random", 0), (other_seed, "random", 1), (cem, "cem", 0)):
        assert {(entry.searcher, entry.seed) for entry in found.history} == {
            ("probes", seed),
            (method, seed),
            ("", seed),
        }
        assert found.history == search_into(path, method=method, seed=seed).history


def test_journal_of_another_network_with_the_same_layers_is_refused(tmp_path: Path) -> None:
    search_into(tmp_path / "journal.jsonl")
    other = small_net()
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1e-6

    with pytest.raises(JournalError) as caught:
        search_into(tmp_path / "journal.jsonl", other, evaluate=lambda _: pytest.fail("scored a candidate"))

    assert re.fullmatch(
        rf"the journal '{re.escape(str(tmp_path))}/journal\.jsonl' is of another search: weights [0-9a-f]{{16}}, now "
        r"[0-9a-f]{16}; pass the same again, or another file",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"budget": "40%"}, r"budget \d+ macs, now \d+ macs"),
        ({"budget": "50% params"}, r"budget \d+ macs, now \d+ params"),
        ({"calibration": [images(4)]}, r"calibration [0-9a-f]{16}, now [0-9a-f]{16}"),
        ({"criterion": "l2"}, "importance l1, now l2"),
        ({"start": "uniform", "rounding": 2}, "start sensitivity, now uniform; rounding None, now 2"),
        ({"n_images": 500}, "n_images 1000, now 500"),
        ({"calibration_method": "minmax"}, "calibration_method mse, now minmax"),
        ({"range_images": [images(4)]}, "range_images unknown, now [0-9a-f]{16}"),
    ],
)
def test_journal_of_other_arguments_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    search_into(tmp_path / "journal.jsonl")

    with pytest.raises(JournalError, match=f" is of another search: {told}; pass the same again, or another file$"):
        search_into(tmp_path / "journal.jsonl", **changes)


def test_journal_knows_importance_by_the_order_of_the_units(tmp_path: Path) -> None:
    model = small_net()
    scores = rank_units(model, secateur.capture(model, images()))
    search_into(tmp_path / "journal.jsonl", importance=scores)

    search_into(tmp_path / "journal.jsonl", importance={name: 2 * values for name, values in scores.items()})
    with pytest.raises(JournalError, match=r"is of another search: importance [0-9a-f]{16}, now [0-9a-f]{16}; pass"):
        search_into(tmp_path / "journal.jsonl", importance={name: -values for name, values in scores.items()})


class Halved:
    """A reward that is an object."""

    def __call__(self, accuracy: float, cost: int, limit: int | None) -> float:
        return accuracy / 2


@pytest.mark.parametrize("make_reward", [Halved, lambda: partial(lambda by, accuracy, *_: accuracy / by, 2)])
def test_journal_knows_a_reward_that_is_made_anew(tmp_path: Path, make_reward: Callable[[], Any]) -> None:
    rewards = [make_reward(), make_reward()]  # both are there at once, so at different places in memory
    first, second = (search_into(tmp_path / "journal.jsonl", reward=reward) for reward in rewards)

    assert second.history == first.history
    with pytest.raises(JournalError, match=r" is of another search: reward .+, now accuracy; pass the same again"):
        search_into(tmp_path / "journal.jsonl", reward="accuracy")


def test_journal_of_another_argument_of_the_reward_is_refused(tmp_path: Path) -> None:
    def divided(by: float, accuracy: float, *_: object) -> float:
        return accuracy / by

    search_into(tmp_path / "journal.jsonl", reward=partial(divided, 2))

    with pytest.raises(JournalError) as caught:
        search_into(tmp_path / "journal.jsonl", reward=partial(divided, 3))

    function = f"<function {divided.__qualname__}>"
    assert f"reward functools.partial({function}, 2), now functools.partial({function}, 3); " in str(caught.value)


def test_journal_of_a_run_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search_into(path)
    entries = path.read_bytes().splitlines(keepends=True)[1:]
    path.write_bytes(b"".join(entries))

    with pytest.raises(JournalError) as caught:
        search_into(path)

    assert str(caught.value) == (
        f"the journal '{path}' holds {len(entries)} evaluations and does not say of what network and arguments, so "
        "they cannot be used here; pass another file"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "pppo"},
            "unknown method 'pppo'; did you mean 'ppo'? Allowed: uniform, magnitude, sensitivity, greedy, knapsack, "
            "random, cem, ppo, ddpg",
        ),
        (
            {"environment": "layers"},
            "unknown environment 'layers'; did you mean 'layerwise'? Allowed: network, layerwise",
        ),
        ({"start": 3}, "unknown start '3'. Allowed: sensitivity, uniform"),
        ({"criterion": "l3"}, "unknown criterion 'l3'; did you mean 'l2'? Allowed: l1, l2, fpgm, taylor, bn_scale"),
        (
            {"reward": "accuracy_guarantee"},
            "unknown reward 'accuracy_guarantee'; did you mean 'accuracy_guaranteed'? Allowed: accuracy, "
            "accuracy_guaranteed, galen, or a function (accuracy, cost, limit) -> float",
        ),
        (
            {"decide": ["channel"]},
            "compress: decide.0: 'channel' is not allowed; did you mean 'channels'? Allowed: channels, density, "
            "weight_bits, act_bits, bits",
        ),
        ({"n_images": 0}, "n_images is 0; it is how many images evaluate scores on, at least 1"),
        (
            {"importance": {"0": torch.ones(6), "3": torch.ones(16), "6": torch.ones(12), "9": torch.ones(12)}},
            "importance of the group '6' is of shape (12,); it needs one score for each of its 16 units, as "
            "pruning.importance.rank_units returns them for a captured network",
        ),
        (
            {"importance": {"0": torch.ones(6), "3": torch.ones(16)}},
            "importance of the group '6' is not there; it needs one score for each of its 16 units, as "
            "pruning.importance.rank_units returns them for a captured network",
        ),
        ({"evaluations": 0}, "compress: evaluations: input should be greater than or equal to 1; found 0"),
        ({"seed": 2**32}, "compress: seed: input should be less than or equal to 4294967295; found 4294967296"),
        (
            {"decide": ["bits"], "budget": "40% bytes", "method": "magnitude", "calibration": [images()]},
            "the method 'magnitude' ranks channels, and no channel group is decided here: let channels be decided "
            "(search.decide, search.protect_first, search.protected), or choose another method",
        ),
        (
            {
                "importance": {
                    "0": torch.ones(6),
                    "3": torch.full((16,), torch.inf),
                    "6": torch.ones(16),
                    "9": torch.ones(12),
                }
            },
            "importance of the group '3' is inf for unit 0; every score must be finite: to keep a unit longest, give "
            "it one above the others of its group",
        ),
        ({"min_keep_ratio": 2}, "compress: min_keep_ratio: input should be less than or equal to 1; found 2"),
        (
            {"protected": ["stem"]},
            "protected names no channel group of this network: ['stem']; groups are ['0', '14', '3', '6', '9']",
        ),
    ],
)
def test_argument_that_is_none_of_those_allowed_is_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        search_into(tmp_path / "journal.jsonl", evaluate=lambda _: pytest.fail("scored a candidate"), **changes)

    assert str(caught.value) == message


def test_impossible_budget_is_refused_before_any_evaluation() -> None:
    def evaluate(_: nn.Module) -> float:
        pytest.fail("scored a candidate")

    with pytest.raises(BudgetError) as caught:
        secateur.compress(small_net(), images(), evaluate=evaluate, budget="1%")

    assert re.fullmatch(
        r"a budget of [\d,]+ macs \(1\.0% of the dense [\d,]+ macs\) cannot be met: with every decision at its least "
        r"the network still costs [\d,]+ macs \([\d.]+%\)\. Pass at least [\d,]+ macs, or spare fewer groups "
        r"\(search\.protect_first, search\.protected\), or lower search\.min_keep_ratio or search\.rounding",
        str(caught.value),
    )


def test_probes_that_leave_nothing_to_search_with_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        secateur.compress(small_net(), images(), evaluate=share_of_channels, budget="50%", evaluations=3)

    assert str(caught.value) == (
        "ppo is granted 3 evaluations, but the sensitivity probes take 4, which leaves less than one; grant at least 5"
        ", or lower search.probe_share, or set search.start to uniform"
    )


@pytest.mark.parametrize(
    "calibration",
    [
        lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.int64)), batch_size=3),
        lambda x: iter(x.split(3)),
        lambda x: [(batch, None) for batch in x.split(3)],
    ],
    ids=["loader of images and labels", "iterator", "tuples with something behind"],
)
def test_calibration_may_be_any_batches_that_begin_with_what_forward_takes(
    calibration: Callable[[Tensor], Any],
) -> None:
    def statistics(calibration: Any) -> list[Tensor]:
        found = secateur.compress(
            small_net(),
            images(),
            evaluate=share_of_channels,
            budget="50%",
            method="random",
            evaluations=9,
            calibration=calibration,
        )
        return [buffer for name, buffer in found.model.named_buffers() if name.endswith("running_mean")]

    expected = statistics(images(12).split(3))

    for given, wanted in zip(statistics(calibration(images(12))), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            images(),
            "calibration is a tensor of float32 of shape (6, 1, 8, 8); it must be a list or another iterable of "
            "batches: pass [calibration] if the tensor is one batch, or calibration.split(250)",
        ),
        (
            None,
            "calibration is an object of class 'NoneType'; it must be a list or another iterable of batches, or empty",
        ),
        (
            [images(), images()[0]],
            "batch 1 of calibration is a tensor of float32 of shape (1, 8, 8), but forward takes a tensor of float32 "
            "of shape (6, 1, 8, 8), as example_inputs says; pass batches of that, of any number of images. In a tuple "
            "or list, what follows the inputs (labels) is left out",
        ),
        (
            [{"x": images()}],
            "batch 0 of calibration is an object of class 'dict', but forward takes a tensor of float32 of shape "
            "(6, 1, 8, 8), as example_inputs says; pass batches of that, of any number of images. In a tuple or list, "
            "what follows the inputs (labels) is left out; of a mapping pass the tensors, such as (batch['x'],)",
        ),
        (
            [images(), images().expand(-1, 3, -1, -1)],
            "batch 1 of calibration is a tensor of float32 of shape (6, 3, 8, 8), but forward takes a tensor of "
            "float32 of shape (6, 1, 8, 8), as example_inputs says; pass batches of that, of any number of images. In "
            "a tuple or list, what follows the inputs (labels) is left out",
        ),
        (
            [images(), images(0)],
            "batch 1 of calibration is a tensor of float32 of shape (0, 1, 8, 8), which holds nothing; leave it out",
        ),
        (
            [(torch.zeros(6, dtype=torch.int64), images())],
            "batch 0 of calibration is a tuple of (a tensor of int64 of shape (6,), a tensor of float32 of shape "
            "(6, 1, 8, 8)), but forward takes a tensor of float32 of shape (6, 1, 8, 8), as example_inputs says; pass "
            "batches of that, of any number of images. In a tuple or list, what follows the inputs (labels) is left "
            "out",
        ),
    ],
)
def test_calibration_that_forward_does_not_take_is_told_at_the_start(calibration: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        secateur.compress(
            small_net(),
            images(),
            evaluate=lambda _: pytest.fail("scored a candidate"),
            budget="50%",
            calibration=calibration,
        )

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("sizes", "is_taken"), [((1, 12), True), ((3, 8), False), ((1, 2), False)], ids=["longer", "channels", "too short"]
)
def test_signals_of_another_size_are_taken_where_forward_takes_them(sizes: tuple[int, int], is_taken: bool) -> None:
    model = nn.Sequential(nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Conv1d(6, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    signals, others = torch.randn(6, 1, 8), torch.randn(4, *sizes)

    def found() -> secateur.Compressed:
        return secateur.compress(
            model,
            signals,
            evaluate=lambda _: 0.5,
            budget="90%",
            calibration=[signals, others],
            method="uniform",
            protect_first=False,
        )

    if is_taken:
        assert found().cost < found().dense_cost
        return
    with pytest.raises(ConfigError) as caught:
        found()
    assert str(caught.value) == (
        f"batch 1 of calibration is a tensor of float32 of shape {(4, *sizes)}, but forward takes a tensor of float32 "
        "of shape (6, 1, 8), as example_inputs says; pass batches of that, of any number of images. In a tuple or "
        "list, what follows the inputs (labels) is left out"
    )


def test_example_inputs_that_are_no_tensors_are_not_blamed_on_calibration() -> None:
    with pytest.raises(TraceError) as caught:
        secateur.compress(
            small_net(),
            images().numpy(),  # type: ignore[arg-type]
            evaluate=lambda _: pytest.fail("scored a candidate"),
            budget="50%",
            calibration=[images()],
        )

    assert str(caught.value) == (
        "the example inputs are an object of class 'ndarray'; pass a tensor, or a tuple of the tensors that forward "
        "takes, batch first"
    )


class TwoInputs(nn.Module):
    """Images and a vector beside each, in two branches that meet before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.vector = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.image(x).mean(dim=(2, 3)) + self.vector(y))


def pair(n: int = 6) -> tuple[Tensor, Tensor]:
    return images(n), torch.randn(n, 4, generator=torch.Generator().manual_seed(2))


def compress_two_inputs(**options: Any) -> secateur.Compressed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoInputs().eval()
    x, y = pair(12)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    arguments = {"budget": "60%", "method": "random", "evaluations": 12, "calibration": batches, "rounding": 1}
    return secateur.compress(model, pair(), evaluate=lambda _: 0.5, **(arguments | options))


def test_network_of_two_inputs_is_reconstructed_on_tuples() -> None:
    fitted, plain = compress_two_inputs(reconstruct=True), compress_two_inputs()

    assert fitted.policy == plain.policy
    assert fitted.cost <= 0.6 * fitted.dense_cost
    assert not torch.equal(fitted.model(*pair()), plain.model(*pair()))


def test_channels_and_bits_of_a_network_of_two_inputs_are_decided_on_tuples() -> None:
    with pytest.warns(UserWarning, match="no budget is spent on single precision"):
        found = compress_two_inputs(
            decide=["channels", "bits"], bits=[4, 8, 32], budget="30% bytes", method="greedy", evaluations=60
        )

    assert found.cost <= 0.3 * found.dense_cost
    assert any(layer.is_quantized for layer in found.policy.layers.values())
    assert found.model(*pair()).shape == (6, 3)


def test_ranges_of_bits_are_chosen_on_images_of_their_own() -> None:
    options: dict[str, Any] = {"decide": ["bits"], "budget": "30% bytes", "method": "uniform", "protect_first": False}

    def compressed(**more: Any) -> nn.Module:
        calibration = [images(12)]
        return secateur.compress(
            small_net(), images(), evaluate=lambda _: 0.5, calibration=calibration, **options, **more
        ).model

    usual, same, wider = (
        compressed(**more) for more in ({}, {"range_images": [images(12)]}, {"range_images": [9 * images(12)]})
    )
    steps = [
        torch.stack(
            [step for name, step in model.named_parameters() if "act_quantizer" in name and name.endswith("step")]
        )
        for model in (usual, same, wider)
    ]

    assert torch.equal(steps[0], steps[1])
    assert (steps[2] > 2 * steps[0]).all()


def test_a_budget_that_is_left_since_single_precision_buys_nothing_is_warned_of() -> None:
    options: dict[str, Any] = {"decide": ["channels", "bits"], "budget": "80% bytes", "calibration": [images()]}

    message = r"^quantized, with all of its channels, the network loses 0\.00 points of"
    with pytest.warns(UserWarning, match=message) as told:
        found = secateur.compress(small_net(), images(), evaluate=share_of_channels, method="cem", **options)

    assert told[0].filename == __file__
    assert not found.policy.kept
    assert {layer.weight_bits for layer in found.policy.layers.values()} == {8}
    assert found.cost < 0.4 * found.dense_cost
    assert [entry.searcher for entry in found.history if entry.purpose == "candidate"] == ["cem"]


class Scaled(nn.Module):
    """A network whose first input is one number for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.norm(self.first(scale * x)).relu()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("options", [{"decide": ["channels", "density"]}, {"reconstruct": True}], ids=str)
def test_first_input_may_be_a_number_for_all_images(options: dict[str, Any]) -> None:
    scale = torch.tensor(2.0)
    batches = [(scale, x) for x in images(9).split(4)]

    found = secateur.compress(
        Scaled().eval(), (scale, images()), evaluate=lambda _: 0.5, budget="60%", method="random", evaluations=12,
        calibration=batches, rounding=1, protect_first=False, **options,
    )  # fmt: skip

    assert found.cost <= 0.6 * found.dense_cost
    assert found.model(scale, images()).shape == (6, 3)


def test_journal_tells_batches_of_two_inputs_apart_by_both(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    x, y = pair()
    compress_two_inputs(journal=path, calibration=[(x, y)])

    compress_two_inputs(journal=path, calibration=[(x, y)])
    with pytest.raises(JournalError, match="is of another search: calibration"):
        compress_two_inputs(journal=path, calibration=[(x, y + 1)])


def test_proof_of_a_network_of_two_inputs_can_be_read_from_the_public_functions() -> None:
    model = TwoInputs().eval()
    graph = secateur.capture(model, pair())

    proofs = secateur.prove(model, graph, pair(), generator=torch.Generator().manual_seed(0))

    assert all(isinstance(proof, secateur.Proof) and proof.holds for proof in proofs)
    assert [proof.subject for proof in proofs] == ["all groups", *(group.name for group in graph.prunable)]
    assert {group.reason != "" for group in graph.groups} == {True, False}


def test_batches_of_one_tensor_for_two_inputs_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        compress_two_inputs(calibration=[images()])

    assert str(caught.value) == (
        "batch 0 of calibration is a tensor of float32 of shape (6, 1, 8, 8), but forward takes a tuple of (a tensor "
        "of float32 of shape (6, 1, 8, 8), a tensor of float32 of shape (6, 4)), as example_inputs says; pass batches "
        "of that, of any number of images. In a tuple or list, what follows the inputs (labels) is left out"
    )


def test_reconstruction_without_images_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        secateur.compress(small_net(), images(), evaluate=share_of_channels, budget="50%", reconstruct=True)

    assert str(caught.value) == "reconstruct fits layers on training inputs; pass some batches as calibration"


@pytest.mark.slow
def test_environment_of_the_readme_is_made_as_it_says() -> None:
    text = (PROJECT / "README.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gymnasium.make" in code]
    names = {
        "model": small_net(),
        "example_inputs": images(),
        "accuracy_on_unseen_images": share_of_channels,
        "training_batches": [images()],
        "training_images": [images()],
    }

    exec(block, names)

    assert 0 <= names["reward"] <= 1
    assert names["terminated"]
    assert names["env"].observation_space.contains(names["observation"])


def test_documented_example_runs_from_start_to_end() -> None:
    lines = runpy.run_path(str(PROJECT / "docs" / "example.py"))["main"]()

    accuracy = [float(re.search(r"([\d.]+)%", line)[1]) for line in lines[:3]]  # type: ignore[index]
    assert accuracy[0] > 90
    assert accuracy[2] > accuracy[1]


def test_folder_of_the_user_that_hides_a_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").touch()
    code = f"import sys; sys.path[1:1] = [{str(PROJECT)!r}]; import secateur"

    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )

    assert run.stderr.splitlines()[-1] == (
        f"ImportError: secateur needs its own package 'envs' in {PROJECT}, but Python finds {tmp_path / 'envs'} first; "
        "rename that folder, or start Python from another one"
    )


def test_a_plan_that_needs_no_search_needs_a_budget() -> None:
    with pytest.raises(ConfigError) as caught:
        secateur.compress(small_net(), images(), evaluate=share_of_channels, budget=None, method="uniform")

    assert str(caught.value) == (
        "the method 'uniform' needs a budget; without one choose among ppo, ddpg, cem and random"
    )


def test_taylor_needs_labels_that_only_the_user_has() -> None:
    with pytest.raises(ConfigError) as caught:
        secateur.compress(small_net(), images(), evaluate=share_of_channels, budget=0.5, criterion="taylor")

    assert str(caught.value) == (
        "the criterion 'taylor' needs labelled batches; pass what pruning.importance.rank_units makes of them"
    )


def test_the_first_layer_may_be_pruned_if_asked_for() -> None:
    def compressed(protect_first: bool) -> dict[str, float]:
        found = secateur.compress(
            small_net(), images(), evaluate=share_of_channels, budget=0.5, method="uniform", protect_first=protect_first
        )
        return found.policy.keep_ratios()

    assert set(compressed(protect_first=False)) > set(compressed(protect_first=True))


def test_batch_norms_without_calibration_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=NO_CALIBRATION) as told:
        secateur.compress(small_net(), images(), evaluate=share_of_channels, budget="60%", method="uniform")
    assert [warning.filename for warning in told] == [__file__]


def test_what_the_proof_refutes_is_not_offered() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ScaledByWidth(3, 1).eval()
    options: dict[str, Any] = {"budget": "60%", "method": "uniform", "protect_first": False}

    found = secateur.compress(model, images(), evaluate=lambda _: 0.5, **options)

    assert {group.name for group in secateur.capture(model, images()).prunable} == {"first", "second"}
    assert set(found.policy.kept) == {"second"}
