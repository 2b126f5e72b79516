"""mm1-tiny with its keys and values in 8 bits: logits within a bound, the same tokens.

The bound is 0.5% of the spread of a step's logits (highest minus lowest). Where from:
8 bits put a key or value at most 1/510 of its group's range, 0.2%, off its place. An
attention adds up many such errors of either sign, and each layer adds its own; two and
a half times the largest single one leaves room for all of them (four sets of weights
stayed below 0.2%). 4 bits are off by up to 1/30 and break the bound: a test shows it.

One thing is no matter of size: a router whose experts are nearly tied may choose
another one, and then the logits jump. So a step is compared while every expert is the
one that the full cache chose. And where the two likeliest tokens are nearer than twice
the bound, both orders are right. All else must be the same token.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from helpers import ROOT, need_tiny
from mm1_mlx.inference.generation import generate
from mm1_mlx.loading import load

BOUND = 0.005  # of the spread of a step's logits
MOST = 40  # tokens of an answer

QUESTIONS = [
    ("shapes", "What colour is the star?"),
    ("shapes", "How many red circles are there?"),
    ("shapes", "Is there a green triangle?"),
    ("shapes", "Where is the square?"),
    ("shapes", "Which shape is left of the square?"),
    ("shapes", "Describe the picture."),
    ("shapes", "What do you see?"),
    ("shapes", "Describe this image in words."),
    ("two", "What shape is green?"),
    ("two", "How many shapes are there?"),
    ("two", "Is there a purple circle?"),
    ("two", "Describe the picture."),
    ("two", "What do you see?"),
    ("one", "What is this?"),
    ("one", "Where is the triangle?"),
    ("one", "Describe the picture."),
    ("one", "Write a caption."),
    ("grey", "Describe the picture."),
    ("grey", "What word is written?"),
    ("grey", "What number is shown?"),
]


def picture(name: str) -> Image.Image:
    if name == "shapes":
        return Image.open(ROOT / "examples" / "shapes.png")
    image = Image.new("RGB", (256, 256), (240, 238, 230))
    draw = ImageDraw.Draw(image)
    if name == "two":
        draw.rectangle((30, 40, 100, 110), fill=(20, 150, 60))
        draw.ellipse((150, 130, 225, 205), fill=(130, 40, 160))
    elif name == "one":
        draw.polygon([(128, 30), (40, 140), (216, 140)], fill=(240, 130, 20))
    else:
        noise = np.random.default_rng(0).integers(60, 190, (32, 32, 3), np.uint8)
        image = Image.fromarray(noise).resize((256, 256))
    return image


@dataclass
class Run:
    """One answer, each step's logits and experts on the way."""

    ids: list[int]
    logits: np.ndarray  # (steps, V)
    experts: list  # of each step but the first, which no quantized value reaches


@pytest.fixture(scope="module")
def tiny():
    need_tiny()
    return load("mm1-tiny")


def run(tiny, question, bits=None, forced=None) -> Run:
    """The greedy answer, or the same tokens again (`forced`), as Decoding makes it."""
    model, processor = tiny
    name, text = question
    inputs = processor(text, images=[picture(name)])
    cache = model.make_cache()
    hidden = model.decoder.hidden(
        None, cache, model.embed(inputs.input_ids, inputs.pixel_values)
    )
    if bits is not None:
        cache = [entry.to_quantized(bits=bits) for entry in cache]
    ids, logits, experts = [], [], []
    while True:
        logits.append(np.array(model.decoder.head(hidden[:, -1])[0]))
        step = len(ids)
        ids.append(int(logits[-1].argmax()) if forced is None else forced[step])
        ended = ids[-1] in model.config.eos_token_ids
        if len(ids) == (MOST if forced is None else len(forced)) or ended:
            return Run(ids, np.stack(logits), experts)
        chosen: list = []
        token = mx.array([[ids[-1]]])
        hidden = model.decoder.hidden(token, cache, router_outputs=chosen)
        experts.append([np.sort(np.array(e).reshape(-1)).tolist() for _, e in chosen])


@pytest.fixture(scope="module")
def full(tiny):
    """Each question's answer with the full cache."""
    return {question: run(tiny, question) for question in QUESTIONS}


def same_experts(one: Run, other: Run) -> int:
    """How many steps come before the first one in which a router chose otherwise."""
    for step, (a, b) in enumerate(zip(one.experts, other.experts, strict=True)):
        if a != b:
            return step + 1
    return len(one.ids)


def spread(logits: np.ndarray) -> np.ndarray:
    return logits.max(1) - logits.min(1)


def error(one: Run, other: Run, steps: int) -> np.ndarray:
    """The largest difference of each step, over the spread."""
    a, b = one.logits[:steps], other.logits[:steps]
    return np.abs(a - b).max(1) / spread(a)


def sure(run: Run) -> int:
    """How many steps come before the first that is nearly a tie."""
    best = np.sort(run.logits, axis=1)[:, -2:]
    near = (best[:, 1] - best[:, 0]) <= 2 * BOUND * spread(run.logits)
    return int(near.argmax()) if near.any() else len(run.ids)


@pytest.mark.parametrize("question", QUESTIONS, ids=[" ".join(q) for q in QUESTIONS])
def test_8_bits_keep_logits_and_tokens(tiny, full, question):
    whole = full[question]
    eight = run(tiny, question, bits=8, forced=whole.ids)
    steps = same_experts(whole, eight)
    assert error(whole, eight, steps).max() <= BOUND
    model, processor = tiny
    name, text = question
    found = generate(
        model, processor, text, picture(name), max_tokens=MOST, kv_bits=8
    ).token_ids
    certain = min(sure(whole), steps)
    assert list(found[:certain]) == whole.ids[:certain]


def test_most_steps_are_compared(tiny, full):
    """Else the test above could pass by comparing nothing."""
    compared = total = 0
    for question, whole in full.items():
        eight = run(tiny, question, bits=8, forced=whole.ids)
        compared += same_experts(whole, eight)
        total += len(whole.ids)
    assert total > 2 * len(QUESTIONS)  # captions are among them
    assert compared >= 0.75 * total


def test_4_bits_break_the_bound(tiny, full):
    """So the bound is one that a worse cache does not keep."""
    broken = [
        error(whole, four, same_experts(whole, four)).max() > BOUND
        for question, whole in full.items()
        for four in [run(tiny, question, bits=4, forced=whole.ids)]
    ]
    assert any(broken)
