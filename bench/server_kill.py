"""`kill -9` of the engine under load, again and again: what is lost, and how soon it answers again.

python -m bench.server_kill --seconds 600 --every 20
An answer may be lost only if a token of it was sent; what waited is answered by the next engine.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import time
from collections import Counter

from .http_client import Answer, Connection, percentile
from .serve_gpu import server
from .server_load import children


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-options", default="--model demo --slots 4")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every", type=float, default=20.0)
    parser.add_argument("--users", type=int, default=8)
    given = parser.parse_args()
    with server(given.model_options) as (port, pid, loaded):
        row = asyncio.run(play(port, pid, given.seconds, given.every, given.users))
    print(json.dumps({"model": given.model_options, "load_s": round(loaded, 2)} | row))


async def play(port: int, pid: int, seconds: float, every: float, users: int) -> dict:
    draw, ends = random.Random(0), Counter[str]()
    down, kills = [], 0
    over = time.monotonic() + seconds

    async def user() -> None:
        connection = Connection(port)
        while time.monotonic() < over:
            ids = [draw.randrange(300, 4000) for _ in range(draw.randrange(4, 64))]
            body = {"model": "demo", "prompt": ids, "max_tokens": 24, "stream": True}
            answer = Answer()
            async for _ in connection.stream("/v1/completions", body, answer):
                pass
            ends[outcome(answer)] += 1
        connection.close()

    async def killer() -> None:
        nonlocal kills
        while time.monotonic() + every < over:
            await asyncio.sleep(every)
            os.kill(children(pid)[0], signal.SIGKILL)
            kills += 1
            killed = time.monotonic()
            body = {"model": "demo", "prompt": [300], "max_tokens": 1, "stream": True}
            with Connection(port) as connection:
                answer = await connection.post("/v1/completions", body)
            ends[outcome(answer)] += 1
            down.append(time.monotonic() - killed)

    await asyncio.gather(killer(), *(user() for _ in range(users)))
    return {
        "seconds": seconds,
        "kills": kills,
        "ends": dict(ends),
        "answers_again_p50_s": round(percentile(down, 0.5), 2),
        "answers_again_max_s": round(max(down), 2),
    }


def outcome(answer: Answer) -> str:
    if answer.whole and not answer.error:
        return "answered"
    if answer.times and answer.error:
        return "ended with an error after its first token"
    return f"lost: {answer}"


if __name__ == "__main__":
    main()
