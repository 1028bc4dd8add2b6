"""What TensorBoard shows of a folder."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

Series = list[tuple[int, float]]


def scalars(folder: Path) -> dict[str, Series]:
    """Steps and values of every scalar by its tag, of the event files that lie in ``folder`` itself."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hyperparameters(folder: Path) -> dict[str, Any]:
    """Hyper-parameters by name, as the tab HPARAMS shows those of ``folder``."""
    content = EventAccumulator(str(folder)).Reload().PluginTagToContent("hparams")[SESSION_START_INFO_TAG]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}
