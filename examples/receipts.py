"""Read receipts: photos in a folder to fields, one JSON object a line.

    python -m examples.receipts RECEIPTS out.jsonl --model NAME
    python -m examples.receipts examples out.jsonl

It needs a model that reads small print: a converted one that sees pictures in tiles,
such as --model llava-hf/llava-v1.6-mistral-7b-hf (made once, 15 GB). The built-in
mm1-tiny, the default, cannot read receipts: it is here to see the command run.

A line has the file, the fields (null where the answer is no JSON object, or leaves one
out), the answer as it was given, and "cut": whether --max-tokens ended it. Check what
matters: a model may read a wrong number with confidence. "adds_up" says whether the
prices of the items make the total. A run that was interrupted goes on when the same
command is given again. A picture that cannot be read is one line on stderr, and the
exit code is 1.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from examples.describe_folder import (
    find_pictures,
    pictures_left,
    read_earlier,
    write_whole,
)
from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import MM1Error
from mm1_mlx.inputs.prompts import with_image_slots

TINY = "mm1-tiny"
FIELDS = ("merchant", "date", "currency", "total", "items")
_OF_NO_ITEM = {"merchant", "date", "currency", "items"}
PROMPT = (
    "This is a photo of a receipt. Answer with one JSON object and nothing else, with "
    'the keys "merchant" (text), "date" (YYYY-MM-DD), "currency" (three letters), '
    '"total" (number) and "items" (a list of {"name": text, "price": number}). Use '
    "null for what cannot be read."
)


def json_object(text: str) -> dict[str, Any] | None:
    """The first whole JSON object of an answer with a field of a receipt, whatever is
    around it, or None.

    In an answer that was cut off, an item may be whole: it is no receipt.
    """
    decoder, wanted = json.JSONDecoder(), set(FIELDS)
    for match in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            wanted = _OF_NO_ITEM
            continue
        if not wanted.isdisjoint(found):
            return found
    return None


def amount(value: Any) -> float | None:
    """A sum of money as a number: 12.5, "12,50 EUR", "$1,234.50", "1.234,50"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e12 else None
    if not isinstance(value, str):
        return None
    match = re.search(r"(-[$€£¥]?)?(\.?\d[\d.,' ]*)", value[:60])
    if match is None:
        return None
    digits = re.sub(r"[' ]", "", match[2]).rstrip(".,")
    cents = re.search(r"[.,](\d{1,2})$", digits)
    whole = re.sub(r"[.,]", "", digits[: cents.start()] if cents else digits)
    found = float(f"{whole or 0}.{cents[1] if cents else 0}")
    return -found if match[1] else found


def fields_of(answer: str) -> dict[str, Any] | None:
    """The fields of an answer, numbers as numbers; None where it is no JSON object."""
    found = json_object(answer)
    if found is None:
        return None
    fields: dict[str, Any] = {key: found.get(key) for key in FIELDS}
    fields["total"] = amount(fields["total"])
    items = fields["items"] if isinstance(fields["items"], list) else []
    fields["items"] = [
        {"name": str(item.get("name") or ""), "price": amount(item.get("price"))}
        for item in items
        if isinstance(item, dict)
    ]
    return fields


def adds_up(fields: dict[str, Any] | None) -> bool | None:
    """Whether the items' prices make the total; None where one is not known."""
    prices = [item["price"] for item in fields["items"]] if fields else []
    if fields is None or fields["total"] is None or not prices or None in prices:
        return None
    return abs(sum(prices) - fields["total"]) < 0.005


def read_lines(place: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run; a last one that was cut off is left out."""
    found = []
    for number, line in enumerate(read_earlier(place).split("\n")[:-1], 1):
        try:
            found.append(json.loads(line))
            found[-1]["file"]
        except (ValueError, TypeError, KeyError) as error:
            raise MM1Error(
                f"{place} is there already, but line {number} was not written by this "
                f"command. Give another name."
            ) from error
    return found


def as_line(values: dict[str, Any]) -> str:
    """A JSON object as a line of a file."""
    return json.dumps(values, ensure_ascii=False) + "\n"


def run(args: argparse.Namespace) -> int:
    """Ask about each picture that has no line yet; 1 where one cannot be read."""
    from mm1_mlx import generate, load

    with_image_slots(args.prompt, 1)  # fails before anything is loaded or written
    names = find_pictures(args.folder)
    before = read_lines(args.out)
    done = {line["file"] for line in before}
    left = [name for name in names if name not in done]
    if args.model == TINY:
        print(
            f"note: {TINY} cannot read receipts: it knows drawn shapes, numbers of "
            f"three digits and words of five letters. --help names a model that can.",
            file=sys.stderr,
        )
    if left:
        model, processor = load(args.model)
        # Whole again, where the last run was cut off in the midst of a line.
        write_whole(args.out, "".join(map(as_line, before)))
    asked = read = 0
    for (name,), pictures, write in pictures_left(args.folder, left, args.out, "read"):
        answer = generate(
            model, processor, args.prompt, pictures, max_tokens=args.max_tokens
        )
        fields = fields_of(answer.text)
        asked, read = asked + 1, read + (fields is not None)
        line = {
            "file": name,
            "fields": fields,
            "adds_up": adds_up(fields),
            "cut": answer.finish_reason == "length",
            "answer": answer.text.strip(),
        }
        write(as_line(line))
    print(
        f"{args.out}: {read} of {len(left)} answers are JSON, {len(names) - len(left)} "
        f"were there"
    )
    return int(asked < len(left))


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(prog="python -m examples.receipts", description=__doc__ or "")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    p.add_argument("out", type=Path, metavar="OUT.jsonl")
    p.add_argument("--model", default=TINY, metavar="NAME")
    p.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="other words")
    p.add_argument("-m", "--max-tokens", type=whole_number(1), default=600, metavar="N")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
