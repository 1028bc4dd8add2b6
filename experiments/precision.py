"""Which precision a run computes in: what it asks for, as far as the processor gains by it."""

from __future__ import annotations

import torch

from graph_encoder.modes import bfloat16_pays, has_bfloat16

from .config import RunConfig
from .progress import RunDisplay

NO_KERNELS = "PyTorch has no kernels in bfloat16 for this processor, and would take many times as long"
_SLOWER = "convolutions in bfloat16 are not faster on this processor"


def settle_precision(config: RunConfig, device: torch.device, display: RunDisplay) -> RunConfig:
    """The configuration without bfloat16 where that would not be faster, which is said.

    What is settled here stays with a run or a training, on any machine that it is continued on.
    """
    asked = [name for name in ("search", "train", "finetune") if getattr(config, name).autocast]
    if not asked or bfloat16_pays(device.type):
        return config
    reason = _SLOWER if has_bfloat16(device.type) else NO_KERNELS
    display.say(f"{', '.join(f'{name}.autocast' for name in asked)}: left out, as {reason}")
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update={"autocast": False}) for name in asked}
    )
