"""A batch over a local Ray cluster of several nodes, one of which is killed in the middle of it.

    python -m bench.ray_batch [--nodes 3] [--requests 60] [--backend reference]

Prints what each node answered and how long it took; fails unless each request was answered once.
"""

import argparse
import asyncio
import json
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster as LocalCluster

from ds4.batch.cluster import Cluster, connect
from ds4.batch.journal import Journal
from ds4.batch.lines import read_jobs


class Tagging:
    """A worker that says which node it is on."""

    def __init__(self, worker: Any) -> None:
        import ray

        self._worker = worker
        self._node = ray.get_runtime_context().get_node_id()[:8]

    async def answer(self, job: Any) -> dict[str, Any]:
        line = await self._worker.answer(job)
        return line | {"node": self._node}


def open_tagging(spec: dict[str, Any]) -> Tagging:
    from ds4.batch.answer import open_worker

    return Tagging(open_worker(spec))


def main(nodes: int = 3, requests: int = 60, backend: str = "reference") -> Counter[str]:
    """Answers by node; a third of the way a node is killed."""
    local = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(nodes):
        local.add_node(num_cpus=1)
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        given.write_text("".join(_line(i) for i in range(requests)))
        ray = connect(local.address)
        try:
            return _run(ray, local, given, out, backend)
        finally:
            ray.shutdown()
            local.shutdown()


def _run(ray: Any, local: Any, given: Path, out: Path, backend: str) -> Counter[str]:
    jobs = read_jobs(given)
    journal = Journal(out, jobs)
    spec = {"model": "demo", "backend": backend, "device": "cpu", "context": 128, "slots": 2}
    seen: Counter[str] = Counter()
    killed: list[str] = []
    start = time.perf_counter()

    def told(line: dict[str, Any]) -> None:
        seen[line.get("node", "none")] += 1
        if len(journal.done) == len(jobs) // 3 and not killed:
            victim = next(n for n in local.worker_nodes if n.node_id[:8] == line["node"])
            killed.append(line["node"])
            threading.Thread(target=local.remove_node, args=(victim, False)).start()

    async def work() -> None:
        size = len(local.worker_nodes)
        cluster = Cluster(ray, spec | {"gpus": 1}, open_tagging, at_once=4, size=size)
        await cluster.run(jobs, journal, told)

    asyncio.run(work())
    journal.close()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    print(f"{len(lines)} answers in {time.perf_counter() - start:.1f} s, killed {killed}: {seen}")
    assert sorted(line["id"] for line in lines) == [job.id for job in jobs]
    assert all(line["response"]["status_code"] == 200 for line in lines)
    assert killed
    assert len(seen) > 1
    return seen


def _line(number: int) -> str:
    body = {"model": "demo", "prompt": f"On day {number}", "max_tokens": 8}
    said = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(said) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--backend", default="reference")
    main(**vars(parser.parse_args()))
