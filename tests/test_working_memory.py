"""The working memory of plans, against what the backend of kernels has alive in a step."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from ds4.backends.cuda.kernels import dense  # noqa: E402
from torch.autograd.profiler import profile  # noqa: E402

from ds4.backend import open_backend  # noqa: E402
from ds4.check import small_config  # noqa: E402
from ds4.config import Config  # noqa: E402
from ds4.model import forward  # noqa: E402
from ds4.plan import memory  # noqa: E402
from ds4.plan.flash import flash  # noqa: E402
from ds4.plan.memory import predict, recorded, recorded_tokens, working  # noqa: E402
from ds4.plan.placement import fits_whole, need_of_recipe  # noqa: E402
from ds4.plan.slots import default_slots  # noqa: E402
from ds4.quant.recipes import RECIPES  # noqa: E402
from ds4.ranks import Alone  # noqa: E402
from ds4.runner import Runner  # noqa: E402
from ds4.step import Chunk, plan  # noqa: E402
from ds4.weights import load_weights  # noqa: E402
from ds4.weights.synthetic import SyntheticCheckpoint  # noqa: E402
from tests.pretend_gpu import pretend  # noqa: E402

MORE = {"num_attention_heads": 32, "index_topk": 256, "moe_intermediate_size": 1536}
CONFIG = replace(small_config(), num_experts_per_tok=7, **MORE)  # each moment takes most somewhere


class Half(Alone):
    """One of two ranks, whose sums are whatever it has."""

    size = 2


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: bench.million measures it")
    mode, _ = pretend(monkeypatch)
    # on a GPU cuBLAS multiplies into `out`: nothing else is made than the unpacked matrix
    monkeypatch.setattr(dense, "_multiply", lambda m, x, out: (dense.unpacked(m), None)[1])
    monkeypatch.setattr(torch, "baddbmm", lambda sums, *_, **__: sums)
    with mode:
        yield


def most_alive(run: Callable[[], object]) -> int:
    """Bytes of tensors that `run` makes, when they are the most."""
    with profile(profile_memory=True) as seen:
        run()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.parametrize("ranks", [Alone(), Half()])
@pytest.mark.usefixtures("pretended")
def test_a_step_has_alive_what_the_plan_counts(ranks: Alone) -> None:
    cfg, seen = CONFIG, set()
    be = open_backend("cuda", "auto", "native")
    be.ranks = ranks  # type: ignore[attr-defined]
    be.begin(cfg)  # type: ignore[attr-defined]
    weights = load_weights(be, cfg, SyntheticCheckpoint(cfg, recipe=RECIPES["q8_0"]))
    for context, tokens in ((1024, 1024), (8192, 1024), (300_000, 40)):
        cache = Runner(be, cfg, weights, context, 1, tokens).cache
        step = plan([Chunk(0, context - tokens, [5] * tokens)], [4, 8]).on(be)
        got = most_alive(lambda c=cache, s=step: forward(be, cfg, weights, c, s))  # type: ignore[misc]
        assert working(cfg, context, tokens, ranks.size) == pytest.approx(got, rel=0.01)
        seen.add(_moment(cfg, context, tokens, ranks.size))
    assert seen == {"_choosing", "_attending" if ranks.size == 1 else "_feeding"}


def _moment(cfg: Config, *given: int) -> str:
    moments = memory._choosing, memory._attending, memory._feeding
    return max(moments, key=lambda moment: moment(cfg, *given)).__name__


def test_working_memory_of_the_real_model() -> None:
    """3,997 MB were measured on an H100 for chunks of 8,192 tokens, when wo_a's input was put in
    another order instead of the matrix being unpacked (bench/results/million.jsonl)."""
    cfg = flash()
    heads = cfg.num_attention_heads * cfg.head_dim
    reordered = 2 * heads * (8192 - cfg.o_lora_rank)
    assert working(cfg, 8192, 8192) + reordered == pytest.approx(3996.5e6, rel=1e-3)
    alone, half = (working(cfg, 131_072, 8192, parts) for parts in (1, 2))
    assert half == pytest.approx(3.15e9, rel=0.01)
    need = need_of_recipe(cfg, "q2", 131_072, held=128)
    assert need.working(8192) < 0.95 * need_of_recipe(cfg, "q2", 131_072).working(8192)
    assert need.working(8192) > half
    assert alone == pytest.approx(3.53e9, rel=0.01)


def test_recorded_steps_are_counted() -> None:
    cfg = flash()
    assert [recorded_tokens(chunk) for chunk in (1, 64, 65, 256, 2048)] == [64, 64, 128, 256, 256]
    graphs = recorded(cfg, 8192, 256, 1)
    assert 200e6 < graphs < 260e6
    # logits of all shapes lie in one place: of 32 rows, or of guesses in a second one, of 128
    assert recorded(cfg, 8192, 256, 32) == graphs

    def rows(slots: int, tokens: int = 256, guessing: bool = True) -> float:
        more = recorded(cfg, 8192, tokens, slots, guessing=guessing)
        graphs = 288e6 if tokens > 32 and slots > 1 else 0
        return (more - recorded(cfg, 8192, tokens, 1) - graphs) / (4 * cfg.vocab_size)

    assert (rows(1), rows(2), rows(33, guessing=False)) == (2 * 32, 2 * 32 + 3 * 128, 128)
    assert rows(2, tokens=32) == 2 * 32  # where experts are in host memory
    found = predict(cfg, RECIPES["q2"], 8192, 1, 2048)
    assert found.recorded == graphs
    assert found.total == found.held + found.working + graphs


def test_a_model_fits_with_its_recorded_steps() -> None:
    need = need_of_recipe(flash(), "q2", 8192)
    least = need.others + need.experts + need.beside(2048) + need.reserve
    graphs = need.recorded(256)
    assert not fits_whole(need, least + graphs - 1, 2048)
    assert fits_whole(need, least + graphs, 2048)


def test_slots_leave_room_for_recorded_steps() -> None:
    class Gpu:
        max_chunk, decode_sizes = 2048, memory.DECODED

        def free_memory(self) -> int:
            return 100 * 10**9

    need = need_of_recipe(flash(), "q2", 32_768)
    weights = need.others + need.experts
    count = default_slots(Gpu(), need, weights)
    assert 1 < count < 32
    graphs = recorded(need.cfg, 32_768, 256, 32)
    assert graphs > 0.2e9
    Gpu.free_memory = lambda _: 100 * 10**9 + graphs  # type: ignore[method-assign, assignment]
    more = default_slots(Gpu(), need, weights)
    assert more > count
    guessing = replace(need, drafter=0)
    assert default_slots(Gpu(), guessing, weights) < more
