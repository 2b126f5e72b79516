"""Prompts: chat templates, and the places of images in the text.

Plain Python. jinja2 is imported only for a template that is not one of the built-in
ones; Pillow and MLX never.

What a user types is text: a mark of the vocabulary inside it ("</s>", "<|im_end|>")
stays text, so nobody can end a turn or play another role by typing it. `guard` puts an
invisible GUARD into such a mark, the template passes it on, and the tokenizer takes it
out again and encodes the mark as plain characters. `<image>` is the one exception.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mm1_mlx.errors import PromptError

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"  # what users write; the model reads so many images
GUARD = "\ufdd0"  # a noncharacter: no text or vocabulary has it
ROLES = ("system", "user", "assistant")


def plural(count: int, noun: str, many: str | None = None) -> str:
    """'1 image', '2 images', and '2 entries' where an s is not enough."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def is_conversation(prompt: Any) -> bool:
    """Whether this is one list of messages, and not a batch of prompts."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(message, dict) for message in prompt)
    )


def guard(text: str, marks: Iterable[str]) -> str:
    """The text with its marks made inert; IMAGE_TOKEN stays what it is."""
    text = text.replace(GUARD, "")
    found = [m for m in marks if len(m) > 1 and m != IMAGE_TOKEN and m in text]
    if not found:
        return text
    found.sort(key=len, reverse=True)
    starts = re.compile(f"(?={'|'.join(map(re.escape, found))})")  # overlaps too
    pieces, last = [], 0
    for match in starts.finditer(text):
        cut = match.start() + 1
        pieces.append(text[last:cut])
        last = cut
    return GUARD.join([*pieces, text[last:]])


def _slot_mismatch(slots: int, num_images: int) -> PromptError:
    has = f"The prompt has {slots} {IMAGE_TOKEN}"
    given = "was" if num_images == 1 else "were"
    if num_images == 0:
        return PromptError(
            f"{has} but no image was given. Give {plural(slots, 'image')}, or take "
            f"{IMAGE_TOKEN} out of the text."
        )
    if slots > num_images:
        return PromptError(
            f"{has} but only {plural(num_images, 'image')} {given} given. Give "
            f"{slots - num_images} more, or write {IMAGE_TOKEN} once for each image."
        )
    return PromptError(
        f"{has} but {num_images} images were given. Write {IMAGE_TOKEN} once for each "
        f"image, where it belongs in the text, or leave it out to put all images first."
    )


def with_image_slots(prompt: str, num_images: int) -> str:
    """The prompt with one slot per image; without any, the slots come first."""
    if not prompt.strip():
        raise PromptError("The prompt is empty: write a question or a text.")
    slots = prompt.count(IMAGE_TOKEN)
    if slots == 0:
        return IMAGE_TOKEN * num_images + prompt
    if slots != num_images:
        raise _slot_mismatch(slots, num_images)
    return prompt


# --- messages ------------------------------------------------------------------------

_IMAGE_KEYS = ("image", "url", "path", "image_url")


def _part(part: Any, limits: dict[str, Any]) -> tuple[str, list]:
    """The text of one content part, and the images it carries."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], []
    if kind in ("image", "image_url"):
        held = [part[key] for key in _IMAGE_KEYS if part.get(key) is not None]
        held = [h.get("url") if isinstance(h, dict) else h for h in held]
        return IMAGE_TOKEN, held[:1]
    if kind == "video" and part.get("video") is not None:
        from mm1_mlx.inputs.video import FRAMES, video_frames  # Pillow

        frames = video_frames(part["video"], part.get("frames", FRAMES), **limits)
        return IMAGE_TOKEN * len(frames), list(frames)
    raise PromptError(
        f"A message has the part {str(part)[:80]!r}, but parts are "
        f'{{"type": "text", "text": ...}}, {{"type": "image"}} or {{"type": "video", '
        f'"video": ..., "frames": 24}}.'
    )


def flatten_messages(messages: Any, **limits: Any) -> tuple[list[dict[str, Any]], list]:
    """Messages whose content is text with <image> slots, and the images in them.

    A message is {"role": "user", "content": "text"} or has a list of parts, {"type":
    "text", "text": ...}, {"type": "image", "image": FILE}, or {"type": "video",
    "video": FILE, "frames": 24}, which becomes so many images. Keys beside role and
    content are kept for templates that read them. limits: of video_frames.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError(
            "The conversation has no messages: expected a list of "
            '{"role": "user", "content": "..."}.'
        )
    flat, images, unnamed = [], [], 0
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PromptError(
                f"A message is {str(message)[:80]!r}, but must be "
                '{"role": "user", "content": "..."}.'
            )
        content = message.get("content")
        if beside := [key for key in ("images", "image") if message.get(key)]:
            raise PromptError(
                f'A message has "{beside[0]}" beside its content, which nothing reads: '
                f'write a part {{"type": "image", "image": FILE}} for each picture.'
            )
        if isinstance(content, (list, tuple)):
            parts = [_part(part, limits) for part in content]
            text = "".join(text for text, _ in parts)
            images += [image for _, held in parts for image in held]
            unnamed += sum(t == IMAGE_TOKEN and not held for t, held in parts)
        elif isinstance(content, str):
            text = content
        else:
            raise PromptError(
                f"A message of the role {message['role']!r} has the content "
                f"{str(content)[:40]!r}, but text or a list of parts was expected."
            )
        flat.append({**message, "content": text})
    if images and unnamed:
        raise PromptError(
            f"{plural(len(images), 'image part')} of the messages hold an image and "
            f"{unnamed} do not. Put every image into its part, or all into images=."
        )
    return flat, images


def place_images(messages: list[dict], num_images: int) -> list:
    """Flat messages with one slot per image; without any, before the first user's text.

    Raises PromptError for an empty conversation or another number of slots.
    """
    last = messages[-1]
    if last["role"] == "user" and not last["content"].strip():
        raise PromptError("The prompt is empty: write a question or a text.")
    slots = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if slots == num_images:
        return messages
    if slots:
        raise _slot_mismatch(slots, num_images)
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise PromptError("The conversation has no message of the role 'user'.")
    message = messages[first]
    text = IMAGE_TOKEN * num_images + message["content"]
    return [*messages[:first], {**message, "content": text}, *messages[first + 1 :]]


# --- templates -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat format as plain text around the turns.

    start: once, in front. system: around a system message, None if the format has
    no place for one; default_system: used when no system message is given. answer:
    around an answer that was given; END in it becomes the vocabulary's own end mark.
    prompt: what the text ends with where an answer is asked for, None for answer's
    first part (a model that writes its own space begins there without one). separator:
    between an image that a user's message begins with and text directly behind it
    (LLaVA was trained with a line break there).
    """

    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str | None = None
    system: tuple[str, str] | None = None
    default_system: str = ""
    start: str = ""
    separator: str = "\n"

    @property
    def asks(self) -> str:
        """What the text ends with where an answer is asked for."""
        return self.answer[0] if self.prompt is None else self.prompt


END = "\ufdd2"  # in a template: eos_token, or "</s>" where there is none

_LLAVA_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_VICUNA_TURNS: dict[str, Any] = {
    "user": ("USER: ", " "),
    "answer": ("ASSISTANT: ", END),
    "prompt": "ASSISTANT:",
    "system": ("", " "),
}


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


# Sources: LLaVA's and Honeybee's published prompts (checkpoints.md section 4 of the
# design notes), Llama 3's and ChatML's public formats. mm1-tiny and plain are ours.
TEMPLATES: dict[str, ChatTemplate] = {
    "mm1-tiny": ChatTemplate(
        user=("<user>", ""), answer=("<assistant>", "</s>"), separator=""
    ),
    "plain": ChatTemplate(
        user=("", ""), answer=("", ""), system=("", "\n"), separator=""
    ),
    "vicuna": ChatTemplate(
        **_VICUNA_TURNS, default_system=_LLAVA_SYSTEM.format("user")
    ),
    "llava-v1": ChatTemplate(
        **_VICUNA_TURNS, default_system=_LLAVA_SYSTEM.format("human")
    ),
    "llava-hf": ChatTemplate(**_VICUNA_TURNS),
    "honeybee": ChatTemplate(
        user=("\nHuman: ", ""),
        answer=("\nAI: ", ""),
        system=("", ""),
        default_system=(
            "The following is a conversation between a curious human and AI "
            "assistant. The assistant gives helpful, detailed, and polite answers to "
            "the user's questions."
        ),
        separator="\nHuman: ",
    ),
    "llama-3": ChatTemplate(
        start="<|begin_of_text|>",
        system=(_header("system"), "<|eot_id|>"),
        user=(_header("user"), "<|eot_id|>"),
        answer=(_header("assistant"), "<|eot_id|>"),
    ),
    "chatml": ChatTemplate(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        answer=("<|im_start|>assistant\n", "<|im_end|>\n"),
    ),
}


def jinja_source(name: str) -> str:
    """A built-in template in Jinja, so that other programs can read our folders.

    A folder that has exactly this text is rendered by the built-in template, without
    importing jinja2.
    """
    template = TEMPLATES[name]
    text = repr  # Python's quoted strings are Jinja's too

    def turn(around: tuple[str, str]) -> str:
        before, after = around
        end = "(eos_token or '</s>')" if after == END else text(after)
        whole = [text(before)] if before else []
        whole += ["m['content']"] + ([end] if after else [])
        return "{{ " + " + ".join(whole) + " }}"

    start = "{{ " + text(template.start) + " }}" if template.start else ""
    system = "{{ raise_exception('this template has no system message') }}"
    default = ""
    if template.system is not None:
        system = turn(template.system)
    if template.default_system and template.system is not None:
        before, after = template.system
        default = (
            "{% if messages[0]['role'] != 'system' %}{{ "
            + text(before + template.default_system + after)
            + " }}{% endif %}"
        )
    return (
        f"{start}{default}{{% for m in messages %}}"
        f"{{% if m['role'] == 'system' %}}{system}"
        f"{{% elif m['role'] == 'user' %}}{turn(template.user)}"
        f"{{% else %}}{turn(template.answer)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {text(template.asks)} }}}}"
        "{% endif %}"
    )


@lru_cache(maxsize=1)
def _names_by_source() -> dict[str, str]:
    return {jinja_source(name): name for name in reversed(TEMPLATES)}


def builtin_name(template: str | None) -> str | None:
    """The name of the built-in template that this name or Jinja text is, or None."""
    if template is None:
        return "plain"
    if template in TEMPLATES:
        return template
    return _names_by_source().get(template.strip())


_FRONT = re.compile(rf"\A(?:{IMAGE_TOKEN})++(?=\S)")


def separated(messages: list[dict], separator: str) -> list[dict]:
    """The messages with it behind each image that a user's text begins with, where
    words follow at once."""

    def put(front: re.Match) -> str:
        return front[0].replace(IMAGE_TOKEN, IMAGE_TOKEN + separator)

    return [
        {**m, "content": _FRONT.sub(put, m["content"])} if m["role"] == "user" else m
        for m in messages
    ]


def _render_builtin(
    name: str, messages: list[dict], add_generation_prompt: bool, end: str
) -> str:
    template = TEMPLATES[name]
    said, stop = template.answer
    out = [template.start]
    if template.default_system and messages[0]["role"] != "system":
        before, after = template.system or ("", "")
        out.append(before + template.default_system + after)
    turns = {
        "system": template.system,
        "user": template.user,
        "assistant": (said, end if stop == END else stop),
    }
    for message in separated(messages, template.separator):
        role, around = message["role"], turns.get(message["role"])
        if role not in turns:
            raise PromptError(
                f"A message has the role {role!r}, but the chat template {name!r} "
                f"knows {', '.join(map(repr, ROLES))}."
            )
        if around is None:
            raise PromptError(
                f"The chat template {name!r} has no place for a system message: put "
                f"it into the user's text."
            )
        out.append(around[0] + message["content"] + around[1])
    if add_generation_prompt:
        out.append(template.asks)
    return "".join(out)


def render_chat(
    messages: Any,
    template: Any = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The conversation as the text that a model was trained on.

    messages: [{"role": ..., "content": text or parts}, ...], or the text of one user.
    template: the name of a built-in one (see TEMPLATES), Jinja source, or a tokenizer,
    whose chat_template and special tokens are used; None is "plain". variables: more
    names for a Jinja template, such as enable_thinking.

    Contents stand in the result as they are; `guard` them first where they come from a
    user. Raises PromptError for messages that the template cannot hold.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    flat, _ = flatten_messages(messages)
    if template is not None and not isinstance(template, str):
        tokenizer = template
        template = tokenizer.chat_template
        variables = {**tokenizer.template_tokens(), **variables}
    name = builtin_name(template)
    if name is not None:
        end = variables.get("eos_token") or "</s>"
        return _render_builtin(name, flat, add_generation_prompt, end)
    if not isinstance(template, str) or "{" not in template:
        raise PromptError(
            f"There is no chat template {str(template)[:60]!r}. Built in are: "
            f"{', '.join(sorted(TEMPLATES))}; or give Jinja text."
        )
    from mm1_mlx.inputs.jinja import render_messages  # jinja2

    return render_messages(
        template, flat, add_generation_prompt=add_generation_prompt, **variables
    )
