"""The table of doors: the commands of `python -m mm1_mlx NAME`."""

from importlib import import_module

# name: (module with main(argv) -> exit code, what it does)
DOORS = {
    "generate": ("mm1_mlx.generate", "answer a prompt about images"),
    "chat": ("mm1_mlx.chat", "talk with a model about pictures"),
    "info": ("mm1_mlx.info", "parts, parameters and memory of a model"),
    "convert": (
        "mm1_mlx.convert.__main__",
        "a public checkpoint to a model folder, and back",
    ),
    "quantize": ("mm1_mlx.quantize", "fewer bits per weight, and what that costs"),
    "lora": ("mm1_mlx.lora", "fine-tune a model on your own pictures"),
    "fuse": ("mm1_mlx.fuse", "take an adapter into the weights"),
    "pretrain": ("mm1_mlx.pretrain", "train a model from scratch, MM1's recipe"),
    "evaluate": ("mm1_mlx.evaluate", "score answers on benchmarks, MM1's or yours"),
    "benchmark": (
        "mm1_mlx.benchmark",
        "measure answers, start-up and training here",
    ),
}


def open_door(name: str, argv: list[str]) -> int:
    """Run the door `name` (a key of DOORS) with its arguments; give its exit code."""
    return import_module(DOORS[name][0]).main(argv)


def table() -> str:
    """The doors, one line each, for `--help`."""
    return "\n".join(f"  {name:<10} {what}" for name, (_, what) in DOORS.items())
