"""Loads and their figures, on a clock that only the engine moves: every number is known."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ds4.bench import cost, measure
from ds4.bench.load import Load, Record
from ds4.bench.target import EngineTarget
from ds4.bench.texts import PlainTexts, TokenTexts
from ds4.bench.workload import Workload, read_workloads
from ds4.engine.api import Event, Finished, Request, Stats, Tokens
from ds4.errors import BenchError, PromptError
from tests.power_sim import Clock


@dataclass
class Metronome:
    """An engine whose prompts take `prefill_s` and whose steps take 10 ms, a token for each."""

    clock: Clock
    prefill_s: float = 0.1
    fail: bool = False
    running: dict[str, list[int]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    most: int = 0

    def submit(self, request: Request) -> None:
        if self.fail:
            raise PromptError("no such token")
        self.requests.append(request)
        self.running[request.id] = [0, request.params.max_tokens or 0, len(request.prompt)]

    def step(self) -> list[Event]:
        events: list[Event] = []
        self.most = max(self.most, len(self.running))
        fresh = [name for name, state in self.running.items() if not state[0]]
        self.clock.sleep(self.prefill_s if fresh else 0.01)
        for name in fresh or list(self.running):
            state = self.running[name]
            state[0] += 1
            events.append(Tokens(name, [7]))
            if state[0] == state[1]:
                del self.running[name]
                events.append(Finished(name, "length", state[2], 0, state[1]))
        return events

    def has_work(self) -> bool:
        return bool(self.running)

    def cancel(self, request_id: str) -> None: ...

    def stats(self) -> Stats:
        return Stats()

    def close(self) -> None: ...


def ran(workload: Workload, **options: Any) -> tuple[Load, Metronome]:
    clock = Clock()
    engine = Metronome(clock, **options)
    target = EngineTarget(
        engine,
        lambda seed: TokenTexts(list(range(1000)), 0, seed),
        {"recipe": "none"},
        None,
        clock=clock,
        sleep=clock.sleep,
    )
    load = Load(workload, target.texts(1), clock(), 1)
    target.run(load)
    return load, engine


SINGLE = Workload("single", prompt_tokens=50, output_tokens=11, requests=4, seconds=0)


def test_one_at_a_time_has_the_latencies_of_the_engine() -> None:
    load, engine = ran(SINGLE)
    assert [len(request.prompt) for request in engine.requests] == [50] * 4
    assert len({tuple(request.prompt[:4]) for request in engine.requests}) == 4
    at = measure.window(load)
    found = measure.figures(SINGLE, load.records, at)
    assert at.end - at.start == pytest.approx(4 * 0.2)
    assert found["ttft_s"]["p50"] == pytest.approx(0.1)
    assert found["tpot_s"]["p99"] == pytest.approx(0.01)
    assert found["itl_s"]["p90"] == pytest.approx(0.01)
    assert found["e2e_s"]["p50"] == pytest.approx(0.2)
    assert found["output_tok_s"] == pytest.approx(44 / 0.8)
    assert found["user_tok_s"] == pytest.approx(100)
    assert found["prefill_tok_s"] == pytest.approx(500)
    assert (found["prompt_tokens"], found["output_tokens"], found["failed"]) == (200, 44, 0)


def test_concurrency_is_kept_and_the_window_is_where_it_was() -> None:
    workload = replace(SINGLE, concurrency=3, requests=12)
    load, engine = ran(workload)
    assert engine.most == 3
    assert len(load.records) == 12
    at = measure.window(load)
    firsts = sorted(record.first for record in load.records if record.first is not None)
    assert not at.whole
    assert at.start == firsts[2]
    assert at.end < max(record.end for record in load.records if record.end is not None) + 1e-9
    counted = measure.figures(workload, load.records, at)["output_tokens"]
    assert 0 < counted <= sum(record.output_tokens for record in load.records)


def test_a_load_lasts_as_long_as_was_asked_and_no_longer() -> None:
    assert len(ran(replace(SINGLE, seconds=2.9))[0].records) == 15
    assert len(ran(replace(SINGLE, requests=100, most_seconds=0.95))[0].records) == 5


def test_arrivals_are_poisson_and_start_when_they_are_due() -> None:
    workload = replace(SINGLE, kind="poisson", rate=20.0, requests=400, ttft_s=0.3, tpot_s=0.02)
    load, _ = ran(workload, prefill_s=0.001)
    starts = [record.start for record in load.records]
    assert len(starts) == 400
    assert (starts[-1] - starts[0]) / 399 == pytest.approx(1 / 20, rel=0.15)
    found = measure.figures(workload, load.records, measure.window(load))
    assert found["good_share"] == 1.0
    assert found["goodput"] == pytest.approx(20, rel=0.15)
    strict = replace(workload, tpot_s=0.005)
    assert measure.figures(strict, load.records, measure.window(load))["goodput"] == 0


def test_conversations_grow_and_share_their_opening() -> None:
    workload = replace(SINGLE, kind="agent", turns=3, shared_tokens=20, concurrency=2, requests=6)
    engine = ran(workload)[1]
    assert engine.most == 2
    prompts = [list(request.prompt) for request in engine.requests]
    assert sorted(map(len, prompts)) == [70, 70, 131, 131, 192, 192]
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 1
    for longer in (prompt for prompt in prompts if len(prompt) > 70):
        before = next(p for p in prompts if len(p) == len(longer) - 61 and p == longer[: len(p)])
        assert longer[len(before) : len(before) + 11] == [7] * 11
    assert workload.context == 20 + 3 * 61


def test_nothing_is_measured_where_all_fails() -> None:
    with pytest.raises(BenchError, match="single: no such token"):
        ran(SINGLE, fail=True)


def test_tokens_that_come_together_share_the_gap() -> None:
    record = Record("r", 0.0, first=1.0, end=2.0, tokens=[(1.0, 1), (1.4, 3), (2.0, 4)])
    record.output_tokens = 4
    assert measure.gaps(record) == pytest.approx([0.2, 0.2, 0.6])
    assert measure.tpot_of(record) == pytest.approx(1 / 3)
    assert measure.shares([]) is None


def test_joules_a_token_gross_and_net() -> None:
    found = {"output_tokens": 100, "prompt_tokens": 400, "requests": 2}
    energy = measure.energy_figures(500.0, 10.0, found, 20.0)
    assert energy["watts"] == 50
    assert energy["j_per_output_token"] == 5
    assert energy["net_j_per_output_token"] == 3
    assert energy["tokens_per_j"] == 0.2
    assert energy["j_per_prompt_token"] is None
    assert measure.energy_figures(500.0, 10.0, found, None)["net_joules"] is None
    only = measure.energy_figures(500.0, 10.0, found | {"output_tokens": 2}, None)
    assert only["j_per_prompt_token"] == 1.25
    assert measure.decode_only(500.0, found, 0.5) == 3.0


# workload files


def test_packaged_workloads_read_and_expand() -> None:
    names = [one.name for one in read_workloads("standard")]
    assert "closed-512@32" in names
    assert [one.name for one in read_workloads("standard", ["closed-512"])] == [
        f"closed-512@{n}" for n in (1, 2, 4, 8, 16, 32)
    ]
    budget = sum(1 + one.most_seconds * (1 + one.prefill) for one in read_workloads("quick"))
    assert budget < 120


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no \\[\\[workload\\]\\]"),
        ("[[workload]]\nprompt_tokens = 5", "needs a name"),
        ('[[workload]]\nname = "a"\ntokens = 5', "workload a: no field is called tokens"),
        ('[[workload]]\nname = "a"\nconcurrency = [1, 0]', "workload a@0: concurrency must"),
        ('[[workload]]\nname = "a"\nkind = "burst"', "workload a: kind must be"),
        ('[[workload]]\nname = "a"\n[[workload]]\nname = "a"', "a is there twice"),
        ("[[workload", "w.toml: "),
    ],
)
def test_a_wrong_workload_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "w.toml"
    file.write_text(text)
    with pytest.raises(BenchError, match=said):
        read_workloads(file)


def test_keys_tell_workloads_apart_but_not_how_long_they_ran() -> None:
    assert SINGLE.key == replace(SINGLE, name="x", seconds=9, requests=50).key
    assert SINGLE.key != replace(SINGLE, output_tokens=12).key


def test_prompts_as_text_have_about_the_length() -> None:
    texts = PlainTexts("some words that come again " * 40, 4.0, seed=3)
    prompt = texts.new(500)
    assert isinstance(prompt, str)
    assert len(prompt) == 2000
    assert texts.join("a", "b", "c") == "abc"


# money


def test_costs_are_those_of_the_worked_example() -> None:
    mac = cost.cost(30, 200, 0, cost.Terms(9500, 0.5, 0.20, 5))
    assert mac.total == pytest.approx(4.39, abs=0.01)
    assert mac.electricity == pytest.approx(0.37, abs=0.005)
    rig = cost.cost(120, 900, 0, cost.Terms(9000, 0.5, 0.20, 5))
    assert rig.total == pytest.approx(1.37, abs=0.01)
    assert rig.electricity == pytest.approx(0.42, abs=0.005)
    assert rig.tokens_per_dollar == pytest.approx(1e6 / 1.368, rel=0.01)


def test_unknown_parts_of_a_cost_stay_unknown() -> None:
    assert cost.cost(30, None, None, cost.Terms(9500)).electricity is None
    assert cost.cost(30, None, None, cost.Terms(9500)).total is None
    assert cost.cost(30, 100, None, cost.Terms(None)).total is None
    idle = cost.cost(30, 100, 50, cost.Terms(0, duty=0.5, tariff=1.0, years=1))
    still = cost.cost(30, 150, 0, cost.Terms(0, duty=0.5, tariff=1.0, years=1))
    assert idle.electricity == pytest.approx(still.electricity)
    with pytest.raises(BenchError, match="duty"):
        cost.Terms(duty=0)
