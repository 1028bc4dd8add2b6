import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graph_encoder.capture import capture
from pruning.policy import POLICY_SCHEMA, POLICY_VERSION, CompressionPolicy, LayerPolicy, PolicyError

POLICY = CompressionPolicy({"a": (0, 2), "b.0": (1,)}, {"a": 4, "b.0": 2})


LAYERS = {"a": LayerPolicy("block16", 0.3), "b.0": LayerPolicy("2:4", weight_bits=8, act_bits=8)}


def test_policy_survives_its_file(tmp_path: Path) -> None:
    POLICY.save(tmp_path / "policy.json")

    assert CompressionPolicy.load(tmp_path / "policy.json") == POLICY
    assert POLICY.keep_ratios() == {"a": 0.5, "b.0": 0.5}


def test_layers_survive_the_file_and_count_in_the_digest(tmp_path: Path) -> None:
    policy = replace(POLICY, layers=LAYERS)
    policy.save(tmp_path / "policy.json")

    assert CompressionPolicy.load(tmp_path / "policy.json") == policy
    assert len({POLICY.digest, policy.digest, replace(POLICY, layers={"a": LAYERS["a"]}).digest}) == 3


def test_density_of_n_of_m_is_n_over_m() -> None:
    assert LayerPolicy("1:4").density == LayerPolicy("1:4", 0.25).density == 0.25


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sparsity": "unstructured", "density": 0.0}, "density is 0.0; it must lie above 0 and at most at 1"),
        ({"density": 0.5}, "density is 0.5 for a dense layer; name a sparsity, such as 'unstructured'"),
        ({"sparsity": "2:4", "density": 0.3}, "density is 0.3 for sparsity '2:4'; leave it out, it is 0.5"),
        ({"sparsity": "5:4"}, "sparsity is '5:4'; at most 4 of 4 inputs can keep their weight"),
        (
            {"sparsity": "block3"},
            "sparsity is 'block3'; it must be one of dense, unstructured, block4, block8, block16, or 'N:M' such as "
            "'2:4'",
        ),
        ({"quantizer": "log"}, "quantizer is 'log'; it must be one of linear, kmeans"),
        (
            {"quantizer": "kmeans", "weight_bits": 16},
            "quantizer 'kmeans' shares at most 256 values, and weight_bits is 16; pass 8 or less",
        ),
        ({"reduce_range": 1}, "reduce_range is 1; it must be true or false"),
        (
            {"weight_bits": 7, "reduce_range": True},
            "reduce_range is for linear weights of 8 bits, and these are linear with 7; leave it out",
        ),
        (
            {"weight_bits": 8, "quantizer": "kmeans", "reduce_range": True},
            "reduce_range is for linear weights of 8 bits, and these are kmeans with 8; leave it out",
        ),
    ],
)
def test_bad_layer_is_refused_in_words(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        LayerPolicy(**entry)
    assert str(caught.value) == message


def test_layer_that_the_network_does_not_have_is_named() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 4))
    policy = CompressionPolicy(layers={"0": LayerPolicy(weight_bits=8), "1": LayerPolicy(weight_bits=8)})

    assert policy.misfits(graph) == ["the network has no weighted layer '1'"]


def test_digest_depends_on_the_decision_and_not_on_its_order() -> None:
    same = CompressionPolicy({"b.0": (1,), "a": (0, 2)}, {"b.0": 2, "a": 4})
    other = CompressionPolicy({"b.0": (0,), "a": (0, 2)}, {"b.0": 2, "a": 4})

    assert POLICY.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "'p.json' is not a compression policy: 'format' must be 'secateur-policy'"),
        ({"version": 2}, "'p.json' has version 2; this release reads version 1"),
        (
            {"extra": 1},
            "'p.json' has the unknown entry 'extra'; a policy has "
            "'format', 'version', 'groups' and maybe 'layers', nothing else",
        ),
        (
            {"groups": []},
            "'p.json' has no object 'groups'; a policy has "
            "'format', 'version', 'groups' and maybe 'layers', nothing else",
        ),
        (
            {"groups": {"a": {"size": 4, "kept": [1.5]}}},
            "group 'a' of 'p.json' must be an object with an integer 'size' and a list of integers 'kept'",
        ),
        (
            {"layers": {"c": {"weight_bits": 9}}},
            "layer 'c' of 'p.json': weight_bits is 9; it must be one of 1, 2, 3, 4, 5, 6, 7, 8, 16, 32",
        ),
        (
            {"layers": {"c": {"bits": 8}}},
            "layer 'c' of 'p.json' must be an object with no other entries than sparsity, density, weight_bits, "
            "act_bits, quantizer, reduce_range",
        ),
        (
            {"groups": {"a": {"size": 4, "kept": [3, 1]}}},
            "the policy keeps [3, 1] of the 4 units of 'a'; kept units are ascending, without repeats, "
            "between 0 and 3, and at least one",
        ),
    ],
)
def test_bad_policy_is_refused_in_words(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(POLICY.to_json()), **change})

    with pytest.raises(PolicyError) as caught:
        CompressionPolicy.from_json(text, "'p.json'")
    assert str(caught.value) == message


def test_text_that_is_not_json_names_the_line() -> None:
    with pytest.raises(
        PolicyError, match=r"^the policy is not JSON \(line 1: Expecting value\); a policy is written by"
    ):
        CompressionPolicy.from_json("nonsense")


TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
TOLD_ONLY = {"$schema", "title", "description"}


def faults(value: Any, schema: Mapping[str, Any], where: str = "policy") -> Iterator[str]:
    """What of ``value`` a JSON Schema forbids, as the specification reads (draft 2020-12, validation vocabulary)."""
    for keyword, allowed in schema.items():
        match keyword:
            case "type":
                wanted = TYPES[allowed]
                if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                    yield f"{where}: not of type {allowed}"
            case "const":
                if value != allowed:
                    yield f"{where}: not {allowed!r}"
            case "enum":
                if value not in allowed:
                    yield f"{where}: none of {allowed}"
            case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
                if isinstance(value, int | float) and not _within(value, keyword, allowed):
                    yield f"{where}: {keyword} {allowed}"
            case "pattern":
                if isinstance(value, str) and not re.search(allowed, value):
                    yield f"{where}: not like {allowed}"
            case "minItems":
                if isinstance(value, list) and len(value) < allowed:
                    yield f"{where}: fewer than {allowed} items"
            case "uniqueItems":
                if allowed and isinstance(value, list) and any(each in value[:i] for i, each in enumerate(value)):
                    yield f"{where}: repeats"
            case "items":
                for index, each in enumerate(value if isinstance(value, list) else []):
                    yield from faults(each, allowed, f"{where}[{index}]")
            case "required":
                missing = [name for name in allowed if isinstance(value, dict) and name not in value]
                yield from (f"{where}: no {name}" for name in missing)
            case "properties":
                for name in allowed if isinstance(value, dict) else ():
                    if name in value:
                        yield from faults(value[name], allowed[name], f"{where}.{name}")
            case "additionalProperties":
                for name in value if isinstance(value, dict) else ():
                    if name not in schema.get("properties", {}) and allowed is False:
                        yield f"{where}: unknown {name}"
                    elif name not in schema.get("properties", {}) and allowed is not True:
                        yield from faults(value[name], allowed, f"{where}.{name}")
            case _:
                assert keyword in TOLD_ONLY, f"the schema uses '{keyword}', which this validator does not know"


def _within(value: float, keyword: str, bound: float) -> bool:
    inside = {
        "minimum": value >= bound,
        "exclusiveMinimum": value > bound,
        "maximum": value <= bound,
        "exclusiveMaximum": value < bound,
    }
    return inside[keyword]


@pytest.mark.parametrize(
    "policy",
    [POLICY, CompressionPolicy(), CompressionPolicy({"a": (0,)}, {"a": 1}), CompressionPolicy(layers=LAYERS)],
)
def test_a_written_policy_is_what_the_schema_describes(policy: CompressionPolicy) -> None:
    assert list(faults(json.loads(policy.to_json()), POLICY_SCHEMA)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "other"}, "policy.format: not 'secateur-policy'"),
        ({"version": 99}, f"policy.version: not {POLICY_VERSION}"),
        ({"extra": 1}, "policy: unknown extra"),
        ({"groups": []}, "policy.groups: not of type object"),
        ({"groups": {"a": [0]}}, "policy.groups.a: not of type object"),
        ({"groups": {"a": {"kept": [0]}}}, "policy.groups.a: no size"),
        ({"groups": {"a": {"size": 4}}}, "policy.groups.a: no kept"),
        ({"groups": {"a": {"size": 4, "kept": [0], "bytes": 4}}}, "policy.groups.a: unknown bytes"),
        ({"groups": {"a": {"size": "4", "kept": [0]}}}, "policy.groups.a.size: not of type integer"),
        ({"groups": {"a": {"size": 4, "kept": []}}}, "policy.groups.a.kept: fewer than 1 items"),
        ({"groups": {"a": {"size": 4, "kept": [1, 1]}}}, "policy.groups.a.kept: repeats"),
        ({"groups": {"a": {"size": 4, "kept": [-1, 2]}}}, "policy.groups.a.kept[0]: minimum 0"),
        ({"groups": {"a": {"size": 4, "kept": [0.5]}}}, "policy.groups.a.kept[0]: not of type integer"),
        ({"groups": {"a": {"size": 4, "kept": [True]}}}, "policy.groups.a.kept[0]: not of type integer"),
        ({"layers": []}, "policy.layers: not of type object"),
        ({"layers": {"a": {"bits": 8}}}, "policy.layers.a: unknown bits"),
        ({"layers": {"a": {"sparsity": "unstructured", "density": 0}}}, "policy.layers.a.density: exclusiveMinimum 0"),
        (
            {"layers": {"a": {"weight_bits": 9}}},
            "policy.layers.a.weight_bits: none of [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]",
        ),
        ({"layers": {"a": {"weight_bits": 8, "reduce_range": 1}}}, "policy.layers.a.reduce_range: not of type boolean"),
        ({"layers": {"a": {"quantizer": "log"}}}, "policy.layers.a.quantizer: none of ['linear', 'kmeans']"),
        (
            {"layers": {"a": {"sparsity": "block3"}}},
            "policy.layers.a.sparsity: not like ^(dense|unstructured|block(4|8|16)|[1-9][0-9]*:[1-9][0-9]*)$",
        ),
    ],
)
def test_what_the_schema_forbids_the_reader_refuses(change: dict[str, Any], fault: str) -> None:
    broken = {**json.loads(POLICY.to_json()), **change}

    assert list(faults(broken, POLICY_SCHEMA)) == [fault]
    with pytest.raises(PolicyError):
        CompressionPolicy.from_json(json.dumps(broken))


@pytest.mark.parametrize("name", ["format", "version", "groups"])
def test_an_entry_that_the_schema_requires_the_reader_requires(name: str) -> None:
    broken = json.loads(POLICY.to_json())
    del broken[name]

    assert list(faults(broken, POLICY_SCHEMA)) == [f"policy: no {name}"]
    with pytest.raises(PolicyError):
        CompressionPolicy.from_json(json.dumps(broken))


def test_sparse_layers_are_those_that_lose_weights() -> None:
    layers = {"a": LayerPolicy("2:4"), "b": LayerPolicy(weight_bits=8), "c": LayerPolicy("block4", 1.0)}
    assert CompressionPolicy(layers=layers).sparse_layers == ("a",)


def test_numbers_of_numpy_are_taken(tmp_path: Path) -> None:
    plain = CompressionPolicy({"a": (0, 2)}, {"a": 4}, {"b": LayerPolicy("unstructured", 0.3)})
    kept: Any = tuple(np.flatnonzero([True, False, True, False]))
    policy = CompressionPolicy({"a": kept}, {"a": np.int64(4)}, {"b": LayerPolicy("unstructured", np.float64(0.3))})

    policy.save(tmp_path / "policy.json")

    assert policy.digest == plain.digest
    assert CompressionPolicy.load(tmp_path / "policy.json") == plain
