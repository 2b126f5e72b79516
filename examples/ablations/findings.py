"""What the paper says of each axis, as differences that runs can decide.

An effect is a difference between cells, paired by seed, its mean over seeds and its
95% t interval. Runs of one seed start from the same encoder, decoder and fresh weights,
where these are not what differs, and read the same documents, where the mix is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from examples.ablations.measure import share
from examples.ablations.plan import BASE, PIXELS, TOKENS, Cell

# Two-sided 95% quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
_T |= {9: 2.262, 10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042}

LITTLE = 0.05  # five points: where the paper finds little effect, ours

Results = dict[tuple[Cell, int], dict[str, Any]]  # result.json by cell and seed


def t_quantile(degrees: int) -> float:
    """Of the table; between its rows that of fewer degrees, which is the wider."""
    return _T[max(d for d in _T if d <= degrees)]


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% t interval; None for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, t_quantile(n - 1) * (variance / n) ** 0.5


@dataclass(frozen=True)
class Effect:
    """A difference that the paper has a word about.

    more, less: the cells on both sides, pair by pair; their mean difference counts.
    expected: +1, -1, or 0 where the paper finds none that matters; None where it says
    nothing that we know of. said: its finding, in a few words.
    """

    table: str
    what: str
    measure: str
    more: tuple[Cell, ...]
    less: tuple[Cell, ...]
    expected: int | None
    said: str

    def differences(self, results: Results) -> list[float]:
        """One number for each seed for which all runs are there."""
        found = []
        for seed in sorted({seed for _, seed in results}):
            pairs = list(zip(self.more, self.less, strict=True))
            if all((c, seed) in results for pair in pairs for c in pair):
                apart = [
                    share(results[a, seed], self.measure)
                    - share(results[b, seed], self.measure)
                    for a, b in pairs
                ]
                found.append(sum(apart) / len(apart))
        return found

    def verdict(self, mean: float, reach: float | None) -> str:
        """Whether these runs agree with the paper. An interval that holds 0 decides
        no direction; one within LITTLE is a difference of little effect."""
        if reach is None:
            return "one seed"
        if self.expected == 0 and abs(mean) + reach <= LITTLE:
            return "agrees"
        if abs(mean) <= reach:
            return "open"
        if not self.expected:
            return "a difference"
        return "agrees" if mean * self.expected > 0 else "disagrees"


def _with(cells: Sequence[Cell], **changes: Any) -> tuple[Cell, ...]:
    return tuple(replace(cell, **changes) for cell in cells)


_TYPES = ("average_pool", "attention_pool", "c_abstractor")
_GRID = tuple(
    Cell(connector=kind, tokens=tokens, pixels=pixels)
    for kind in _TYPES
    for tokens in TOKENS
    for pixels in PIXELS
)
_OF_TYPE = tuple(cell for cell in _GRID if cell.connector == "c_abstractor")


def _connector_effects() -> list[Effect]:
    few = tuple(cell for cell in _GRID if cell.tokens == TOKENS[0])
    low = tuple(cell for cell in _GRID if cell.pixels == PIXELS[0])
    found = []
    for measure in ("zero", "shots"):
        found += [
            Effect(
                "connectors", f"{TOKENS[1]} tokens instead of {TOKENS[0]}", measure,
                _with(few, tokens=TOKENS[1]), few, 1, "more tokens are better",
            ),
            Effect(
                "connectors", f"{PIXELS[1]} pixels instead of {PIXELS[0]}", measure,
                _with(low, pixels=PIXELS[1]), low, 1, "more pixels are better",
            ),
        ]  # fmt: skip
        found += [
            Effect(
                "connectors", f"c_abstractor instead of {other}", measure,
                _OF_TYPE, _with(_OF_TYPE, connector=other), 0, "type: little effect",
            )
            for other in _TYPES[:2]
        ]  # fmt: skip
    few_or_none = Cell(tokens=4, pixels=48)
    found.append(
        Effect(
            "connectors", "16 tokens instead of 4", "zero",
            (BASE,), (few_or_none,), 1, "more tokens are better",
        )
    )  # fmt: skip
    middle = Cell(tokens=36, pixels=72)
    found.append(
        Effect(
            "connectors", "96 pixels instead of 72", "zero",
            (replace(middle, pixels=96),), (middle,), 1, "more pixels are better",
        )
    )  # fmt: skip
    return found


def _mix_effects() -> list[Effect]:
    captions, interleaved = Cell(mix=(100, 0, 0)), Cell(mix=(0, 100, 0))
    even = Cell(mix=(50, 50, 0))
    rows = (
        ("only captions instead of only interleaved", "zero", captions, interleaved, 1,
         "captions: better 0-shot"),
        ("half interleaved instead of none", "shots", even, captions, 1,
         "interleaved data is what few-shot needs"),
        ("half interleaved instead of none", "naming", even, captions, 1,
         "interleaved data is what few-shot needs"),
        ("a tenth of text instead of none", "facts", BASE, even, 1,
         "text keeps what the decoder knew"),
        ("a tenth of text instead of none", "zero", BASE, even, 0,
         "a little text costs little"),
        ("a tenth of text instead of none", "naming", BASE, even, 1,
         "text helps few-shot"),
        ("MM1.5's 50/10/40 instead of 45/45/10", "facts", Cell(mix=(50, 10, 40)), BASE,
         1, "MM1.5: more text, better text-only"),
    )  # fmt: skip
    return [
        Effect("mix", what, measure, (more,), (less,), expected, said)
        for what, measure, more, less, expected, said in rows
    ]


def _other_effects() -> list[Effect]:
    rows = [
        ("encoders", "regions instead of none (which has five times the rate)", "zero",
         BASE, Cell(encoder="none"), None, "no such run known to us"),
        ("encoders", "contrast (CLIP) instead of none (five times the rate)", "zero",
         Cell(encoder="global"), Cell(encoder="none"), None, "no such run known to us"),
        ("encoders", "contrast (CLIP) instead of reconstruction (AIM)", "zero",
         Cell(encoder="global"), Cell(encoder="reconstruction"), 0,
         "about equal; AIM is a little below at equal size"),
        ("encoders", "contrast (CLIP) instead of reconstruction (AIM)", "shots",
         Cell(encoder="global"), Cell(encoder="reconstruction"), 0,
         "about equal; AIM is a little below at equal size"),
        ("experts", "experts instead of dense, equal active size", "zero",
         Cell(decoder="experts"), BASE, 1, "experts are better"),
        ("experts", "experts instead of dense, equal active size", "shots",
         Cell(decoder="experts"), BASE, 1, "experts are better"),
        ("experts", "dense of the experts' whole size instead of dense", "zero",
         Cell(decoder="wide"), BASE, 1, "larger models are better"),
        ("parts", "all instead of a frozen encoder", "zero", BASE,
         Cell(trained="encoder frozen"), None, "trains all; no numbers known to us"),
        ("parts", "all instead of the connector only", "zero", BASE,
         Cell(trained="connector only"), None, "trains all; no numbers known to us"),
        ("parts", "all instead of the connector only", "facts", BASE,
         Cell(trained="connector only"), None, "trains all; no numbers known to us"),
    ]  # fmt: skip
    return [
        Effect(table, what, measure, (more,), (less,), expected, said)
        for table, what, measure, more, less, expected, said in rows
    ]


EFFECTS = (*_connector_effects(), *_mix_effects(), *_other_effects())
