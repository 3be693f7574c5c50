"""Cases of the experts of a decoding step: 256 at the real widths, six of them a token."""

from collections.abc import Iterator
from typing import Any

import torch
from ds4.backends.cuda import qmatrix
from ds4.backends.cuda.kernels import gemv
from ds4.backends.cuda.kernels.router import Gate, route_small
from torch import Tensor

from ds4.weights.synthetic_tensor import Description, SyntheticTensor

from .kernels import Case, cases

WIDTH, HIDDEN, EXPERTS, PICKS, LIMIT = 4096, 2048, 256, 6, 10.0
SHAPES = ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))  # w1, w3, w2
RECIPES = {
    "native": ((("mxfp4", 0, 0),) * 3, ("mxfp8", 0, 0)),
    "q2": ((("affine", 2, 128), ("affine", 2, 128), ("affine", 2, 64)), ("affine", 6, 64)),
}
Matrices = tuple[qmatrix.QMatrix, ...]


@cases
def experts() -> Iterator[Case]:
    """Gate and up, and down, with the shared expert and the router's product."""
    for recipe in RECIPES:
        for tokens in (1, 8, 32):
            yield _experts(recipe, tokens)


def _experts(recipe: str, tokens: int) -> Case:
    kinds, shared_kind = RECIPES[recipe]
    held: dict[str, tuple[Matrices, Matrices]] = {}

    def make(device: str, number: int) -> Any:
        if device not in held:  # 256 experts are more than a cache: every set may use them
            held[device] = (
                tuple(
                    _matrix(kind, (EXPERTS, *shape), i, device)
                    for i, (kind, shape) in enumerate(zip(kinds, SHAPES, strict=True))
                ),
                tuple(_matrix(shared_kind, shape, 3 + i, device) for i, shape in enumerate(SHAPES)),
            )
        logits = torch.randn(tokens, EXPERTS, device=device)
        gate = Gate(torch.zeros(EXPERTS, device=device), None, EXPERTS, PICKS, 1.5)
        ids, weights, tiles = route_small(
            gate, logits, torch.zeros(tokens, dtype=torch.int32, device=device)
        )
        x = gemv.to_panel(torch.randn(tokens, WIDTH, device=device))
        router = qmatrix.from_values(torch.randn(EXPERTS, WIDTH, device=device))
        product = gemv.Product(router, x, torch.empty(tokens, EXPERTS, device=device))
        return *held[device], x, ids, weights, tiles, product

    def run(inputs: Any) -> tuple[Tensor, Tensor]:
        routed, shared, x, _, weights, tiles, product = inputs
        todo = gemv.Experts(routed, shared, x, (tokens, PICKS), LIMIT)
        todo.begin(product)
        return todo.finish(tiles, weights)

    def reference(inputs: Any) -> Tensor:
        routed, shared, x, ids, weights, _, _ = inputs
        rows = x.transpose(0, 1).flatten(1)[:tokens].double()
        y = _expert([qmatrix.dequantize(m)[0].double() for m in shared], rows)
        for t, picked in enumerate(ids.tolist()):
            for e, weight in zip(picked, weights[t].tolist(), strict=True):
                one = [qmatrix.dequantize(qmatrix.one_of(m, e))[0].double() for m in routed]
                y[t] += weight * _expert(one, rows[t])
        return y

    distinct = EXPERTS * (1 - (1 - PICKS / EXPERTS) ** tokens)
    each = sum(_bytes(kind, shape) for kind, shape in zip(kinds, SHAPES, strict=True))
    router = 2 * EXPERTS * WIDTH
    nbytes = distinct * each + sum(_bytes(shared_kind, shape) for shape in SHAPES)
    name = f"experts {recipe}, {tokens} tokens"
    return Case(name, make, run, reference, nbytes + router, result=lambda y: y[0].sum(1) + y[1])


def _description(kind: tuple[str, int, int], shape: tuple[int, ...], seed: int = 0) -> Description:
    return Description(kind[0], shape, seed, shape[-1] ** -0.5, 0, *kind[1:])


def _matrix(
    kind: tuple[str, int, int], shape: tuple[int, ...], seed: int, device: str
) -> qmatrix.QMatrix:
    return qmatrix.from_host(SyntheticTensor(_description(kind, shape, seed)), device)


def _bytes(kind: tuple[str, int, int], shape: tuple[int, ...]) -> int:
    return SyntheticTensor(_description(kind, shape)).nbytes


def _expert(matrices: list[Tensor], x: Tensor) -> Tensor:
    w1, w3, w2 = matrices
    up = (x @ w3.T).clamp(-LIMIT, LIMIT)
    return (torch.nn.functional.silu((x @ w1.T).clamp(max=LIMIT)) * up) @ w2.T
