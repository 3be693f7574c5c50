"""Give the packaged demo model an MTP block: `python scripts/train_demo_mtp.py --steps 400`.

Reads build/demo_corpus (scripts/demo_corpus.py) and the model in --folder, whose own weights stay
as they are to the bit; adds `mtp.0.*` in DeepSeek's formats to its model.safetensors, and to its
config.json that there is one. The block learns what the model itself would say two tokens on
(soft targets), from the model's streams (depth 1) and from its own (depth 2).
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo_quantize as quantize
import torch
from demo_drafter import ROOT, Said, Training, arguments, finish
from demo_shape import build
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from ds4.weights.export import from_transformers

DEPTH_2 = 0.3  # weight of the loss where the block reads its own streams


class Block(nn.Module):
    """The MTP block: one layer, window attention only, and what joins and ends it."""

    def __init__(self, official: dict[str, Any], seed: int, switch: quantize.Switch) -> None:
        super().__init__()
        one = {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
        inner = build(official | one, seed).model
        del inner.embed_tokens
        quantize.attach(inner, switch)
        self.inner, self.window, self.switch = inner, official["sliding_window"], switch
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

    def losses(self, said: Said) -> tuple[Tensor, dict[str, Tensor]]:
        """And at each depth the share of best tokens that are the model's own."""
        streams, embedded = said.streams[-1], said.embedded(said.ids)
        loss, alike = torch.zeros((), device=said.ids.device), []
        for depth in (1, 2):  # slots i, with the token i + depth, say token i + depth + 1
            count = said.ids.shape[1] - depth
            streams = self(streams[:, :count], embedded[:, depth:])
            guess, wanted = said.head(self.collapsed(streams)), said.logits[:, depth:].float()
            each = -(wanted.softmax(-1) * guess.log_softmax(-1)).sum(-1)
            loss = loss + each.mean() * (1.0 if depth == 1 else DEPTH_2)
            alike.append((guess.argmax(-1) == wanted.argmax(-1)).float().mean())
        return loss, {"alike_on_heldout_by_depth": torch.stack(alike)}

    def tensors(self) -> dict[str, Any]:
        found = {k: v.numpy() for k, v in quantize.weights(self, self.switch).items()}
        inner = {k.removeprefix("inner."): v for k, v in found.items() if k.startswith("inner.")}
        named = {k.removeprefix("layers.0."): v for k, v in from_transformers(inner).items()}
        named |= {k: v for k, v in found.items() if not k.startswith("inner.")}
        return {f"mtp.0.{name}": value for name, value in named.items()}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], ROOT / "ds4" / "demo", 400)
    training = Training(parser.parse_args(), Block)
    finish(training, 1, {}, training.run(), "mtp")


if __name__ == "__main__":
    main()
