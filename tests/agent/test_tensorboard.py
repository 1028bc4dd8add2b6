import logging
import time
from pathlib import Path

import pytest

from agent.tensorboard import wait_for_a_later_second


def test_curves_from_a_clock_that_is_ahead_are_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 3600}.host.1.0").touch()

    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        wait_for_a_later_second(tmp_path)

    assert time.monotonic() - started < 60
    (told,) = caplog.messages
    assert told.startswith(f"the newest curves in '{tmp_path}' were written 3")


def test_next_curves_get_a_later_name(tmp_path: Path) -> None:
    newest = int(time.time())
    (tmp_path / f"events.out.tfevents.{newest}.host.1.0").touch()

    wait_for_a_later_second(tmp_path)

    assert int(time.time()) > newest
