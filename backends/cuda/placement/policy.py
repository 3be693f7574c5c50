"""Which experts a layer keeps on the GPU: the rule, in NumPy.

place.cu does the same inside a step's CUDA graph, number by number; on a CPU this is what runs.

A layer's experts live in `slots` of GPU memory and `homes` of host memory. An expert without a home
stays in its slot: it is pinned. Every step's misses are copied into the slots of the experts that
were wanted least, of those that the step does not need; what finds no slot is read where it is.
Wanted is a count that fades: each step multiplies it by FADE and adds the pairs of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ds4.plan import hits

FADE = np.float32(hits.FADE)  # half is forgotten in 350 steps
NOWHERE = -1
BARRED = -2  # owner of a slot whose memory is not there now (lent.py)
# columns of `counts`
HITS, MISSES, PASSED, STEPS, COPY_NS, PAIR_HITS, PAIRS, COUNTS = range(8)

Ints = NDArray[np.int32]


@dataclass
class LayerState:
    """Where a layer's E experts are (of other ranks: nowhere); arrays that `decide` changes."""

    slot_of: Ints  # (E,) -1: not on the GPU
    home_of: Ints  # (E,) -1: not in host memory
    owner: Ints  # (S,) the expert in each slot, -1 for none, -2 if the slot is not to be used
    score: NDArray[np.float32]  # (E,) how much it is wanted
    heat: NDArray[np.int64]  # (E,) pairs so far
    counts: NDArray[np.int64]  # (COUNTS,) experts that steps found, missed, read elsewhere ...

    @property
    def here(self) -> NDArray[np.bool_]:
        """(E,): which experts this process has."""
        return (self.slot_of != NOWHERE) | (self.home_of != NOWHERE)

    @property
    def away(self) -> NDArray[np.bool_]:
        """(E,): which of them are in host memory only."""
        return (self.slot_of == NOWHERE) & (self.home_of != NOWHERE)


def first_state(
    heat: NDArray[np.int64],
    slots: int,
    homes: int,
    held: Sequence[int] | None = None,
    lent: int = 0,
) -> LayerState:
    """The most wanted experts in slots; those beyond `homes`, the most wanted of all, pinned.

    `lent` slots more, behind the others, are barred at first.

    `heat` (E,) says how much each is wanted; of equals every part of the range gets its share.
    Of ranks that share the experts, each places those that it holds; others are nowhere.
    """
    here = np.arange(len(heat)) if held is None else np.sort(np.array(held))
    assert slots <= len(here) <= slots + homes
    assert homes <= len(here)
    spread = (here * 0.6180339887) % 1
    order = here[np.lexsort((spread, -heat[here]))].astype(np.int32)
    slot_of, home_of = (np.full(len(heat), NOWHERE, np.int32) for _ in range(2))
    slot_of[order[:slots]] = np.arange(slots)
    home_of[np.sort(order[len(here) - homes :])] = np.arange(homes)
    total = max(1, int(heat.sum()))
    score = (heat / total).astype(np.float32)  # an order, to be overruled within a few steps
    owner = np.append(order[:slots], np.full(lent, BARRED, np.int32))
    return LayerState(slot_of, home_of, owner, score, heat * 0, np.zeros(COUNTS, np.int64))


def decide(state: LayerState, chosen: Ints, pairs: Ints) -> list[tuple[int, int]]:
    """One step's changes; what to copy, as (home, slot).

    `chosen` are different experts, ascending, and `pairs` how many (token, pick) pairs each has.
    """
    state.score *= FADE
    state.score[chosen] += pairs.astype(np.float32)
    state.heat[chosen] += pairs
    missing = chosen[state.slot_of[chosen] == NOWHERE]
    keys = _keys(state, chosen)
    jobs = []
    for expert in missing:
        slot = int(keys.argmin()) if len(keys) else 0
        if not len(keys) or np.isposinf(keys[slot]):
            break
        keys[slot] = np.inf
        if state.owner[slot] != NOWHERE:
            state.slot_of[state.owner[slot]] = NOWHERE
        state.owner[slot], state.slot_of[expert] = expert, slot
        jobs.append((int(state.home_of[expert]), slot))
    _count(state, chosen, pairs, missing, len(jobs))
    return jobs


def _keys(state: LayerState, chosen: Ints) -> NDArray[np.float32]:
    """How much each slot's expert is wanted: -1 for an empty slot, infinite if it must stay."""
    owner = state.owner
    keys = np.where(owner == NOWHERE, np.float32(-1), state.score[owner])
    needed = np.zeros(len(state.slot_of), bool)
    needed[chosen] = True
    stays = (owner >= 0) & (needed[owner] | (state.home_of[owner] == NOWHERE)) | (owner == BARRED)
    return np.where(stays, np.float32(np.inf), keys)


def _count(state: LayerState, chosen: Ints, pairs: Ints, missing: Ints, copied: int) -> None:
    missed = int(pairs[np.isin(chosen, missing)].sum())
    state.counts[HITS] += len(chosen) - len(missing)
    state.counts[MISSES] += copied
    state.counts[PASSED] += len(missing) - copied
    state.counts[STEPS] += 1
    state.counts[PAIR_HITS] += int(pairs.sum()) - missed
    state.counts[PAIRS] += int(pairs.sum())


def prompt_score(score: NDArray[np.float32], pairs: Ints, tokens: int) -> NDArray[np.float32]:
    """The score after `tokens` of a prompt with so many pairs an expert: as if spread evenly."""
    kept = FADE**tokens
    return np.float32(kept) * score + pairs * np.float32((1 - kept) / (1 - FADE) / tokens)


def swaps(state: LayerState, most: int) -> list[tuple[int, int]]:
    """Pinned experts that should give their place to wanted ones with a home: (pinned, wanted).

    Both are in slots now. The wanted one loses its home to the pinned one, so that nothing moves
    on the GPU; only the pinned one's bytes go to host memory.
    """
    here = state.owner[state.owner >= 0]
    homeless = state.home_of[here] == NOWHERE
    pinned, others = here[homeless], here[~homeless]
    pinned = pinned[np.argsort(state.score[pinned], kind="stable")]
    others = others[np.argsort(-state.score[others], kind="stable")]
    return [
        (int(a), int(b))
        for a, b in list(zip(pinned, others, strict=False))[:most]
        if _clearly(float(state.score[b]), float(state.score[a]))
    ]


def _clearly(more: float, less: float) -> bool:
    """Whether one count is above another by more than chance: else experts that are wanted alike
    would go on swapping, which takes some of the link's time."""
    return more > less and (more - less) ** 2 > 2.5**2 * (more + less)


def set_lent(state: LayerState, kept: int, there: bool) -> None:
    """The slots from `kept` on come to be used, empty, or are barred: their experts have homes."""
    gone = state.owner[kept:]
    state.slot_of[gone[gone >= 0]] = NOWHERE
    gone[:] = NOWHERE if there else BARRED
