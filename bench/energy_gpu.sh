#!/usr/bin/env bash
# What a GPU takes for a token: random weights of the real shape in two recipes, at 1, 8 and 32
# sequences; gross, net of idle, and the board's counter beside its integrated power. The results
# go to out/flash.json, with what there is when the time is up, and, if time is left, those of the
# packaged demo model to out/demo.json. `python -m bench.energy_windows out/flash.json` follows.
set -euo pipefail
most=${SECONDS_AT_MOST:-120}
mkdir -p out
bench() {
    local file=$1 seconds=$((most - SECONDS))
    shift
    timeout "$seconds" python -m ds4.cli bench "out/$file" -w bench/energy.toml --backend cuda \
        --quick --warm 6 --idle 3 --power nvml --label "${LABEL:-H100}" --price "${PRICE:-30000}" "$@"
}
bench flash.json --synthetic flash --unique-layers 7 --recipe native,q2
if ((most - SECONDS > 30)); then bench demo.json; fi
