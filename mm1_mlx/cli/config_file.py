"""A command's flags from a YAML file, checked as the flags are.

A key is a flag's long name, with - or _; its value goes through the flag's own type and
choices, so there is one definition of both. A list is for a flag that can be repeated,
and a mapping is a list of NAME=VALUE. What the command line gives goes before the file.
"""

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser, did_you_mean
from mm1_mlx.errors import UsageError

Translate = Callable[[dict[str, Any], Collection[str]], dict[str, Any]]


def long_name(action: argparse.Action) -> str | None:
    """The key of a flag in a file: "batch_size" of --batch-size; None without one."""
    names = [name for name in action.option_strings if name.startswith("--")]
    return names[0][2:].replace("-", "_") if names else None


def with_file(parser: Parser, args: Sequence[str], translate: Translate) -> list[str]:
    """The arguments with those of the file that --config names before them.

    translate: gives a file's values (keys with _) and the parser's keys to something
    that knows other names for them. Raises UsageError.
    """
    path = _path(args)
    if path is None:
        return list(args)
    flags = {
        name: action
        for action in parser._actions
        if (name := long_name(action)) and action.dest not in ("help", "config")
    }
    given = _given(parser, args)
    before: list[str] = []
    after: list[str] = []  # a flag of several words would take what follows it
    for key, value in translate(read_values(path), flags).items():
        if value is None:  # as if it were not there
            continue
        action = flags.get(key)
        if action is None:
            close = did_you_mean(key, flags)
            raise UsageError(f"{path}: unknown key '{key}'{close}")
        words = _words(parser, action, value, f"{path}: {key}")
        if action not in given:
            place = after if action.nargs in ("+", "*") else before
            place += words
    end = list(args).index("--") if "--" in args else len(args)
    return [*before, *args[:end], *after, *args[end:]]


def _path(args: Sequence[str]) -> str | None:
    """What --config names; the last one holds, as with other flags."""
    finder = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    finder.add_argument("--config")
    args = list(args)
    args = args[: args.index("--")] if "--" in args else args
    try:
        return finder.parse_known_args(args)[0].config
    except argparse.ArgumentError as error:  # --config without a file
        raise UsageError(str(error)) from None


def _given(parser: Parser, args: Sequence[str]) -> list[argparse.Action]:
    """The flags of the command line, and those that they exclude."""
    found = []
    for token in args:
        if token == "--":
            break
        action = parser._option_string_actions.get(token.partition("=")[0])
        if action is not None:
            found.append(action)
    for group in parser._mutually_exclusive_groups:
        if any(action in found for action in group._group_actions):
            found += group._group_actions
    return found


def read_values(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping, its keys with _ in place of -. Raises UsageError."""
    try:
        import yaml
    except ImportError:
        raise UsageError(
            "a --config needs the package pyyaml: pip install pyyaml"
        ) from None

    class Loader(yaml.SafeLoader):
        """Refuses a key that is written twice, of which only one would hold."""

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise UsageError(f"{path}: the key '{twice[0]}' is there twice")
            return super().construct_mapping(node, deep)

    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            values = yaml.load(file, Loader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is not YAML: {reason}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(f"{path} is no mapping: write lines like 'iters: 500'")
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key in found:
            raise UsageError(
                f"{path}: the key '{key}' is there twice, with - and with _"
            )
        found[key] = value
    return found


def _words(parser: Parser, action: Any, value: Any, where: str) -> list[str]:
    """The words of a command line that say the same as a key's value, checked."""
    flag = next(name for name in action.option_strings if name.startswith("--"))
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if _bool(value, where) else "--no-" + flag[2:]]
    if action.nargs == 0:
        return [flag] if _bool(value, where) else []
    if isinstance(value, dict) and _repeated(action):
        value = [name if v is None else f"{name}={v}" for name, v in value.items()]
    if isinstance(value, list) and not _repeated(action):
        raise UsageError(f"{where} is a list, but must be one value")
    if isinstance(value, dict):
        raise UsageError(f"{where} is a mapping, but must be one value")
    texts = [_text(v, where) for v in (value if isinstance(value, list) else [value])]
    for text in texts:
        try:
            one = action.nargs in (None, "?")
            parser._get_values(action, [text]) if one else parser._get_value(
                action, text
            )
        except argparse.ArgumentError as error:
            raise UsageError(f"{where} {_as_a_sentence(error.message)}") from None
    if isinstance(action, argparse._AppendAction) and action.nargs is None:
        return [f"{flag}={text}" for text in texts]
    if action.nargs in (None, "?"):
        return [f"{flag}={texts[0]}"]
    return [flag, *texts] if texts else []


def _as_a_sentence(message: str) -> str:
    """argparse's message, after the name of a key."""
    return message if message.startswith("must be ") else f"cannot be used: {message}"


def _repeated(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction) or action.nargs in ("+", "*")


def _bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{where} is {value!r}, but must be true or false")
    return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, list | dict) or value is None:
        raise UsageError(f"{where} holds {value!r}, but must hold single values")
    return str(value)


def merged(parser: Parser, args: argparse.Namespace, without: Collection[str]) -> dict:
    """What flags and file together say, by key; unset ones are left out.

    without: keys of flags that are of one call, not of the work.
    """
    found = {}
    exclusive = [
        a for group in parser._mutually_exclusive_groups for a in group._group_actions
    ]
    for action in parser._actions:
        key = long_name(action)
        if action in exclusive and getattr(args, action.dest) == action.default:
            continue  # a default that is written down would exclude the others
        if key is None or action.dest in ("help", "config", "debug") or key in without:
            continue
        value = getattr(args, action.dest)
        if value is not None:
            listed = isinstance(value, list)
            found[key] = [_plain(v) for v in value] if listed else _plain(value)
    return found


def _plain(value: Any) -> Any:
    """For YAML: as it was written, so that the flag's type reads it again."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def yaml_text(values: dict[str, Any], heading: str) -> str:
    """A YAML file of values, a key a line; needs no package, since JSON is YAML."""
    lines = [f"# {heading}"]
    for key, value in values.items():
        lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
