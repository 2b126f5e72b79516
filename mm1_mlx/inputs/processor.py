"""Processor: prompt and images in, checked model inputs out; ids back to text.

Everything that a user can get wrong about a prompt is checked here, before the model
runs: counts of images and slots, length, ids. A prompt is never cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.counting import (
    Slot,
    check_ids,
    layouts_of,
    per_prompt,
    resolutions,
    too_long,
)
from mm1_mlx.inputs.images import MAX_PIXELS, image_size, load_image, pixels
from mm1_mlx.inputs.known import read_once
from mm1_mlx.inputs.prompts import (
    IMAGE_TOKEN,
    flatten_messages,
    guard,
    is_conversation,
    place_images,
    plural,
    render_chat,
    with_image_slots,
)
from mm1_mlx.inputs.resolution import Way, ways_of
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.shelf import Shelf
from mm1_mlx.inputs.shots import shots_of, together
from mm1_mlx.inputs.tiling import expansion, tiles, whole
from mm1_mlx.inputs.tokenizer import (
    Detokenizer,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    number_tokenizer,
)
from mm1_mlx.inputs.video import is_frame

__all__ = ["Inputs", "Processor"]


@dataclass(frozen=True)
class Inputs:
    """What the model reads.

    input_ids: (B, L) int32; an image is config.image_token_id, once for each of its
    tokens, with text between its tiles where the model's tiling has some.
    pixel_values: (N, H, W, 3) float32 in reading order (row by row), None without
    images; where images are read in several sizes, a tuple of such, one for each image.
    left_padding: (B,) int32, how many ids in front of each row are padding;
    a model that is called with a padded batch must be given it (model(input_ids,
    pixel_values, left_padding=left_padding)), or it reads the padding as text.
    images_per_row: how many of the images each row has. layouts: the tiles of each
    image, where some are read in tiles (N counts those); else empty.
    image_tokens: how many each image takes, in reading order.
    """

    input_ids: mx.array
    pixel_values: Any  # mx.array | tuple[mx.array, ...] | None
    left_padding: mx.array
    images_per_row: tuple[int, ...]
    image_tokens: tuple[int, ...]
    layouts: tuple[Layout, ...] = ()

    @property
    def num_images(self) -> int:
        """How many pictures."""
        return sum(self.images_per_row)

    @property
    def attention_mask(self) -> mx.array:
        """(B, L) bool: False on the left padding."""
        positions = mx.arange(self.input_ids.shape[1])
        return positions[None] >= self.left_padding[:, None]


class Processor:
    """Prompts and images to Inputs, and ids to text, for one model.

    chat_template: the name of a built-in template or Jinja text; by default the
    tokenizer's own, and without one prompts are taken as they are ("plain").
    resolution, max_tiles: what a call takes that is given no resolution, such as an
    adapter was trained with; None: the model's own. names: of model and adapter.
    """

    resolution: Any = None
    max_tiles: int | None = None
    names: tuple[str | None, str | None] = (None, None)

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_settings: ImageSettings | None,
        config: MM1Config,
        *,
        chat_template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_settings = image_settings
        self.config = config
        self.chat_template = chat_template or tokenizer.chat_template
        self.eos_token_ids = config.eos_token_ids or tokenizer.eos_token_ids
        self.pad_token_id = self._find_pad()
        self.tokens_per_image = self._find_tokens_per_image()
        self._pieces: dict[str, list[int]] = {}
        # The vocabulary's own <image> is used only if the model means it.
        own = tokenizer.token_to_id(IMAGE_TOKEN)
        self._native_slot = (
            own == config.image_token_id and IMAGE_TOKEN in tokenizer.marks
        )

    @classmethod
    def from_folder(cls, folder: str | Path, config: MM1Config) -> "Processor":
        """The processor in a folder: its tokenizer and preprocessor_config.json.

        A folder without a tokenizer takes prompts of token ids ("1 306 4966"); see
        Processor.tokenizer.reads_text.
        """
        images = ImageSettings.read(folder) if config.reads_images else None
        if has_tokenizer(folder):
            return cls(load_tokenizer(folder), images, config)
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
        ids = config.bos_token_id, eos, config.pad_token_id
        tokenizer = number_tokenizer(config.text_config.vocab_size, *ids)
        return cls(tokenizer, images, config, chat_template="plain")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer files, preprocessor_config.json and the chat template."""
        from mm1_mlx.inputs.prompts import TEMPLATES, jinja_source
        from mm1_mlx.inputs.tokenizer import CHAT_TEMPLATE_FILE

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        if self.image_settings is not None:
            self.image_settings.write(folder)
        template = self.chat_template
        if template is not None:
            # As Jinja text, so that transformers and mlx-lm can read the folder too.
            text = jinja_source(template) if template in TEMPLATES else template
            (folder / CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8")

    def _find_pad(self) -> int:
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        candidates = (self.config.pad_token_id, self.tokenizer.pad_token_id, eos, 0)
        image = self.config.image_token_id
        usable = (i for i in candidates if i is not None and i >= 0 and i != image)
        return next(usable, 1 if image == 0 else 0)

    def _find_tokens_per_image(self) -> int:
        """Q for pictures of image_settings.size; the encoder's own may differ."""
        vision, connector = self.config.vision_config, self.config.connector_config
        if vision is None or connector is None:
            return 0
        if self.image_settings is None:
            raise ConfigError(
                "preprocessor: there are no image settings, but the model has an "
                "image encoder."
            )
        if self.image_settings.size < vision.patch_size:
            raise ConfigError(
                f"preprocessor: size is {self.image_settings.size}, but must be at "
                f"least the encoder's patch_size ({vision.patch_size})."
            )
        grid = self.image_settings.size // vision.patch_size
        queries = connector.num_query_tokens or grid**2
        return queries + connector.num_eos_tokens

    # --- prompts ---------------------------------------------------------------------

    def __call__(
        self,
        prompt: Any,
        images: Any = None,
        *,
        system: str | None = None,
        use_template: bool = True,
        max_tokens: int = 0,
        resolution: Any = None,
        max_tiles: int | None = None,
        max_pixels: int = MAX_PIXELS,
        allow_url: bool = False,
        chat_template_config: Mapping[str, Any] | None = None,
        known: Shelf | None = None,
    ) -> Inputs:
        """The model's inputs for a prompt or a batch of them.

        prompt: text with one <image> for each image (none: the images come first), or
        messages [{"role": ..., "content": ...}], or a list of such for a batch, which
        is padded on the left. images: one image or a list; for a batch a list with an
        entry for each prompt. An image is whatever load_image takes. system: a system
        message for text prompts. use_template: False takes text as it is, with the
        vocabulary's marks in it. max_tokens: room to keep for the answer.
        resolution: how large pictures are read: None as the model's config says,
        "native" at the encoder's own size, a number of pixels (336, 448, 560, 672;
        above that, as 1344, in four parts with an overview), or "dynamic" in tiles that
        suit the picture, at most max_tiles; or a list, one for each image (for a batch
        one entry for each prompt).
        chat_template_config: names and values of a Jinja template's own variables.
        known: where pictures are kept: a file with the same bytes is decoded once.

        Raises PromptError and ImageError before anything is computed.
        """
        batch = isinstance(prompt, (list, tuple)) and not is_conversation(prompt)
        if batch and not prompt:
            raise PromptError("The batch has no prompts: give at least one.")
        prompts = list(prompt) if batch else [prompt]
        given = per_prompt(images, len(prompts), batch)
        asked = resolutions(resolution, len(prompts), batch)

        limits = {"max_pixels": max_pixels, "allow_url": allow_url}

        def read(source: Any, way: Way) -> tuple[mx.array | np.ndarray, Layout]:
            make = partial(shots_of, settings=way.settings, config=way.tiling)
            return read_once(source, make, known, str(way), **limits)

        texts, sources, ways = [], [], []
        for one, its_images, wanted in zip(prompts, given, asked, strict=True):
            if use_template:
                more = chat_template_config or {}
                text, its_images = self._text(one, its_images, system, more, limits)
            else:
                text = _raw_text(one, len(its_images), system)
            self._check_reads(its_images)
            texts.append(text)
            sources.append(its_images)
            frames = [is_frame(image) for image in its_images]
            ways.append(self.ways(len(frames), wanted, max_tiles, frames))
        return self._inputs(texts, sources, ways, read, max_tokens)

    def _inputs(
        self,
        texts: list[str],
        sources: list[list],
        ways: list[list[Way]],
        read: Callable[[Any, Way], tuple[mx.array | np.ndarray, Layout]],
        max_tokens: int,
    ) -> Inputs:
        """Ids and pixels of each row; where none is cut into tiles, ids are checked
        before pictures are read."""
        pairs = [
            list(zip(*row, strict=True)) for row in zip(sources, ways, strict=True)
        ]
        seen: list = []
        lying = [[whole(0, 0)] * len(row) for row in sources]
        if any(way.tiling for row in ways for way in row):
            seen = [[read(*pair) for pair in row] for row in pairs]
            lying = [[layout for _, layout in row] for row in seen]
        rows, slots = [], []
        for text, its_ways, layouts in zip(texts, ways, lying, strict=True):
            slots.append(self.slots(its_ways, layouts))
            rows.append(self._ids(text, slots[-1]))
            self.check_length(rows[-1], slots[-1], max_tokens)
        if not seen:
            seen = [[read(*pair) for pair in row] for row in pairs]
        loaded = [parts for row in seen for parts, _ in row]
        ids, padding = self._pad(rows)
        every = [slot for row in slots for slot in row]
        return Inputs(
            input_ids=mx.array(ids),
            pixel_values=together(loaded) if loaded else None,
            left_padding=mx.array(padding),
            images_per_row=tuple(len(row) for row in sources),
            image_tokens=tuple(slot.tokens for slot in every),
            layouts=layouts_of(every),
        )

    def _check_reads(self, images: list) -> None:
        if images and not self.config.reads_images:
            raise PromptError(
                f"This model is a decoder alone and reads text only, but "
                f"{plural(len(images), 'image')} came with the prompt. Take a model "
                f"with an image encoder, or leave the images out."
            )

    @property
    def _settings(self) -> ImageSettings:
        assert self.image_settings is not None, "the model reads text only"
        return self.image_settings

    # --- pictures --------------------------------------------------------------------

    def ways(
        self,
        count: int,
        resolution: Any = None,
        max_tiles: int | None = None,
        frames: Sequence[bool] = (),
    ) -> list[Way]:
        """How each of a prompt's `count` pictures is read; arguments as of a call.
        frames: which of them are frames of a video."""
        if not count:
            return []
        return ways_of(
            *(resolution, max_tiles, count, self.config, self._settings),
            own=self.resolution,
            own_tiles=self.max_tiles,
            frames=frames,
        )

    def read_picture(
        self, source: Any, way: Way | None = None
    ) -> tuple[np.ndarray, int, Layout]:
        """Pixels (n, H, W, 3) of a picture and its tiles, how many tokens they become,
        and how the tiles lie. On the host, as training reads pictures."""
        picture, way = load_image(source), way or self.ways(1)[0]
        if way.tiling is None:
            shots, layout = pixels(picture, way.settings)[None], whole(*picture.size)
        else:
            shots, layout = tiles(picture, way.settings, way.tiling)
        return shots, self._count(way, layout), layout

    def picture_layout(self, source: Any, way: Way) -> Layout:
        """How a picture's tiles lie; only its header is read, and only where it may be
        cut (else width and height are 0)."""
        if way.tiling is None:
            return whole(0, 0)
        return way.layout(*image_size(source))

    def slots(self, ways: Sequence[Way], layouts: Sequence[Layout]) -> list[Slot]:
        """What stands in the ids for each of a prompt's pictures."""
        pairs = enumerate(zip(ways, layouts, strict=True))
        return [self._slot(number, *pair) for number, pair in pairs]

    def _slot(self, number: int, way: Way, layout: Layout) -> Slot:
        image: Any = self.config.image_token_id
        count, ids = self._count(way, layout), []
        pieces: list[str | None] = [None]
        if way.tiling is not None:
            pieces = expansion(layout, number, way.tiling)
        runs = pieces.count(None)
        for piece in pieces:
            ids += [image] * (count // runs) if piece is None else self._between(piece)
        return Slot(ids, count, way, layout)

    def _between(self, piece: str) -> list[int]:
        """Ids of a piece of text between tiles, in which nothing is a mark."""
        if not self.tokenizer.reads_text:  # without words there are no words
            return []
        if piece not in self._pieces:
            text = guard(piece, self.tokenizer.marks)
            self._pieces[piece] = self.tokenizer.encode(text, place="mark")
        return self._pieces[piece]

    def _count(self, way: Way, layout: Layout) -> int:
        """Image tokens of a picture."""
        assert self.config.vision_config is not None
        grid = way.settings.size // self.config.vision_config.patch_size
        cut = way.tiling is not None
        return self.config.image_tokens(layout if cut else None, grid)

    def _text(
        self,
        prompt: Any,
        images: list,
        system: str | None,
        variables: Mapping[str, Any],
        limits: dict[str, Any],
    ) -> tuple[str, list]:
        """The whole text for the tokenizer, one slot for each image, and the images."""
        if isinstance(prompt, str):
            # Checked here so that the message speaks of a prompt, not of messages.
            with_image_slots(prompt, len(images))
            messages = [{"role": "user", "content": prompt}]
        elif is_conversation(prompt):
            messages = list(prompt)
        else:
            raise PromptError(
                f"A prompt is of the type {type(prompt).__name__}, but text or a list "
                f"of messages was expected."
            )
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        flat, held = flatten_messages(messages, **limits)
        if held and images:
            raise PromptError(
                f"The messages hold {plural(len(held), 'image')} and {len(images)} "
                f"more were given in images=. Give them in one place only."
            )
        images = held or images
        marks = self.tokenizer.marks
        flat = [{**m, "content": guard(m["content"], marks)} for m in flat]
        flat = place_images(flat, len(images))
        tokens = self.tokenizer.template_tokens()
        if taken := sorted({"messages", "template"} & set(variables)):
            raise PromptError(
                f"chat_template_config sets {taken[0]!r}, which the prompt itself is "
                f"for. Take it out."
            )
        text = render_chat(flat, self.chat_template, **{**tokens, **variables})
        if (slots := text.count(IMAGE_TOKEN)) != len(images):
            raise PromptError(
                f"The chat template made {slots} {IMAGE_TOKEN} of "
                f"{plural(len(images), 'image')}: it does not fit this model. Name a "
                f"built-in template instead."
            )
        return text, images

    def _ids(self, text: str, slots: list[Slot]) -> list[int]:
        """The ids of a text, with those of its slots."""
        ids = self.encode_piece(text, list(slots))
        self.check_ids(ids, [slot.tokens for slot in slots])
        return ids

    def check_length(self, ids: list[int], slots: list[Slot], max_tokens: int) -> None:
        """PromptError where ids and an answer of max_tokens exceed the context."""
        limit = self.config.text_config.max_position_embeddings
        if len(ids) + max_tokens <= limit:
            return

        def reread(number: int, way: Way) -> Slot:
            lying = slots[number].layout
            return self._slot(number, way, way.layout(lying.width, lying.height))

        native = self.ways(1, "native")[0] if slots else None
        if native is not None and native.tiling is not None:
            native = None
        raise too_long(len(ids), slots, max_tokens, limit, native, reread)

    def encode_piece(
        self, text: str, slots: list[Slot], *, place: str = "start"
    ) -> list[int]:
        """Ids of a piece of a text with image slots.

        slots: of the images that are left; those of the piece are taken out.
        place: where the piece stands, as Tokenizer.encode knows it; "start" puts the
        begin-of-text id in front, where the model wants one.
        """
        image: Any = self.config.image_token_id
        encode, first = self.tokenizer.encode, place == "start"
        ids: list[int] = []
        if self._native_slot:
            for i in encode(text, add_special=first, place=place):
                ids += slots.pop(0).ids if i == image and slots else [i]
            return ids
        start, *rest = text.split(IMAGE_TOKEN)
        if first or start:
            ids = encode(start, add_special=first, place=place)
        for piece in rest:
            ids += slots.pop(0).ids
            ids += encode(piece, place="mark") if piece else []
        return ids

    def check_ids(self, ids: list[int], counts: list[int]) -> None:
        """PromptError unless ids are the model's, and have a place for each picture.

        counts: tokens of the pictures.
        """
        check_ids(ids, counts, self.config)

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Rows as one array (B, L), shorter ones padded on the left, and how much."""
        length = max(map(len, rows))
        padding = np.array([length - len(row) for row in rows], np.int32)
        ids = np.full((len(rows), length), self.pad_token_id, np.int32)
        for out, row, start in zip(ids, rows, padding, strict=True):
            out[start:] = row
        return ids, padding

    # --- answers ---------------------------------------------------------------------

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        """The text of ids: a list, an array (L,), or anything that can be listed."""
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        return self.tokenizer.decode(values, skip_special=skip_special)

    def detokenizer(self) -> Detokenizer:
        """A new Detokenizer for one answer that comes id by id."""
        return self.tokenizer.detokenizer()


def _raw_text(prompt: Any, num_images: int, system: str | None) -> str:
    """A prompt without a chat template: text, and no place for a system message."""
    if not isinstance(prompt, str):
        raise PromptError(
            f"Without the chat template a prompt must be text, but it is of the type "
            f"{type(prompt).__name__}. Write the whole text, or use the template."
        )
    if system:
        raise PromptError(
            "Without the chat template there is no place for a system message: write "
            "it into the prompt, or use the template."
        )
    return with_image_slots(prompt, num_images)
