"""A bar on a terminal, lines elsewhere, and times in words."""

import io
import os
import re
import sys
from importlib import import_module

import pytest
from training_kit import environment, write_run

from helpers import ROOT, clean_environment, need, need_tiny
from mm1_mlx.cli import progress
from mm1_mlx.cli.progress import SlowBar, duration, encoder_bar, progress_bar, shows
from mm1_mlx.inference import picture_progress


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0, "0 s"),
        (59.6, "60 s"),
        (89, "89 s"),
        (90, "2 min"),
        (45 * 60 + 10, "45 min"),
        (89 * 60 + 31, "1 h 30 min"),
        (3 * 3600 + 300, "3 h 05 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_on_a_terminal_only():
    need("tqdm")
    quiet = progress_bar(10, "work", stream=io.StringIO())
    assert not shows(quiet)
    quiet.update(3)
    quiet.set_postfix_str("x")
    quiet.clear()
    quiet.close()

    terminal = Terminal()
    bar = progress_bar(10, "work", initial=2, unit="step", stream=terminal)
    assert shows(bar)
    bar.update(8)
    bar.close()
    assert re.search(r"work: 100%.*10/10", terminal.getvalue())


def test_a_terminal_without_tqdm_and_no_terminal_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert not shows(progress_bar(10, "work", stream=Terminal()))
    monkeypatch.setattr(sys, "stderr", None)  # pythonw, some services
    assert not shows(progress_bar(10, "work"))
    closed = Terminal()
    closed.close()
    assert not shows(progress_bar(10, "work", stream=closed))


def test_a_slow_bar_shows_what_takes_long_and_goes(monkeypatch):
    need("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = SlowBar("work", "step")
    for done in (0, 3, 10):
        bar(done, 10)
    assert sys.stderr.getvalue() == ""  # it was over in no time
    monkeypatch.setattr(progress, "_SLOW", 0)
    for done in (0, 3):
        bar(done, 10)
    assert re.search(r"work:  30%.*3/10", sys.stderr.getvalue())
    bar(10, 10)
    assert sys.stderr.getvalue().endswith(" \r")  # wiped out
    bar.close()


def test_an_encoder_bar_is_for_who_sees_it(monkeypatch):
    for stream, wanted in ((io.StringIO(), True), (Terminal(), False), (None, True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with encoder_bar(wanted) as bar:
            assert bar is None


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_encoder_is_watched_on_a_terminal(monkeypatch, capsys, command):
    """While it reads several pictures; the answer stands alone on stdout."""
    need("tqdm")
    need_tiny()
    monkeypatch.setattr(progress, "_SLOW", 0)
    monkeypatch.setattr(picture_progress, "REPORTED", 1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What?\n")))
    examples = ROOT / "examples"
    flags = ["--image", f"{examples}/shapes.png", f"{examples}/shapes.png"]
    flags += ["-m", "1", "--resolution", "192"]
    main = import_module(f"mm1_mlx.{command}").main
    assert main([*flags, *(["-p", "What?"] if command == "generate" else [])]) == 0
    assert "reading pictures: " in sys.stderr.getvalue()
    assert "reading" not in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a Unix terminal")
def test_pretrain_on_a_terminal(tmp_path):
    """What, how far, how long, and memory, on one line that is written over."""
    import pty
    import subprocess
    import termios

    need("tqdm")
    arguments = write_run(tmp_path, joint={"steps": 20})
    main, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 200))
    process = subprocess.Popen(
        [sys.executable, "-m", "mm1_mlx.pretrain", *arguments],
        cwd=ROOT,
        env=clean_environment(**environment(tmp_path, TERM="xterm")),
        stdout=subprocess.PIPE,
        stderr=child,
        text=True,
    )
    os.close(child)
    shown = b""
    try:
        while data := os.read(main, 4096):
            shown += data
    except OSError:  # Linux's way to say that the other side has closed
        pass
    out, _ = process.communicate(timeout=60)
    text = shown.decode()
    assert process.returncode == 0, text
    assert out.startswith(str(tmp_path / "run" / "model"))
    assert re.search(r"encoder: 100%\|.*\| 4/4 \[.*, loss \S+ accuracy", text)
    shown = r"joint: 100%\|.*\| 20/20 \[\d\d:\d\d.*loss .* tok/s, peak \d\.\d\d GB\]"
    assert re.search(shown, text) and "experts (▄ even" in text
    assert "joint 20/20" not in text  # that is the line for log files
