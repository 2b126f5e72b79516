"""The JSON files of a folder, read with errors for people. Only plain Python here."""

import json
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}, so it is not a model folder."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return values
