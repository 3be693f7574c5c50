"""Plans: fits and speeds on known machines, the article, the command."""

import json
from dataclasses import replace

import pytest

from ds4.plan.article import compare
from ds4.plan.estimate import fit, fits, recommend
from ds4.plan.flash import flash
from ds4.plan.hits import slowest_card
from ds4.plan.machines import PlanError, adjusted, cards, detected, named, names
from ds4.plan.published import FIGURES, PREFILL, efficiency
from ds4.plan.report import Model, make_report, open_model
from ds4.plan.sizes import drafter_bytes, prefill_flops, weight_sizes
from ds4.quant.recipes import RECIPES
from tests.test_cli import one_error, run

__all__ = ["run"]  # a fixture

CFG = flash()
GIB = 2**30

# machines


def test_every_name_is_a_machine():
    for name in names():
        machine = named(name)
        assert machine.name == name
        assert 0 < machine.gpu_limit <= machine.raised_limit
        assert machine.bandwidth
        assert machine.tflops


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("M4 Max 128GB", "m4max-128"),
        ("RTX 5090", "5090"),
        ("2x RTX-5090", "2x5090"),
        ("rtx pro 6000", "pro6000"),
        ("1xH100", "h100"),
        ("DGX Spark", "dgxspark"),
    ],
)
def test_names_are_read_generously(text, name):
    assert named(text).name == name


@pytest.mark.parametrize(
    ("name", "word"),
    [("m4max-127", "m4max-128"), ("m4max", "m4max-36"), ("9090", "--vram"), ("", "m4max-128")],
)
def test_unknown_machines(name, word):
    with pytest.raises(PlanError, match=word):
        named(name)


def test_this_machine():
    mac = detected({"cpu": "Apple M4 Max, 16 threads", "memory": "128.0 GiB", "gpus": ["x"]})
    assert (mac.kind, mac.memory, mac.bandwidth) == ("mac", 128, 546)
    gpu = "NVIDIA GeForce RTX 5090, 32607 MiB, 580.65"
    rig = detected({"cpu": "x, 8 threads", "memory": "125.7 GiB", "gpus": [gpu, gpu]})
    assert (rig.kind, rig.cards, rig.ram, rig.bandwidth) == ("gpu", 2, 125.7, 1792)
    assert rig.memory == pytest.approx(31.84, abs=0.01)
    laptop = detected(
        {"cpu": "x", "memory": "64 GiB", "gpus": ["NVIDIA RTX 5090 Laptop GPU, 24463 MiB, 580"]}
    )
    assert (laptop.kind, laptop.bandwidth) == ("gpu", None)
    newer = detected({"cpu": "Apple M9 Max, 32 threads", "memory": "256.0 GiB", "gpus": ["x"]})
    assert (newer.kind, newer.memory, newer.bandwidth) == ("mac", 256, None)
    plain = detected({"cpu": "x", "memory": "unknown", "gpus": ["none found"]})
    assert (plain.kind, plain.gpu_limit) == ("cpu", 0)


def test_what_the_user_knows_better():
    plain = detected({"cpu": "x", "memory": "64.0 GiB", "gpus": ["none found"]})
    card = adjusted(plain, 48, None, 800)
    assert (card.kind, card.memory, card.ram, card.bandwidth) == ("gpu", 48, 64, 800)
    assert adjusted(named("2x5090"), None, 256, None).ram == 256
    assert adjusted(named("m4max-128"), None, 96, None).memory == 96
    assert adjusted(named("2x5090"), link=40).link == 80
    assert adjusted(named("m4max-128"), link=40).link == 0


# fits


def where(machine, cfg=CFG):
    return {one.recipe: one.where for one in fits(cfg, named(machine), 8192)}


@pytest.mark.parametrize(
    ("machine", "places"),
    [
        ("m4max-64", "no no no no no no no"),
        ("m2max-96", "raised no no no no no no"),
        ("m4max-128", "gpu gpu no no no no no"),
        ("m2ultra-192", "gpu gpu gpu raised raised raised raised"),
        ("m3ultra-256", "gpu gpu gpu gpu gpu gpu gpu"),
        ("pro6000", "gpu gpu host host host host host"),
        ("h200", "gpu gpu gpu host host host host"),
        ("4x5090", "gpu gpu gpu host host host host"),
        ("2xpro6000", "gpu gpu gpu gpu gpu gpu gpu"),
        ("2x5090", "host host host host host host host"),
    ],
)
def test_what_fits_where(machine, places):
    names = {"gpu, raised limit": "raised", "gpu + host": "host"}
    got = [names.get(place, place) for place in where(machine).values()]
    assert " ".join(got) == places


def test_a_pruned_model_fits_a_128_gb_mac():
    pruned = where("m4max-128", replace(CFG, n_routed_experts=160))
    assert pruned["q3_K_S"] == "gpu"
    assert pruned["q4_K_M"] == "gpu, raised limit"  # rings take the last 0.4 GB
    assert "no" not in pruned.values()


@pytest.mark.parametrize(("machine", "recipe"), [("m2max-96", "q2"), ("2x4090", "q8_0")])
def test_the_largest_context_is_the_largest(machine, recipe):
    most = fit(CFG, named(machine), RECIPES[recipe], 8192).largest_context
    assert 8192 < most < CFG.max_position_embeddings
    assert fit(CFG, named(machine), RECIPES[recipe], most).fits
    assert not fit(CFG, named(machine), RECIPES[recipe], most + 256).fits


def test_speeds_are_near_what_is_published():
    for machine, low, high in (("m4max-128", 26, 45), ("m3ultra-256", 36, 60)):
        best = fit(CFG, named(machine), RECIPES["q2"], 8192)
        assert low < best.decode < high
        assert best.decode_ceiling == pytest.approx(
            best.decode / efficiency(named(machine)).bandwidth
        )


def test_a_mac_s_efficiency_is_what_was_published_for_its_chip():
    """26.8 tok/s of 9.6 GB on 546 GB/s; 343.8 tok/s of 27 GFLOP on 18.4 TFLOP/s."""
    seen = efficiency(named("m4max-128"))
    assert (seen.bandwidth, seen.compute) == pytest.approx((0.471, 0.504), abs=1e-3)
    assert "m4_max.csv" in seen.source
    older = efficiency(named("m1max-64"))
    assert 0.4 < older.bandwidth < 0.6
    assert "the middle" in older.source
    here = detected({"cpu": "Apple M3 Ultra, 32 threads", "memory": "512.0 GiB", "gpus": []})
    assert "issue 779" in efficiency(here).source
    assert pytest.approx(prefill_flops(CFG, 2048), rel=0.01) == PREFILL
    for one in FIGURES:
        assert 0.2 < one.bandwidth_share < 0.7


def test_offload_costs_what_the_link_costs():
    rig = fit(CFG, named("2x5090"), RECIPES["q4_K_M"], 8192)
    missed = rig.weights.token_experts * (1 - rig.resident) / 50e9
    assert 1 / rig.decode > missed
    slowest = slowest_card(6, 1 - rig.budget.resident_decoding, 2)  # of a layer's misses, twice
    assert 1.3 < slowest < 1.5  # its share
    assert 1 / rig.decode == pytest.approx(slowest * missed, rel=0.2)
    small = fit(CFG, cards("5090", 1, ram=32), RECIPES["q4_K_M"], 8192)
    assert (small.fits, small.decode, small.largest_context) == (False, None, 0)


def test_room_for_guesses():
    """Weights of a drafter on every card, and the steps recorded for guesses."""

    def placed(machine, recipe, guess):
        return fit(CFG, named(machine), RECIPES[recipe], 8192, guess)

    ways = "off", "lookup", "mtp", "dspark"
    rig = [placed("2x5090", "q2", guess) for guess in ways]
    sizes = [drafter_bytes(CFG, kind, RECIPES["q2"]) for kind in ("mtp", "dspark")]
    assert [one.budget.need.drafter for one in rig] == [None, 0, *sizes]
    assert [one.resident for one in rig] == sorted({one.resident for one in rig}, reverse=True)
    lost = (rig[1].resident - rig[2].resident) * rig[0].weights.experts / 2  # of each card's half
    assert lost == pytest.approx(sizes[0], rel=0.02)
    places = [placed("m4max-128", "q2_K_L", guess).where for guess in ways]
    assert places == ["gpu", "gpu", "gpu, raised limit", "gpu, raised limit"]
    assert [placed("m2max-96", "q2", guess).fits for guess in ways] == [True, True, False, False]

    def cuda(guess):
        report = make_report(Model("flash", CFG), named("h200"), 8192, guess)
        return report["recipes"][0]["cuda_bytes"]

    plain, lookup, mtp = (cuda(guess) for guess in ways[:3])
    assert lookup["recorded"] > plain["recorded"]
    assert mtp["total"] - lookup["total"] == mtp["weights"] - plain["weights"] == sizes[0]


def test_the_recommendation():
    def best(machine):
        found = recommend(fits(CFG, named(machine), 8192))
        return found and found.recipe

    assert best("m4max-64") is None
    assert best("m2max-96") == "q2"
    assert best("m4max-128") == "q2_K_L"
    assert best("m3ultra-256") == "q8_0"
    assert best("dgxspark") == "q2_K_L"  # slower than one reads, but hardly slower than q2


def test_slow_machines_get_hardly_less_than_the_fastest():
    found = [one for one in fits(CFG, named("4090"), 8192) if one.fits]
    assert max(one.decode for one in found) < 20
    assert recommend(found).decode >= 0.9 * max(one.decode for one in found)


# reports


def test_a_report_adds_up():
    report = make_report(Model("flash", CFG), named("m4max-128"), 131_072)
    assert [one["recipe"] for one in report["recipes"]] == list(RECIPES)
    for one in report["recipes"]:
        assert sum(one["weights_by_class"].values()) == one["weights_bytes"]
        assert one["cache_bytes"] == 1_279_667_456  # as MLX holds it: test_plan_cache.py
        assert (one["decode_tok_s_estimate"] is not None) == one["fits"]
    assert report["machine"]["wired_limit_command"].endswith("iogpu.wired_limit_mb=117964")
    assert report["recommended"] == "q2_K_L"


def test_a_context_or_pruning_that_cannot_be():
    with pytest.raises(PlanError, match="at most 1048576"):
        make_report(Model("flash", CFG), named("h200"), 2_000_000)
    with pytest.raises(PlanError, match="from 6 to 256"):
        open_model("flash", 5)
    assert open_model("flash", 160).cfg.n_routed_experts == 160


def test_the_article():
    report = compare()
    rows = {one["recipe"]: one for one in report["recipes"]}
    assert list(rows) == ["q3_K_S", "q4_K_M", "q5_K_M", "q6_K", "q8_0"]
    assert rows["q4_K_M"]["article_memory_gb"] == "110"
    assert rows["q4_K_M"]["weights_bytes"] == pytest.approx(142.0 * GIB, rel=0.005)
    assert 96e9 < rows["q4_K_M"]["pruned_weights_bytes"] < 104e9
    assert all(one["why"] for one in (*report["recipes"], *report["claims"]))
    text = json.dumps(report["claims"])
    assert all(word in text for word in ("64 GB", "60-90", "800-1100", "130 W"))


# the command


def test_plan_as_json(run):
    status, out, err = run("plan", "--model", "flash", "--machine", "m4max-128", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert set(report) >= {"machine", "model", "recipes", "recommended"}
    keys = {"recipe", "weights_bytes", "cache_bytes", "fits", "largest_context"}
    assert set(report["recipes"][0]) > {*keys, "decode_tok_s_estimate"}


def test_plan_for_people(run):
    status, out, err = run("plan", "--machine", "m2max-96")
    assert (status, err) == (0, "")
    assert "take q2" in out
    assert "sudo sysctl iogpu.wired_limit_mb=88473" in out
    assert "take no recipe" in run("plan", "--machine", "m4max-64")[1]
    cramped = run("plan", "--machine", "m2max-96", "--speculate", "mtp")[1]
    assert "nothing fits: even q2 needs 88.3 GiB" in " ".join(cramped.split())
    assert "350" not in run("plan", "--model", "demo")[1]
    assert "the article" in run("plan", "--article")[1]
    assert json.loads(run("plan", "--article", "--json")[1])["recipes"]


def test_plan_on_this_machine_and_another(run):
    assert json.loads(run("plan", "--json")[1])["machine"]["name"].startswith("this machine")
    options = "--machine", "2x5090", "--vram", "48", "--ram", "256", "--bandwidth", "2000"
    machine = json.loads(run("plan", *options, "--json")[1])["machine"]
    got = machine["memory_gib"], machine["host_memory_gib"], machine["bandwidth_gb_s"]
    assert got == (48, 256, 2000)


@pytest.mark.parametrize("recipe", ["q2", "q5_K_M", "q8_0"])
def test_a_plan_says_what_quantize_makes(run, tmp_path, recipe):
    made = str(tmp_path / "made")
    assert run("quantize", "demo", made, "--recipe", recipe, "--method", "rtn")[0] == 0
    cfg = open_model("demo").cfg
    planned = weight_sizes(cfg, RECIPES[recipe]).total + drafter_bytes(cfg, "mtp", RECIPES[recipe])
    assert planned == json.loads(run("verify", made, "--full", "--json")[1])["bytes"]


def test_plan_errors(run, tmp_path):
    assert "no machine is called 'abacus'" in one_error(run("plan", "--machine", "abacus"))
    assert "config.json" in one_error(run("plan", "--model", str(tmp_path)))
    assert "--experts must be" in one_error(run("plan", "--experts", "300"))
