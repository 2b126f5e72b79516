"""Samples in parquet files, as the hub's datasets are: read a part at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.parquet_file import ParquetTable
from mm1_mlx.errors import DatasetError
from mm1_mlx.training.samples import KEYS, KINDS, Sample, parse_sample


class ParquetRows(ParquetTable):
    """The samples of parquet files; needs pyarrow."""

    def __init__(self, files: Sequence[Path], folder: Path | None = None):
        """folder: what paths of pictures start from; None for the files' own."""
        self._folder = folder or files[0].parent
        super().__init__(files, lambda path: path.partition(".")[0] in KEYS, _check)

    def __getitem__(self, index: int) -> Sample:
        """A sample; DatasetError names the file and the row where it is none."""
        values = _without_none(self.row(index))
        return parse_sample(values, self._folder, self.where(index))


def _check(file: Path, columns: list[str]) -> None:
    if not set(columns) & set(KINDS):
        raise DatasetError(
            f"{file} has the columns {sorted(columns)[:6]}, but must have one of "
            f"{', '.join(map(repr, KINDS))}."
        )


def _without_none(value: Any) -> Any:
    """The values without the keys that are empty: a table has all keys in every row."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
