"""Chat templates in Jinja, as the hub's tokenizer configs hold them; sandboxed.

A template comes with a checkpoint and is not trusted: it runs in Jinja's immutable
sandbox, which has no access to Python's attributes, files or imports.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from mm1_mlx.errors import PromptError


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
