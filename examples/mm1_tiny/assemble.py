"""Turns a finished run into the model folder that ships, with its model card.

    python -m examples.mm1_tiny.assemble --run runs/mm1-tiny --out mm1_mlx/assets/mm1-tiny
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from examples.mm1_tiny.evaluate import markdown
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.loading import save
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.pretraining import float16_weights
from mm1_mlx.training.pretraining_run import read_recipe
from mm1_mlx.training.state import load_state

HERE = Path(__file__).parent


def assemble(run: Path, out: Path, recipe_file: Path) -> None:
    """Write config, float16 weights, vocabulary and picture settings into `out`."""
    recipe = read_recipe(recipe_file)
    trees, facts = load_state(run / "joint.safetensors")
    model = MM1(recipe.model)
    model.update(trees["parameters"])
    model.load_weights(list(float16_weights(model).items()))
    mx.eval(model.parameters())
    made = {"made_by": "python -m mm1_mlx.pretrain", "joint_steps": facts["step"]}
    model.config = replace(recipe.model, extra=made)
    tokenizer = load_tokenizer(run)
    processor = Processor(
        tokenizer, recipe.images, model.config, chat_template="mm1-tiny"
    )
    save(model, processor, out, overwrite=True)


def write_card(out: Path, result_file: Path) -> None:
    """The model card: CARD.md with the table of evaluate's result filled in."""
    results = json.loads(result_file.read_text())
    text = (HERE / "CARD.md").read_text()
    text = text.replace("{{table}}", markdown(results))
    text = text.replace("{{n}}", str(results["n"]))
    (out / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/mm1-tiny"))
    add("--out", type=Path, default=Path("mm1_mlx/assets/mm1-tiny"))
    add("--recipe", type=Path, default=HERE / "recipe.json")
    add("--card", type=Path, metavar="RESULT.json", help="write the model card only")
    args = parser.parse_args()
    if args.card:
        write_card(args.out, args.card)
    else:
        assemble(args.run, args.out, args.recipe)
    print(args.out)


if __name__ == "__main__":
    main()
