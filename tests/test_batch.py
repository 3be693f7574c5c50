"""`ds4 batch`: answers in OpenAI's format, and nothing lost or done twice when it is killed."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from ds4.batch.answer import Worker
from ds4.batch.cluster import Cluster
from ds4.batch.journal import Journal
from ds4.batch.lines import BatchError, Job, answered, read_jobs
from ds4.batch.run import run
from ds4.cli import app
from ds4.errors import Ds4Error
from ds4.loader import find_model
from ds4.server.client import ModelInfo
from tests.fake_engine import FakeEngine


def request(name: str, **body: Any) -> dict[str, Any]:
    said = {"model": "demo", "prompt": f"{name} said", "max_tokens": 2} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": said}


def write(path: Path, *lines: Any) -> list[Job]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return read_jobs(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def answers(jobs: list[Job], out: Path, engine: FakeEngine) -> list[dict[str, Any]]:
    """Run a batch on an engine that computes nothing; what was written."""

    async def work() -> None:
        info = ModelInfo("demo", engine.tokenizer.size)
        worker = Worker(engine, info, engine.context, find_model("demo"))
        try:
            await run(jobs, journal, worker.answer, 6, told.append)
        finally:
            await worker.close()

    told: list[dict[str, Any]] = []
    journal = Journal(out, jobs)
    with contextlib.closing(journal):
        asyncio.run(work())
    assert told == lines(out)[-len(told) :]
    return lines(out)


def test_each_line_is_answered_or_says_why_not(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": "demo", "max_tokens": 3}
    jobs = write(
        tmp_path / "in.jsonl",
        request("a"),
        "not json",
        {"custom_id": "b", "url": "/v1/chat/completions", "body": chat},
        request("a"),
        "",
        request("c", max_tokens="many"),
        request("d", stream=True),
        request("e") | {"method": "GET"},
        request("f") | {"url": "/v1/embeddings"},
        {"custom_id": 7},
        "[1]",
    )
    found = {line["id"]: line for line in answers(jobs, tmp_path / "out.jsonl", FakeEngine())}
    each = [found[job.id] for job in jobs]
    assert [line["custom_id"] for line in each] == [
        *("a", None, "b", "a", "c", "d", "e", "f"),
        None,
        None,
    ]
    statuses = [line["response"] and line["response"]["status_code"] for line in each]
    assert statuses == [200, None, 200, None, 400, *5 * [None]]
    assert each[0]["response"]["body"]["object"] == "text_completion"
    assert each[2]["response"]["body"]["choices"][0]["finish_reason"] == "length"
    codes = [line["error"] and line["error"]["code"] for line in each]
    assert codes[1:4] == ["invalid_json_line", None, "duplicate_custom_id"]
    assert codes[5:8] == ["invalid_request", "invalid_method", "invalid_url"]
    assert "custom_id must be a string" in each[8]["error"]["message"]


def test_a_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    jobs = write(tmp_path / "in.jsonl", *(request(str(i)) for i in range(9)))
    out = tmp_path / "out.jsonl"
    first = answers(jobs[:4], out, FakeEngine())
    with out.open("a") as file:
        file.write('{"id": "cut sho')
    engine = FakeEngine(slots=2, max_waiting=1)  # a full queue is tried again
    after = answers(jobs, out, engine)
    assert after[:4] == first
    assert sorted(line["custom_id"] for line in after) == sorted(map(str, range(9)))
    assert len(engine.requests) == 5


def test_an_engine_that_ends_leaves_what_was_answered(tmp_path: Path) -> None:
    class Ending(FakeEngine):
        def step(self) -> list[Any]:
            if len(self.requests) > 7:
                raise RuntimeError("out of memory")
            return super().step()

    jobs = write(tmp_path / "in.jsonl", *(request(str(i)) for i in range(30)))
    with pytest.raises(Ds4Error, match="engine"):
        answers(jobs, tmp_path / "out.jsonl", Ending(slots=2))
    assert len(answers(jobs, tmp_path / "out.jsonl", FakeEngine())) == 30


def test_another_output_or_another_run_is_refused(tmp_path: Path) -> None:
    jobs, out = write(tmp_path / "in.jsonl", request("a")), tmp_path / "out.jsonl"
    journal = Journal(out, jobs)
    with contextlib.closing(journal), pytest.raises(BatchError, match="another ds4 batch"):
        Journal(out, jobs)
    out.write_text('{"id": "batch_req_000009_abc"}\n')
    with pytest.raises(BatchError, match="line 1 is no answer"):
        Journal(out, jobs)
    with pytest.raises(BatchError, match="cannot be read"):
        read_jobs(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "text", ["chapter 1\nchapter 2\nlast line", "one line", '[{"id": 1', "7\n"]
)
def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path, text: str) -> None:
    jobs, book = write(tmp_path / "in.jsonl", request("a")), tmp_path / "book.txt"
    book.write_text(text)
    with pytest.raises(BatchError, match="line 1 is no answer"):
        Journal(book, jobs)
    assert book.read_text() == text


def test_the_first_answer_may_be_cut_short(tmp_path: Path) -> None:
    jobs, out = write(tmp_path / "in.jsonl", request("a")), tmp_path / "out.jsonl"
    whole = json.dumps(answers(jobs, out, FakeEngine())[0])
    for end in 1, 9, 30, len(whole):
        out.write_text(whole[:end])
        with contextlib.closing(Journal(out, jobs)):
            assert out.read_bytes() == b""


def test_requests_are_not_a_place_for_answers(tmp_path: Path) -> None:
    file, link = tmp_path / "same.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(file)
    file.write_text(json.dumps(request("a")))
    for out in file, link:
        with pytest.raises(BatchError, match="holds the requests"):
            app(["batch", str(file), str(out)], standalone_mode=False)
    assert json.loads(file.read_text()) == request("a")


def test_what_json_has_no_number_for_is_a_fault_of_its_line(tmp_path: Path) -> None:
    numbers = "1e999", "-1e999", "NaN", "Infinity"
    line = json.dumps(request("a", max_tokens=0.5))
    jobs = write(tmp_path / "in.jsonl", *(line.replace("0.5", x) for x in numbers), request("b"))
    found = {line["id"]: line for line in answers(jobs, tmp_path / "out.jsonl", FakeEngine())}
    *wrong, right = (found[job.id] for job in jobs)
    assert right["response"]["status_code"] == 200
    assert [line["error"]["code"] for line in wrong] == ["invalid_json_line"] * 4
    assert "1e999 is no finite number" in wrong[0]["error"]["message"]


def test_half_a_surrogate_pair_ends_no_batch(tmp_path: Path) -> None:
    jobs = write(tmp_path / "in.jsonl", request("a\ud800"), request("b"))
    found = answers(jobs, tmp_path / "out.jsonl", FakeEngine())
    assert sorted(line["custom_id"] for line in found) == ["a\ud800", "b"]
    with contextlib.closing(Journal(tmp_path / "out.jsonl", jobs)) as journal:
        assert len(journal.done) == 2


def test_an_exception_is_the_answer_to_its_own_request(tmp_path: Path) -> None:
    async def answer(job: Job) -> dict[str, Any]:
        if job.custom_id == "2":
            raise ZeroDivisionError("two")
        return answered(job, 200, "", {})

    jobs, out = write(tmp_path / "in.jsonl", *(request(str(i)) for i in range(5))), tmp_path / "out"
    with contextlib.closing(Journal(out, jobs)) as journal:
        asyncio.run(run(jobs, journal, answer, 2, print))
    found = {line["custom_id"]: line["response"] for line in lines(out)}
    assert [found[str(i)]["status_code"] for i in range(5)] == [200, 200, 500, 200, 200]
    said = {"message": "ZeroDivisionError: two", "code": "internal_error"}
    assert found["2"]["body"] == {"error": said}


def test_a_workers_exception_does_not_end_a_clusters_batch(tmp_path: Path) -> None:
    class TaskError(Exception):
        cause: Exception

    async def answer(job: Job) -> dict[str, Any]:
        error = TaskError()
        error.cause = causes[int(str(job.custom_id))]
        raise error

    causes = [KeyError("a"), KeyError("b")]
    actor = Mock(ready=Mock(remote=AsyncMock()), answer=Mock(remote=answer))
    ray = Mock(cluster_resources=dict)
    ray.remote.return_value.options.return_value.remote.return_value = actor
    ray.exceptions = Mock(RayActorError=EOFError, RayTaskError=TaskError)
    jobs = write(tmp_path / "in.jsonl", request("0"), request("1"))
    with contextlib.closing(Journal(tmp_path / "out.jsonl", jobs)) as journal:
        asyncio.run(Cluster(ray, {}, Mock(), 1, size=1).run(jobs, journal, print))
    statuses = [line["response"]["status_code"] for line in lines(tmp_path / "out.jsonl")]
    assert statuses == [500, 500]
    causes[:] = [Ds4Error("the engine has ended")] * 2
    journal, ended = Journal(tmp_path / "new.jsonl", jobs), "a worker failed: the engine has ended"
    with contextlib.closing(journal), pytest.raises(Ds4Error, match=ended):
        asyncio.run(Cluster(ray, {}, Mock(), 1, size=1).run(jobs, journal, print))


def test_nothing_is_answered_that_cannot_be_written(tmp_path: Path) -> None:
    async def answer(job: Job) -> dict[str, Any]:
        asked.append(job)
        await asyncio.sleep(0.01)
        return {"id": job.id}

    asked: list[Job] = []
    jobs = write(tmp_path / "in.jsonl", *(request(str(i)) for i in range(300)))
    journal = Journal(tmp_path / "out.jsonl", jobs)
    journal.append = Mock(side_effect=BatchError("the disk is full"))  # type: ignore[method-assign]
    with contextlib.closing(journal), pytest.raises(BatchError, match="full"):
        asyncio.run(run(jobs, journal, answer, 2, [].append))
    assert len(asked) < 300


def test_killed_five_times_each_request_is_answered_once(tmp_path: Path) -> None:
    jobs = write(tmp_path / "in.jsonl", *(request(str(i), max_tokens=1 + i % 5) for i in range(40)))
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "ds4.cli", "batch", str(tmp_path / "in.jsonl"), str(out)]
    command += ["--backend", "reference", "--context", "64", "--slots", "3"]
    rng, before = random.Random(0), b""
    for _ in range(5):
        enough = before.count(b"\n") + rng.randint(1, 5)
        with subprocess.Popen(command) as process:
            while process.poll() is None and count(out) < enough:
                time.sleep(rng.random() / 50)
            process.kill()
        kept = out.read_bytes()
        assert kept.startswith(before)
        before = kept[: kept.rfind(b"\n") + 1]
    assert subprocess.run(command, timeout=300).returncode == 0
    assert out.read_bytes().startswith(before)
    found = lines(out)
    assert [job.id for job in jobs] == sorted(line["id"] for line in found)
    assert all(line["response"]["status_code"] == 200 for line in found)
    usage = {line["custom_id"]: line["response"]["body"]["usage"] for line in found}
    assert all(usage[str(i)]["completion_tokens"] <= 1 + i % 5 for i in range(40))
