"""Small files that are written whole: what is at their path, and which path errors name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds4.cli import app
from ds4.weights.shard_file import check_writable, replace_file, write_whole


def test_a_links_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link, lost = tmp_path / "far" / "a", tmp_path / "link", tmp_path / "lost"
    link.symlink_to(target)
    lost.symlink_to(tmp_path / "none" / "a")
    for content in b"new", b"newer":
        check_writable(link)
        write_whole(link, content)
        assert (link.readlink(), target.read_bytes()) == (target, content)
    for function in (lambda path: write_whole(path, b""), check_writable):
        with pytest.raises(FileNotFoundError) as caught:
            function(lost)
        assert caught.value.filename == str(lost)
    replace_file(link, b"here")
    assert (link.is_symlink(), target.read_bytes()) == (False, b"newer")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "far", "link", "lost"]


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "out.fifo"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe)
    app(["compare", "--article", "--csv", str(pipe)], standalone_mode=False)
    assert os.read(reader, 8) == b"machine,"
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("redirect", ["| cat >>", ">>"])
def test_standard_output_is_written_into(tmp_path: Path, redirect: str) -> None:
    log, link = tmp_path / "log", tmp_path / "stdout"
    log.write_text("before\n")
    link.symlink_to("/dev/fd/1")  # not /dev/stdout, which a broken write_whole could replace
    code = (
        "import sys; from pathlib import Path; from ds4.weights.shard_file import write_whole;"
        "write_whole(Path(sys.argv[1]), b'file\\n'); print('after')"
    )
    line = f'"$0" -c "$1" "$2" {redirect} "$3"'
    subprocess.run(["sh", "-c", line, sys.executable, code, link, log], check=True)
    assert link.is_symlink()
    assert log.read_text() == "before\nfile\nafter\n"


def test_errors_name_the_path_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in "folder", "file/a", "none/a", "x" * 255:
        path = tmp_path / name
        functions = (lambda path: write_whole(path, b""), lambda path: replace_file(path, b""))
        for function in (*functions, check_writable):
            with pytest.raises(OSError, match=name) as caught:
                function(path)
            assert caught.value.filename == str(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
