"""The flags of `lora`; what they say in the library's terms is in cli.tuning."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm1_mlx.cli.mlx_lm_config import from_mlx_lm
from mm1_mlx.cli.parser import Parser, number, some_text, whole_number
from mm1_mlx.cli.resolution import add_resolution

MOST_RANK = 65536  # no weight is that wide

_EXAMPLES = """\
data: a folder with train.jsonl (valid.jsonl, test.jsonl), a conversation a line:
  {"question": "What is this?", "answer": "A cat.", "image": "cats/1.jpg"}
  {"messages": [{"role": "user", "content": "<image> What is this?"}, ...],
   "images": ["a.jpg"]}
  {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], ...}
  {"image": "a.jpg", "caption": "A cat on a mat."}
or train.json (one list), train.parquet, train-00000-of-00002.parquet, ...; such a file
itself; or a dataset on the hub: OWNER/NAME, OWNER/NAME/FOLDER, OWNER/NAME@REVISION.
Several --data are mixed, each by its weight; --check shows the shares.

examples:
  python -m mm1_mlx.lora --model mm1-tiny --data DATA --check
  python -m mm1_mlx.lora --model mm1-tiny --data DATA --iters 200
  python -m mm1_mlx.lora --model FOLDER --data DATA --train connector=full --iters 500
  python -m mm1_mlx.lora --model FOLDER --data DATA --train attention=16 --train experts
  python -m mm1_mlx.lora --config adapters/config.yaml --resume
  mlx.launch -n 2 -- python -m mm1_mlx.lora ...  (processes, or Macs, share each batch)
  python -m mm1_mlx.lora --model FOLDER --data A=0.45 --data B=0.45 --data C=0.1

The run can be stopped at any moment; the same command with --resume goes on exactly.
"""


def parser() -> Parser:
    """The flags of this command; where mlx-lm has them, under its names."""
    p = Parser(
        prog="mm1_mlx lora",
        description="Fine-tune a model: low-rank pairs beside frozen weights (LoRA, "
        "DoRA), also on\nquantized models (QLoRA), or whole parts.",
        epilog=_EXAMPLES,
    )
    _add_run(p)
    _add_parts(p)
    _add_learning(p)
    _add_rows(p)
    add_resolution(p.add_argument_group("pictures"))
    _add_memory(p)
    _add_watching(p)
    p.add_config(from_mlx_lm)
    p.add_debug()
    return p


def _add_run(p: Parser) -> None:
    count = whole_number(1)
    add = p.add_argument
    add("--model", required=True, metavar="NAME", help="name, folder or hub id")
    add(
        "--data",
        action="append",
        required=True,
        metavar="WHERE[=WEIGHT]",
        help="a folder, file or hub id, see below; several are mixed",
    )
    add(
        "--image-folder",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="what paths of pictures start from (the data's folder); given once for "
        "all --data, or once for each, in their order",
    )
    add(
        "--adapter-path",
        type=Path,
        default=Path("adapters"),
        metavar="FOLDER",
        help="where to write (%(default)s)",
    )
    add("--iters", type=count, default=1000, metavar="N", help="updates (%(default)s)")
    add(
        "--batch-size", type=count, default=4, metavar="N", help="samples (%(default)s)"
    )
    add(
        "--seed",
        type=whole_number(0, 2**63),
        default=0,
        metavar="N",
        help="(%(default)s)",
    )
    add("--resume", action="store_true", help="go on from --adapter-path, exactly")
    add(
        "--force",
        action="store_true",
        help="with --resume: also with other settings, data or model, where the "
        "trained arrays fit",
    )
    add("--check", action="store_true", help="read all data, report, and train nothing")
    add("--json", action="store_true", help="print one JSON object at the end")


def _add_parts(p: Parser) -> None:
    group = p.add_argument_group("what is trained")
    add = group.add_argument
    add(
        "--train",
        action="append",
        default=[],
        metavar="PART[=HOW]",
        help="a part, and how: a rank, lora, dora, lora:RANK, dora:RANK or full. "
        "Parts: encoder, connector, attention, mlp, experts, embeddings, head, "
        "router, norms (attention, mlp and experts, those that are there)",
    )
    add("--fine-tune-type", choices=["lora", "dora", "full"], default="lora")
    add(
        "--rank",
        type=whole_number(1, MOST_RANK),
        default=8,
        metavar="R",
        help="of the pairs; at most a weight's shorter side (%(default)s)",
    )
    _add_scale(group)
    add("--dropout", type=number(0, 0.99), default=0.0, metavar="X", help="(0)")
    add(
        "--projections",
        metavar="NAMES",
        help="only these, as q_proj,v_proj (all of a part)",
    )
    add(
        "--num-layers",
        type=int,
        default=-1,
        metavar="N",
        help="of the decoder, from its end (-1: all)",
    )
    add("--first-layers", type=whole_number(1), metavar="N", help="from its start")


def _add_scale(group: Any) -> None:
    add = group.add_mutually_exclusive_group().add_argument
    add(
        "--alpha",
        type=number(0, above=True),
        default=16.0,
        metavar="X",
        help="pairs add alpha / rank times their product (%(default)g)",
    )
    add(
        "--scale",
        type=number(0, above=True),
        metavar="X",
        help="in place of alpha / rank",
    )
    group.add_argument("--rslora", action="store_true", help="alpha / sqrt(rank)")


def _add_learning(p: Parser) -> None:
    add = p.add_argument_group("learning").add_argument
    add(
        "--learning-rate",
        default="1e-4",
        metavar="X",
        help="the peak, or mm1: exp(-0.4214 ln N - 0.5535), N the decoder's parameters "
        "without embeddings, adapted or not; a law for training all of them "
        "(%(default)s)",
    )
    add(
        "--part-rate",
        action="append",
        default=[],
        metavar="PART=X",
        help="a part's rate as a part of the others'",
    )
    add("--warmup", type=whole_number(0), default=10, metavar="N", help="(%(default)s)")
    add(
        "--floor",
        type=number(0, 1),
        default=0.1,
        metavar="X",
        help="the last rate as a part of the peak, by a cosine (%(default)s)",
    )
    add(
        "--optimizer",
        choices=["adamw", "adam", "adafactor", "lion", "sgd"],
        default="adamw",
        help="(%(default)s)",
    )
    add("--weight-decay", type=number(0), default=0.0, metavar="X", help="(0)")
    add("--clip", type=number(0, above=True), default=1.0, metavar="X", help="(1)")
    add(
        "--router-losses",
        action="store_true",
        help="add the experts' load-balance and z-loss",
    )
    add("--save-every", type=whole_number(1), default=100, metavar="N", help="(100)")
    add(
        "--steps-per-eval", type=whole_number(1), default=100, metavar="N", help="(100)"
    )
    add(
        "--val-samples",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="of each valid split that an evaluation reads (%(default)s)",
    )
    add(
        "--steps-per-report", type=whole_number(1), default=10, metavar="N", help="(10)"
    )
    add("--until", type=whole_number(1), metavar="STEP", help="stop there, and save")


def _add_rows(p: Parser) -> None:
    add = p.add_argument_group("rows").add_argument
    add(
        "--max-seq-length",
        type=whole_number(16),
        default=2048,
        metavar="N",
        help="tokens of a sample, images included (%(default)s)",
    )
    add(
        "--too-long",
        choices=["refuse", "drop"],
        default="refuse",
        help="what becomes of a longer one; it is never cut (%(default)s)",
    )
    add(
        "--pack",
        action="store_true",
        help="several samples in a row, which do not see each other",
    )


def _add_memory(p: Parser) -> None:
    add = p.add_argument_group("memory").add_argument
    add(
        "--plan",
        action="store_true",
        help="predict the peak, say whether it fits, and train nothing",
    )
    add(
        "--memory-limit",
        type=number(0, above=True),
        metavar="GB",
        help="what the run may take (what the GPU may use)",
    )
    add(
        "--grad-accumulation-steps",
        type=_or_auto(whole_number(1)),
        default=1,
        metavar="N",
        help="micro-batches that a batch is made in, or auto: as few as fit "
        "(%(default)s)",
    )
    add(
        "--grad-checkpoint",
        type=_switch,
        choices=["on", "off", "auto"],
        default="auto",
        nargs="?",
        const="on",
        help="make what layers hold inside again on the way back, a third slower; "
        "auto: where nothing else fits (%(default)s)",
    )
    add(
        "--length-window",
        type=whole_number(1),
        default=1,
        metavar="STEPS",
        help="sort the samples of so many steps by length, so that those of like "
        "length share a batch and less is padding (%(default)s: do not)",
    )
    add(
        "--vocabulary-chunk",
        type=_or_auto(whole_number(16)),
        default="auto",
        metavar="N",
        help="words whose logits are made at a time; auto: 64 MB of them (%(default)s)",
    )


def _switch(text: str) -> str:
    """YAML reads on and off as true and false."""
    return {"true": "on", "false": "off"}.get(text.lower(), text)


def _or_auto(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: text if text == "auto" else kind(text)


def _add_watching(p: Parser) -> None:
    add = p.add_argument_group("watching").add_argument
    add(
        "--task-accuracy",
        type=whole_number(1),
        metavar="N",
        help="every N steps ask samples of valid.jsonl, and count the answers that are "
        "the expected ones (case, spacing and a full stop at the end do not count)",
    )
    add(
        "--task-samples",
        type=whole_number(1),
        default=32,
        metavar="N",
        help="how many are asked (%(default)s)",
    )
    add(
        "--plot",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="curves.png, and answers.png with a few of valid.jsonl before and after "
        "(yes)",
    )
    add("--wandb", type=some_text, metavar="PROJECT", help="log there, too")
