"""Train the packaged demo model on one GPU: `python scripts/train_demo.py --minutes 8 --out DIR`.

Reads build/demo_corpus (scripts/demo_corpus.py) and ds4/demo/tokenizer.json; writes config.json,
generation_config.json, model.safetensors, README.md and training.json. What --out holds is always
the best model so far, quantized. `--smoke` is a small run of every part on a CPU, with checks.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import demo_quantize as quantize  # noqa: E402
import demo_report as report  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from demo_files import decoded, export  # noqa: E402
from demo_model import Attention, Balance, prepare, set_topk  # noqa: E402
from demo_shape import OFFICIAL, build  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

WARM_UP = 0.02  # of the steps, to the full learning rate
DENSE = 0.12  # of the steps, in which attention sees every entry and the indexer learns
LAST_RATE = 0.03  # of the full learning rate
TIMED = (15, 10)  # steps before the clock, steps on it
CHECK = 3  # seconds that a check takes, or fewer
RESERVE = 75  # seconds kept for the last evaluation, the samples and the export


# data


class Corpus:
    """The three token files; windows of the training part on the training device."""

    def __init__(self, folder: Path, length: int, device: str, seed: int) -> None:
        self.about = json.loads((folder / "corpus.json").read_text("utf-8"))
        self.train = np.fromfile(folder / "train.bin", np.uint16)
        self.valid = np.fromfile(folder / "valid.bin", np.uint16)
        self.heldout = np.fromfile(folder / "heldout.bin", np.uint16)
        self._ids = torch.from_numpy(self.train.astype(np.int32)).to(device)
        begins = torch.from_numpy(np.flatnonzero(self.train == 0))
        self._begins = begins[begins < len(self.train) - length]
        self._length = length
        self._random = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        """int64 (size, length): most windows begin with a document, the others anywhere."""
        r = self._random
        some = self._begins[torch.randint(len(self._begins), (size,), generator=r)]
        any_ = torch.randint(len(self.train) - self._length, (size,), generator=r)
        start = torch.where(torch.rand(size, generator=r) < 0.6, some, any_).to(self._ids.device)
        offsets = torch.arange(self._length, device=self._ids.device)
        return self._ids[start.unsqueeze(1) + offsets].long()


# one run


class Run:
    """A model in training and everything that goes with it."""

    def __init__(self, given: argparse.Namespace, official: dict[str, Any]) -> None:
        self.given, self.official = given, official
        self.cuda = given.device == "cuda"
        self.corpus = Corpus(given.corpus, given.length, given.device, given.seed)
        self.model = build(official, given.seed).to(given.device)
        self.switch = quantize.Switch()
        quantize.attach(self.model, self.switch)
        self.attention: Attention = prepare(self.model, given.dropout, given.compile)
        self.balance = Balance(self.model, given.balance)
        self.optimizer = torch.optim.AdamW(
            list(_groups(self.model, given.decay)), given.rate, (0.9, 0.95), fused=self.cuda
        )
        self.began = given.began
        self.best = math.inf

    def step(self, number: int, steps: int) -> Tensor:
        """One update; returns the losses of the language model and of the indexers, (2,)."""
        self.model.train()
        self.switch.on = number >= steps * (1 - self.given.quantized)
        dense = number < steps * DENSE
        set_topk(self.model, 1 << 30 if dense else self.official["index_topk"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.given.rate * _rate(number, steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.attention.collect = True
        ids = self.corpus.batch(self.given.batch)
        with torch.autocast(self.given.device, torch.bfloat16, enabled=self.cuda):
            logits = self.model(ids, use_cache=False).logits
        loss = report.next_token_loss(logits, ids)
        index_loss = self.attention.take()
        (loss + index_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.balance.step()
        return torch.stack([loss, index_loss]).detach()

    def evaluate(self) -> float:
        """The validation loss of the weights as they would be exported."""
        before = self.switch.on
        self.model.eval()
        self.switch.on, self.attention.collect = True, False
        set_topk(self.model, self.official["index_topk"])
        ids = report.windows(self.corpus.valid, self.given.length, self.given.valid_windows)
        loss = report.mean_loss(self.model, ids, self.given.batch, self.cuda)
        self.switch.on = before
        return loss

    def keep_best(self) -> float:
        """Evaluate; export if it is the best so far."""
        loss = self.evaluate()
        if loss < self.best:
            self.best = loss
            export(self.given.out, self.official, quantize.weights(self.model, self.switch))
        return loss

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def train(self, steps: int) -> dict[str, Any]:
        """All steps, or as many as the time allows; returns what to report."""
        logged = checked = time.monotonic()
        sums, count = torch.zeros(2, device=self.given.device), 0
        loss, history = math.nan, []
        limit = self.given.minutes * 60 - RESERVE / 2 if self.given.minutes else math.inf
        for number in range(steps):
            sums += self.step(number, steps)
            count += 1
            now = time.monotonic()
            stop = number == steps - 1 or self.elapsed() > limit
            if now - logged > 10 or stop:
                loss, index_loss = (sums / count).tolist()
                rate = count * self.given.batch * self.given.length / (now - logged)
                print(
                    f"step {number + 1}/{steps} loss {loss:.4f} index {index_loss:.4f} "
                    f"{rate:,.0f} tokens/s {self.elapsed():.0f} s",
                    flush=True,
                )
                logged, count = now, 0
                sums.zero_()
            if now - checked > self.given.every or stop:
                valid = self.keep_best()
                history.append({"step": number + 1, "loss": loss, "valid": round(valid, 4)})
                print(f"step {number + 1} validation {valid:.4f} best {self.best:.4f}", flush=True)
                checked = time.monotonic()
            if stop:
                break
        return {"steps": number + 1, "planned": steps, "train_loss": loss, "history": history}


def plan(run: Run) -> int:
    """The number of steps that fit in the time, from a few steps of both kinds."""
    given, (warm, timed) = run.given, TIMED
    seconds = []
    with run.attention.installed():
        for first in (0, 10**9):  # plain, quantized
            for _ in range(warm):
                run.step(first, 10**9)
            start = time.monotonic()
            for _ in range(timed - 1):
                run.step(first, 10**9)
            run.step(first, 10**9).tolist()
            seconds.append((time.monotonic() - start) / timed)
    mean = seconds[0] * (1 - given.quantized) + seconds[1] * given.quantized
    left = given.minutes * 60 - RESERVE - run.elapsed()
    checks = left / given.every * CHECK
    print(f"a step takes {seconds[0]:.3f} s, quantized {seconds[1]:.3f} s", flush=True)
    return max(int((left - checks) / mean), 10)


def _groups(model: nn.Module, decay: float) -> Iterator[dict[str, Any]]:
    every = list(model.parameters())
    yield {"params": [p for p in every if p.ndim >= 2], "weight_decay": decay}
    yield {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0}


def _rate(number: int, steps: int) -> float:
    """The share of the learning rate at a step: up in a line, down along a cosine."""
    warm = max(steps * WARM_UP, 1)
    if number < warm:
        return (number + 1) / (warm + 1)
    done = min((number - warm) / max(steps - warm, 1), 1)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


# the end


def finish(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Judge the exported file with transformers' own code; write README.md and training.json."""
    given, corpus = run.given, run.corpus
    model = build(run.official, given.seed)
    model.load_state_dict(decoded(given.out, model))
    model = model.to(given.device).eval()
    tokenizer = Tokenizer.from_file(str(given.tokenizer))
    vocabulary = run.official["vocab_size"]
    held = report.windows(corpus.heldout, given.length, given.heldout_windows)
    ids = held.numpy().astype(np.uint16).ravel()
    tokens = report.targets(ids, given.length)[1].size
    size = report.bytes_of(ids, tokenizer, vocabulary, given.length)
    losses = report.baselines(corpus.train, corpus.valid, ids, vocabulary, given.length)
    losses["model"] = report.mean_loss(model, held, max(given.batch // 4, 1), False)
    file = given.out / "model.safetensors"
    done = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": file.stat().st_size,
        "seed": given.seed,
        **result,
        "tokens_per_step": given.batch * given.length,
        "epochs": result["steps"] * given.batch * given.length / len(corpus.train),
        "seconds": round(run.elapsed()),
        "device": torch.cuda.get_device_name() if run.cuda else "a CPU",
        "torch": torch.__version__,
        "rate": given.rate,
        "decay": given.decay,
        "dropout": given.dropout,
        "quantized_share": given.quantized,
        "best_validation_loss": round(run.best, 4),
        "heldout": {"tokens": tokens, "bytes": size, "window": given.length}
        | {n: report.scores(losses[n], tokens, size) for n in ("model", "bigram", "unigram")},
        "corpus": corpus.about,
        "command": f"python scripts/train_demo.py --steps {result['planned']} "
        f"--seed {given.seed} --batch {given.batch} --length {given.length} --out ds4/demo",
        "samples": [report.sample(model, tokenizer, p, given.seed) for p in given.prompts],
    }
    report.write_readme(given.out, done)
    return done


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "demo_corpus")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "ds4" / "demo" / "tokenizer.json")
    parser.add_argument("--minutes", type=float, help="choose the steps to fit this time")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=1e-3)
    parser.add_argument("--quantized", type=float, default=0.4, help="share of the steps, the last")
    parser.add_argument("--every", type=float, default=75, help="seconds between checks")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.set_defaults(device="cuda", prompts=report.PROMPTS, valid_windows=96)
    parser.set_defaults(heldout_windows=None)
    return parser


def main() -> None:
    given = arguments().parse_args()
    given.began, official = time.monotonic(), OFFICIAL
    if given.smoke:
        import demo_smoke

        official = demo_smoke.shrink(given)
    if (given.steps is None) == (given.minutes is None):
        raise SystemExit("give one of --steps and --minutes")
    steps = given.steps or plan(Run(given, official))
    run = Run(given, official)  # anew: `--steps` then repeats what `--minutes` did
    with run.attention.installed():
        result = run.train(steps)
    done = finish(run, result)
    print(json.dumps({k: done[k] for k in ("steps", "seconds", "train_loss", "heldout")}))
    print("\n\n".join(done["samples"]))
    if given.smoke:
        demo_smoke.check(run, given.out)


if __name__ == "__main__":
    main()
