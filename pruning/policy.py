"""The decision, as a plain value: which units of which channel group stay, and what happens inside each layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index as as_index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph_encoder.network import NetworkGraph

from .files import write_atomic
from .layer_policy import LAYER_SCHEMA, LayerPolicy, PolicyError

__all__ = ["POLICY_SCHEMA", "CompressionPolicy", "LayerPolicy", "PolicyError"]

POLICY_VERSION = 1
POLICY_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Secateur compression policy",
    "type": "object",
    "required": ["format", "version", "groups"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": "secateur-policy"},
        "version": {"const": POLICY_VERSION},
        "groups": {
            "description": "by channel group; groups left out stay dense",
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["size", "kept"],
                "additionalProperties": False,
                "properties": {
                    "size": {"description": "units of the group in the dense network", "type": "integer", "minimum": 1},
                    "kept": {
                        "description": "indices of the units that stay, ascending",
                        "type": "array",
                        "minItems": 1,
                        "uniqueItems": True,
                        "items": {"type": "integer", "minimum": 0},
                    },
                },
            },
        },
        "layers": {
            "description": "by weighted layer, sizes after the channels are removed; layers left out stay as they are",
            "type": "object",
            "additionalProperties": LAYER_SCHEMA,
        },
    },
}
"""JSON Schema of a policy file."""


@dataclass(frozen=True)
class CompressionPolicy:
    """Units kept in each channel group, and sparsity and bits of each layer.

    Attributes:
        kept: ascending unit indices by group name; groups left out stay dense.
        sizes: units of the same groups in the dense network.
        layers: sparsity and bits by qualified layer name; layers left out stay as they are.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, LayerPolicy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # NumPy's integers, which indices often are, are no numbers of JSON.
        object.__setattr__(self, "kept", {name: tuple(map(as_index, kept)) for name, kept in self.kept.items()})
        object.__setattr__(self, "sizes", {name: as_index(size) for name, size in self.sizes.items()})
        for name, kept in self.kept.items():
            size = self.sizes.get(name)
            if size is None:
                msg = f"the policy keeps units of '{name}' and does not say how many the group has; add its size"
                raise PolicyError(msg)
            if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
                msg = (
                    f"the policy keeps {_shorten(kept)} of the {size} units of '{name}'; kept units are ascending, "
                    f"without repeats, between 0 and {size - 1}, and at least one"
                )
                raise PolicyError(msg)

    @property
    def digest(self) -> str:
        """Hash of the decision, equal for equal policies on any machine."""
        decision: dict[str, Any] = {name: list(self.kept[name]) for name in sorted(self.kept)}
        if layers := {name: self.layers[name].to_plain() for name in sorted(self.layers)}:
            decision = {"groups": decision, "layers": layers}
        plain = json.dumps(decision, separators=(",", ":"))
        return hashlib.sha256(plain.encode()).hexdigest()[:32]

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that lose weights: those whose zeros training has to hold."""
        return tuple(name for name, layer in self.layers.items() if layer.is_sparse)

    def keep_ratios(self) -> dict[str, float]:
        """Kept share of each group named, in (0, 1]."""
        return {name: len(kept) / self.sizes[name] for name, kept in self.kept.items()}

    def to_plain(self) -> dict[str, Any]:
        """The policy as plain values that `POLICY_SCHEMA` describes."""
        groups = {name: {"size": self.sizes[name], "kept": list(kept)} for name, kept in self.kept.items()}
        plain: dict[str, Any] = {"format": "secateur-policy", "version": POLICY_VERSION, "groups": groups}
        if self.layers:
            plain["layers"] = {name: layer.to_plain() for name, layer in self.layers.items()}
        return plain

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_plain(), indent=1)

    @staticmethod
    def from_json(text: str, where: str = "the policy") -> CompressionPolicy:
        """Read a policy back.

        Args:
            text: JSON text.
            where: name of its origin, for messages.

        Raises:
            PolicyError: naming what was found, where, and what is allowed.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            msg = f"{where} is not JSON (line {error.lineno}: {error.msg}); a policy is written by `secateur search`"
            raise PolicyError(msg) from error
        return CompressionPolicy.from_plain(data, where)

    @staticmethod
    def from_plain(data: Any, where: str = "the policy") -> CompressionPolicy:
        """Read what `to_plain` returned; `PolicyError` as `from_json`."""
        if not isinstance(data, dict) or data.get("format") != "secateur-policy":
            msg = f"{where} is not a compression policy: 'format' must be 'secateur-policy'"
            raise PolicyError(msg)
        if data.get("version") != POLICY_VERSION:
            msg = f"{where} has version {data.get('version')!r}; this release reads version {POLICY_VERSION}"
            raise PolicyError(msg)
        unknown = sorted(data.keys() - {"format", "version", "groups", "layers"})
        sections = {"groups": data.get("groups"), "layers": data.get("layers", {})}
        missing = [key for key, section in sections.items() if not isinstance(section, dict)]
        if unknown or missing:
            found = f"the unknown entry '{unknown[0]}'" if unknown else f"no object '{missing[0]}'"
            msg = f"{where} has {found}; a policy has 'format', 'version', 'groups' and maybe 'layers', nothing else"
            raise PolicyError(msg)
        kept, sizes = {}, {}
        for name, entry in sections["groups"].items():
            if not isinstance(entry, dict) or entry.keys() != {"size", "kept"} or not _are_ints(entry):
                msg = (
                    f"group '{name}' of {where} must be an object with an integer 'size' and a list of integers 'kept'"
                )
                raise PolicyError(msg)
            kept[name], sizes[name] = tuple(entry["kept"]), entry["size"]
        layers = {
            name: LayerPolicy.from_plain(entry, f"layer '{name}' of {where}")
            for name, entry in sections["layers"].items()
        }
        return CompressionPolicy(kept, sizes, layers)

    def save(self, path: Path | str) -> None:
        """Write the policy to ``path``, all of it or nothing."""
        write_atomic(Path(path), self.to_json().encode())

    @staticmethod
    def load(path: Path) -> CompressionPolicy:
        """Read the policy at ``path``; `PolicyError` if it is not one."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            msg = f"'{path}' cannot be read as a policy: {error}"
            raise PolicyError(msg) from error
        return CompressionPolicy.from_json(text, f"'{path}'")

    def masks(self, graph: NetworkGraph) -> dict[int, Tensor]:
        """What stays, by group index of ``graph``: boolean tensors of shape ``(size,)``.

        Raises:
            PolicyError: if a group is unknown, has another size, or must stay dense.
        """
        misfits = self.misfits(graph)
        if misfits:
            msg = "the policy does not fit the network: " + "; ".join(misfits)
            raise PolicyError(msg)
        masks = {}
        for name, kept in self.kept.items():
            if len(kept) < self.sizes[name]:
                mask = torch.zeros(self.sizes[name], dtype=torch.bool)
                mask[list(kept)] = True
                masks[graph.group_index[name]] = mask
        return masks

    def misfits(self, graph: NetworkGraph) -> list[str]:
        """Everything about the policy that does not fit ``graph``, in words; empty if it fits."""
        found = []
        for name, kept in self.kept.items():
            index = graph.group_index.get(name)
            if index is None:
                found.append(f"the network has no channel group '{name}'")
                continue
            group = graph.groups[index]
            if group.size != self.sizes[name]:
                found.append(f"group '{name}' has {group.size} units, the policy was made for {self.sizes[name]}")
            elif not group.is_prunable and len(kept) < group.size:
                found.append(f"group '{name}' has to stay dense ({group.reason})")
        weighted = {operator.layer for operator in graph.operators if operator.weight}
        found += [f"the network has no weighted layer '{name}'" for name in self.layers if name not in weighted]
        return found


def _are_ints(entry: Mapping[str, Any]) -> bool:
    kept = entry["kept"]
    values = [entry["size"], *kept] if isinstance(kept, list) else [None]
    return all(type(value) is int for value in values)


def _shorten(kept: tuple[int, ...]) -> str:
    return str(list(kept)) if len(kept) <= 8 else f"[{', '.join(map(str, kept[:6]))}, ..., {kept[-1]}]"
