"""The folder of snapshots: what happens beside it while it is written and read."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4.engine import store as module
from ds4.engine.store import Store
from ds4.engine.tree import Ending, Segment, ending_key, page_keys
from ds4.errors import ConfigError

PAGE, ROOT, PLENTY = 2, b"r" * 16, 1 << 20


def rows(n: int) -> Any:
    return np.arange(n, dtype=np.uint8)


def segment(tokens: list[int], first: int = 0) -> Segment[Any]:
    keys = page_keys(ROOT, tokens, PAGE)
    return Segment(keys[first], first, tuple(keys[first + 1 :]), 50, rows(50))


def ending(tokens: list[int]) -> Ending[Any]:
    keys = page_keys(ROOT, tokens, PAGE)
    return Ending(ending_key(keys[-1], []), keys[-1], len(keys) - 1, 0, 20, rows(20))


def write(store: Store, *parts: Any) -> None:
    for part in parts:
        store.write([part])
    store.flush()


def test_what_a_snapshot_hangs_on_may_go_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment is found damaged: what was being written after it is dropped, others are not."""
    store = Store(tmp_path, ROOT, PAGE, PLENTY)
    first, plain = segment([1, 2]), module.write_file
    write(store, first, ending([1, 2]))
    on_disk = store.tree.path(first.keys[-1])[0][0]

    def damaged(path: Path, header: bytes, data: Any) -> None:
        plain(path, header, data)
        on_disk.payload.write_bytes(b"short")
        assert store.read(on_disk) is None

    monkeypatch.setattr(module, "write_file", damaged)
    write(store, segment([1, 2, 3, 4], 1))
    monkeypatch.setattr(module, "write_file", plain)
    assert not list(store.folder.iterdir())
    write(store, segment([5, 6]), ending([5, 6]))
    assert ending([5, 6]).key in store
    store.close()


def test_segments_go_with_an_ending_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or nothing would ever evict them."""
    store, plain = Store(tmp_path, ROOT, PAGE, PLENTY), module.write_file

    def full(path: Path, header: bytes, data: Any) -> None:
        if len(data) == 20:
            raise OSError(28, "No space left on device")
        plain(path, header, data)

    write(store, segment([5, 6]), ending([5, 6]))
    monkeypatch.setattr(module, "write_file", full)
    store.write([segment([1, 2]), segment([1, 2, 3, 4], 1), ending([1, 2, 3, 4])])
    store.flush()
    assert store.counts["skipped"] == 1
    assert len(list(store.folder.iterdir())) == 2
    assert store.tree.nbytes == sum(file.stat().st_size for file in store.folder.iterdir())
    store.close()


def test_a_snapshot_waits_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING", 100)
    going, plain = threading.Event(), module.write_file

    def slow(path: Path, header: bytes, data: Any) -> None:
        assert going.wait(60)
        plain(path, header, data)

    monkeypatch.setattr(module, "write_file", slow)
    store = Store(tmp_path, ROOT, PAGE, PLENTY)
    tokens = [1, 2, 3, 4, 5, 6]
    parts = [segment(tokens[: n + 2], n // 2) for n in (0, 2, 4)]
    store.write([*parts, ending(tokens)])  # 170 bytes: nothing else waits
    store.write([segment([7, 8]), ending([7, 8])])
    going.set()
    store.flush()
    assert (ending(tokens).key in store, ending([7, 8]).key in store) == (True, False)
    assert (store.counts["written"], store.counts["skipped"]) == (4, 2)
    store.close()


def test_pages_that_two_files_have_count_once(tmp_path: Path) -> None:
    """Two servers write to a folder, each without knowing of the other's files."""
    one, other = (Store(tmp_path, ROOT, PAGE, PLENTY) for _ in range(2))
    write(one, segment([1, 2, 3, 4]), ending([1, 2, 3, 4]))
    write(other, segment([1, 2]), ending([1, 2]))
    for store in (one, other):
        store.close()
    again = Store(tmp_path, ROOT, PAGE, PLENTY)
    assert again.tree.nbytes == sum(file.stat().st_size for file in again.folder.iterdir())
    for tokens in ([1, 2], [1, 2, 3, 4]):
        with again._lock:
            again._unlink(again.tree.remove(again.tree[ending(tokens).key]))
    assert again.tree.nbytes == 0
    assert not list(again.folder.iterdir())
    again.close()


def test_a_file_that_goes_while_the_folder_is_read_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, ROOT, PAGE, PLENTY)
    write(store, segment([1, 2]), ending([1, 2]))
    store.close()
    names = [*store.folder.iterdir(), store.folder / "gone"]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(names))
    again = Store(tmp_path, ROOT, PAGE, PLENTY)
    assert ending([1, 2]).key in again
    again.close()


@pytest.mark.skipif(os.name != "posix", reason="/dev/null")
def test_a_folder_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/dev/null.*--snapshot-dir"):
        Store(Path("/dev/null/x"), ROOT, PAGE, PLENTY)
