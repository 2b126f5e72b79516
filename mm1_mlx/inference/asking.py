"""What is asked: prompts that are refused, examples in front, what is read of them."""

from collections.abc import Callable
from typing import Any

from mm1_mlx.errors import ContextError, ImageError, PromptError
from mm1_mlx.inference.asked import Asked
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import is_conversation, plural
from mm1_mlx.models.mm1 import MM1


def asked_of(
    model: MM1 | None, processor: Any, prompt: Any, images: Any, settings: Settings
) -> Asked:
    """A prompt with its pictures, behind the examples of settings.shots.

    model: None where nearest examples cannot be looked for; the first ones are taken.
    prompt: may be an Asked, which is taken as it is. Raises PromptError and
    DatasetError.
    """
    if isinstance(prompt, Asked):
        return prompt
    check_one(prompt)
    check_system(prompt, settings.system)
    shots = settings.shots
    if shots is None:
        return Asked(prompt, images, resolution=settings.resolution)
    if model is None and shots.choice == "nearest":
        shots = shots.changed(choice="first")
    return shots.ask(
        prompt,
        images,
        model=model,
        processor=processor,
        use_template=settings.use_template,
        resolution=settings.resolution,
        **settings.limits(),
    )


def read(
    processor: Any, asked: Asked, settings: Settings, context: int, known: Any = None
) -> tuple[Any, list[int]]:
    """What the processor gives for one prompt, and its ids.

    context: of the model; one token of the answer must have room. known: see Processor.
    Raises PromptError and ImageError; DatasetError names an example's line.
    """
    reading = settings.reading()
    if known is not None and isinstance(processor, Processor):
        reading["known"] = known

    def read_it(asked: Asked) -> tuple[Any, list[int]]:
        """Inputs and ids of one, or ContextError where they are too many."""
        own = {} if asked.resolution is None else {"resolution": asked.resolution}
        given = {"images": asked.images, **reading, **own}
        inputs = processor(asked.prompt, **given)
        rows: Any = inputs.input_ids.tolist()
        (ids,) = rows
        if len(ids) >= context:
            if isinstance(processor, Processor):
                processor(asked.prompt, **given, max_tokens=1)  # says what fits
            raise ContextError(
                f"The prompt has {len(ids)} tokens, but the model's context has "
                f"{context} and the answer needs room too.",
                wish="Shorten the prompt or use fewer images.",
            )
        return inputs, ids

    try:
        return read_it(asked)
    except ImageError as error:
        raise asked.explained(error, **settings.limits()) from error
    except ContextError as error:
        if asked.again is None:
            raise
        ways = _ways(error, asked, read_it)
        found = error.found
        if not ways:
            found += f" None of the {plural(len(asked.shots), 'shot')} fits."
        raise ContextError(
            found,
            error.image_ids,
            error.too_many,
            ways=ways,
            wish="Or shorten texts." if ways else error.wish,
        ) from error


def _ways(error: ContextError, asked: Asked, read_it: Callable) -> list[str]:
    """Single changes that make a question with shots fit: of the pictures' resolution,
    and of the shots' number."""
    assert asked.again is not None
    count = len(asked.shots)
    # One resolution for all goes without --high-resolution-shots, which says which
    # shots have the question's; and a number of pictures is one of shots.
    single = [way for way in error.ways if way.startswith("--")]
    ways = [
        way
        for way in single
        if asked.high is None or not way.startswith("--resolution")
    ]
    high, large = count if asked.high is None else asked.high, None
    if asked.large is not None:
        large = _most(asked.large, high, read_it)
    if large is not None:
        ways.append(f"--high-resolution-shots {large} (high_resolution_shots={large})")
    if fewer := _most(asked.again, count, read_it, least=1):
        ways.append(
            f"{fewer} of the {plural(count, 'shot')}: {asked.flag.format(fewer)}"
        )
    return ways


def _most(
    ask: Callable[[int], Asked], beyond: int, read_it: Callable, least: int = 0
) -> int | None:
    """The largest number below `beyond` with which it fits, by halves, or None."""
    fits = None
    while least < beyond:
        middle = (least + beyond) // 2
        try:
            read_it(ask(middle))
            fits, least = middle, middle + 1
        except ContextError:
            beyond = middle
        except PromptError:  # it would change nothing
            return None
    return fits


def check_one(prompt: Any) -> None:
    """Refuse a list that is not one conversation: only its first would be answered."""
    if not isinstance(prompt, (list, tuple)) or is_conversation(prompt):
        return
    raise PromptError(
        f"The prompt is a list of {plural(len(prompt), 'entry', 'entries')}, but one "
        f"text or one conversation (a list of "
        f'{{"role": ..., "content": ...}}) was expected. For several prompts use '
        f"batch_generate."
    )


def check_batch(prompts: Any, images: Any) -> None:
    """Refuse one prompt, or its pictures, where a list for each prompt belongs."""
    one = "text" if isinstance(prompts, (str, bytes)) else "conversation"
    if one == "text" or isinstance(prompts, dict) or is_conversation(prompts):
        raise PromptError(
            f"The prompts are one {one}, but batch_generate takes a list of prompts. "
            f"Put it into a list, or use generate."
        )
    if images is None:
        return
    if not isinstance(images, (list, tuple)):
        raise PromptError(
            f"The images are one {type(images).__name__}, but batch_generate takes a "
            f"list with an entry for each prompt: an image, a list of images, or None."
        )
    if len(images) != len(prompts):
        raise PromptError(
            f"There are {plural(len(prompts), 'prompt')} but "
            f"{plural(len(images), 'entry', 'entries')} of images. Give one entry for "
            f"each prompt: an image, a list of images, or None."
        )


def check_system(prompt: Any, system: str | None) -> None:
    """Refuse two system messages."""
    if system is None or not is_conversation(prompt):
        return
    if prompt[0].get("role") == "system":
        raise PromptError(
            "system was given, but the messages begin with a system message already. "
            "Use one of the two."
        )
