"""What trains a drafter for the demo model, whose own weights stay as they are to the bit."""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import demo_quantize as quantize
import demo_report as report
import torch
from demo_files import decoded
from demo_model import Attention, Balance, prepare
from demo_shape import build
from torch import Tensor, nn
from train_demo import ROOT, Corpus, _groups, _rate

from ds4.config import Config
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.export import quantize_official, write_checkpoint
from ds4.weights.names import expected
from ds4.weights.tensor import HostTensor

QUANTIZED = 0.4  # of the steps, the last: weights are seen as the file will hold them
# of a model's folder, what is the same beside another drafter
BESIDE = "tokenizer.json", "tokenizer_config.json", "generation_config.json", "heldout.txt"


class Said:
    """What the frozen model makes of some text (B, S): all that a drafter may learn from."""

    def __init__(self, model: Any, ids: Tensor, logits: Tensor, streams: list[Tensor]) -> None:
        self.model, self.ids, self.logits = model, ids, logits
        self.streams = streams  # (B, S, H, D) after each layer

    def embedded(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.model.embed_tokens(ids)
        return embedded

    def head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(x).float()
        return logits


class Training:
    """The model, frozen, a block that drafts for it, and what trains that.

    `make` gives an nn.Module whose `losses(said)` are the loss, and by name what to report, a mean
    for every guess; and whose `tensors()` are its own, under the checkpoint's names, float32.
    """

    def __init__(self, given: argparse.Namespace, make: Callable[..., Any]) -> None:
        self.given, self.cuda = given, given.device == "cuda"
        torch.set_flush_denormal(True)  # a CPU takes ten times as long for the least chances
        self.official = json.loads((given.folder / "config.json").read_text())
        self.corpus = Corpus(given.corpus, given.length, given.device, given.seed)
        model = build(self.official, given.seed)
        model.load_state_dict(decoded(given.folder, model))
        self.model = model.to(given.device).eval().requires_grad_(False)
        self.switch = quantize.Switch()
        self.block = make(self.official, given.seed, self.switch).to(given.device)
        self.attention: Attention = prepare(self.model, 0.0, given.compile)
        prepare(self.block, given.dropout, given.compile)
        self.balance = Balance(self.block, 1e-3)
        groups = list(_groups(self.block, given.decay))
        self.optimizer = torch.optim.AdamW(groups, given.rate, (0.9, 0.95), fused=self.cuda)
        self._streams: list[Tensor] = []
        for layer in self.model.model.layers:
            layer.register_forward_hook(self._note)

    def _note(self, _: nn.Module, __: Any, streams: Tensor) -> None:
        self._streams.append(streams.detach())

    def losses(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self._streams.clear()
        with torch.autocast(self.given.device, torch.bfloat16, enabled=self.cuda):
            with torch.no_grad():
                logits = self.model(ids, use_cache=False).logits
            found: tuple[Tensor, dict[str, Tensor]] = self.block.losses(
                Said(self.model, ids, logits, self._streams)
            )
        return found

    def step(self, number: int, steps: int) -> Tensor:
        self.block.train()
        self.switch.on = number >= steps * (1 - QUANTIZED)
        for group in self.optimizer.param_groups:
            group["lr"] = self.given.rate * _rate(number, steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.losses(self.corpus.batch(self.given.batch))
        loss.backward()
        nn.utils.clip_grad_norm_(self.block.parameters(), 1.0)
        self.optimizer.step()
        self.balance.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """On held-out text, as the file will hold the block."""
        self.block.eval()
        self.switch.on = True
        windows = report.windows(self.corpus.heldout, self.given.length, self.given.windows)
        each = [self.losses(ids.to(self.given.device))[1] for ids in windows.split(8)]
        means = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
        return {name: [round(float(x), 4) for x in mean] for name, mean in means.items()}

    def run(self) -> dict[str, Any]:
        """All steps; what to report."""
        began, steps = time.monotonic(), self.given.steps
        with self.attention.installed():
            for number in range(steps):
                loss = self.step(number, steps)
                if number % 20 == 19 or number == steps - 1:
                    value, seconds = float(loss), time.monotonic() - began
                    print(f"step {number + 1}/{steps} loss {value:.4f} {seconds:.0f} s", flush=True)
                    if not math.isfinite(value):
                        raise SystemExit("the loss is not finite")
            found = self.evaluate()
        return {
            "steps": steps,
            "tokens_per_step": self.given.batch * self.given.length,
            "seconds": round(time.monotonic() - began),
            "device": torch.cuda.get_device_name() if self.cuda else "a CPU",
            "parameters": sum(p.numel() for p in self.block.parameters()),
            **found,
        }


def finish(
    training: Training, layers: int, config: dict[str, Any], about: dict[str, Any], name: str
) -> None:
    """The folder: the model's tensors as they are, the block's in DeepSeek's formats, and both
    configs; `layers` is how many the drafter has, `config` what its kind says besides."""
    given, official = training.given, training.official | config
    ratios = official["compress_ratios"][: official["num_hidden_layers"]]
    official |= {"num_nextn_predict_layers": 1, "compress_ratios": [*ratios, *[0] * layers]}
    given.out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(given.out, _merged(given.folder, training.block.tensors(), official))
    (given.out / "config.json").write_text(json.dumps(official, indent=2) + "\n")
    about["command"] = (
        f"python scripts/train_demo_{name}.py --steps {given.steps} --seed {given.seed} "
        f"--batch {given.batch} --length {given.length}"
    )
    (given.out / f"training_{name}.json").write_text(json.dumps(about, indent=2) + "\n")
    for file in BESIDE if given.out.resolve() != given.folder.resolve() else ():
        shutil.copyfile(given.folder / file, given.out / file)
    print(json.dumps(about))


def _merged(folder: Path, added: dict[str, Any], official: dict[str, Any]) -> Any:
    checkpoint, cfg = Checkpoint(folder), Config.from_file(folder / "config.json")

    def each() -> Iterator[tuple[str, HostTensor]]:
        for name, shape in expected(cfg).items():
            yield name, checkpoint.read(name, shape)
        yield from quantize_official(official, added)

    return list(each())  # read before the file is replaced


def arguments(about: str, out: Path, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--folder", type=Path, default=ROOT / "ds4" / "demo", help="the model")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "demo_corpus")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, to judge")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    return parser
