"""A conversation with a model: earlier turns and pictures are remembered, and saved."""

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mm1_mlx.errors import ImageError, MM1Error, PromptError
from mm1_mlx.inference.generation import GenerationResponse, joined, stream_generate
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inputs.images import MAX_PIXELS, decoded, is_decoded, load_image
from mm1_mlx.inputs.prompts import (
    IMAGE_TOKEN,
    flatten_messages,
    place_images,
    render_chat,
    with_image_slots,
)
from mm1_mlx.inputs.sources import pasted_path, read_source
from mm1_mlx.inputs.video import Film, film_of
from mm1_mlx.models.mm1 import MM1

__all__ = ["Conversation", "Exchange", "Shown"]


@dataclass(frozen=True)
class Shown:
    """A picture of a conversation.

    name: its path or address, "" where it came as pixels. source: what the model is
    given, the file's bytes: the file may change meanwhile. size: width and height.
    film: of a frame of a video, whose name it has.
    """

    name: str
    source: Any
    size: tuple[int, int]
    film: Film | None = None


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    asked: as it was typed. content: with an <image> for each of its pictures. last: the
    statistics of the answer, None where it was loaded. seen: every picture that the
    model was shown for the answer, in reading order, those of earlier turns first: it
    may speak of any, also when those turns are forgotten since.
    """

    asked: str
    content: str
    pictures: tuple[Shown, ...]
    answer: str
    last: GenerationResponse | None = None
    seen: tuple[Shown, ...] = ()


class Conversation:
    """A conversation with a model.

        talk = Conversation(model, processor, max_tokens=100)
        talk.show("cat.png")
        print(talk.answer("What is this?"))
        print(talk.answer("What colour is it?"))

    What earlier turns have computed is used again (see Reuse), so a turn reads its own
    question and pictures only. One exception: where pictures are cut into dynamic
    tiles, the third (TilingConfig.max_images) makes all whole, which are read anew.

    system: a system prompt. reuse and settings: as of stream_generate. exchanges: what
    was said. waiting: pictures that go with the next question. Raises MM1Error for a
    setting out of range, PromptError where the model's template has no system prompt.
    """

    def __init__(
        self,
        model: MM1,
        processor: Any,
        *,
        system: str | None = None,
        reuse: Any = None,
        **settings: Any,
    ):
        Settings.of(settings)  # checks them
        self._model, self._processor = model, processor
        self._reuse, self._settings = reuse, settings
        self.exchanges: list[Exchange] = []
        self.waiting: list[Shown] = []
        self.system = system

    @property
    def system(self) -> str | None:
        """The system prompt; a new one is that of the whole conversation."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        text = text or None
        if text is not None:
            messages = [_message("system", text), _message("user", "Hi")]
            render_chat(messages, self._processor.chat_template)
        self._system = text

    @property
    def reuse(self) -> Any:
        """What is kept between turns: what was given, else the model's own."""
        return self._model.reuse if self._reuse is None else self._reuse

    @property
    def context(self) -> int:
        """How many tokens the model can read, answers included."""
        return self._model.config.text_config.max_position_embeddings

    @property
    def tokens(self) -> int:
        """How many tokens the last turn ended with; 0 where that is not known."""
        last = self.exchanges[-1].last if self.exchanges else None
        return last.prompt_tokens + last.generation_tokens if last else 0

    # --- talking ---------------------------------------------------------------------

    def show(self, source: Any) -> Shown:
        """Read a picture that goes with the next question.

        source: whatever load_image takes. ImageError where it cannot be read,
        PromptError where the model reads text only.
        """
        if not self._model.config.reads_images:
            raise PromptError(
                "This model is a decoder alone and reads text only: it cannot be shown "
                "a picture."
            )
        shown = self._read(source)
        self.waiting.append(shown)
        return shown

    def _read(self, source: Any) -> Shown:
        limit = self._settings.get("max_pixels") or MAX_PIXELS
        if is_decoded(source):
            picture, film = load_image(source, max_pixels=limit), film_of(source)
            if film is None or film.source is None:
                return Shown("", picture, picture.size)
            several = isinstance(film.source, (list, tuple))
            names = [*map(_lasting_name, film.source if several else [film.source])]
            film = film._replace(source=names if several else names[0])
            return Shown(names[0], picture, picture.size, film)
        url = bool(self._settings.get("allow_url"))
        data, name = read_source(source, allow_url=url)
        size = decoded(data, name, limit).size
        return Shown(_lasting_name(source), data, size)

    def ask(self, text: str) -> Generator[GenerationResponse, None, None]:
        """The answer to the next question, in pieces, as of stream_generate.

        The turn is remembered when the answer is whole, or when the generator is closed
        after some of it; one that fails before leaves everything as it was. Raises what
        stream_generate raises; ContextError where the conversation has grown too long.
        """
        shown = tuple(self.waiting)
        content = with_image_slots(text, len(shown))
        messages = [*self._flat(), _message("user", content)]
        seen = (*(p for e in self.exchanges for p in e.pictures), *shown)
        stream = stream_generate(
            self._model,
            self._processor,
            messages,
            [picture.source for picture in seen],
            reuse=self._reuse,
            **self._settings,
        )
        pieces: list[GenerationResponse] = []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            stream.close()
            whole = joined(pieces) if pieces else None
            if whole is not None and (whole.text.strip() or whole.finish_reason):
                answer = whole.text.strip()
                self.exchanges.append(
                    Exchange(text, content, shown, answer, whole, seen)
                )
                self.waiting = self.waiting[len(shown) :]

    def answer(self, text: str) -> GenerationResponse:
        """The whole answer to the next question."""
        return joined(list(self.ask(text)))

    # --- what is remembered ----------------------------------------------------------

    def clear(self) -> None:
        """Forget all turns and pictures; the system prompt stays."""
        self.exchanges.clear()
        self.waiting.clear()

    def undo(self) -> Exchange | None:
        """Take the last question and its answer back; its pictures wait again."""
        if not self.exchanges:
            return None
        taken = self.exchanges.pop()
        self.waiting = [*taken.pictures, *self.waiting]
        return taken

    def drop_oldest(self) -> Exchange | None:
        """Forget the oldest question, with its pictures and its answer."""
        return self.exchanges.pop(0) if self.exchanges else None

    def _flat(self) -> list[dict[str, str]]:
        """What was said, as messages of text with <image>."""
        system = [_message("system", self._system)] if self._system else []
        said = [
            message
            for each in self.exchanges
            for message in (
                _message("user", each.content),
                # Of what a model says nothing is a place for a picture.
                _message("assistant", each.answer.replace(IMAGE_TOKEN, "< image>")),
            )
        ]
        return [*system, *said]

    def messages(self) -> list[dict[str, Any]]:
        """What was said, as `generate` takes it: pictures and videos as parts, by their
        names.

        MM1Error where a picture came as pixels, without a name.
        """
        pictures = iter([p for each in self.exchanges for p in each.pictures])
        return [
            {**message, "content": _parts(message["content"], pictures)}
            for message in self._flat()
        ]

    def restore(
        self, messages: Sequence[Any], images: Sequence[Any] | None = None
    ) -> None:
        """Take messages in place of what was said, pictures read anew.

        messages: those of `messages()`, or others: a system message or none, then
        questions and answers in turn. images: the pictures of their <image>, where
        the messages hold none. PromptError, ImageError: then nothing is changed.
        """
        limits = Settings.of(self._settings).limits()
        flat, held = flatten_messages(messages, **limits)
        images = held or list(images or ())
        if images and not any(IMAGE_TOKEN in message["content"] for message in flat):
            flat = place_images(flat, len(images))
        system = None
        if flat[0]["role"] == "system":
            system, flat = flat[0]["content"], flat[1:]
        wanted = ("user", "assistant") * (len(flat) // 2 + 1)
        for number, (message, role) in enumerate(zip(flat, wanted, strict=False), 1):
            if message["role"] != role:
                raise PromptError(
                    f"Message {number} of the conversation has the role "
                    f"{message['role']!r}, but {role!r} was expected: questions and "
                    f"answers in turn."
                )
        if len(flat) % 2:
            raise PromptError("The conversation ends with a question, not an answer.")
        slots = sum(m["content"].count(IMAGE_TOKEN) for m in flat[::2])
        if slots != len(images):
            raise PromptError(
                f"The questions have {slots} {IMAGE_TOKEN}, but {len(images)} of them "
                f"name a picture."
            )
        shown = iter([self._read(image) for image in images])
        found: list[Exchange] = []
        for user, said in zip(flat[::2], flat[1::2], strict=True):
            content = user["content"]
            pictures = tuple(next(shown) for _ in range(content.count(IMAGE_TOKEN)))
            seen = (*(found[-1].seen if found else ()), *pictures)
            answer = said["content"]
            found.append(Exchange(content, content, pictures, answer, seen=seen))
        self.system = system
        self.exchanges, self.waiting = found, []


def _message(role: str, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content or ""}


def _parts(content: str, pictures: Iterator[Shown]) -> str | list[dict[str, Any]]:
    """A content with <image> as parts, with the next of the pictures; the frames of a
    video are one part. MM1Error where a picture has no name."""
    if IMAGE_TOKEN not in content:
        return content
    first, *texts = content.split(IMAGE_TOKEN)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    left = list(zip(islice(pictures, len(texts)), texts, strict=True))
    while left:
        picture, film = left[0][0], left[0][0].film
        part, count = {"type": "image", "image": picture.name}, 1
        if film is not None:
            part = {"type": "video", "video": film.source, "frames": film.frames}
            count = film.count
        frames = [film and film._replace(number=i) for i in range(count)]
        whole = [each.film for each, _ in left[:count]] == frames
        if not picture.name or not whole or any(t for _, t in left[: count - 1]):
            raise MM1Error(
                "A picture of the conversation came as pixels, and has no file to name."
            )
        text = left[count - 1][1]
        parts += [part, {"type": "text", "text": text}] if text else [part]
        del left[:count]
    return parts


def _lasting_name(source: Any) -> str:
    """A path or address that means the same in another folder."""
    if not isinstance(source, (str, os.PathLike)):
        return ""
    text = str(source)
    if text[:5].lower() == "data:" or text.strip()[:8].lower() == "https://":
        return text.strip()
    path = source if isinstance(source, Path) else pasted_path(text)
    try:
        return str(Path(path).expanduser().resolve())
    except OSError as error:
        raise ImageError(f"{text} is not a path that can be kept: {error}.") from error
