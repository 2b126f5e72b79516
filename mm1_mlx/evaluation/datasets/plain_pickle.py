"""Pickles of plain data without running them: RefCOCO's refs(unc).p.

Python's unpickler runs what a pickle says. Here lists, dictionaries, texts and numbers
are all that there is: no name is looked up, nothing is called.
"""

from typing import Any

from mm1_mlx.errors import DatasetError

__all__ = ["read_plain"]


def read_plain(path: Any) -> Any:
    """What a pickle of plain data holds; DatasetError for any other, unrun."""
    from mm1_mlx.convert.unpickle import RefusedError, UnpickleError, unpickle_plain

    try:
        return unpickle_plain(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
    except RefusedError as error:
        raise DatasetError(
            f"{path} is a pickle that names {error}: it is no data but a program, and "
            f"was not run. Download it again from where RefCOCO is published."
        ) from error
    except UnpickleError as error:
        raise DatasetError(
            f"{path} is no pickle of plain data: {error}. Nothing of it was run."
        ) from error
