"""Give the packaged demo model an MTP block: `python scripts/train_demo_mtp.py --steps 400`.

Reads build/demo_corpus (scripts/demo_corpus.py) and the model in --folder, whose own weights stay
as they are to the bit; adds `mtp.0.*` in DeepSeek's formats to its model.safetensors, and to its
config.json that there is one. The block learns what the model itself would say two tokens on
(soft targets), from the model's streams (depth 1) and from its own (depth 2).
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
import torch  # noqa: E402
from demo_files import decoded  # noqa: E402
from demo_model import Attention, Balance, prepare  # noqa: E402
from demo_shape import build  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from train_demo import Corpus, _groups, _rate  # noqa: E402
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf  # noqa: E402

from ds4.config import Config  # noqa: E402
from ds4.weights.checkpoint import Checkpoint  # noqa: E402
from ds4.weights.export import (  # noqa: E402
    from_transformers,
    quantize_official,
    write_checkpoint,
)
from ds4.weights.names import expected  # noqa: E402
from ds4.weights.tensor import HostTensor  # noqa: E402

DEPTH_2 = 0.3  # weight of the loss where the block reads its own streams


class Block(nn.Module):
    """The MTP block: one layer, window attention only, and what joins and ends it."""

    def __init__(self, official: dict[str, Any], seed: int, switch: quantize.Switch) -> None:
        super().__init__()
        one = {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
        inner = build(official | one, seed).model
        del inner.embed_tokens
        quantize.attach(inner, switch)
        self.inner, self.window = inner, official["sliding_window"]
        width, eps = official["hidden_size"], official["rms_norm_eps"]
        self.enorm, self.hnorm = (hf.DeepseekV4RMSNorm(width, eps=eps) for _ in range(2))
        self.e_proj, self.h_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        for projection in (self.e_proj, self.h_proj):
            nn.init.eye_(projection.weight)
            projection.weight.data *= 0.5
            rounded = quantize.Rounded("fp8", switch)
            parametrize.register_parametrization(projection, "weight", rounded)

    def forward(self, streams: Tensor, embedded: Tensor) -> Tensor:
        """Streams (B, S, H, D) of slot i, the next token embedded (B, S, D) -> streams."""
        x = self.e_proj(self.enorm(embedded)).unsqueeze(2) + self.h_proj(self.hnorm(streams))
        position = torch.arange(x.shape[1], device=x.device)
        behind = position.unsqueeze(1) - position
        hidden = (behind < 0) | (behind >= self.window)
        mask = torch.zeros_like(behind, dtype=torch.float32).masked_fill(hidden, -torch.inf)
        rotary = self.inner.rotary_emb
        turn = {"main": rotary(embedded, position_ids=position[None], layer_type="main")}
        out: Tensor = self.inner.layers[0](
            x,
            position_embeddings=turn,
            position_ids=position[None],
            attention_mask=mask[None, None],
            cache=None,
        )
        return out

    def collapsed(self, streams: Tensor) -> Tensor:
        """(B, S, H, D) -> (B, S, D): what the model's head reads."""
        normed: Tensor = self.inner.norm(self.inner.hc_head(streams))
        return normed


class Training:
    """The model, frozen, the block, and what trains it."""

    def __init__(self, given: argparse.Namespace, official: dict[str, Any]) -> None:
        self.given, self.cuda = given, given.device == "cuda"
        self.corpus = Corpus(given.corpus, given.length, given.device, given.seed)
        model = build(official, given.seed)
        model.load_state_dict(decoded(given.folder, model))
        self.model = model.to(given.device).eval().requires_grad_(False)
        self.switch = quantize.Switch()
        self.block = Block(official, given.seed, self.switch).to(given.device)
        self.attention: Attention = prepare(self.model, 0.0, given.compile)
        prepare(self.block, given.dropout, given.compile)
        self.balance = Balance(self.block, 1e-3)
        groups = list(_groups(self.block, given.decay))
        self.optimizer = torch.optim.AdamW(groups, given.rate, (0.9, 0.95), fused=self.cuda)
        self.model.model.layers[-1].register_forward_hook(self._note)

    def _note(self, _: nn.Module, __: Any, streams: Tensor) -> None:
        self.streams = streams.detach()

    def losses(self, ids: Tensor) -> tuple[Tensor, list[float]]:
        """The loss, and at each depth the share of best tokens that are the model's own."""
        with torch.autocast(self.given.device, torch.bfloat16, enabled=self.cuda):
            with torch.no_grad():
                logits = self.model(ids, use_cache=False).logits
                embedded = self.model.model.embed_tokens(ids)
            streams, loss, alike = self.streams, torch.zeros((), device=ids.device), []
            for depth in (1, 2):  # slots i, with the token i + depth, say token i + depth + 1
                count = ids.shape[1] - depth
                streams = self.block(streams[:, :count], embedded[:, depth:])
                said = self.model.lm_head(self.block.collapsed(streams)).float()
                wanted = logits[:, depth:].float()
                each = -(wanted.softmax(-1) * said.log_softmax(-1)).sum(-1)
                loss = loss + each.mean() * (1.0 if depth == 1 else DEPTH_2)
                alike.append(float((said.argmax(-1) == wanted.argmax(-1)).float().mean()))
        return loss, alike

    def step(self, number: int, steps: int) -> Tensor:
        self.block.train()
        self.switch.on = number >= steps * 0.6
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
    def evaluate(self) -> list[float]:
        """On held-out text, as the file will hold the block: the share of tokens alike by depth."""
        self.block.eval()
        self.switch.on = True
        windows = report.windows(self.corpus.heldout, self.given.length, self.given.windows)
        each = [self.losses(ids.to(self.given.device))[1] for ids in windows.split(8)]
        return [sum(x) / len(each) for x in zip(*each, strict=True)]


def tensors(block: Block, switch: quantize.Switch) -> dict[str, Any]:
    """The block under the checkpoint's names, float32."""
    found = {k: v.numpy() for k, v in quantize.weights(block, switch).items()}
    inner = {k.removeprefix("inner."): v for k, v in found.items() if k.startswith("inner.")}
    named = {k.removeprefix("layers.0."): v for k, v in from_transformers(inner).items()}
    named |= {k: v for k, v in found.items() if not k.startswith("inner.")}
    return {f"mtp.0.{name}": value for name, value in named.items()}


def merged(folder: Path, added: dict[str, Any], official: dict[str, Any]) -> Any:
    """The tensors of a folder as they are, and the block's in DeepSeek's formats."""
    checkpoint, cfg = Checkpoint(folder), Config.from_file(folder / "config.json")

    def each() -> Iterator[tuple[str, HostTensor]]:
        for name, shape in expected(cfg).items():
            yield name, checkpoint.read(name, shape)
        yield from quantize_official(official, added)

    return list(each())  # read before the file is replaced


def main() -> None:
    given = arguments()
    began = time.monotonic()
    official = json.loads((given.folder / "config.json").read_text())
    training = Training(given, official)
    with training.attention.installed():
        for number in range(given.steps):
            loss = training.step(number, given.steps)
            if number % 20 == 19 or number == given.steps - 1:
                value, seconds = float(loss), time.monotonic() - began
                print(
                    f"step {number + 1}/{given.steps} loss {value:.4f} {seconds:.0f} s", flush=True
                )
                if not math.isfinite(value):
                    raise SystemExit("the loss is not finite")
        alike = training.evaluate()
    layers = official["num_hidden_layers"]
    official["num_nextn_predict_layers"] = 1
    official["compress_ratios"] = [*official["compress_ratios"][:layers], 0]
    found = merged(given.folder, tensors(training.block, training.switch), official)
    given.out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(given.out, found)
    (given.out / "config.json").write_text(json.dumps(official, indent=2) + "\n")
    about = {
        "steps": given.steps,
        "tokens_per_step": given.batch * given.length,
        "seconds": round(time.monotonic() - began),
        "device": torch.cuda.get_device_name() if training.cuda else "a CPU",
        "parameters": sum(p.numel() for p in training.block.parameters()),
        "alike_on_heldout_by_depth": [round(x, 4) for x in alike],
        "command": f"python scripts/train_demo_mtp.py --steps {given.steps} --seed {given.seed} "
        f"--batch {given.batch} --length {given.length}",
    }
    (given.out / "training_mtp.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    demo = ROOT / "ds4" / "demo"
    parser.add_argument("--folder", type=Path, default=demo, help="the model")
    parser.add_argument("--out", type=Path, default=demo)
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "demo_corpus")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, to judge")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
