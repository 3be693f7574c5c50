"""The fast path on a GPU: against the reference and the plain path."""

import sys, time, traceback
import numpy as np, torch
import ds4
from ds4.backend import open_backend
from ds4.backends.cuda.ops import Cuda as Plain
from ds4.backends.cuda.fast import Fast
from ds4.config import Config
from ds4.plan.flash import flash
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint
from dataclasses import replace


def section(f):
    t = time.time()
    try:
        f()
    except Exception:
        traceback.print_exc()
    print(f"-- {f.__name__} {time.time() - t:.1f} s", flush=True)


def demo():
    text = open("ds4/demo/heldout.txt").read()[:3000]
    ref = ds4.load("demo", "reference", cache="exact", context=1024)
    ids = ref.encode(text)[:300]
    for cache in ("exact", "native"):
        fast = ds4.load("demo", "cuda", cache=cache, context=1024)
        print(type(fast.runner.be).__name__, fast.runner.max_chunk)
        want = (
            ref if cache == "exact" else ds4.load("demo", "reference", cache=cache, context=1024)
        ).logits(ids)
        got = fast.logits(ids)
        d = np.abs(got - want)
        print(
            cache,
            "prefill: max",
            d.max(),
            "mean",
            d.mean(),
            "rel",
            np.linalg.norm(got - want) / np.linalg.norm(want),
            "argmax",
            (got.argmax(-1) == want.argmax(-1)).mean(),
            "nan",
            np.isnan(got).sum(),
            flush=True,
        )
        r = fast.runner
        r.rewind(0, 0)
        rows = []
        for i in ids[:80]:
            rows.append(r.be.download(r.run({0: [i]}))[0].copy())
        got = np.array(rows)
        d = np.abs(got - want[:80])
        print(
            cache,
            "steps: max",
            d.max(),
            "mean",
            d.mean(),
            "argmax",
            (got.argmax(-1) == want[:80].argmax(-1)).mean(),
            "recorded",
            r._forward.recorded,
            flush=True,
        )
        out = fast.generate(ids[:20], max_tokens=64, temperature=0).tokens
        w = ref.generate(ids[:20], max_tokens=64, temperature=0).tokens
        print(
            cache,
            "greedy same as exact reference:",
            sum(a == b for a, b in zip(out, w)),
            "of",
            len(w),
            flush=True,
        )
        print("timings", fast.generate(ids[:20], max_tokens=200, temperature=0).timings)


def real_width(layers=(0, 0, 4, 128, 4), experts=16):
    base = flash()
    cfg = replace(
        base,
        num_hidden_layers=5,
        compress_ratios=tuple(layers),
        n_routed_experts=experts,
        num_hash_layers=3,
    )
    src = SyntheticCheckpoint(cfg)
    ids = np.random.default_rng(0).integers(3, cfg.vocab_size, 900).tolist()
    for cache in ("exact", "native"):
        outs = {}
        for make in (Plain, Fast):
            be = make("cuda", cache)
            w = load_weights(be, cfg, src)
            r = Runner(be, cfg, w, context=1024, slots=2, max_chunk=512)
            a = be.download(r.run({0: ids[:512]}, every_row=True)).copy()
            b = [be.download(r.run({0: [ids[512 + i]], 1: [ids[i]]})).copy() for i in range(40)]
            c = be.download(r.run({0: ids[560:580]}, every_row=True)).copy()
            outs[make] = a, np.concatenate(b), c
            del w, r, be
            torch.cuda.empty_cache()
        for name, x, y in zip(("prefill 512", "decode 2x40", "chunk 20"), outs[Plain], outs[Fast]):
            print(
                cache,
                name,
                "rel",
                np.linalg.norm(x - y) / np.linalg.norm(x),
                "max",
                np.abs(x - y).max(),
                "std",
                x.std(),
                "argmax",
                (x.argmax(-1) == y.argmax(-1)).mean(),
                "nan",
                np.isnan(y).sum(),
                flush=True,
            )


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    section(demo)
    section(real_width)
