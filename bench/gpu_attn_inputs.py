"""Inputs of attention at the real shapes, and its result in float64: for gpu_attn.py."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from ds4.backends.cuda.kernels.attention import Split, Tiling, attention
from torch import Tensor

Way: TypeAlias = Tiling | Split | str | None

H, C, R, WINDOW = 64, 512, 64, 128
DEVICE = "cuda"


def freqs(base: float) -> Tensor:
    return (base ** -(torch.arange(0, R, 2, device=DEVICE).double() / R)).float()


def planes(slots: int, size: int, exact: bool) -> list[Tensor]:
    shape = slots, size + 1
    if exact:
        return [torch.randn(*shape, C, device=DEVICE)]
    codes = torch.randn(*shape, C - R, device=DEVICE, dtype=torch.float16).mul_(100)
    codes = codes.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.randint(118, 122, (*shape, 8), device=DEVICE, dtype=torch.uint8)
    return [codes, scales, torch.randn(*shape, R, device=DEVICE).bfloat16()]


def decoded(rows: list[Tensor], slot: int, at: Tensor) -> Tensor:
    """Rows `at` of a slot in float64."""
    if len(rows) == 1:
        return rows[0][slot, at].double()
    codes, scales, tail = (p[slot, at] for p in rows)
    power = torch.exp2(scales[:, : (C - R) // 64].double() - 127)
    plain = codes.view(torch.float8_e4m3fn).float().double().unflatten(-1, (-1, 64))
    return torch.cat([(plain * power[..., None]).flatten(-2), tail.double()], -1)


@dataclass
class Inputs:
    """Arguments of `attention`, with an output in panel (T <= 32) or row layout."""

    q: Tensor
    freqs: Tensor
    sink: Tensor
    slot: Tensor
    pos: Tensor
    ids: Tensor | None
    ring: list[Tensor]
    pool: list[Tensor] | None
    ratio: int
    out: Tensor

    def run(self, way: Way = None) -> None:
        T = len(self.q)
        ps, ts = (8 * T, 8) if T <= 32 else (8, H * C)
        given = self.q, self.freqs, self.sink, self.slot, self.pos, self.ids, self.ring, self.pool
        attention(*given, self.ratio, WINDOW, 1e-6, self.out, ps, ts, way)

    def result(self) -> Tensor:
        T = len(self.q)
        if T <= 32:
            return self.out.view(-1, T, 8).permute(1, 0, 2).reshape(T, H, C)
        return self.out.view(T, H, C)

    def keys(self, t: int) -> int:
        p = int(self.pos[t])
        entries = (p + 1) // self.ratio if self.ratio else 0
        return min(p + 1, WINDOW) + (entries if self.ids is None else int((self.ids[t] >= 0).sum()))


def inputs(
    slot: list[int],
    pos: list[int],
    ratio: int,
    k: int = 0,
    context: int = 0,
    exact: bool = False,
    chunk: int = 32,
) -> Inputs:
    T, slots = len(pos), max(slot) + 1
    ring = planes(slots, WINDOW + chunk, exact)
    entries = max(context, max(pos) + 1) // ratio if ratio else 0
    pool = planes(slots, entries, exact) if ratio else None
    ids = None
    if k:
        visible = (torch.tensor(pos, device=DEVICE) + 1) // ratio
        ids = torch.full((T, k), -1, dtype=torch.int32, device=DEVICE)
        for n in visible.unique().tolist():
            rows = (visible == n).nonzero()[:, 0]
            m = min(n, k)
            if m == n:
                ids[rows, :m] = torch.rand(len(rows), n, device=DEVICE).argsort(-1).int()
            else:  # different entries: a stride apart, from a random start
                start = torch.randint(0, n, (len(rows), 1), device=DEVICE)
                step = torch.arange(m, device=DEVICE) * (n // m)
                ids[rows] = ((start + step) % n).int()
    wide = torch.randn(T, H * C + 8192, device=DEVICE)
    out = torch.full((T * H * C,), torch.nan, device=DEVICE)
    return Inputs(
        wide[:, : H * C].unflatten(1, (H, C)),
        freqs(160000.0 if ratio else 10000.0),
        torch.randn(H, device=DEVICE),
        torch.tensor(slot, dtype=torch.int32, device=DEVICE),
        torch.tensor(pos, dtype=torch.int32, device=DEVICE),
        ids,
        ring,
        pool,
        ratio,
        out if exact else out.half(),
    )


def poison(x: Inputs) -> None:
    """NaN in every row that no token may read."""
    for rows, seen in (x.ring, window_rows), (x.pool, entry_rows):
        if rows is None:
            continue
        keep = torch.zeros(rows[0].shape[:2], dtype=torch.bool, device=DEVICE)
        for t in range(len(x.pos)):
            if int(x.pos[t]) >= 0:
                keep[int(x.slot[t]), seen(x, t)] = True
        for plane in rows:
            plane[~keep] = 255 if plane.dtype == torch.uint8 else torch.nan


def window_rows(x: Inputs, t: int) -> Tensor:
    p = int(x.pos[t])
    return torch.arange(max(0, p - WINDOW + 1), p + 1, device=DEVICE) % (x.ring[0].shape[1] - 1)


def entry_rows(x: Inputs, t: int) -> Tensor:
    if x.ids is not None:
        return x.ids[t][x.ids[t] >= 0].long()
    return torch.arange((int(x.pos[t]) + 1) // x.ratio if x.ratio else 0, device=DEVICE)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    plain, tail = x[..., : C - R], x[..., C - R :]
    a, b, cos, sin = tail[..., ::2], tail[..., 1::2], angle.cos(), angle.sin()
    return torch.cat(
        [plain, torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)], -1
    )


def wanted(x: Inputs, t: int) -> Tensor:
    """One token's result in float64, from the definition."""
    p, slot = int(x.pos[t]), int(x.slot[t])
    if p < 0:
        return torch.zeros(H, C, dtype=torch.float64, device=DEVICE)
    angle = (x.pos[t].float() * x.freqs).double()
    q = x.q[t].double()
    q = turned(q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt(), angle)
    keys = decoded(x.ring, slot, window_rows(x, t))
    if x.pool is not None:
        keys = torch.cat([keys, decoded(x.pool, slot, entry_rows(x, t))])
    logits = torch.cat([q @ keys.T * C**-0.5, x.sink.double()[:, None]], -1)
    return turned(logits.softmax(-1)[:, :-1] @ keys, -angle)
