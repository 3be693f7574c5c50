"""The load scripts of bench/, short: what they count must hold at any speed."""

import asyncio
import sys

import pytest

from bench import server_kill, server_load

from .server_process import ServerProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they read /proc")


def test_nothing_is_lost_or_misrouted() -> None:
    row = server_load.soak(requests=80, users=8)
    assert row["ends"] == {"right": 80}


def test_clients_that_leave_disturb_nobody() -> None:
    row = server_load.storm(rounds=1)
    assert row["wrong"] == 0


def test_kills_lose_only_what_had_begun() -> None:
    with ServerProcess(slots=2, step_s=0.02) as server:
        server.until_ready()
        played = server_kill.play(server.port, server.process.pid, 3.0, 1.0, 4)
        row = asyncio.run(played)
        assert server.process.poll() is None
    assert row["kills"] >= 1
    assert row["ends"]["answered"] > 0
    assert set(row["ends"]) <= {"answered", "ended with an error after its first token"}
