"""Plans from what was measured: the measured speed comes back, the others follow from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds4.errors import Ds4Error
from ds4.plan.estimate import fit
from ds4.plan.flash import flash
from ds4.plan.machines import PlanError, named
from ds4.plan.measured import with_measured
from ds4.plan.sizes import weight_sizes
from ds4.quant.recipes import RECIPES

CFG, MAC = flash(), named("m4max-128")


def results(**changes: Any) -> dict[str, Any]:
    """What `ds4 bench` writes, as far as a plan reads it: q2 at 512 tokens and 31 tok/s."""
    weights = weight_sizes(CFG, RECIPES["q2"]).total
    load = {"kind": "closed", "rate": 1.0, "prompt_tokens": 448, "output_tokens": 128}
    absent = dict.fromkeys(("cache_hit", "ttft_s", "tpot_s", "itl_s"))
    figures = {"user_tok_s": 31.0, "output_tok_s": 31.0} | absent
    row = {"recipe": "q2", "key": "one", "figures": figures, "prefill_tok_s": 300.0}
    row |= {"workload": "one", "energy": {}, "problems": [], "remarks": []}
    empty = {"label": "", "runs": [], "terms": {}, "samples": {}}
    made = {
        "format": "ds4-bench",
        "version": 1,
        "targets": [{"recipe": "q2", "model": "flash", "weights_bytes": weights}],
        "workloads": [
            {"name": "many", "key": "many", "concurrency": 8} | load,
            {"name": "one", "key": "one", "concurrency": 1} | load,
        ],
        "summary": [row | {"key": "many", "figures": figures | {"user_tok_s": 9.0}}, row],
    }
    return empty | made | changes


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "results.json"
    file.write_text(json.dumps(results(**changes)))
    return file


def test_the_measured_speed_replaces_the_estimate(tmp_path: Path) -> None:
    mac = with_measured(MAC, CFG, written(tmp_path))
    q2 = fit(CFG, mac, RECIPES["q2"], 512)
    assert q2.decode == pytest.approx(31.0, rel=1e-6)
    assert fit(CFG, mac, RECIPES["q2"], 448).prefill == pytest.approx(300.0, rel=1e-6)
    before = [fit(CFG, MAC, RECIPES[name], 512).decode for name in ("q2", "q2_K_L")]
    after = [fit(CFG, mac, RECIPES[name], 512).decode for name in ("q2", "q2_K_L")]
    assert after[1] / after[0] == pytest.approx(before[1] / before[0])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"targets": [{"recipe": "q2", "model": "demo", "weights_bytes": 5}]}, "demo as q2"),
        ({"summary": []}, "one sequence"),
        ({"version": 2}, "version 2"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(Ds4Error, match=word):
        with_measured(MAC, CFG, written(tmp_path, **changes))


def test_a_speed_beyond_the_bandwidth_is_refused(tmp_path: Path) -> None:
    made = results()
    made["summary"][1]["figures"]["user_tok_s"] = 500.0
    with pytest.raises(PlanError, match="more than m4max-128 can read"):
        with_measured(MAC, CFG, written(tmp_path, summary=made["summary"]))
