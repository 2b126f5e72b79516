"""Trains mm1-tiny's sentencepiece vocabulary on the text of its own generator.

    python -m examples.mm1_tiny.vocabulary --out runs/mm1-tiny/tokenizer.model

Digits, capital letters and a line break are tokens of their own, so that a number or a
word in a picture is read sign by sign.
"""

import argparse
import random
import string
from pathlib import Path

from examples.mm1_tiny.documents import corpus

MARKS = ["<image>", "<user>", "<assistant>"]
SIGNS = ["\n", *string.digits, *string.ascii_uppercase]


def train(out: Path, size: int = 512, lines: int = 60_000, seed: int = 0) -> None:
    """Write a unigram model of `size` pieces: unk 0, bos 1, eos 2, pad 3, marks 4-6."""
    import sentencepiece

    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus(random.Random(seed), lines),
            model_writer=file,
            vocab_size=size,
            model_type="unigram",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            user_defined_symbols=MARKS + SIGNS,
            required_chars=string.ascii_lowercase + ".,;:!?'\"()-+=<>/",
            num_threads=1,
            minloglevel=2,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--lines", type=int, default=60_000)
    args = parser.parse_args()
    train(args.out, args.size, args.lines)
    print(f"{args.out}: {args.size} pieces from {args.lines} lines")


if __name__ == "__main__":
    main()
