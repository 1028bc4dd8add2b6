"""The decision inside one layer: which pattern its zeros follow, how dense it stays, and how many bits it uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from graph_encoder.errors import SecateurError

BLOCKS = (4, 8, 16)
"""Output channels that may share their zeros."""
INTEGER_BITS, HALF_BITS, FULL_BITS = 8, 16, 32
BITS = (1, 2, 3, 4, 5, 6, 7, INTEGER_BITS, HALF_BITS, FULL_BITS)
"""Bits of a value: up to 7 only simulated, 8 an integer, 16 a half-precision and 32 a single-precision float."""
QUANTIZERS = ("linear", "kmeans")

_N_OF_M = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")

LAYER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "sparsity": {
            "description": "pattern of the zeros: unstructured, blocks of output channels, or N of M along the input",
            "type": "string",
            "pattern": "^(dense|unstructured|block(4|8|16)|[1-9][0-9]*:[1-9][0-9]*)$",
        },
        "density": {
            "description": "share of the weights that stay, N/M for N of M",
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
        },
        "weight_bits": {"description": "bits of a weight", "enum": list(BITS)},
        "act_bits": {"description": "bits of a value that the layer reads", "enum": list(BITS)},
        "quantizer": {"description": "how weights are quantized", "enum": list(QUANTIZERS)},
        "reduce_range": {"description": "8-bit weights from -63 to 63 in place of -127 to 127", "type": "boolean"},
    },
}
"""JSON Schema of one layer's entry in a policy file; what is left out has its default."""


class PolicyError(SecateurError, ValueError):
    """A policy that is not one, or that does not fit the network."""


@dataclass(frozen=True)
class LayerPolicy:
    """Sparsity and bits of one weighted layer.

    Attributes:
        sparsity: ``"dense"``, ``"unstructured"``, ``"block4"``, ``"block8"``, ``"block16"`` (so many consecutive
            output channels share their zeros), or ``"N:M"`` (of M consecutive inputs N keep their weight).
        density: share of the layer's weights that stay, in (0, 1]; 1 for dense, N / M for N:M.
        weight_bits: one of `BITS`.
        act_bits: the same, of the values that the layer reads.
        quantizer: ``"linear"``, or ``"kmeans"`` for weights that share ``2 ** weight_bits`` values.
        reduce_range: weights of 8 bits take half of their levels, -63 to 63, so that a sum of two products of bytes
            fits into the 16 bits that x86 processors without VNNI add them in.
    """

    sparsity: str = "dense"
    density: float = 1.0
    weight_bits: int = FULL_BITS
    act_bits: int = FULL_BITS
    quantizer: str = "linear"
    reduce_range: bool = False

    def __post_init__(self) -> None:
        self._check_sparsity()
        for what, bits in (("weight_bits", self.weight_bits), ("act_bits", self.act_bits)):
            if type(bits) is not int or bits not in BITS:
                msg = f"{what} is {bits!r}; it must be one of {', '.join(map(str, BITS))}"
                raise PolicyError(msg)
        if self.quantizer not in QUANTIZERS:
            msg = f"quantizer is {self.quantizer!r}; it must be one of {', '.join(QUANTIZERS)}"
            raise PolicyError(msg)
        if self.quantizer == "kmeans" and self.weight_bits > 8:
            msg = f"quantizer 'kmeans' shares at most 256 values, and weight_bits is {self.weight_bits}; pass 8 or less"
            raise PolicyError(msg)
        if type(self.reduce_range) is not bool:
            msg = f"reduce_range is {self.reduce_range!r}; it must be true or false"
            raise PolicyError(msg)
        if self.reduce_range and (self.weight_bits, self.quantizer) != (8, "linear"):
            msg = (
                f"reduce_range is for linear weights of 8 bits, and these are {self.quantizer} with "
                f"{self.weight_bits}; leave it out"
            )
            raise PolicyError(msg)

    def _check_sparsity(self) -> None:
        if isinstance(self.density, float):  # NumPy's too, which are no numbers of JSON
            object.__setattr__(self, "density", float(self.density))
        if type(self.density) not in (int, float) or not 0 < self.density <= 1:
            msg = f"density is {self.density!r}; it must lie above 0 and at most at 1"
            raise PolicyError(msg)
        if self.sparsity == "dense":
            if self.density != 1:
                msg = f"density is {self.density:g} for a dense layer; name a sparsity, such as 'unstructured'"
                raise PolicyError(msg)
        elif match := _N_OF_M.fullmatch(self.sparsity):
            n, m = int(match[1]), int(match[2])
            if n > m:
                msg = f"sparsity is '{self.sparsity}'; at most {m} of {m} inputs can keep their weight"
                raise PolicyError(msg)
            if self.density not in (1, n / m):
                msg = f"density is {self.density:g} for sparsity '{self.sparsity}'; leave it out, it is {n / m:g}"
                raise PolicyError(msg)
            object.__setattr__(self, "density", n / m)
        elif self.sparsity != "unstructured" and self.sparsity not in {f"block{size}" for size in BLOCKS}:
            allowed = ", ".join(["dense", "unstructured", *(f"block{size}" for size in BLOCKS)])
            msg = f"sparsity is {self.sparsity!r}; it must be one of {allowed}, or 'N:M' such as '2:4'"
            raise PolicyError(msg)

    @property
    def block(self) -> int:
        """Output channels that share their zeros: 1 where they do not."""
        return int(self.sparsity.removeprefix("block")) if self.sparsity.startswith("block") else 1

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """``(N, M)``, or None for another pattern."""
        match = _N_OF_M.fullmatch(self.sparsity)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def is_sparse(self) -> bool:
        """Whether weights have to go."""
        return self.density < 1

    @property
    def is_quantized(self) -> bool:
        """Whether anything has fewer than `FULL_BITS` bits."""
        return min(self.weight_bits, self.act_bits) < FULL_BITS

    def to_plain(self) -> dict[str, Any]:
        """The entry as `LAYER_SCHEMA` describes it, defaults left out."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @staticmethod
    def from_plain(entry: Any, where: str) -> LayerPolicy:
        """Read an entry back; `PolicyError` names ``where`` and what is allowed."""
        allowed = [f.name for f in fields(LayerPolicy)]
        if not isinstance(entry, Mapping) or not entry.keys() <= set(allowed):
            msg = f"{where} must be an object with no other entries than {', '.join(allowed)}"
            raise PolicyError(msg)
        try:
            return LayerPolicy(**entry)
        except (PolicyError, TypeError) as error:
            msg = f"{where}: {error}"
            raise PolicyError(msg) from error
