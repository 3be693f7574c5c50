"""Our matrix kernels beside those of the library humming-kernels, on the same random bytes.

    python -m bench.humming [--out bench/results/humming.jsonl]     (pip install humming-kernels)

Dense MXFP4 and MXFP8 matrices of 4096 x 8192 and the 256 experts of a layer (both products, for
which humming gets its pairs sorted and does no SwiGLU), at few tokens and at many. Each result is
checked against float64; times are medians in CUDA graphs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from ds4.backends.cuda.kernels import gemm, gemv, moe_gemm
from ds4.backends.cuda.qmatrix import QMatrix, assemble, dequantize

from .kernels import difference, timed
from .machine import describe

TOKENS = (8, 32, 512, 8192)
EXPERTS, PICKS, WIDTH, HIDDEN = 256, 6, 4096, 2048
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


def dense(kind: str, rows: int = 4096, cols: int = 8192) -> list[dict[str, Any]]:
    of = random_bytes(kind, rows, cols)
    m, layer, found = ours(kind, rows, cols, of), theirs(kind, rows, cols, of), []
    values = dequantize(m)[0].double()
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, device="cuda").half()
        want, out = x[:64].double() @ values.T, torch.empty(tokens, rows, device="cuda")
        if tokens <= gemv.MOST_TOKENS:
            products = [gemv.Product(m, gemv.to_panel(x.float()), out)]

            def run(products: Any = products, tokens: int = tokens) -> None:
                gemv.linears(products, tokens)

        else:
            ordered = gemm.permute(x, m)

            def run(x: Any = ordered, out: Any = out) -> None:  # type: ignore[misc]
                gemm.linear(m, x, out)

        run()
        got = layer(x)
        errors = difference(out[:64], want), difference(got[:64], want)
        times = timed("cuda", [run] * 4), timed("cuda", [lambda x=x: layer(x)] * 4)
        found.append(row(f"{kind} {rows} x {cols}", tokens, errors, times))
    return found


def experts() -> list[dict[str, Any]]:
    """Gate and up, and down, of all pairs: the shared expert and the sum are left out."""
    shapes = (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)
    parts = [random_bytes("mxfp4", EXPERTS, *shape) for shape in shapes]
    routed = tuple(ours("mxfp4", *shape, of) for shape, of in zip(shapes, parts, strict=True))
    joined = tuple(torch.cat(pair, 1) for pair in zip(*parts[:2], strict=True))
    first = theirs("mxfp4", 2 * HIDDEN, WIDTH, joined)  # type: ignore[arg-type]
    second = theirs("mxfp4", WIDTH, HIDDEN, parts[2])
    found = []
    for tokens in TOKENS[2:]:
        ids = torch.rand(tokens, EXPERTS, device="cuda").topk(PICKS, -1)[1].flatten()
        order, counts = ids.argsort(stable=True), ids.bincount(minlength=EXPERTS)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        weights = torch.ones(len(ids), device="cuda")
        plan = gemm.Routed(order.int(), offsets.int(), weights, PICKS)
        x = torch.randn(tokens, WIDTH, device="cuda").half() / 8
        ordered, pairs = gemm.permute(x, routed[0]), x[order // PICKS].contiguous()
        grouped = {"expert_layout": offsets, "compute_config": {"gemm_type": "grouped_contiguous"}}
        hidden = torch.randn(len(ids), HIDDEN, device="cuda").half()

        def run(x: Any = ordered, plan: Any = plan) -> Any:
            return moe_gemm.each_expert(routed, x, plan, 10.0)

        def other(pairs: Any = pairs, hidden: Any = hidden, grouped: Any = grouped) -> Any:
            return first(pairs, **grouped), second(hidden, **grouped)

        expert = int(counts.argmax())
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        one = [theirs_value[expert] for theirs_value in joined]
        want = (
            pairs[rows].double()
            @ dequantize(ours("mxfp4", 2 * HIDDEN, WIDTH, (one[0], one[1])))[0].double().T
        )
        errors = float("nan"), difference(other()[0][rows], want)
        run()
        found.append(
            row(
                "256 mxfp4 experts",
                tokens,
                errors,
                (timed("cuda", [run] * 2), timed("cuda", [other] * 2)),
            )
        )
    return found


def row(
    case: str, tokens: int, errors: tuple[float, float], times: tuple[float, float]
) -> dict[str, Any]:
    us = [round(t * 1e6, 1) for t in times]
    print(
        f"{case}, {tokens} tokens: ours {us[0]} us, humming {us[1]} us; errors {errors}", flush=True
    )
    return {"bench": "humming", "case": case, "tokens": tokens, "us": us[0], "humming_us": us[1],
            "error": errors[0], "humming_error": errors[1]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="ours and humming-kernels")
    parser.add_argument("--out", help="append a JSON line for each case")
    args = parser.parse_args()
    found = []
    for part in (lambda: dense("mxfp4"), lambda: dense("mxfp8"), experts):
        try:
            found += part()
        except Exception as error:  # theirs may not take a format: the others still count
            print("failed:", repr(error)[:400], flush=True)
    if args.out:
        facts = describe("cuda")
        with Path(args.out).open("a") as out:
            out.writelines(json.dumps(facts | one) + "\n" for one in found)


if __name__ == "__main__":
    main()
