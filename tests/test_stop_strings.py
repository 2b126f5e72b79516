"""Stop strings: where an answer is cut, and what is held back until it is sure."""

import pytest
from small import SmallProcessor

from mm1_mlx.inference.generation import batch_generate, generate, stream_generate
from mm1_mlx.inference.text import StopText


@pytest.mark.parametrize("cut", range(1, 8))
@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["x", "thr", " t"], "one"),
        ("aaab", ["aab"], "a"),  # a held-back text that turns out to be text
        ("no stop here", ["stops"], "no stop here"),
        ("end sto", ["stop"], "end sto"),  # held back until the end
        ("xaby", ["ab", "xaby"], "x"),  # the one that ends first
        ("xxaby", ["aby", "xaby"], "x"),  # both end together: the longer
        ("stop", ["stop"], ""),
        ("füße", ["ß"], "fü"),
    ],
)
def test_stop_strings_are_cut_exactly_wherever_tokens_end(text, stops, expected, cut):
    stop = StopText(stops)
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    found = "".join(stop.push(piece) for piece in pieces)
    if not stop.found:
        found += stop.flush()
    assert found == expected
    assert stop.found == (expected != text)


def test_text_is_held_back_only_while_it_may_become_a_stop():
    stop = StopText(["END", "enough"])
    assert stop.push("ab") == "ab"
    assert stop.push("cE") == "c"
    assert stop.push("N") == ""
    assert stop.push("Gx") == "ENGx"


@pytest.fixture
def speller(model):
    """A processor that spells the first two tokens of "40 41" as hel|lo wor."""
    tokens = generate(model, SmallProcessor(), "40 41", max_tokens=2).token_ids
    assert tokens[0] != tokens[1], "choose another prompt"
    return SmallProcessor({tokens[0]: "hel", tokens[1]: "lo wor"})


@pytest.mark.parametrize(
    "stop, text", [("lo w", "hel"), ("o", "hell"), (["zz", "el"], "h"), ("h", "")]
)
def test_answer_ends_before_the_stop_string(model, speller, stop, text):
    full = generate(model, speller, "40 41", max_tokens=12)
    assert full.text.startswith("hello wor")
    found = generate(model, speller, "40 41", max_tokens=12, stop=stop)
    assert (found.text, found.finish_reason) == (text, "stop")
    (row,) = batch_generate(model, speller, ["40 41"], max_tokens=12, stop=stop)
    assert (row.text, row.token_ids) == (text, found.token_ids)


def test_pieces_hold_back_what_may_become_a_stop_string(model, speller):
    stream = stream_generate(model, speller, "40 41", max_tokens=12, stop="lo w")
    assert [piece.text for piece in stream] == ["he", "l"]


def test_text_held_back_is_given_when_the_answer_ends(model, speller):
    found = generate(model, speller, "40 41", max_tokens=2, stop="world")
    assert (found.text, found.finish_reason) == ("hello wor", "length")
