"""What a user types in a chat, line by line: from a terminal, or through a pipe."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path

from mm1_mlx.errors import PromptError

_BLOCK = '"""'
_MORE = "... "
_NO_TEXT = "The line is not UTF-8 text. Check the terminal's encoding."
_KEPT = 1000  # lines of the history


class Lines:
    """Reads inputs; one may go over several lines, in triple quotes or with a backslash
    at the end of each but the last.

    history: a file that outlives the session, or None. words: what the tabulator key
    completes at the beginning of a line; behind a word it completes paths.
    """

    def __init__(self, history: Path | None = None, words: Sequence[str] = ()):
        if sys.stdin is None:
            raise PromptError("The chat is read from stdin, but stdin is closed.")
        self.interactive = sys.stdin.isatty()
        self._edits = self.interactive and sys.stdout.isatty()
        self._history = None
        if self._edits:
            self._history = _start_readline(history, words)

    def read(self, prompt: str) -> str | None:
        """The next input, without its last line break; None at the end.

        prompt: shown on a terminal alone. PromptError for what is not text.
        """
        line = self._line(prompt)
        if line is None:
            return None
        if line.lstrip().startswith(_BLOCK):
            return self._block(line.lstrip()[len(_BLOCK) :])
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(_MORE)
        return "\n".join([*lines, line or ""] if lines else [line or ""])

    def _block(self, line: str | None) -> str:
        lines = []
        while line is not None:
            if line.rstrip().endswith(_BLOCK):
                lines.append(line.rstrip()[: -len(_BLOCK)])
                break
            lines.append(line)
            line = self._line(_MORE)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        line = self._typed(prompt) if self.interactive else _piped()
        if line is not None and any("\ud800" <= letter <= "\udfff" for letter in line):
            raise PromptError(
                "The line is not UTF-8 text. Check the terminal's encoding."
            )
        return line

    def _typed(self, prompt: str) -> str | None:
        try:
            if self._edits:
                line = input(prompt)
                self._keep()
                return line
            print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise PromptError(_NO_TEXT) from error

    def _keep(self) -> None:
        """Write the history now: a terminal that is closed gives no time for it."""
        if self._history is None:
            return
        import readline

        with suppress(OSError):
            readline.write_history_file(self._history)


def _piped() -> str | None:
    line = sys.stdin.buffer.readline()
    if not line:
        return None
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"A line on stdin is not UTF-8 text (byte {error.start})."
        ) from error


def _start_readline(history: Path | None, words: Sequence[str]) -> Path | None:
    """Editing, history and completion, where Python has readline; the history's file,
    readable by its owner alone."""
    try:
        import readline
    except ImportError:
        return None
    readline.set_completer_delims(" \t\n")
    readline.set_completer(_completer(words, readline.get_line_buffer))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_history_length(_KEPT)
    if history is None:
        return None
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_RDWR, 0o600))
        os.chmod(history, 0o600)
    except OSError:
        return None  # nowhere to write: a chat without a history is still one
    with suppress(OSError, UnicodeDecodeError):  # empty, or of another readline
        readline.read_history_file(history)
    return history


def _completer(
    words: Sequence[str], line: Callable[[], str]
) -> Callable[[str, int], str | None]:
    def complete(text: str, state: int) -> str | None:
        begun = line().lstrip()
        if begun.startswith("/") and " " not in begun and "/" not in begun[1:]:
            options = [f"{word} " for word in words if word.startswith(text)]
        else:
            found = sorted(glob(f"{os.path.expanduser(text)}*"))
            options = [f"{p}/" if os.path.isdir(p) else p for p in found]
        return options[state] if state < len(options) else None

    return complete
