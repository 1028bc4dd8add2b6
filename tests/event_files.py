"""What TensorBoard shows of a folder."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Series = list[tuple[int, float]]


def scalars(folder: Path) -> dict[str, Series]:
    """Steps and values of every scalar by its tag, of the event files that lie in ``folder`` itself."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
