"""Many random request bodies against the whole application: no 5xx, no hang.

    python -m bench.fuzz_server [BODIES] [--seed 0] [--pool 20000] [--at-once 8]

Hypothesis makes a pool of bodies (tests/fuzzing.py: valid ones with a few things changed), which
are all sent. The rest are made from these: from a body of the pool, or a quarter of the time from
one that was answered, with one to three of its values or keys dropped, doubled, or replaced by ones
from anywhere in the pool, and now and then bytes of its text. Making one so takes a fortieth of
hypothesis' time. No body is sent twice.

Prints counts by status every 10,000 bodies, and the first failure.
"""

import argparse
import asyncio
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz_target import Target
from tests.fuzzing import bodies, places

Body = tuple[str, bytes]
LONG = 20_000  # bytes of a body that others are not made from
VALUES = 200_000  # that are put into bodies
CHEAP = "/tokenize", "/detokenize", "/v1/messages/count_tokens"  # no bodies from answered ones
ANSWERED = 20_000  # bodies that others are made from


def main() -> None:
    parser = argparse.ArgumentParser(description="random bodies against the application")
    parser.add_argument("bodies", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=20_000, help="of them from hypothesis")
    parser.add_argument("--at-once", type=int, default=8)
    given = parser.parse_args()
    start = time.perf_counter()
    made = pool(min(given.pool, given.bodies), given.seed)
    print(f"{len(made)} bodies by hypothesis in {time.perf_counter() - start:.0f} s", flush=True)
    answered: list[Body] = []
    run(every(made, answered, given.bodies, random.Random(given.seed)), answered, given.at_once)


def pool(count: int, number: int) -> list[Body]:
    """Different bodies as hypothesis makes them, from about `count` examples."""
    made: dict[Body, None] = {}

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(body=bodies())
    def collect(body: Body) -> None:
        made[body] = None

    collect()
    return list(made)


def every(made: list[Body], answered: list[Body], count: int, rng: random.Random) -> Iterator[Body]:
    """The pool, and then bodies made from it, `count` different ones in all."""
    sent: set[bytes] = set()
    mixed = mixtures([body for body in made if len(body[1]) < LONG], answered, rng)
    for body in made:
        sent.add(_digest(body))
        yield body
    while len(sent) < count:
        body = next(mixed)
        if (key := _digest(body)) not in sent:
            sent.add(key)
            yield body


def mixtures(made: list[Body], answered: list[Body], rng: random.Random) -> Iterator[Body]:
    """Bodies of the pool, and answered ones, with values, keys and bytes of others in them."""
    texts = []
    for path, text in made:
        try:
            json.loads(text)
            texts.append((path, text))
        except (ValueError, RecursionError):
            pass
    values = [json.dumps(holder[key]) for _, text in texts for holder, key in _places(text)]
    values = rng.sample(values, min(len(values), VALUES))
    keys = [key for _, text in texts for _, key in _places(text) if isinstance(key, str)]
    while True:
        path, text = rng.choice(answered if answered and rng.random() < 0.25 else texts)
        body = json.loads(text)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _change(body, values, keys, rng)
        text = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        if rng.random() < 0.05:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.randbytes(rng.randrange(4)) + text[at + rng.randrange(4) :]
        yield path, text


def _change(body: Any, values: list[str], keys: list[str], rng: random.Random) -> None:
    """Drop, double, rename or replace something within a body."""
    there = places(body)
    if not there:
        return
    holder, key = rng.choice(there)
    value, how = holder[key], rng.random()
    if how < 0.15:
        del holder[key]
    elif how < 0.25 and isinstance(holder, list):
        holder.append(json.loads(json.dumps(value)))
    elif how < 0.35 and isinstance(holder, dict):
        holder[rng.choice(keys)] = holder.pop(key)
    else:
        holder[key] = json.loads(rng.choice(values))


def _places(text: bytes) -> list[tuple[Any, Any]]:
    return places(json.loads(text))


def _digest(body: Body) -> bytes:
    return hashlib.blake2b(body[1], digest_size=8, key=body[0].encode()).digest()


def run(todo: Iterator[Body], answered: list[Body], at_once: int) -> None:
    """Send them all, several at a time; the exit status is 1 at the first that fails.

    `answered` gets those with an answer, and keeps the latest.
    """
    target, statuses, start = Target(), Counter[int](), time.perf_counter()

    def tell() -> None:
        seconds = time.perf_counter() - start
        print(f"{sum(statuses.values())} bodies in {seconds:.0f} s: {dict(statuses)}", flush=True)

    async def work() -> None:
        for path, text in todo:
            status = await target.post(path, text)
            statuses[status] += 1
            if status == 200 and len(text) < LONG and path not in CHEAP:
                if len(answered) < ANSWERED:
                    answered.append((path, text))
                else:
                    answered[sum(statuses.values()) % ANSWERED] = path, text
            if sum(statuses.values()) % 10_000 == 0:
                tell()

    async def all_work() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())

    try:
        target.loop.run_until_complete(all_work())
    except ExceptionGroup as failed:
        print(f"FAILED: {failed.exceptions[0]!r}"[:20_000])
        sys.exit(1)
    finally:
        tell()
        target.close()


if __name__ == "__main__":
    main()
