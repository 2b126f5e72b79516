"""A chat: what each input does, and what is printed."""

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm1_mlx.cli.answering import DEFAULT_MODEL, tell_problem
from mm1_mlx.cli.boxes import check_place, draw, places_of, regions_of
from mm1_mlx.cli.chat_commands import ALIASES, COMMANDS, table
from mm1_mlx.cli.chat_files import as_markdown, write_text
from mm1_mlx.cli.chat_lines import Lines
from mm1_mlx.cli.chat_paths import (
    addresses_in,
    is_path,
    no_picture,
    paths_in,
    split_paths,
)
from mm1_mlx.cli.parser import did_you_mean
from mm1_mlx.cli.progress import SlowBar
from mm1_mlx.cli.resolution import picture_limits
from mm1_mlx.cli.run import explain
from mm1_mlx.cli.statistics import statistics
from mm1_mlx.errors import ContextError, PromptError, UsageError
from mm1_mlx.inference.conversation import Conversation
from mm1_mlx.inference.wired import wired_limit
from mm1_mlx.inputs.conversation import read_conversation
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, plural
from mm1_mlx.inputs.sources import pasted_path

_WAITING = "/image - takes the waiting pictures back"
_FULL = "/clear starts anew, /drop forgets the oldest turn, then /retry asks again"


class Session:
    """One chat. An input that fails is one line on stderr, and the chat goes on."""

    def __init__(
        self,
        talk: Conversation,
        processor: Any,
        lines: Lines,
        args: argparse.Namespace,
        bar: SlowBar | None = None,
    ):
        self._talk, self._processor = talk, processor
        self._lines, self._args = lines, args
        self._bar = bar  # of the encoder
        self._stats = args.stats
        # The last question, where it failed, and the pictures of its line.
        self._unanswered: tuple[str, list] | None = None
        self._written: set[Path] = set()  # files that may be written over
        self._failed = False

    def start(self) -> None:
        """What the flags ask for; errors end the command."""
        if self._args.load is not None:
            self._restore(Path(self._args.load).expanduser())
            self._note(f"loaded: {plural(len(self._talk.exchanges), 'turn')}")
        if self._args.system is not None:
            self._talk.system = self._args.system
        for path in self._args.image:
            self._talk.show(path)

    def run(self) -> int:
        """Take inputs until they end; 1 where one failed that came through a pipe."""
        goes_on = True
        while goes_on:
            try:
                line = self._read()
                goes_on = line is not None and self.take(line)
            except KeyboardInterrupt:
                if not self._lines.interactive:
                    raise
                print(file=sys.stderr, flush=True)
            except (BrokenPipeError, _Unreadable):
                raise
            except Exception as error:
                self._tell_error(error)
        return int(self._failed and not self._lines.interactive)

    def _read(self) -> str | None:
        """The next input, None at the end; _Unreadable where there will be none."""
        try:
            line = self._lines.read(self._prompt())
        except OSError as error:  # the terminal is gone
            raise _Unreadable(explain(error)) from error
        if line is None and self._lines.interactive:
            print(file=sys.stderr, flush=True)
        return line

    def _prompt(self) -> str:
        waiting = len(self._talk.waiting)
        return f"({plural(waiting, 'picture')}) > " if waiting else "> "

    # --- an input --------------------------------------------------------------------

    def take(self, line: str) -> bool:
        """Do what an input says; whether the chat goes on. Raises what fails."""
        text = line.strip()
        if not text:
            return True
        if _is_command(text):
            return self._command(text)
        paths, rest = split_paths(line)
        left = rest if paths else text
        if not (named := addresses_in(left)) and (path := no_picture(left)) is not None:
            named = [path]  # reading it says what it is
        if named:
            self._show_all([*paths, *named])
            return True
        if not paths and text.startswith("/"):  # neither a command nor a file
            return self._command(text)
        waiting = len(self._talk.waiting)
        self._show_all(paths)
        if paths and not re.search(r"\w", rest.replace(IMAGE_TOKEN, "")):
            return True  # marks around paths are no question
        if IMAGE_TOKEN in rest and IMAGE_TOKEN not in line:  # in place of the paths
            rest = IMAGE_TOKEN * waiting + rest
        if rest:
            self._ask(rest, self._talk.waiting[waiting:])
        return True

    def _command(self, text: str) -> bool:
        name, argument = _name_and_argument(text)
        if name not in COMMANDS:
            close = did_you_mean(f"/{name}", [f"/{known}" for known in COMMANDS])
            raise UsageError(
                f"unknown command '/{name}'{close or '; /help lists them'}"
            )
        if name == "exit":
            return False
        do: Callable[[str], None] = getattr(self, f"_do_{name}")
        do(argument)
        return True

    def _ask(self, text: str, own: list) -> None:
        """Print the answer as it comes. Ctrl-C ends it, what came of it is kept.

        own: the last of the waiting pictures, which came with the question; where
        nothing is answered they wait for /retry alone, not for another question.
        """
        count, stopped = len(self._talk.exchanges), False
        with wired_limit(), _stoppable(self._lines.interactive) as stop:
            pieces = self._talk.ask(text)
            try:
                for piece in pieces:
                    stop.may_wait = True
                    print(piece.text, end="", flush=True)
                    if stop.asked:
                        break
            except KeyboardInterrupt:
                if not self._lines.interactive:
                    raise
                stop.asked = True
            finally:
                stopped = stop.asked
                pieces.close()
                if self._bar is not None:
                    self._bar.close()
                if stop.may_wait:
                    print(flush=True)
                self._unanswered = None
                if len(self._talk.exchanges) == count:
                    self._unanswered = text, own
                    del self._talk.waiting[len(self._talk.waiting) - len(own) :]
        if stopped:
            self._note("(stopped)")
        else:
            self._after()

    def _after(self) -> None:
        """What there is to say of a whole answer."""
        last = self._talk.exchanges[-1].last
        if last is not None and last.finish_reason == "length":
            context = self._talk.context
            if self._talk.tokens >= context:
                self._note(
                    f"(the answer ends here: the context of {context} tokens is full; "
                    f"/clear starts anew, /drop forgets the oldest turn)"
                )
            else:
                self._note(
                    f"(cut off after {last.generation_tokens} tokens: --max-tokens N "
                    f"allows more)"
                )
        tell_problem(self._args.prefix_cache and self._talk.reuse)
        if self._stats:
            self._tell_statistics()

    # --- commands --------------------------------------------------------------------

    def _do_help(self, argument: str) -> None:
        print(table(), file=sys.stderr, flush=True)

    def _show_all(self, paths: list[str]) -> None:
        waiting = len(self._talk.waiting)
        try:
            for path in paths:
                self._talk.show(path)
        except BaseException:  # the others wait for no other question
            del self._talk.waiting[waiting:]
            raise
        for shown in self._talk.waiting[waiting:]:
            name = Path(shown.name).name if "://" not in shown.name else shown.name
            self._note(f"picture: {name}, {shown.size[0]}x{shown.size[1]}")

    def _do_image(self, argument: str) -> None:
        if argument == "-":
            count = len(self._talk.waiting)
            self._talk.waiting.clear()
            self._note(f"taken back: {plural(count, 'picture')}")
            return
        if argument:
            self._show_all(paths_in(argument))
            return
        said = [p for each in self._talk.exchanges for p in each.pictures]
        for number, picture in enumerate([*said, *self._talk.waiting], 1):
            waits = " (for the next question)" if number > len(said) else ""
            print(f"{number}. {picture.name}{waits}", file=sys.stderr)
        if not said and not self._talk.waiting:
            print("no pictures: /image PATH shows one", file=sys.stderr)

    def _do_system(self, argument: str) -> None:
        if not argument:
            print(self._talk.system or "no system prompt", file=sys.stderr, flush=True)
            return
        self._talk.system = None if argument == "-" else argument

    def _do_clear(self, argument: str) -> None:
        self._talk.clear()
        self._unanswered = None
        self._note("forgotten: all turns and pictures")

    def _do_drop(self, argument: str) -> None:
        if argument and (not argument.isdecimal() or int(argument) < 1):
            raise UsageError(f"/drop takes how many turns, not '{argument}'")
        count = 0
        while count < int(argument or 1) and self._talk.drop_oldest():
            count += 1
        self._note(
            f"forgotten: {plural(count, 'turn')}, "
            f"{plural(len(self._talk.exchanges), 'turn')} left"
        )

    def _do_undo(self, argument: str) -> None:
        taken = self._talk.undo()
        if taken is None:
            raise PromptError("There is no question to take back.")
        self._note(f"taken back: {taken.asked}")

    def _do_retry(self, argument: str) -> None:
        if self._unanswered is not None:
            text, own = self._unanswered
            self._talk.waiting += own
            self._ask(text, own)
            return
        waiting, taken = self._talk.waiting, self._talk.undo()
        if taken is None:
            raise PromptError("There is no question to ask again.")
        count = len(self._talk.exchanges)
        self._talk.waiting = own = [*taken.pictures]
        try:
            self._ask(taken.asked, own)
        finally:
            self._talk.waiting = waiting
            if len(self._talk.exchanges) == count:  # the answer that was there stays
                self._talk.exchanges.append(taken)
                self._unanswered = None

    def _do_stats(self, argument: str) -> None:
        if argument not in ("", "on", "off"):
            raise UsageError(f"/stats takes on or off, not '{argument}'")
        if not argument:
            self._tell_statistics()
        else:
            self._stats = argument == "on"

    def _tell_statistics(self) -> None:
        last = self._talk.exchanges[-1].last if self._talk.exchanges else None
        if last is None:
            raise PromptError("There is no answer yet to tell statistics of.")
        print(statistics(last), file=sys.stderr)
        room = f"Context: {self._talk.tokens} of {self._talk.context} tokens"
        print(room, file=sys.stderr, flush=True)

    def _do_draw(self, argument: str) -> None:
        if not argument or not self._talk.exchanges:
            raise UsageError("/draw FILE goes with an answer that has boxes or points")
        last = self._talk.exchanges[-1]
        pictures = last.seen  # of turns that are forgotten since, too
        place = str(pasted_path(argument))
        check_place(place, "/draw")
        if not pictures:
            raise UsageError("/draw has no picture to draw on: show one with /image")
        files = places_of(place, len(pictures))
        for file in files:
            self._check_free(file)
        how = argparse.Namespace(
            draw=place,
            box_format=None,
            quiet=self._args.quiet,
            max_image_pixels=self._args.max_image_pixels,
        )
        regions = regions_of(last.answer, how, self._processor, len(pictures))
        draw(regions, [picture.source for picture in pictures], how)
        self._written.update(file.resolve() for file in files if regions)

    def _do_save(self, argument: str) -> None:
        if not argument:
            raise UsageError("/save needs the name of a file, such as chat.json")
        if not self._talk.exchanges:
            raise PromptError("There is no turn yet to save.")
        place = pasted_path(argument)
        if place.name in ("", ".."):
            raise UsageError(
                f"/save needs the name of a file, such as chat.json, not '{argument}'"
            )
        place = place if place.suffix else place.with_suffix(".json")
        self._check_free(place)
        model = self._args.model or DEFAULT_MODEL
        messages = self._talk.messages()
        text = as_markdown(messages, model)
        if place.suffix.lower() != ".md":
            values = {"model": model, "messages": messages}
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_text(place, text)
        self._written.add(place.resolve())
        self._note(f"saved: {plural(len(self._talk.exchanges), 'turn')} in {place}")

    def _do_load(self, argument: str) -> None:
        if not argument:
            raise UsageError("/load needs the name of a file that /save wrote")
        self._restore(pasted_path(argument))
        self._unanswered = None
        self._note(f"loaded: {plural(len(self._talk.exchanges), 'turn')}")

    def _restore(self, place: Path) -> None:
        self._talk.restore(*read_conversation(place, **picture_limits(self._args)))
        self._written.add(place.resolve())

    def _check_free(self, place: Path) -> None:
        if place.exists() and place.resolve() not in self._written:
            raise UsageError(f"{place} is there already: give another name")

    # --- telling ---------------------------------------------------------------------

    def _note(self, text: str) -> None:
        if self._lines.interactive and not self._args.quiet:
            print(text, file=sys.stderr, flush=True)

    def _tell_error(self, error: Exception) -> None:
        if self._args.debug:
            import traceback

            traceback.print_exc()
        text = explain(error)
        if isinstance(error, ContextError) and self._talk.exchanges:
            text = f"{text} {_FULL}."
        waiting = len(self._talk.waiting)
        if isinstance(error, ContextError) and waiting > bool(self._talk.exchanges):
            text = f"{text} {_WAITING}."
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._failed = True


def _name_and_argument(text: str) -> tuple[str, str]:
    name, *rest = text[1:].split(maxsplit=1) or [""]
    return ALIASES.get(name, name), rest[0] if rest else ""


def _is_command(text: str) -> bool:
    """Whether an input is a known command, and no file of that name."""
    known = text.startswith("/") and _name_and_argument(text)[0] in COMMANDS
    return known and not is_path(text)


class _Unreadable(PromptError):
    """Nothing can be read any more."""


class _Stop:
    """asked: Ctrl-C was pressed. may_wait: an answer comes, so it ends soon enough."""

    asked = False
    may_wait = False


@contextmanager
def _stoppable(interactive: bool) -> Iterator[_Stop]:
    """Ctrl-C asks for an end between two tokens, so that what was computed is kept;
    before the first, and the second time, it ends at once."""
    stop = _Stop()
    if not interactive:
        yield stop
        return

    def interrupt(*_: Any) -> None:
        if stop.asked or not stop.may_wait:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
