#!/usr/bin/env bash
# Every kernel's check on a GPU, all at once: compiling takes most of the time.
# From the repository's root: bash bench/gpu_checks.sh [folder for what they print]
out=${1:-/tmp/checks}
mkdir -p "$out"
run() { python -u "${@:2}" >"$out/$1.txt" 2>&1; echo "$1: exit $?" >>"$out/all.txt"; }
run gemm -m bench.gpu_gemm check &
(
    for i in 0 1 2 3 4 5; do python -m bench.gpu_attn warm $i 6 & done
    wait
    run attn -m bench.gpu_attn check
) &
run rows -m bench.gpu_rows checks &
run index -m bench.gpu_index checks &
run hyper -m bench.gpu_hyper check &
run router -m bench.gpu_router check &
run draw -m bench.gpu_draw check &
wait
cat "$out/all.txt"
! grep -H "WRONG\|FAILED\|FAIL\|Error\|exit [1-9]" "$out"/*.txt
