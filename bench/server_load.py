"""The server under load, over an engine that computes nothing: what is lost, and what grows.

python -m bench.server_load soak --requests 50000 --users 16
python -m bench.server_load storm --rounds 200      # 30 % of the clients leave, at any moment
python -m bench.server_load overload --seconds 60   # ten times as many as can be served

Every answer is checked word by word: the fake engine's text follows from the prompt alone.
"""

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from pathlib import Path

from tests.fake_engine import WORDS
from tests.server_process import ServerProcess

from .http_client import Answer, Connection, percentile

LONG = 68  # tests.engine_child answers the prompt [68] with thousands of tokens
PATH = "/v1/completions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["soak", "storm", "overload"])
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    if given.what == "soak":
        row = soak(given.requests, given.users)
    elif given.what == "storm":
        row = storm(given.rounds)
    else:
        row = overload(given.seconds)
    print(json.dumps({"what": given.what} | row))


def body(prompt: list[int]) -> dict:
    return {"model": "fake", "prompt": prompt, "stream": True, "max_tokens": 3900}


def expected(prompt: list[int]) -> str:
    seed = sum(prompt) + len(prompt)
    return " ".join(WORDS[(seed + n * n) % len(WORDS)] for n in range(8 + seed % 8))


async def ask(connection: Connection, prompt: list[int]) -> tuple[Answer, bool]:
    """One request to its end, and whether its text is the right one."""
    answer, text = Answer(), ""
    async for event in connection.stream(PATH, body(prompt), answer):
        if event.startswith("{") and answer.error is None:
            text += json.loads(event)["choices"][0]["text"]
    return answer, answer.whole and text == expected(prompt)


def soak(requests: int, users: int) -> dict:
    """Closed loop. Growth is of resident memory, from a fifth of the way on."""
    with ServerProcess(slots=16, log="warning") as server:
        server.until_ready()
        return asyncio.run(_soak(server, requests, users))


async def _soak(server: ServerProcess, requests: int, users: int) -> dict:
    draw, ends = random.Random(1), Counter[str]()
    started = iter(range(requests))
    marks: list[tuple[int, int]] = []

    async def user() -> None:
        connection = Connection(server.port)
        for n in started:
            prompt = [draw.randrange(300, 4000) for _ in range(draw.randrange(1, 64))]
            answer, right = await ask(connection, prompt)
            ends["right" if right else f"wrong: {answer.status} {answer.error}"] += 1
            if n in (requests // 5, requests - users):
                marks.append(sum_of_processes(server))
        connection.close()

    start = time.monotonic()
    await asyncio.gather(*(user() for _ in range(users)))
    spent = time.monotonic() - start
    (rss, files), (rss_after, files_after) = marks[0], marks[-1]
    return {
        "requests": requests,
        "ends": dict(ends),
        "seconds": round(spent, 1),
        "requests_s": round(requests / spent, 1),
        "rss_mib": [round(rss / 2**20, 1), round(rss_after / 2**20, 1)],
        "rss_growth_percent": round(100 * (rss_after / rss - 1), 2),
        "open_files": [files, files_after],
    }


def sum_of_processes(server: ServerProcess) -> tuple[int, int]:
    """Resident bytes and open files of the server and its engine."""
    pids = [server.process.pid, *children(server.process.pid)]
    rss = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)
    return rss, sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def storm(rounds: int) -> dict:
    """Every slot is taken for a minute; clients leave; how soon does the next one have a token?"""
    with ServerProcess(slots=8, step_s=0.01, log="warning") as server:
        server.until_ready()
        return asyncio.run(_storm(server, rounds))


async def _storm(server: ServerProcess, rounds: int) -> dict:
    draw, waits, wrong = random.Random(2), [], 0

    async def leave(after: float) -> None:
        """Take a slot, and hang up: before the headers, among the tokens, or while queued."""
        with contextlib.suppress(TimeoutError), Connection(server.port) as connection:
            async with asyncio.timeout(after):
                await connection.post(PATH, body([LONG]))

    async def first_token(connection: Connection) -> None:
        await anext(connection.stream(PATH, body([LONG]), Answer()))

    async def stay() -> None:
        nonlocal wrong
        connection = Connection(server.port)
        prompt = [draw.randrange(300, 4000) for _ in range(8)]
        _, right = await ask(connection, prompt)
        wrong += not right
        connection.close()

    for _ in range(rounds):
        leaving = [leave(draw.uniform(0.0, 0.5)) for _ in range(9)]  # more than there are slots
        await asyncio.gather(*leaving, *(stay() for _ in range(21)))
        held = [Connection(server.port) for _ in range(8)]  # every slot
        await asyncio.gather(*map(first_token, held))
        for connection in held:
            connection.close()
        with Connection(server.port) as connection:
            answer, right = await ask(connection, [400, 401])
        waits.append(answer.ttft)
        wrong += not right
    left = server.ask("GET", "/metrics")[2].decode()
    end = time.monotonic() + 5
    while 'ds4_num_requests_running{model_name="fake"} 0.0' not in left:
        assert time.monotonic() < end, "slots are still taken"
        left = server.ask("GET", "/metrics")[2].decode()
    return {
        "clients": rounds * 31,
        "left": rounds * 9,
        "wrong": wrong,
        "next_token_p50_ms": round(1e3 * percentile(waits, 0.5), 1),
        "next_token_p99_ms": round(1e3 * percentile(waits, 0.99), 1),
        "next_token_max_ms": round(1e3 * max(waits), 1),
    }


def overload(seconds: float) -> dict:
    """Goodput at capacity, and when ten times as many requests arrive."""
    with ServerProcess(slots=8, step_s=0.05, queue=16, log="warning") as server:
        server.until_ready()
        return asyncio.run(_overload(server, seconds))


async def _overload(server: ServerProcess, seconds: float) -> dict:
    draw = random.Random(3)

    def prompt() -> list[int]:
        return [draw.randrange(300, 4000) for _ in range(8)]

    until = time.perf_counter() + seconds / 3
    tokens = 0

    async def user() -> None:
        nonlocal tokens
        connection = Connection(server.port)
        while time.perf_counter() < until:
            answer, right = await ask(connection, prompt())
            assert right
            tokens += len(answer.times)
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(12)))  # slots are never idle
    capacity = tokens / (time.perf_counter() - start)

    rate = 10 * capacity / 12.5  # requests; an answer has 12.5 tokens on average
    ends, good = Counter[str](), 0
    refused: list[float] = []

    async def visitor() -> None:
        nonlocal good
        connection = Connection(server.port)
        begun = time.perf_counter()
        answer, right = await ask(connection, prompt())
        if answer.status == 200:
            ends["answered" if right else "wrong"] += 1
            good += len(answer.times) if time.perf_counter() < over else 0
        else:
            told = "retry-after" in answer.headers
            ends[f"{answer.status}{'' if told else ' without Retry-After'}"] += 1
            refused.append(time.perf_counter() - begun)
        connection.close()

    start = time.perf_counter()
    over = start + seconds
    visitors: list[asyncio.Task[None]] = []
    while (now := time.perf_counter()) < over:
        while len(visitors) < (now - start) * rate:
            visitors.append(asyncio.create_task(visitor()))
        await asyncio.sleep(0.005)
    await asyncio.gather(*visitors)
    return {
        "capacity_tok_s": round(capacity, 1),
        "arrivals_s": round(rate, 1),
        "goodput_percent": round(100 * good / seconds / capacity, 1),
        "ends": dict(ends),
        "refused_p50_ms": round(1e3 * percentile(refused, 0.5), 1),
        "refused_p99_ms": round(1e3 * percentile(refused, 0.99), 1),
    }


if __name__ == "__main__":
    main()
