from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def each_reading_once() -> Iterator[None]:
    """Tests keep the processor busy themselves: what they time is not read again for it, and nothing is waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latency.pace.MOST_TRIES", 1)
        patch.setattr("latency.pace.PAUSE_S", 0.0)
        patch.setattr("latency.device.PAUSE_S", 0.0)
        yield
