from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.config import (
    METHODS,
    ConfigError,
    RunConfig,
    SearchSettings,
    config_file,
    load_as,
    load_config,
    parse_setting,
)
from experiments.studies.han_config import HanConfig
from latency.budget import Budget, BudgetError

BUNDLED = sorted(config_file("digits").parent.rglob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_options_override_the_file_and_leave_the_rest_of_it(tmp_path: Path) -> None:
    path = written(tmp_path, "search:\n  seed: 3\n  evaluations: 40\nthreads: 2\n")

    config = load_config(path, {"search.seed": 7, "device": "cpu"})

    assert (config.search.seed, config.search.evaluations, config.threads) == (7, 40, 2)


def test_null_is_a_value_that_overrides_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "search: {rounding: 4}")

    assert load_config(path).search.rounding == 4
    assert load_config(path, dict([parse_setting("search.rounding=null")])).search.rounding is None


def test_configuration_written_as_yaml_is_read_back_equal(tmp_path: Path) -> None:
    config = load_config(
        None, {"budget": "30% params, 3 ms", "search.methods": ["ppo", "cem"], "model.weights": "w.safetensors"}
    )

    assert load_config(written(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("50%", (Budget(share=0.5),)),
        ("30% params", (Budget(kind="params", share=0.3),)),
        ("125M flops", (Budget(absolute=62_500_000),)),
        (0.25, (Budget(share=0.25),)),
        ("none", ()),
        (None, ()),
        ("50% macs, 20% bytes", (Budget(share=0.5), Budget(kind="bytes", share=0.2))),
        (["50%", "3 ms"], (Budget(share=0.5), Budget(kind="latency", absolute=3_000_000))),
        ({"kind": "params", "share": 0.3}, (Budget(kind="params", share=0.3),)),
    ],
)
def test_budget_is_read_as_a_person_writes_it(text: object, budget: tuple[Budget, ...]) -> None:
    config = load_config(None, {"budget": text, "search.methods": ["cem"]})

    assert config.budget == budget


def test_agents_for_other_networks_learn_what_they_will_have_there() -> None:
    config = load_config(None, {"search.for_transfer": True})

    assert (config.search.start, config.search.measured_dropout) == ("uniform", 0.5)
    assert (config.ppo.n_frequencies, config.ddpg.n_frequencies) == (0, 0)
    left = config.model_copy(update={name: getattr(RunConfig(), name) for name in ("search", "ppo", "ddpg")})
    assert left == RunConfig()


def test_what_is_set_beside_for_transfer_stays_and_outlives_the_file(tmp_path: Path) -> None:
    text = "search: {for_transfer: true, start: sensitivity}\nppo: {n_frequencies: 6, hidden: 8}\n"

    config = load_config(written(tmp_path, text))

    assert (config.search.start, config.search.measured_dropout, config.ppo.n_frequencies) == ("sensitivity", 0.5, 6)
    assert (config.ppo.hidden, config.ddpg.n_frequencies) == (8, 0)
    assert load_config(written(tmp_path, config.to_yaml())) == config


def test_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    path = written(tmp_path, "finetune:\n  epoch: 3\n")

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == (
        f"{path}: unknown key 'epoch' in 'finetune'; did you mean 'epochs'? Allowed: epochs, learning_rate, momentum, "
        "weight_decay, batch_size, autocast, quantized_epochs, distillation_weight, temperature, dense_control"
    )


def test_unknown_section_without_a_near_name_lists_what_is_allowed(tmp_path: Path) -> None:
    path = written(tmp_path, "zzz: 1\n")

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == (
        f"{path}: unknown key 'zzz' in the top level. Allowed: model, data, budget, search, train, finetune, ppo, "
        "ddpg, latency, measure, device, threads"
    )


def test_every_fault_is_told_with_its_place_and_what_was_found(tmp_path: Path) -> None:
    path = written(tmp_path, "search:\n  evaluations: 0\n  criterion: l3\n")

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value).splitlines() == [
        f"{path}: search.evaluations: input should be greater than or equal to 1; found 0",
        f"{path}: search.criterion: 'l3' is not allowed; did you mean 'l2'? Allowed: l1, l2, fpgm, taylor, bn_scale",
    ]


def test_file_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Path("missing.yaml"))

    assert str(caught.value) == "configuration file missing.yaml does not exist"


def test_file_that_holds_no_mapping_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, "- 1\n")

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == (
        f"{path} holds list; a mapping with the keys model, data, budget, search, train, finetune, ppo, ddpg, "
        "latency, measure, device, threads is needed"
    )


def test_budget_that_cannot_be_read_is_told() -> None:
    with pytest.raises((ConfigError, BudgetError), match="budget 'half' cannot be read"):
        load_config(None, {"budget": "half"})


def test_two_budgets_of_one_kind_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"budget": ["50% macs", "125M flops"]})

    assert str(caught.value) == (
        "the options: budget: there are 2 budgets of macs: 0.5 of the dense macs, 62,500,000 macs; give one of each "
        "kind"
    )


def test_value_that_a_message_quotes_is_not_told_twice() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"budget": "150%"})

    assert str(caught.value) == (
        "the options: budget: budget '150%' is a share of 1.5 of the dense network's cost; it must lie above 0 and at "
        "most 1 (100%)"
    )


def test_methods_that_need_a_budget_are_named_when_there_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"budget": "none", "search.methods": ["uniform", "ppo", "magnitude"]})

    assert str(caught.value) == (
        "the options: search.methods: uniform, magnitude need a budget; without one choose among random, cem, ppo, ddpg"
    )


@pytest.mark.parametrize(
    ("settings", "using"),
    [
        ({}, ["sensitivity", "greedy", "knapsack", "random", "cem", "ppo", "ddpg"]),
        ({"start": "uniform"}, ["sensitivity", "greedy", "knapsack"]),
        ({"start": "uniform", "show_sensitivity": True}, ["sensitivity", "greedy", "knapsack", "ppo", "ddpg"]),
    ],
)
def test_probes_are_used_by_what_follows_starts_from_or_sees_them(settings: dict[str, Any], using: list[str]) -> None:
    assert [method for method in METHODS if SearchSettings(**settings).uses_probes(method)] == using


def test_setting_is_read_as_yaml() -> None:
    assert parse_setting("search.methods=[ppo, cem]") == ("search.methods", ["ppo", "cem"])
    assert parse_setting("finetune.learning_rate=0.01") == ("finetune.learning_rate", 0.01)


def test_pattern_of_zeros_is_read_as_it_is_documented(tmp_path: Path) -> None:
    setting = load_config(None, dict([parse_setting("search.sparsity=2:4")]))
    file = load_config(written(tmp_path, "search:\n  sparsity: 2:4\n  seed: 0x10\n"))

    assert (setting.search.sparsity, file.search.sparsity, file.search.seed) == ("2:4", "2:4", 16)


def test_setting_that_is_not_yaml_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^the value in --set 'search\.decide=\[channels' is not valid YAML: while"):
        parse_setting("search.decide=[channels")


def test_model_and_data_may_be_named_alone_beside_other_keys_of_theirs(tmp_path: Path) -> None:
    path = written(tmp_path, "model: resnet20\ndata: cifar10\n")

    for config in (
        load_config(path, {"model.weights": "w.pt", "data.download": True}),
        load_config(None, {"model.weights": "w.pt", "data.download": True, "model": "resnet20", "data": "cifar10"}),
    ):
        assert (config.model.name, config.model.weights) == ("resnet20", Path("w.pt"))
        assert (config.data.source, config.data.download) == ("cifar10", True)


def test_option_that_is_a_section_is_left_as_it_was_given() -> None:
    options = {"search": {"seed": 3}, "search.seed": 7}

    assert load_config(None, options).search.seed == 7
    assert options == {"search": {"seed": 3}, "search.seed": 7}


def test_key_below_a_value_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "budget: 50%\n"), {"budget.share": 0.3})

    assert (
        str(caught.value)
        == "'budget.share' cannot be set, as 'budget' is '50%' and no section; set 'budget' as a whole"
    )


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_empty_file_leaves_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(written(tmp_path, text)) == RunConfig()


def test_section_whose_keys_are_commented_out_leaves_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "model:\ndata:\nsearch:\n  # seed: 3\nbudget:\nthreads: 2\n")

    with pytest.raises(ConfigError, match="need a budget; without one"):
        load_config(path)
    assert load_config(path, {"budget": "50%"}) == load_config(None, {"threads": 2, "data": {}})


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("model: resnet20\nthreads: 2\nmodel: resnet56\n", "model", 3),
        ("search:\n  seed: 3\n  seed: 3\n", "seed", 3),
        ("search: {seed: 3, evaluations: 4, seed: 3}\n", "seed", 1),
    ],
)
def test_key_that_stands_twice_is_told(tmp_path: Path, text: str, key: str, line: int) -> None:
    path = written(tmp_path, text)

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == (
        f"{path} is not valid YAML: the key '{key}' stands again in line {line}; keep one of them"
    )


def test_keys_taken_over_from_another_section_may_be_set_again(tmp_path: Path) -> None:
    path = written(tmp_path, "ppo: &agent {hidden: 8, updates: 2}\nddpg:\n  <<: *agent\n  updates: 3\n")

    config = load_config(path)

    assert (config.ppo.hidden, config.ddpg.hidden, config.ppo.updates, config.ddpg.updates) == (8, 8, 2, 3)


@pytest.mark.parametrize(("text", "key"), [("=3", ""), ("search.=3", "search."), (" . =3", " . ")])
def test_setting_without_a_key_is_told(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting(text)

    assert str(caught.value) == (
        f"--set '{text}' has no key in '{key}' before its '='; write it as section.key=value, for example "
        "search.finalists=5"
    )


def test_setting_without_a_value_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting("search.seed")

    assert str(caught.value) == (
        "--set 'search.seed' has no '='; write it as section.key=value, for example search.finalists=5"
    )


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_configuration_is_found_by_its_name_and_written_out_is_read_back_equal(
    path: Path, tmp_path: Path
) -> None:
    experiment = "" if path.parent.name == "configs" else path.parent.name
    kind = {"": RunConfig, "han": HanConfig}[experiment]
    config = load_as(kind, config_file(path.stem, experiment))
    text = yaml.safe_dump(config.model_dump(mode="json"))

    assert config_file(path.stem, experiment) == path
    assert load_as(kind, written(tmp_path, text)) == config


def test_unknown_name_of_a_configuration_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"called 'digit'; did you mean 'digits'\? Allowed: "):
        config_file("digit")
