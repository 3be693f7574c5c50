"""Our matrix kernels beside those of the library humming-kernels, on the same random bytes.

    python -m bench.humming [--out bench/results/humming.jsonl]     (pip install humming-kernels)

Dense MXFP4 and MXFP8 matrices of 4096 x 8192, and the 256 experts of a layer (both products, for
which humming gets its pairs sorted and gathered, and does no SwiGLU), at few tokens and at many.
Each result is checked against float64; times are medians in CUDA graphs.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ds4.backends.cuda.ahead import compile_only
from ds4.backends.cuda.kernels import dense, gemm, gemv, gemv_staged, moe_gemm
from ds4.backends.cuda.kernels.router import Gate, route_small
from ds4.backends.cuda.qmatrix import QMatrix, assemble, dequantize, one_of

from .kernels import difference, timed
from .machine import describe

TOKENS = (8, 32, 512, 8192)
EXPERTS, PICKS, WIDTH, HIDDEN, LIMIT = 256, 6, 4096, 2048, 10.0
Bytes = tuple[torch.Tensor, torch.Tensor]


def random_bytes(kind: str, *shape: int) -> Bytes:
    """Codes and E8M0 scales of a matrix, or of a stack of them."""
    *stack, rows, cols = shape
    bits = 4 if kind == "mxfp4" else 8
    codes = torch.randint(0, 256, (*stack, rows, cols * bits // 8), device="cuda").byte()
    if kind == "mxfp8":
        codes &= 0xBF  # no NaN
    scales = torch.randint(112, 120, (*stack, rows, cols // 32), device="cuda").byte()
    return codes, scales


def ours(kind: str, rows: int, cols: int, of: Bytes) -> QMatrix:
    return assemble(kind, 4 if kind == "mxfp4" else 8, 32, (rows, cols), *of)


def theirs(kind: str, rows: int, cols: int, of: Bytes) -> Any:
    from humming import dtypes
    from humming.layer import HummingLayer
    from humming.schema import HummingWeightSchema

    schema = HummingWeightSchema(
        b_dtype=dtypes.float4e2m1 if kind == "mxfp4" else dtypes.float8e4m3,
        bs_dtype=dtypes.float8e8m0,
        weight_scale_group_size=32,
    )
    count = of[0].shape[0] if of[0].ndim == 3 else None
    layer = HummingLayer(rows, cols, schema, num_experts=count, torch_dtype=torch.float16).cuda()
    codes, scales = of
    layer.weight.data.copy_(codes.view(torch.int32))
    layer.weight_scale.data.copy_(scales.view(torch.float8_e8m0fnu))
    layer.transform()
    return layer


@dataclass
class Case:
    """One product at one number of tokens: ours and theirs, and how wrong each is."""

    name: str
    tokens: int
    run: Callable[[], Any]
    other: Callable[[], Any]
    errors: Callable[[], tuple[float, float]]


def one_matrix(kind: str, rows: int = 4096, cols: int = 8192) -> Iterator[Case]:
    of = random_bytes(kind, rows, cols)
    m, layer = ours(kind, rows, cols, of), theirs(kind, rows, cols, of)
    halves = gemv_staged.Halves("cuda")
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, device="cuda").half()
        out = torch.empty(tokens, rows, device="cuda")
        panel = gemv.to_panel(x[: gemv.MOST_TOKENS].float())

        def few(x: Any = panel, out: Any = out) -> None:
            product = gemv.Product(m, x, out)
            if not gemv_staged.linears([product], len(out), halves):
                gemv.linears([product], len(out))

        def many(x: Any = x, out: Any = out) -> None:
            dense.linears([m], x, [out])

        def errors(x: Any = x, out: Any = out) -> tuple[float, float]:
            want = x[:64].double() @ dequantize(m)[0].double().T
            return difference(out[:64], want), difference(layer(x)[:64], want)

        run = few if tokens <= gemv.MOST_TOKENS else many
        yield Case(f"{kind} {rows} x {cols}", tokens, run, lambda x=x: layer(x), errors)  # type: ignore[misc]


def experts() -> Iterator[Case]:
    """Gate and up, and down, of all pairs: the shared expert and the sum are left out."""
    shapes = (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)
    parts = [random_bytes("mxfp4", EXPERTS, *shape) for shape in shapes]
    routed = tuple(ours("mxfp4", *shape, of) for shape, of in zip(shapes, parts, strict=True))
    codes, scales = (torch.cat(pair, 1) for pair in zip(*parts[:2], strict=True))
    first = theirs("mxfp4", 2 * HIDDEN, WIDTH, (codes, scales))
    second = theirs("mxfp4", WIDTH, HIDDEN, parts[2])
    for tokens in TOKENS:
        x = torch.randn(tokens, WIDTH, device="cuda").half() / 8
        run, ids, weights = (few_tokens if tokens <= gemv.MOST_TOKENS else many_tokens)(routed, x)
        order, counts = ids.argsort(stable=True), ids.bincount(minlength=EXPERTS)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        pairs = x[order // PICKS].contiguous()
        hidden = torch.randn(len(ids), HIDDEN, device="cuda").half()
        grouped = {
            "expert_layout": offsets,
            "compute_config": {"gemm_type": "grouped_contiguous"},
        }

        def other(pairs: Any = pairs, hidden: Any = hidden, grouped: Any = grouped) -> Any:
            return first(pairs, **grouped), second(hidden, **grouped)

        expert = int(counts.argmax())
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))

        def errors(
            of: Any = (pairs[rows], rows, expert, order[rows], weights),
            run: Any = run,
            other: Any = other,
        ) -> tuple[float, float]:
            some, rows, expert, mine, weights = of
            w1, w3, w2 = (dequantize(one_of(m, expert))[0].double() for m in routed)
            gate, up = some.double() @ w1.T, some.double() @ w3.T
            h = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
            want = (h * weights[mine, None]) @ w2.T
            first_want = torch.cat([gate, up], 1)
            return difference(run()[mine], want), difference(other()[0][rows], first_want)

        yield Case("256 mxfp4 experts", tokens, run, other, errors)


Run = Callable[[], Any]  # gives (pairs, WIDTH)


def few_tokens(routed: tuple[QMatrix, ...], x: torch.Tensor) -> tuple[Run, Any, Any]:
    """Our decode path, the experts of each pair, and their weights."""
    tokens = len(x)
    gate = Gate(torch.zeros(EXPERTS, device="cuda"), None, EXPERTS, PICKS, 1.5)
    zeros = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    ids, weights, tiles = route_small(gate, torch.randn(tokens, EXPERTS, device="cuda"), zeros)
    panel = gemv.to_panel(x.float())
    todo = gemv.Experts(routed, routed, panel, (tokens, PICKS), LIMIT, has_shared=False)
    return (
        lambda: todo.finish(tiles, weights)[0].flatten(0, 1),
        ids.flatten().long(),
        weights.flatten(),
    )


def many_tokens(routed: tuple[QMatrix, ...], x: torch.Tensor) -> tuple[Run, Any, Any]:
    ids = torch.rand(len(x), EXPERTS, device="cuda").topk(PICKS, -1)[1].flatten()
    offsets = torch.nn.functional.pad(ids.bincount(minlength=EXPERTS).cumsum(0), (1, 0))
    weights = torch.ones(len(ids), device="cuda")
    plan = gemm.Routed(ids.argsort(stable=True).int(), offsets.int(), weights, PICKS)
    ordered = gemm.permute(x, routed[0])
    return lambda: moe_gemm.each_expert(routed, ordered, plan, LIMIT), ids, weights


def measured(case: Case) -> dict[str, Any]:
    case.run()
    errors = case.errors()
    us = [round(timed("cuda", [f] * 2) * 1e6, 1) for f in (case.run, case.other)]
    print(
        f"{case.name}, {case.tokens} tokens: ours {us[0]} us, humming {us[1]} us; errors {errors}",
        flush=True,
    )
    return {"bench": "humming", "case": case.name, "tokens": case.tokens, "us": us[0],
            "humming_us": us[1], "error": errors[0], "humming_error": errors[1]}  # fmt: skip


def compiled(cases: list[Case]) -> None:
    """Every kernel compiled, theirs by processes that their calls start, with what became of it."""
    since = time.perf_counter()

    def one(case: Case) -> None:
        said = "compiled"
        try:
            case.other()
        except Exception as error:  # which `measured` meets again
            said = repr(error)[:400]
        spent = time.perf_counter() - since
        print(f"{case.name}, {case.tokens} tokens: {said}, {spent:.0f} s", flush=True)

    with compile_only():
        for case in cases:
            case.run()
    print(f"ours compiled, {time.perf_counter() - since:.0f} s", flush=True)
    with ThreadPoolExecutor(max(1, len(cases))) as pool:
        list(pool.map(one, cases))
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="ours and humming-kernels")
    parser.add_argument("--out", help="append a JSON line for each case")
    args = parser.parse_args()
    since, facts = time.perf_counter(), describe("cuda")
    found: list[Case] = []
    for part in (lambda: one_matrix("mxfp4"), lambda: one_matrix("mxfp8"), experts):
        try:
            found += part()
        except Exception as error:  # theirs may not take a format: the others still count
            print("failed:", repr(error)[:400], flush=True)
        print(f"{len(found)} cases, {time.perf_counter() - since:.0f} s", flush=True)
    compiled(found)
    print(f"compiled, {time.perf_counter() - since:.0f} s", flush=True)
    for case in found:
        try:
            one = measured(case)
        except Exception as error:
            print(f"{case.name}, {case.tokens} tokens failed: {error!r}"[:400], flush=True)
            continue
        if args.out:
            with Path(args.out).open("a") as out:
                out.write(json.dumps(facts | one) + "\n")


if __name__ == "__main__":
    main()
