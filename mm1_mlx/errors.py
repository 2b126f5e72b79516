"""The errors a user can meet. Each message says what was found, expected, and to do."""

from collections.abc import Sequence


class MM1Error(Exception):
    """Base of every error meant for the user: one line, no traceback on the CLI."""


class UsageError(MM1Error):
    """Flags of a command that do not go together; it exits with 2."""


class ConfigError(MM1Error):
    """A configuration value or key is not usable."""


class CheckpointError(MM1Error):
    """A model folder or checkpoint file is missing, broken or does not fit."""


class PromptError(MM1Error):
    """A prompt is empty, too long, or does not fit its images."""


class ContextError(PromptError):
    """A prompt has more tokens than the model's context.

    found: what was found. ways: single changes that would make it fit. wish: what else
    to do. image_ids: how many ids each picture has. too_many: ids beyond the context.
    """

    def __init__(
        self,
        found: str,
        image_ids: Sequence[int] = (),
        too_many: int = 0,
        *,
        ways: Sequence[str] = (),
        wish: str = "",
    ):
        fits = f"What fits: {'; or '.join(ways)}." if ways else ""
        super().__init__(" ".join(part for part in (found, fits, wish) if part))
        self.image_ids, self.too_many = tuple(image_ids), too_many
        self.found, self.ways, self.wish = found, tuple(ways), wish


class ImageError(MM1Error):
    """A picture cannot be found, read or used."""


class DatasetError(MM1Error):
    """Training or evaluation data cannot be used."""


class MemoryPlanError(MM1Error):
    """The work would not fit into this machine's memory."""


class MM1Warning(UserWarning):
    """Something worked, but not as it should; commands show it as one line."""


class ToldElsewhere(MM1Error):
    """What ended another process of the run, which the first one tells the user."""
