"""Which prefixes the prefix cache knows: the tree, beside a list of what was kept."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ds4.engine.tree import Ending, Segment, Tree, ending_key, page_keys

PAGE, MOST_PAGES = 2, 3
sequences = st.lists(st.integers(0, 1), min_size=1, max_size=12)


def keep(tree: Tree[Any], tokens: list[int], size: int) -> None:
    """As PrefixCache.keep does, with no rows."""
    keys = page_keys(tree.root, tokens, PAGE)
    pages, rest = len(keys) - 1, tokens[(len(keys) - 1) * PAGE :]
    key = ending_key(keys[-1], rest)
    if key in tree:
        tree.touch(tree[key])
        return
    for first in range(tree.known(keys), pages, MOST_PAGES):
        some = tuple(keys[first + 1 : first + 1 + MOST_PAGES])
        tree.add_segment(Segment(keys[first], first, some, size * len(some), tuple(tokens)))
    tree.add_ending(Ending(key, keys[-1], pages, len(rest), size, tuple(tokens)))


def longest(tree: Tree[Any], tokens: list[int]) -> tuple[int, ...] | None:
    found = tree.longest(page_keys(tree.root, tokens, PAGE), tokens)
    return None if found is None else found.payload


@settings(max_examples=150)
@given(
    st.lists(st.tuples(sequences, st.integers(1, 5)), max_size=12), st.integers(5, 60), sequences
)
def test_the_tree_knows_what_was_kept_and_not_evicted(
    kept: list[tuple[list[int], int]], budget: int, asked: list[int]
) -> None:
    tree: Tree[Any] = Tree(b"root", PAGE, budget)
    here: dict[bytes, tuple[int, ...]] = {}
    segments: dict[int, Segment[Any]] = {}
    for tokens, size in kept:
        keep(tree, tokens, size)
        path = tree.path(page_keys(b"root", tokens, PAGE)[-1])
        segments |= {id(segment): segment for segment, _ in path}
        key = ending_key(page_keys(b"root", tokens, PAGE)[-1], tokens[len(tokens) // 2 * 2 :])
        here[key] = tuple(tokens)
        for gone in tree.evict():
            if isinstance(gone, Ending):
                assert here.pop(gone.key) == gone.payload
            else:
                segments.pop(id(gone))
        assert tree.nbytes <= budget
    known = [tree[key] for key in here]
    assert len(tree) == len(known)
    assert tree.nbytes == sum(part.nbytes for part in (*known, *segments.values()))
    for ending in known:
        keys = page_keys(b"root", ending.payload, PAGE)
        assert tree.known(keys) == ending.pages == len(keys) - 1
        walked = [key for segment, used in tree.path(ending.base) for key in segment.keys[:used]]
        assert walked == keys[1:]
    want = [t for t in here.values() if len(t) < len(asked) and t == tuple(asked[: len(t)])]
    assert longest(tree, asked) == max(want, key=len, default=None)
    tree.budget = 0
    tree.evict()
    assert (len(tree), tree.nbytes, tree.known(page_keys(b"root", asked, PAGE))) == (0, 0, 0)


def test_pages_with_two_owners_stay_known_when_one_goes() -> None:
    """A segment from disk had two pages that memory had already, under another owner."""
    tree: Tree[Any] = Tree(b"root", PAGE, 1000)
    keep(tree, [0] * 4, 1)
    keys = page_keys(b"root", [0] * 8, PAGE)
    tree.add_segment(Segment(b"root", 0, tuple(keys[1:]), 7, None))
    tree.add_ending(Ending(ending_key(keys[-1], []), keys[-1], 4, 0, 1, (0,) * 8))
    tree.remove(tree[ending_key(keys[2], [])])
    assert tree.known(keys) == 4
    keep(tree, [0] * 8 + [1], 1)  # stores no page again
    tree.budget = 0
    tree.evict()
    assert (len(tree), tree.nbytes) == (0, 0)


def test_what_is_used_stays_longer() -> None:
    tree: Tree[Any] = Tree(b"root", PAGE, 40)
    keep(tree, [0, 0, 1], 10)
    assert longest(tree, [0, 0, 1, 9]) == (0, 0, 1)
    tree.touch(tree[ending_key(page_keys(b"root", [0, 0], PAGE)[-1], [1])])
    for other in range(1, 5):
        keep(tree, [other, 1], 10)
        tree.evict()
    assert longest(tree, [0, 0, 1, 9]) is None
    assert longest(tree, [4, 1, 0]) == (4, 1)
    assert longest(tree, [3, 1, 0]) == (3, 1)


def test_a_damaged_segment_takes_every_ending_that_needs_it() -> None:
    tree: Tree[Any] = Tree(b"root", PAGE, 1000)
    for tokens in ([0] * 8, [0] * 7, [0] * 3, [1, 1]):
        keep(tree, tokens, 1)
    first, second = (segment for segment, _ in tree.path(page_keys(b"root", [0] * 8, PAGE)[-1]))
    assert (len(first.keys), len(second.keys)) == (3, 1)
    tree.remove_segment(second)
    assert longest(tree, [0] * 9) == (0,) * 7
    tree.remove_segment(first)
    assert longest(tree, [0] * 9) is None
    assert longest(tree, [1, 1, 1]) == (1, 1)
