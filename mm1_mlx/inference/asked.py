"""A question as it goes to the processor, with what stands in front of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm1_mlx.errors import DatasetError, ImageError
from mm1_mlx.inputs.examples import Example
from mm1_mlx.inputs.images import load_image


@dataclass(frozen=True)
class Asked:
    """A question behind its examples, as the processor takes it.

    prompt: text or messages. images: in reading order. stops: texts that end the
    answer. mark: what stands between reasoning and answer, or None. shots: what stands
    in front. resolution: for the processor, of all pictures. again: asks with another
    number of them; large: with so many of them in the question's resolution, which
    `high` says now (None: nothing does), PromptError where that changes nothing. flag:
    what says their number, for messages.
    """

    prompt: Any
    images: Any
    stops: tuple[str, ...] = ()
    mark: str | None = None
    shots: tuple[Example, ...] = ()
    resolution: Any = None
    again: Callable[[int], "Asked"] | None = None
    large: Callable[[int], "Asked"] | None = None
    high: int | None = None
    flag: str = "--num-shots {0} (num_shots={0})"

    def explained(self, error: Exception, **limits: Any) -> Exception:
        """The error, with the line of the example whose picture is to blame."""
        if isinstance(error, ImageError):
            for shot in self.shots:
                for image in shot.images:
                    try:
                        load_image(image, **limits)
                    except ImageError as found:
                        return DatasetError(f"{shot.where}: {found}")
        return error
