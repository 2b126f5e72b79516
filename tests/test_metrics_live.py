"""The same comparison as in test_metrics_parity.py on fresh strings, where the
references are installed: pip install pycocoevalcap anls inflection, and Java.

They are not part of the `parity` extra: pycocoevalcap is 100 MB, and what it says is
stored in tests/fixtures/metrics.
"""

import importlib.util
import random
import shutil

import numpy as np
import pytest
from odd_strings import PIECES, captions, odd

from helpers import assert_close
from mm1_mlx.evaluation import stemming
from mm1_mlx.evaluation.metrics.anls import anls_of_the_paper
from mm1_mlx.evaluation.metrics.cider import cider
from mm1_mlx.evaluation.metrics.ptb import tokenize

SEED = 20261123  # of no fixture


def installed(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"an optional reference: {name}")


@installed("pycocoevalcap")
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_words_are_those_of_stanfords_tokenizer():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [*odd(3000, SEED), *captions(3000, SEED), "the end"]
    named = {i: [{"caption": text}] for i, text in enumerate(texts)}
    expected = PTBTokenizer().tokenize(named)
    found = tokenize(texts)
    wrong = [
        (text, words, expected[i][0].split())
        for i, (text, words) in enumerate(zip(texts, found, strict=True))
        if words != expected[i][0].split()
    ]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:3]}"


@installed("pycocoevalcap")
def test_cider_of_the_same_words_is_the_scorers():
    from pycocoevalcap.cider.cider import Cider

    dice = random.Random(SEED)
    said, references = [], []
    for _ in range(400):
        words = dice.choices(PIECES[:60], k=dice.randint(0, 12))
        said.append(words)
        others = [dice.sample(words, len(words)) for _ in range(dice.randint(0, 4))]
        references.append([*others, words[: dice.randint(0, 12)]])
    total, each = Cider().compute_score(
        {i: [" ".join(w) for w in one] for i, one in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(said)},
    )
    found = cider(said, references)
    assert_close(np.array(found), each, atol=1e-9)  # of up to 10
    assert_close(np.mean(found), np.array(total), atol=1e-9)


@installed("anls")
def test_anls_is_the_packages():
    from anls import anls_score

    texts, dice = odd(600, SEED), random.Random(SEED)
    for text in texts:
        references = [*dice.choices(texts, k=3), text[dice.randint(0, 3) :]]
        found = anls_of_the_paper(text, references)
        assert found == pytest.approx(anls_score(text, references), abs=1e-12)


@installed("inflection")
def test_singulars_are_inflections():
    import inflection

    words = {piece.lower() for piece in PIECES if piece.isalpha()}
    words |= {inflection.pluralize(word) for word in words}
    wrong = [w for w in words if stemming.singular(w) != inflection.singularize(w)]
    assert not wrong
