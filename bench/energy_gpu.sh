#!/usr/bin/env bash
# What a GPU takes for a token: random weights of the real shape in two recipes, then the demo model.
# Results go to out/; ds4 compare out/*.json shows them. Under 200 s on an H100.
set -euo pipefail
mkdir -p out
run() { python -m ds4.cli bench "$@" --backend cuda --repeat 1 --label "${LABEL:-H100}"; }
run out/flash.json -w bench/energy.toml --synthetic flash --unique-layers 7 --recipe native,q2 \
    --idle 6 --warm 10 --power nvml --price "${PRICE:-30000}"
run out/demo.json -w quick --only quick-closed --idle 5 --warm 5 --power nvml --price "${PRICE:-30000}"
