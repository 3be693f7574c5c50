"""The command line as a process: terminals, signals, closed pipes."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

from ds4.cli.terminal import Screen

FAKE = [sys.executable, str(Path(__file__).with_name("fake_llm.py"))]


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{FAKE[0]} {FAKE[1]} generate forever | head -c 3",
        shell=True,
        capture_output=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (b"One", b"")


def test_ctrl_c_ends_generate():
    with subprocess.Popen([*FAKE, "generate", "forever"], stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout.read(3) == b"One"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


PROMPT = "\x1b[?2004h"  # where prompt-toolkit begins to read


class Terminal:
    """A `ds4` process on a terminal of its own."""

    def __init__(self, *arguments, **environment):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", **environment}
        self.process = subprocess.Popen(
            [*FAKE, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text):
        """Read until `text` appears; what came before and with it."""
        end = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self._read()
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def _read(self):
        try:
            data = os.read(self.master, 65536).decode()
        except OSError:  # how Linux says that the other end is closed
            data = ""
        assert data or self.process.poll() is None, self.seen
        if "\x1b[6n" in data:  # where is the cursor?
            os.write(self.master, b"\x1b[1;1R")
        self.seen += data

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def close(self):
        status = self.process.wait(60)
        os.close(self.master)
        return status


def test_ctrl_c_ends_only_the_answer_and_ctrl_d_the_talk():
    terminal = Terminal("chat")
    terminal.wait_for(PROMPT)
    terminal.type("forever\r")
    terminal.wait_for("three.")
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for(PROMPT)
    terminal.type("/clear\r")
    terminal.wait_for("(a new conversation)")
    terminal.type("Hi\r")
    terminal.wait_for("One two three.")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.close() == 0


def test_speed_is_told_on_a_terminal_and_colour_can_be_refused():
    for environment, styled in ({}, True), ({"NO_COLOR": "1"}, False):
        terminal = Terminal("generate", "x", **environment)
        seen = terminal.wait_for("10.0 tok/s; stop")
        assert seen.startswith("One two three.\r\n")
        assert bool(re.search(r"\x1b\[2m", seen)) == styled
        assert terminal.close() == 0


# What is shown


class Tty(io.StringIO):
    def isatty(self):
        return True


def shown(stream):
    screen = Screen(stream)
    screen.thought("Hm\x1b[2J.")
    screen.text("\n\nFour\x9b.")
    screen.end()
    return stream.getvalue()


def test_thoughts_are_dim_and_nothing_moves_the_cursor(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(Tty()) == "\x1b[2mHm�[2J.\x1b[0m\n\nFour�.\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Tty()) == "Hm�[2J.\n\nFour�.\n"
    assert shown(io.StringIO()) == "\n\nFour\x9b.\n"
