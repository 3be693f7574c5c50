"""One rank of tests/test_mlx_ranks.py: prints what the model computes here as a JSON line."""

import json

import ds4


def main() -> None:
    llm = ds4.load("demo", "mlx", "cpu", context=128)
    logits = llm.logits([3, 14, 15, 92, 65, 35])
    made = llm.generate([3, 14, 15], max_tokens=12, temperature=1.0)  # each rank has its own seed
    be = llm.runner.be
    held = llm.runner.weights.layers[0].ffn.experts.w2.values.shape[0]
    answer = {"rank": be.ranks.rank, "size": be.ranks.size, "experts": held}  # type: ignore
    print(json.dumps(answer | {"logits": logits[-1].tolist(), "tokens": made.tokens}))


if __name__ == "__main__":
    main()
