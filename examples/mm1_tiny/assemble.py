"""Turns a run into the model folder that ships, and a result into its model card.

    python -m examples.mm1_tiny.assemble --run RUN --recipe RECIPE --out FOLDER
    python -m examples.mm1_tiny.evaluate --model FOLDER --wrong-image --json RESULT
    python -m mm1_mlx.evaluate --model FOLDER --task mm1-tiny --output OUT
    python -m examples.mm1_tiny.assemble --out FOLDER --card RESULT \\
        --abilities OUT/result.json --trained "..."

The same run, recipe and result always give the same bytes. A run that is still going on
can be assembled too: its last checkpoint is taken.
"""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import CheckpointError, UsageError

HERE = Path(__file__).parent
CARD = "README.md"
# How the model was made, from nothing; the card and README.md show them.
COMMANDS = """\
python -m examples.mm1_tiny.vocabulary --out runs/tokenizer.model
python -m mm1_mlx.pretrain examples/mm1_tiny/recipe.json --out runs/1 \\
    --tokenizer runs/tokenizer.model
python -m mm1_mlx.pretrain examples/mm1_tiny/recipe_2.json --out runs/2 \\
    --tokenizer runs/tokenizer.model --stage joint --init runs/1/model --until 2600
python -m examples.mm1_tiny.assemble --run runs/2 --out runs/2/model \\
    --tokenizer runs/tokenizer.model --recipe examples/mm1_tiny/recipe_2.json
python -m mm1_mlx.pretrain examples/mm1_tiny/recipe_3.json --out runs/3 \\
    --tokenizer runs/tokenizer.model --stage encoder --init runs/1
python -m mm1_mlx.pretrain examples/mm1_tiny/recipe_3.json --out runs/3 \\
    --tokenizer runs/tokenizer.model --stage joint --init runs/2/model --until 8954
python -m examples.mm1_tiny.assemble --run runs/3 --out runs/3/model \\
    --tokenizer runs/tokenizer.model --recipe examples/mm1_tiny/recipe_3.json
mkdir -p runs/4 && cp runs/3/encoder.safetensors runs/4
python -m mm1_mlx.pretrain examples/mm1_tiny/recipe_4.json --out runs/4 \\
    --tokenizer runs/tokenizer.model --stage joint --init runs/3/model --until 1754
python -m examples.mm1_tiny.assemble --run runs/4 --out runs/4/model \\
    --tokenizer runs/tokenizer.model --recipe examples/mm1_tiny/recipe_4.json
mkdir -p runs/5 && cp runs/3/encoder.safetensors runs/5
python -m mm1_mlx.pretrain examples/mm1_tiny/recipe_5.json --out runs/5 \\
    --tokenizer runs/tokenizer.model --stage joint --init runs/4/model
python -m examples.mm1_tiny.assemble --run runs/5 --out runs/5/model \\
    --tokenizer runs/tokenizer.model --recipe examples/mm1_tiny/recipe_5.json
mkdir -p runs/10 && cp runs/3/encoder.safetensors runs/10
before=5
for round in 6:700 7:1000 8:560 9:1100 10:3300 11:2900; do
    now=${round%:*}
    python -m mm1_mlx.pretrain examples/mm1_tiny/recipe_$now.json --out runs/$now \\
        --tokenizer runs/tokenizer.model --stage joint --init runs/$before/model \\
        --until ${round#*:}
    python -m examples.mm1_tiny.assemble --run runs/$now --out runs/$now/model \\
        --tokenizer runs/tokenizer.model --recipe examples/mm1_tiny/recipe_$now.json
    before=$now
done
cp runs/11/model/* mm1_mlx/assets/mm1-tiny
"""


def assemble(
    run: Path,
    out: Path,
    recipe_file: Path,
    tokenizer: Path,
    average: Sequence[Path] = (),
) -> None:
    """Write config, float16 weights, vocabulary and picture settings into `out`.

    average: runs that this one went on from; the weights are the mean of all of them
    ("Model soups", arXiv 2203.05482).
    """
    from mlx.utils import tree_map

    from mm1_mlx.training.model_folder import make_processor, write_model
    from mm1_mlx.training.recipe import read_recipe
    from mm1_mlx.training.state import load_model_state, load_state

    recipe = read_recipe(recipe_file)
    checkpoint = run / "joint.safetensors"
    model = load_model_state(checkpoint, recipe.model)
    step = load_state(checkpoint)[1]["step"]
    made = {"made_by": "python -m mm1_mlx.pretrain", "joint_steps": step}
    if average:
        files = [each / checkpoint.name for each in average]
        all_runs = [model, *(load_model_state(file, recipe.model) for file in files)]
        made["mean_of_runs"] = len(all_runs)
        weights = [each.parameters() for each in all_runs]
        model.update(tree_map(lambda *w: sum(w) / len(w), *weights))
    model.config = replace(recipe.model, extra=made)
    processor = make_processor(
        model.config, recipe.images, tokenizer, recipe.chat_template
    )
    write_model(out, model, processor)


def write_card(
    out: Path, result: dict[str, Any], abilities: list[dict[str, Any]], how: str
) -> None:
    """The model card: CARD.md with the tables of evaluate's result filled in.

    abilities: results of `python -m mm1_mlx.evaluate`. how: what the card says about
    the run, after its commands.
    """
    from examples.mm1_tiny import scenes
    from examples.mm1_tiny.evaluation import ABILITIES
    from examples.mm1_tiny.scoring import abilities_markdown, markdown, missed

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    text = (HERE / "CARD.md").read_text(encoding="utf-8")
    lines = [f"- {line}" for line in missed(result)]
    below = "\n".join(["Below its goal:", "", *lines]) if lines else ""
    run = textwrap.indent(COMMANDS, "    ")
    values = {
        "table": "\n".join([markdown(result).rstrip(), "", below]).rstrip(),
        "abilities": abilities_markdown(abilities, ABILITIES),
        "n": str(result["n"]),
        "run": f"{run}\n{how}".rstrip(),
        "shapes": ", ".join(scenes.SHAPES),
        "colours": ", ".join(scenes.COLOURS),
        "held_out": ", ".join(" ".join(pair) for pair in scenes.HELD_OUT_PAIRS),
        "backends": _renderers(result),
        "pixels": str(config["vision_config"]["image_size"]),
        "tokens": str(config["connector_config"]["num_query_tokens"]),
    }
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    (out / CARD).write_text(text.rstrip() + "\n", encoding="utf-8")


def _renderers(result: dict[str, Any]) -> str:
    """The drawing programs of the task "elsewhere", as they were on that machine."""
    groups = result["tasks"].get("elsewhere", {}).get("groups", {})
    return ", ".join(sorted(groups.get("renderer", {}))) or "not in this result"


def read_result(path: Path) -> dict[str, Any]:
    """What evaluate --json wrote."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a result of evaluate: {error}."
        ) from error
    if not isinstance(result, dict) or not {"n", "tasks", "says_unknown"} <= set(
        result
    ):
        raise CheckpointError(
            f"{path} is not a result of evaluate. Make one with "
            f"python -m examples.mm1_tiny.evaluate --json {path}"
        )
    return result


def read_abilities(path: Path) -> list[dict[str, Any]]:
    """The results in a result.json of `python -m mm1_mlx.evaluate`. CheckpointError
    where it is none, or has no task of an ability."""
    from examples.mm1_tiny.evaluation import ABILITIES

    try:
        found = json.loads(path.read_text(encoding="utf-8"))["results"]
        there = {result["task"] for result in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a result.json of python -m mm1_mlx.evaluate: {error!r}."
        ) from error
    if there.isdisjoint(f"tiny_{name}" for name in ABILITIES):
        raise CheckpointError(
            f"{path} has no result of mm1-tiny's abilities. Ask them with "
            f"python -m mm1_mlx.evaluate --task mm1-tiny."
        )
    return found


def parser() -> Parser:
    """The flags of this command."""
    parser = Parser(
        prog="python -m examples.mm1_tiny.assemble",
        description="Make the model folder of a run, or (with --card) its model card.",
    )
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/mm1-tiny"), help="folder of the run")
    add(
        "--out",
        type=Path,
        default=Path("mm1_mlx/assets/mm1-tiny"),
        help="the model folder; default: %(default)s",
    )
    add("--recipe", type=Path, default=HERE / "recipe.json", help="of the run")
    add(
        "--average",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="the mean with the weights of earlier runs",
    )
    add("--tokenizer", type=Path, help="default: tokenizer.model of the run")
    add("--card", type=Path, metavar="RESULT", help="evaluate's --json; only the card")
    add(
        "--abilities",
        type=Path,
        metavar="RESULT",
        help="result.json of python -m mm1_mlx.evaluate --task mm1-tiny, for the card",
    )
    add("--trained", default="", metavar="TEXT", help="for the card: time and machine")
    parser.add_debug()
    return parser


def run(args) -> None:
    """Write the folder, or the card into it."""
    if args.card is None:
        tokenizer = args.tokenizer or args.run / "tokenizer.model"
        assemble(args.run, args.out, args.recipe, tokenizer, args.average)
    elif not (args.out / "config.json").is_file():
        raise CheckpointError(
            f"There is no model folder {args.out}. Assemble it first."
        )
    else:
        if args.abilities is None:
            raise UsageError("--card goes with --abilities RESULT")
        result = read_result(args.card)
        write_card(args.out, result, read_abilities(args.abilities), args.trained)
    print(args.out)


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
