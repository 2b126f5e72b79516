"""The chat in a terminal (a pseudo terminal): editing, history, Ctrl-C."""

import errno
import fcntl
import os
import pty
import re
import select
import stat
import subprocess
import sys
import termios
import time

import pytest
from test_chat import CIRCLE, SHAPES, STAR

from helpers import clean_environment, heed_ctrl_c, need_tiny
from mm1_mlx.cli.chat_commands import COMMANDS


def _take_ctrl_c() -> None:
    heed_ctrl_c()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal's go to this process


class Terminal:
    """A chat in a pseudo terminal: what it shows, and keys that are pressed."""

    def __init__(self, tmp_path, *flags: str):
        self.outer, inner = pty.openpty()
        self.shown = ""
        env = clean_environment(MM1_MLX_CACHE=str(tmp_path), TERM="dumb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mm1_mlx.chat", *flags],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=env,
            start_new_session=True,
            preexec_fn=_take_ctrl_c,
        )
        os.close(inner)

    def wait_for(self, pattern: str) -> str:
        """What is shown up to a pattern, from what was waited for before."""
        until = time.monotonic() + 120
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < until, f"no {pattern!r} in {self.shown!r}"
            if not self._read():
                raise AssertionError(f"it ended: {self.shown!r}")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def _read(self) -> bool:
        if not select.select([self.outer], [], [], 1)[0]:
            return True
        try:
            data = os.read(self.outer, 4096)
        except OSError as error:
            if error.errno != errno.EIO:  # Linux's way to say that it was closed
                raise
            data = b""
        self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def type(self, keys: str) -> None:
        os.write(self.outer, keys.encode())

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C at the prompt, and what is shown up to a pattern.

        Again each two seconds: Python's readline sees one that comes before it waits
        for the next key only when that key comes, and on a busy machine it does.
        """
        pressed, until = 0.0, time.monotonic() + 120
        while not re.search(pattern, self.shown) and time.monotonic() < until:
            if time.monotonic() - pressed > 2:
                self.type("\x03")
                pressed = time.monotonic()
            self._read()
        return self.wait_for(pattern)

    def ask(self, line: str) -> str:
        """Type a line, and give what is shown until the next prompt."""
        self.type(f"{line}\n")
        self.wait_for(re.escape(line) + r"\n")
        return self.wait_for(r"(?:^|\n)(?:\(\d pictures?\) )?> ")

    def end(self) -> int:
        self.type("\x04")
        until = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < until:
            self._read()
        code = self.process.wait(1)
        os.close(self.outer)
        return code


@pytest.fixture
def terminal(tmp_path):
    need_tiny()
    opened = []

    def make(*flags: str) -> Terminal:
        opened.append(Terminal(tmp_path, *flags))
        return opened[-1]

    yield make
    for each in opened:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def test_a_talk_in_a_terminal(terminal, tmp_path):
    t = terminal()
    greeting = t.wait_for(r"\n> ")
    assert "note: mm1-tiny" in greeting and "/help shows the commands" in greeting
    help_text = t.ask("/help")
    assert all(f"/{name}" in help_text for name in COMMANDS)
    assert "picture: shapes.png, " in t.ask(f"'{SHAPES}' ")
    assert "yellow\n" in t.ask(STAR)
    assert "red\n" in t.ask(CIRCLE)
    assert "Reused: " in t.ask("/stats")
    assert "error: No image file absent.png" in t.ask("/image absent.png")
    t.type('"""What colour\n')
    t.wait_for(r"\.\.\. ")
    t.type('is the star?"""\n')
    assert t.wait_for(r"\n> ")
    assert t.end() == 0
    history = tmp_path / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert STAR in history.read_text()
    assert "Traceback" not in t.shown


def test_the_history_outlives_the_session(terminal):
    first = terminal("--image", str(SHAPES))
    first.wait_for(r"> ")
    first.ask(STAR)
    assert first.end() == 0
    second = terminal("--image", str(SHAPES), "--quiet")
    second.wait_for(r"> ")
    second.type("\x10\n")  # Ctrl-P: the line before
    assert "yellow" in second.wait_for(r"yellow\n> ")
    assert second.end() == 0


def test_no_history_leaves_nothing(terminal, tmp_path):
    t = terminal("--no-history", "--quiet")
    assert t.wait_for(r"> ") == "> "
    t.ask("/help")
    assert t.end() == 0
    assert not (tmp_path / "chat_history").exists()


def test_ctrl_c_ends_an_answer_and_not_the_chat(terminal):
    # So hot that the end token is as unlikely as any other: answers are long. The seed
    # keeps them from ever writing what looks like the prompt.
    hot = ("--temp", "100", "--seed", "1", "-m", "900")
    t = terminal("--image", str(SHAPES), *hot)
    t.wait_for(r"> ")
    for _ in range(5):  # an answer may still be short
        t.type("Describe the picture.\n")
        t.wait_for(r"picture\.\n")
        while len(t.shown) < 5:
            t._read()
        t.type("\x03")
        if "(stopped)" in t.wait_for(r"\n> "):
            break
        t.ask("/clear")
    else:
        pytest.fail("no answer was stopped")
    count = int(re.search(r"Generation: (\d+) tokens", t.ask("/stats"))[1])
    assert 0 < count < 900
    t.type("half a line")
    t.wait_for("half a line")
    t.interrupt(r"\n> ")  # at the prompt: the line is forgotten
    assert "taken back: Describe" in t.ask("/undo")
    assert t.end() == 0
