"""The flags that the commands share which write a model folder from another one."""

from pathlib import Path

from mm1_mlx.cli.parser import Parser, whole_number


def add_target(p: Parser, of_dtype: str, of_seed: str) -> None:
    """Add --mlx-path, --dtype, --seed, --overwrite and --json.

    of_dtype, of_seed: what the type's default is, and what the seed is for.
    """
    from mm1_mlx.convert.numbers import BY_NAME

    add = p.add_argument
    add("--mlx-path", type=Path, required=True, metavar="FOLDER", help="where to write")
    add("--dtype", choices=list(BY_NAME), help=f"of the weights ({of_dtype})")
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help=f"{of_seed} (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a model folder")
    add("--json", action="store_true", help="print one JSON object")
