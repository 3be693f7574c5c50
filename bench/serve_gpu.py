"""`ds4 serve` under 1 to 32 users: time to the first token, and between tokens, as clients see it.

python -m bench.serve_gpu                                  # random weights of the real shape
python -m bench.serve_gpu --model-options '--model demo' --prompt 64
Each user asks again as soon as it was answered. Prompts differ from the first token on, so that
nothing is found in the cache. Random weights draw random tokens, most of which the demo's tokenizer
has no text for; a bias on 200 that it has makes every token an event.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from .http_client import Answer, Connection, percentile

WORDS = dict.fromkeys(map(str, range(300, 500)), 100)
FLASH = "--synthetic flash --unique-layers 7 --backend cuda --context 4096"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-options", default=FLASH)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring, per number")
    parser.add_argument("--json", help="append the rows to this file")
    given = parser.parse_args()
    with server(f"{given.model_options} --slots {max(given.users)}") as (port, _, loaded):
        print(f"ready after {loaded:.1f} s: {given.model_options}")
        print("users  requests  tok/s  tok/s/user  TTFT p50/p99 ms  ITL p50/p99 ms  warm-up s")
        for users in given.users:
            row = asyncio.run(measure(port, users, given.prompt, given.answer, given.seconds))
            print(
                f"{users:5} {row['requests']:9} {row['tok_s']:6.0f} {row['tok_s'] / users:11.1f} "
                f"{row['ttft_p50_ms']:8.0f} / {row['ttft_p99_ms']:.0f} "
                f"{row['itl_p50_ms']:10.1f} / {row['itl_p99_ms']:.1f} {row['warm_s']:12.1f}",
                flush=True,
            )
            if given.json:
                about = {"options": given.model_options, "prompt": given.prompt}
                with open(given.json, "a") as file:
                    file.write(json.dumps(about | {"answer": given.answer} | row) + "\n")


@contextlib.contextmanager
def server(options: str):
    """(port, process id, seconds until it was ready) of `ds4 serve`, ended in good order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ds4.cli", "serve", "--port", str(port), "--log", "warning"]
    start = time.monotonic()
    process = subprocess.Popen([*command, *shlex.split(options)])
    try:
        while not is_ready(port):
            assert process.poll() is None, "the server ended"
            time.sleep(0.05)
        yield port, process.pid, time.monotonic() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def is_ready(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


async def measure(port: int, users: int, prompt: int, answer: int, seconds: float) -> dict:
    """Users that each have one request at a time; a row of figures, after one warm-up each."""
    draw = random.Random(users)
    until = [0.0]
    answers: list[Answer] = []

    def body() -> dict:
        ids = [draw.randrange(100, 300) for _ in range(prompt)]
        wanted = {"max_tokens": answer, "temperature": 1.0, "stream": True, "ignore_eos": True}
        return {"model": "any", "prompt": ids, "logit_bias": WORDS} | wanted

    async def once() -> None:
        with Connection(port) as connection:
            await connection.post("/v1/completions", body())

    async def user() -> None:
        connection = Connection(port)
        while time.perf_counter() < until[0]:
            answers.append(await connection.post("/v1/completions", body()))
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(once() for _ in range(users)))
    warm = time.perf_counter() - start
    start = time.perf_counter()
    until[0] = start + seconds
    await asyncio.gather(*(user() for _ in range(users)))
    spent = time.perf_counter() - start
    bad = [a for a in answers if a.status != 200 or not a.whole or a.error]
    assert not bad, f"{len(bad)} answers are bad, the first: {bad[0]}"
    tokens = sum(len(a.times) for a in answers)
    assert tokens > 0.8 * answer * len(answers), "most tokens came without an event"
    gaps = [gap for a in answers for gap in a.gaps[:-1]]  # the last event has no token
    ttft = [a.ttft for a in answers]
    return {
        "users": users,
        "warm_s": warm,
        "requests": len(answers),
        "tok_s": tokens / spent,
        "ttft_p50_ms": 1e3 * percentile(ttft, 0.5),
        "ttft_p99_ms": 1e3 * percentile(ttft, 0.99),
        "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
        "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
    }


if __name__ == "__main__":
    main()
