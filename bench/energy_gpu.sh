#!/usr/bin/env bash
# What a GPU takes for a token: random weights of the real shape in two recipes, at 1, 8 and 32
# sequences; gross, net of idle, and the board's counter beside its integrated power. The result goes
# to out/flash.json, with what there is when the time is up: compiling kernels takes a minute or two.
set -euo pipefail
mkdir -p out
timeout "${SECONDS_AT_MOST:-360}" python -m ds4.cli bench out/flash.json -w bench/energy.toml \
    --synthetic flash --unique-layers 7 --recipe native,q2 --backend cuda --quick --warm 60 --idle 6 \
    --power nvml --label "${LABEL:-H100}" --price "${PRICE:-30000}"
