"""Chat templates in Jinja, as the hub's tokenizer configs hold them; sandboxed.

A template comes with a checkpoint and is not trusted: it runs in Jinja's immutable
sandbox, which has no access to Python's attributes, files or imports.
"""

import json
import re
import warnings
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

from mm1_mlx.errors import MM1Warning, PromptError
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, separated

_TRACER = "\ufdd1"  # a noncharacter, as GUARD
_FRONT_LINES = re.compile(f"(?:{IMAGE_TOKEN}\n)+")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more):
    # Jinja's own filter escapes <, > and & for HTML; models never saw that.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> None:
    raise PromptError(f"The chat template refuses this conversation: {message}")


@lru_cache(maxsize=8)
def _compile(source: str):
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise PromptError(
            "This model's chat template is written in Jinja, which needs one more "
            "package: pip install jinja2"
        ) from error

    class Generation(Extension):
        """{% generation %} marks answers for training; the text in it is plain."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise PromptError(
            f"The model's chat template is not valid Jinja ({error}). Convert the "
            f"model again, or name a built-in template."
        ) from error


def render(source: str, /, **variables: Any) -> str:
    """The text that a Jinja chat template makes of its variables.

    Variables as transformers passes them: messages, add_generation_prompt, bos_token,
    eos_token, ... Raises PromptError for whatever goes wrong inside the template.
    """
    template = _compile(source)
    try:
        return template.render({"tools": None, "documents": None, **variables})
    except PromptError:
        raise
    except Exception as error:  # a template can fail in any way Python can
        reason = " ".join(str(error).split())[:200]
        raise PromptError(
            f"The model's chat template fails on this conversation: {reason}. Check "
            f"the roles and the order of the messages."
        ) from error


# --- messages ------------------------------------------------------------------------


def _as_parts(text: str) -> list[dict]:
    """Text with slots as the list of parts that some templates loop over."""
    parts: list[dict] = []
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _wants_parts(source: str) -> bool:
    """Whether a Jinja template seems to loop over the parts of a content."""
    content = r"(?:\.content|\[\s*['\"]content['\"]\s*\])"
    return (
        re.search(rf"{{%-?\s*for\s+\w+\s+in\s+[\w\[\]]+{content}", source) is not None
    )


def _with_tracers(messages: list[dict]) -> tuple[list[dict], list[tuple[str, str]]]:
    """The messages with a tracer in each text of a user or system; role and tracer.

    A tracer stands after the first letter, so that trimming and tests of the beginning
    do what they do without it.
    """
    traced, tracers = [], []
    for message in messages:
        pieces = message["content"].split(IMAGE_TOKEN)
        if message["role"] in ("user", "system"):
            for i, piece in enumerate(pieces):
                if not piece.strip():
                    continue
                at = len(piece) - len(piece.lstrip()) + 1
                tracer = f"{_TRACER}{len(tracers)}{_TRACER}"
                tracers.append((message["role"], tracer))
                pieces[i] = piece[:at] + tracer + piece[at:]
        traced.append({**message, "content": IMAGE_TOKEN.join(pieces)})
    return traced, tracers


def _dropped(text: str, tracers: list[tuple[str, str]]) -> str | None:
    """The role whose text is not in a rendered text, or None."""
    text = text.replace("\\ufdd1", _TRACER)  # as JSON may spell it
    return next((role for role, tracer in tracers if tracer not in text), None)


def _is_interleaved(text: str) -> bool:
    """Whether an image stands between words."""
    return sum(bool(piece.strip()) for piece in text.split(IMAGE_TOKEN)) > 1


def _given(messages: list[dict], as_parts: bool, whole: bool = False) -> list[dict]:
    """The messages as a template takes them: as text, or as parts.

    whole: words with images between them are one part, in which the images are text.
    """
    spoken = separated(messages, "\n")  # most models were trained so
    if not as_parts:
        return spoken
    given = []
    for message, said in zip(messages, spoken, strict=True):
        parts = _as_parts(message["content"])
        if whole and _is_interleaved(message["content"]):
            parts = [{"type": "text", "text": said["content"]}]
        given.append({**message, "content": parts})
    return given


def _with_one_break(source: str, messages: list[dict], variables: dict) -> list[dict]:
    """The messages without line breaks that the template itself writes behind images
    in front: LLaVA's own data has them in the text."""
    if not any(_FRONT_LINES.match(message["content"]) for message in messages):
        return messages
    parts = [{"type": "image"}, {"type": "text", "text": "x"}]
    try:
        probe = [{"role": "user", "content": parts}]
        if f"{IMAGE_TOKEN}\n" not in render(source, messages=probe, **variables):
            return messages
    except PromptError:
        return messages

    def take(text: str) -> str:
        front = _FRONT_LINES.match(text)
        return front[0].replace("\n", "") + text[front.end() :] if front else text

    return [{**message, "content": take(message["content"])} for message in messages]


def _order(text: str) -> str:
    """A text's tracers and images alone."""
    text = text.replace("\\ufdd1", _TRACER)
    return "".join(re.findall(f"{IMAGE_TOKEN}|{_TRACER}\\d+{_TRACER}", text))


def _needs_whole(source: str, traced: list[dict], found: str, variables: dict) -> bool:
    """Whether images between words keep their places in whole texts alone.

    MM1Warning where they do not even so.
    """
    said = [m["content"] for m in traced if _is_interleaved(m["content"])]
    ends = re.compile(rf"\A(?:{IMAGE_TOKEN})+|(?:{IMAGE_TOKEN})+\Z")
    between = [ends.sub("", _order(text)) for text in said]

    def in_place(text: str) -> bool:
        return all(order in _order(text) for order in between)

    images = sum(message["content"].count(IMAGE_TOKEN) for message in traced)
    if in_place(found) or found.count(IMAGE_TOKEN) != images:  # another model's mark
        return False
    with suppress(PromptError):
        messages = _given(traced, True, whole=True)
        if in_place(render(source, messages=messages, **variables)):
            return True
    warnings.warn(
        "The model's chat template takes the pictures of a message out of their places "
        "in the text: call them the first picture, the second, and so on.",
        MM1Warning,
        stacklevel=2,
    )
    return False


def render_messages(source: str, messages: list[dict], /, **variables: Any) -> str:
    """What a Jinja template makes of flat messages, with nobody's words lost.

    Some templates take a content as text, others as a list of parts. Given the wrong
    one they loop over letters, or find no 'text', and silently drop all of it; and no
    look at the source can tell in all cases. So each is tried on a copy with tracers.
    Templates for parts write what stands behind an image themselves; some write all
    images in front, and where a text has them between its words it is given whole.
    """
    messages = _with_one_break(source, messages, variables)
    traced, tracers = _with_tracers(messages)
    first = _wants_parts(source)
    lost = None
    for as_parts in (first, not first):
        try:
            found = render(source, messages=_given(traced, as_parts), **variables)
        except PromptError:
            if as_parts == first:
                raise
            break
        dropped = _dropped(found, tracers)
        # A list that is printed as Python spells it is no text either.
        if dropped is None and not (as_parts and "{'type': 'text', 'text': " in found):
            whole = as_parts and _needs_whole(source, traced, found, variables)
            given = _given(messages, as_parts, whole)
            return render(source, messages=given, **variables)
        lost = lost or dropped
    raise PromptError(
        f"The model's chat template drops the text of the {lost or 'user'}. Name a "
        f"built-in template, or convert the model again with a whole one."
    )
