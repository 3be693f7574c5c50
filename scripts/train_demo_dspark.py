"""Give the demo model a DSpark drafter: `python scripts/train_demo_dspark.py --steps 1500`.

Reads build/demo_corpus (scripts/demo_corpus.py) and the model in --folder; writes to --out a model
of the same weights with `mtp.0.*` to `mtp.2.*` in DeepSeek's formats, which is not packaged. The
stages learn what the model itself would say of text that really followed: of a block at a random
place, guess j is told the tokens before it. The confidence learns what share of such guesses is
kept, which is one less half the distance of the two distributions.
"""

import sys
from pathlib import Path
from types import MethodType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo_quantize as quantize
import torch
import torch.nn.functional as F
from demo_drafter import ROOT, Said, Training, arguments, finish
from demo_shape import build
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from ds4.weights.export import from_transformers, storage_format
from ds4.weights.names import DSPARK_STAGES

SIZE, RANK, NOISE = 5, 128, 2  # tokens of a block; of the Markov tables; the padding token
ANCHORS = 48  # blocks of each text in a step
ENTROPY, APART, SURE = 0.1, 0.9, 1.0  # weights of the three losses
ACROSS = {
    "main_proj": "mtp.0.main_proj.weight",
    "main_norm": "mtp.0.main_norm.weight",
    "w1": "mtp.2.markov_head.markov_w1.weight",
    "w2": "mtp.2.markov_head.markov_w2.weight",
    "confidence": "mtp.2.confidence_head.proj.weight",
}


def attend(self: nn.Module, x: Tensor, rows: Tensor, mask: Tensor, turn: Any) -> tuple[Tensor, Any]:
    """Blocks (N, SIZE, D) that see themselves and rows (N, W, C), in place of causal attention."""
    cos, sin = turn
    q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))).unflatten(-1, (-1, self.head_dim))
    q = hf.apply_rotary_pos_emb(self.q_b_norm(q.transpose(1, 2)), cos, sin)
    keys = torch.cat([rows, key_values(self, x, turn)], 1)[:, None]
    out, _ = hf.eager_attention_forward(self, q, keys, keys, mask, self.scaling)
    out = hf.apply_rotary_pos_emb(out.transpose(1, 2), cos, -sin).transpose(1, 2)
    grouped = self.o_a_proj(out.reshape(*x.shape[:2], self.config.o_groups, -1))
    return self.o_b_proj(grouped.flatten(2)), None


def key_values(attention: nn.Module, x: Tensor, turn: Any) -> Tensor:
    rows = attention.kv_norm(attention.kv_proj(x))
    turned: Tensor = hf.apply_rotary_pos_emb(rows[:, None], *turn)[:, 0]
    return turned


class Block(nn.Module):
    """Three layers over blocks of tokens, and what they read and end in (spec, Appendix A)."""

    def __init__(self, official: dict[str, Any], seed: int, switch: quantize.Switch) -> None:
        super().__init__()
        layers = official["num_hidden_layers"]
        self.taps = range(layers - 3, layers)
        stages = {"num_hidden_layers": DSPARK_STAGES, "compress_ratios": [0] * DSPARK_STAGES}
        inner = build(official | stages | {"num_hash_layers": 0}, seed).model
        del inner.embed_tokens
        quantize.attach(inner, switch)
        for layer in inner.layers:
            layer.self_attn.forward = MethodType(attend, layer.self_attn)
        self.inner, self.window, self.switch = inner, official["sliding_window"], switch
        width, words = official["hidden_size"], official["vocab_size"]
        self.main_proj = nn.Linear(len(self.taps) * width, width, bias=False)
        self.main_norm = hf.DeepseekV4RMSNorm(width, eps=official["rms_norm_eps"])
        self.w1, self.w2 = nn.Embedding(words, RANK), nn.Linear(RANK, words, bias=False)
        self.confidence = nn.Linear(width + RANK, 1, bias=False)
        nn.init.normal_(self.w1.weight, std=0.02)
        nn.init.normal_(self.w2.weight, std=0.02)
        nn.init.zeros_(self.confidence.weight)
        for name, file in ACROSS.items():
            rounded = quantize.Rounded(storage_format(file), switch)
            parametrize.register_parametrization(getattr(self, name), "weight", rounded)

    def forward(self, said: Said, at: Tensor) -> Tensor:
        """Blocks that begin at (B, A) -> what the last stage leaves of each, (B, A, SIZE, D)."""
        (texts, length), (_, anchors) = said.ids.shape, at.shape
        means = torch.cat([said.streams[tap].mean(2) for tap in self.taps], -1)
        context = self.main_norm(self.main_proj(means))
        before = at[..., None] - self.window + torch.arange(self.window, device=at.device)
        mask = torch.zeros(before.shape, device=at.device).masked_fill(before < 0, -torch.inf)
        mask = F.pad(mask, (0, SIZE)).flatten(0, 1)[:, None, None]
        of = torch.arange(texts, device=at.device)[:, None, None]
        ids = torch.full((*at.shape, SIZE), NOISE, device=at.device)
        ids[..., 0] = said.ids.gather(1, at)
        x = said.embedded(ids).flatten(0, 1)
        place = (at[..., None] + torch.arange(SIZE, device=at.device)).flatten(0, 1)
        turn = self.inner.rotary_emb(x, position_ids=place, layer_type="main")
        all_ = torch.arange(length, device=at.device)[None]
        turn_all = self.inner.rotary_emb(x, position_ids=all_, layer_type="main")
        h = x[:, :, None].expand(-1, -1, said.streams[0].shape[2], -1)
        for layer in self.inner.layers:
            rows = key_values(layer.self_attn, context, turn_all)
            rows = rows[of, before.clamp(min=0)].flatten(0, 1)
            h = layer(h, rows=rows, mask=mask, turn=turn)
        out: Tensor = self.inner.hc_head(h)
        return out.unflatten(0, (texts, anchors))

    def losses(self, said: Said) -> tuple[Tensor, dict[str, Tensor]]:
        """And for each place: how much of the two distributions is common, the share of best
        tokens that are the model's own, what the confidence says on average, and its error."""
        at = self._anchors(said.ids)
        hidden = self(said, at)
        later = at[..., None] + torch.arange(SIZE, device=at.device)
        of = torch.arange(len(at), device=at.device)[:, None, None]
        previous = self.w1(said.ids[of, later])
        guess = said.head(self.inner.norm(hidden)) + self.w2(previous).float()
        wanted = said.logits[of, later].float()
        sure = self.confidence(torch.cat([hidden, previous], -1))[..., 0].float()
        p, q = wanted.softmax(-1), guess.softmax(-1)
        apart = (p - q).abs().sum(-1)
        entropy = -(p * guess.log_softmax(-1)).sum(-1)
        kept = (1 - apart.detach() / 2).clamp(0, 1)
        doubt = F.binary_cross_entropy_with_logits(sure, kept, reduction="none")
        weight = torch.exp(-torch.arange(SIZE, device=at.device) / SIZE)
        loss = (weight * (ENTROPY * entropy + APART * apart + SURE * doubt)).mean()
        alike = (guess.argmax(-1) == wanted.argmax(-1)).float()
        return loss, {
            "common_on_heldout": kept.mean((0, 1)),
            "alike_on_heldout": alike.mean((0, 1)),
            "said": sure.sigmoid().mean((0, 1)),
            "said_wrong_by": (sure.sigmoid() - kept).abs().mean((0, 1)),
        }

    def _anchors(self, ids: Tensor) -> Tensor:
        """Where blocks begin, int64 (B, ANCHORS): the same in every evaluation."""
        texts, length = ids.shape
        shape, last = (texts, ANCHORS), length - SIZE
        if not self.training:
            return torch.linspace(0, last, ANCHORS, device=ids.device).long().expand(shape)
        return torch.randint(last + 1, shape, device=ids.device)

    def tensors(self) -> dict[str, Any]:
        found = {k: v.numpy() for k, v in quantize.weights(self, self.switch).items()}
        inner = {k.removeprefix("inner."): v for k, v in found.items() if k.startswith("inner.")}
        named = {file: found[f"{name}.weight"] for name, file in ACROSS.items()}
        for name, value in from_transformers(inner).items():
            is_layer = name.startswith("layers.")
            named[f"mtp.{name.removeprefix('layers.')}" if is_layer else f"mtp.2.{name}"] = value
        return named


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], ROOT / "build" / "demo_dspark", 1500)
    training = Training(parser.parse_args(), Block)
    config = {
        "dspark_block_size": SIZE,
        "dspark_markov_rank": RANK,
        "dspark_noise_token_id": NOISE,
        "dspark_target_layer_ids": list(training.block.taps),
    }
    finish(training, DSPARK_STAGES, config, training.run(), "dspark")


if __name__ == "__main__":
    main()
