"""The parser of every door: one-line usage errors, close matches, number checks."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mm1_mlx.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (exit 2), no abbreviations, and `--debug`.

    Abbreviated flags are off because a misspelt flag must never mean another one.
    """

    def __init__(self, prog: str, description: str, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        settings.setdefault("allow_abbrev", False)
        super().__init__(prog=prog, description=description, **settings)
        # What is a value and no flag: also -5,3, a point outside of the picture.
        self._negative_number_matcher = re.compile(r"-\.?\d[\d.,e+-]*$")
        self._translate: Callable | None = None

    def add_debug(self, group=None) -> None:
        """The flag that run_door reads, in `group` of the help; for every door."""
        (group or self).add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )

    def add_config(self, translate: Callable | None = None) -> None:
        """The flag --config FILE: a YAML file of these flags, see config_file.

        translate: (values, known keys) -> values, for other tools' names of keys.
        """
        self._translate = translate or (lambda values, known: values)
        self.add_argument(
            "--config",
            metavar="FILE",
            help="these flags from a YAML file, as 'batch_size: 8'; what the command "
            "line gives goes first",
        )

    def error(self, message: str) -> NoReturn:
        """End with one line about the usage error, and exit code 2."""
        self.exit(2, usage_error(message, self.prog) + "\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse's; unknown flags are told first, and --config is read."""
        args = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown_flags(args)
        if self._translate is not None:
            from mm1_mlx.cli.config_file import with_file

            try:
                args = with_file(self, args, self._translate)
            except UsageError as error:
                self.error(str(error))
        return super().parse_known_args(args, namespace)

    def _refuse_unknown_flags(self, args: Sequence[str]) -> None:
        """Name an unknown flag before argparse misses a required one instead."""
        if self._subparsers is not None:
            return  # each subcommand checks its own
        known = self._option_string_actions
        for token in args:
            if token == "--":
                return
            # As argparse reads it: text with a space or a negative number is a value.
            if not token.startswith("-") or token == "-" or " " in token:
                continue
            if self._negative_number_matcher.match(token):
                continue
            flag = token.partition("=")[0]
            if flag in known or (token[1] != "-" and token[:2] in known):
                continue
            self.error(f"unknown flag '{flag}'{did_you_mean(flag, known)}")

    def _check_value(self, action, value) -> None:
        choices = action.choices
        if choices is None or value in choices:
            return
        names = [str(choice) for choice in choices]
        close = did_you_mean(str(value), names) or f" (one of: {', '.join(names)})"
        raise argparse.ArgumentError(action, f"unknown value '{value}'{close}")


def usage_error(message: str, prog: str) -> str:
    """The one line about a misuse of the command `prog`."""
    message = " ".join(message.split())
    mark = "" if message.endswith("?") else "."
    return f"error: {message}{mark} See: {prog} --help"


def did_you_mean(name: str, known) -> str:
    """What to add to a message about an unknown name; '' when nothing is close.

    Capitals do not count, nor do the dashes of flags, which make all of them alike.
    """
    bare = {str(k).lstrip("-").lower(): str(k) for k in known}
    close = difflib.get_close_matches(name.lstrip("-").lower(), bare, n=1, cutoff=0.6)
    return f"; did you mean '{bare[close[0]]}'?" if close else ""


def _number(kind: type, found: str, what: str, fits: Callable[[float], bool]):
    try:
        value = kind(found)
    except ValueError:
        value = None
    if value is None or (kind is float and not math.isfinite(value)) or not fits(value):
        raise argparse.ArgumentTypeError(f"must be {what}, not '{found}'")
    return value


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for add_argument: a whole number in [least, most], or without an end."""
    what = f"a whole number of {least} or more"
    if most is not None:
        what = f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        return _number(
            int, text, what, lambda v: least <= v and (most is None or v <= most)
        )

    return parse


def number(
    least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """A type for add_argument: a number in [least, most], or (least, most]."""
    if most < math.inf:
        low = f"above {least:g}" if above else f"from {least:g}"
        what = f"a number {low} {'and at most' if above else 'to'} {most:g}"
    else:
        what = f"a number {'above' if above else 'of'} {least:g}"
        what += "" if above else " or more"

    def fits(value: float) -> bool:
        return (least < value if above else least <= value) and value <= most

    def parse(text: str) -> float:
        return _number(float, text, what, fits)

    return parse


def some_text(text: str) -> str:
    """A type for add_argument: a text of at least one character."""
    if not text:
        raise argparse.ArgumentTypeError("must be a text of at least one character")
    return text


def json_object(text: str) -> dict:
    """A type for add_argument: a JSON object, as Python's dict."""
    import json

    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"must be a JSON object like '{{\"name\": true}}', not '{text}'"
        )
    return value
