"""What is said about the demo: its perplexity beside two baselines, samples, README.md."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

PROMPTS = ("Once upon a time", "The old man looked at the sea and said", "It was a dark night, and")


# the model


def next_token_loss(logits: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Nats; that a document begins is not to be predicted."""
    after = ids[:, 1:].flatten()
    after = after.masked_fill(after == 0, -100)
    before = logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(before, after, reduction=reduction)


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor, batch: int, autocast: bool) -> float:
    """Nats a token over all but the first of each window, int64 (n, length)."""
    total, device = 0.0, next(model.parameters()).device
    for ids in windows.split(batch):
        ids = ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(ids, use_cache=False).logits
        total += float(next_token_loss(logits, ids, "sum"))
    return total / int((windows[:, 1:] != 0).sum())


def windows(ids: np.ndarray, length: int, most: int | None = None) -> Tensor:
    """Consecutive windows; with `most`, that many from all over."""
    whole = torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)
    return whole if most is None else whole[:: max(len(whole) // most, 1)][:most]


@torch.no_grad()
def sample(model: DeepseekV4ForCausalLM, tokenizer: Any, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    ids = [0, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    device = next(model.parameters()).device
    out = model.generate(
        torch.tensor([ids], device=device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
        max_new_tokens=80,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=1,
    )
    return tokenizer.decode(out[0, 1:].tolist(), skip_special_tokens=True)


# the baselines


def baselines(
    train: np.ndarray, valid: np.ndarray, heldout: np.ndarray, vocabulary: int, length: int
) -> dict[str, float]:
    """Nats a token of a unigram and of an interpolated bigram model, on the model's own targets.

    Both are counted on `train`, add-one smoothed; the share of the bigram is chosen on `valid`.
    """
    single = np.bincount(train, minlength=vocabulary) + 1.0
    single /= single.sum()
    pairs = np.bincount(
        train[:-1].astype(np.int64) * vocabulary + train[1:], minlength=vocabulary**2
    )
    seen = pairs.reshape(vocabulary, vocabulary).sum(1)

    def loss(ids: np.ndarray, share: float) -> float:
        before, after = targets(ids, length)
        double = pairs[before * vocabulary + after] / np.maximum(seen[before], 1)
        return float(-np.log(share * double + (1 - share) * single[after]).mean())

    share = min(np.arange(0.05, 1, 0.05), key=lambda s: loss(valid, s))
    return {"unigram": loss(heldout, 0), "bigram": loss(heldout, share), "share": float(share)}


def targets(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What is to be predicted, the second, and the token before it, the first."""
    whole = ids[: len(ids) // length * length].astype(np.int64).reshape(-1, length)
    before, after = whole[:, :-1].ravel(), whole[:, 1:].ravel()
    return before[after != 0], after[after != 0]


def bytes_of(ids: np.ndarray, tokenizer: Any, vocabulary: int, length: int) -> int:
    """UTF-8 bytes of the predicted tokens; control tokens have none."""
    spelled = [tokenizer.id_to_token(i) or "" for i in range(vocabulary)]
    control = set(tokenizer.get_added_tokens_decoder())
    sizes = np.array([0 if i in control else len(text) for i, text in enumerate(spelled)])
    return int(sizes[targets(ids, length)[1]].sum())


def scores(nats: float, tokens: int, size: int) -> dict[str, float]:
    return {
        "loss": round(nats, 4),
        "perplexity": round(math.exp(nats), 2),
        "bits_per_byte": round(nats * tokens / size / math.log(2), 3),
    }


# the page


def write_readme(folder: Path, report: dict[str, Any]) -> None:
    corpus, held = report["corpus"], report["heldout"]
    lines = [
        "# The demo model",
        "",
        "A small DeepSeek-V4 with every branch of the real one, trained on public-domain English",
        "so that `ds4` has something to run without a download. It writes recognisable English,",
        "no more. The files have DeepSeek's own format: FP4 experts, FP8 matrices, official names.",
        "",
        f"- {report['parameters']:,} parameters, {report['file_bytes']:,} bytes",
        f"- {report['steps']:,} steps of {report['tokens_per_step']:,} tokens "
        f"({report['epochs']:.1f} times the corpus), seed {report['seed']}, "
        f"{report['seconds']:.0f} s on {report['device']}",
        f"- the last {report['quantized_share']:.0%} of the steps saw the weights as the file "
        "holds them",
        f"- training loss at the end: {report['train_loss']:.3f} nats a token",
        "",
        f"Held-out text, {held['tokens']:,} tokens in windows of {held['window']:,}, by "
        "transformers in float32 on the weights decoded from the file:",
        "",
        "| | perplexity | bits per byte |",
        "|---|---|---|",
    ]
    for name in ("model", "bigram", "unigram"):
        row = held[name]
        lines.append(f"| {name} | {row['perplexity']} | {row['bits_per_byte']} |")
    lines += [
        "",
        "The bigram model is interpolated with the unigram; both are counted on the training text.",
        "`heldout.txt` is part of the held-out text, `calibration.txt` of the text that chose the "
        "step. "
        f"Corpus: {corpus['train']['tokens']:,} training tokens from",
        "",
        "| package | sha256 | texts | licence of the package | characters |",
        "|---|---|---|---|---|",
    ]
    for s in corpus["sources"]:
        lines.append(
            f"| {s['package']} | {s['sha256']} | {s['texts']} | {s['package_licence']} "
            f"| {s['characters']:,} |"
        )
    lines += ["", "Samples (temperature 0.7, top-p 0.9, first draw):", ""]
    lines += [f"> {text.strip()}\n".replace("\n\n", "\n>\n> ") for text in report["samples"]]
    lines += [
        "Made by:",
        "",
        "    python scripts/demo_corpus.py",
        f"    {report['command']}",
        "",
        "The texts are in the public domain in the United States; the model is under this "
        "project's licence.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
