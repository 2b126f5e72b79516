"""Documents in rows: tokens, who sees whom, targets, and equality with one alone."""

import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import IMAGE, MOE, SPARSE, random_array, small_model
from small_tokenizers import write_llama, write_tiny
from training_kit import encode

from helpers import assert_close
from mm1_mlx.errors import DatasetError
from mm1_mlx.models.router_losses import load_balance_loss
from mm1_mlx.training.documents import Document, Text
from mm1_mlx.training.packing import (
    Batch,
    DocumentEncoder,
    DocumentMixer,
    Marks,
    Row,
    collate,
    distinct,
    fill_row,
    may_see,
)

BOS, EOS, PAD, USER, ASSISTANT = 1, 2, 0, 5, 6
A, B, X, Y, Z = map(ord, "abxyz")
MARKS = Marks(bos=BOS, eos=EOS, pad=PAD, image=IMAGE, tokens_per_image=2)
HALF = 2**-0.5


@pytest.fixture
def to_tokens() -> DocumentEncoder:
    return DocumentEncoder(encode, MARKS)


def asked(*answers: str, image: bool = True) -> Document:
    """One picture (or none), and a branch a<assistant>ANSWER for each answer."""
    branches = [[Text("a<assistant>"), Text(answer, True)] for answer in answers]
    context = [Text("<user><image>" if image else "<user>")]
    return Document("caption", ["picture"] * image, context, branches)


# --- tokens --------------------------------------------------------------------------


def test_tokens_of_two_questions_about_one_picture(to_tokens):
    tokens = to_tokens(asked("x", "yz"), 100)

    assert tokens.ids == [
        *(BOS, USER, IMAGE, IMAGE),
        *(A, ASSISTANT, X, EOS),
        *(A, ASSISTANT, Y, Z, EOS),
    ]
    assert tokens.branch == [0] * 4 + [1] * 4 + [2] * 5
    assert tokens.position == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8]
    third = 3**-0.5
    expected = [0] * 6 + [HALF] * 2 + [0, 0] + [third] * 3
    assert tokens.weight == pytest.approx(expected)
    assert tokens.images == ["picture"]


def test_image_tokens_that_are_left_out_leave_positions_as_they_are(to_tokens):
    document = asked("x")
    document.images = ["one", "two"]
    document.context = [Text("<user><image>a<image>")]
    document.kept = [[1], None]
    tokens = to_tokens(document, 100)
    # two tokens a picture: the first one's first is not read
    assert tokens.ids == [BOS, USER, IMAGE, A, IMAGE, IMAGE, A, ASSISTANT, X, EOS]
    assert tokens.position == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert tokens.branch == [0] * 6 + [1] * 4
    assert tokens.kept == [[1], None]
    row = Row([tokens])
    batch = collate([row], 12, PAD, targets=2)
    assert batch.kept == [[1], None] and batch.source.tolist() == [7, 8]
    assert [p.text for p in document.branches[0]] == ["a<assistant>", "x"]


def test_what_is_left_out_makes_room(to_tokens):
    document = asked("x")
    to_tokens(document, 8)
    with pytest.raises(DatasetError):
        to_tokens(document, 7)
    document.kept = [[0]]
    assert len(to_tokens(document, 7).ids) == 7


def test_an_end_mark_follows_each_turn_and_nothing_else(to_tokens):
    turns = [
        Text("<user>a<assistant>"),
        Text("x", True),
        Text("<user>b<assistant>"),
        Text("y", True),
    ]
    whole = to_tokens(Document("text", [], turns[:3], [turns[3:]]), 100)
    expected = [BOS, USER, A, ASSISTANT, X, EOS, USER, B, ASSISTANT, Y, EOS]
    assert whole.ids == expected
    # The same when the second turn starts the branch.
    split = to_tokens(Document("text", [], turns[:2], [turns[2:]]), 100)
    assert split.ids == expected
    # A learned text that goes on is not a turn's end.
    lines = [Text("x", True), Text("y", True)]
    assert to_tokens(Document("text", [], lines[:1], [lines[1:]]), 99).ids == [
        *(BOS, X, Y, EOS)
    ]


def test_pictures_are_never_targets(to_tokens):
    pieces = [Text("x", True), Text("<image>"), Text("y", True)]
    tokens = to_tokens(Document("caption", ["p"], pieces[:2], [pieces[2:]]), 100)
    assert tokens.ids == [BOS, X, IMAGE, IMAGE, Y, EOS]
    assert tokens.weight == pytest.approx([0, 1, 0, 0, HALF, HALF])


def test_branches_that_do_not_fit_are_left_out(to_tokens):
    document = asked("x" * 50, "y", "z")
    document.tasks = ["long", "second", "third"]
    tokens = to_tokens(document, 12)
    assert tokens.tasks == ["second", "third"]
    assert tokens.ids[4:] == [A, ASSISTANT, Y, EOS, A, ASSISTANT, Z, EOS]
    assert tokens.position[4:] == [4, 5, 6, 7] * 2
    assert to_tokens(document, 11).tasks == ["second"]


def test_a_picture_is_never_cut(to_tokens):
    with pytest.raises(DatasetError, match=r"caption .* more than 7 tokens \(4 before"):
        to_tokens(asked("x"), 7)


@pytest.mark.parametrize("write", [write_tiny, write_llama])
def test_a_document_has_the_tokens_of_the_prompt_that_asks_it(tmp_path, write):
    """What was learned and what is asked later must be the same ids."""
    from mm1_mlx.inputs.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(write(tmp_path))
    marks = Marks(bos=1, eos=2, pad=0, image=400, tokens_per_image=1)
    to_tokens = DocumentEncoder(tokenizer.encode, marks)
    first, second, answer = "What colour is the star?", " Where is it?", "at the top"
    document = Document("text", [], [Text(first)], [[Text(second), Text(answer, True)]])
    ids = to_tokens(document, 1000).ids
    apart = tokenizer.encode(second, place="middle")
    assert ids[: -len(tokenizer.encode(answer, place="middle")) - 1] == [
        *(1, *tokenizer.encode(first), *apart)
    ]
    assert tokenizer.decode(ids) == first + second + answer


# --- who sees whom -------------------------------------------------------------------


def test_the_mask_by_hand():
    #                     context | 1  1 | 2 | next document, padding
    document = np.array([[0, 0, 0, 0, 0, 1, 1, -1]])
    branch = np.array([[0, 0, 1, 1, 2, 0, 1, 0]])

    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    mask = may_see(document, branch)
    assert mask.shape == (1, 1, 8, 8) and mask.dtype == bool
    assert mask[0, 0].astype(int).tolist() == expected
    same = may_see(mx.array(document), mx.array(branch), mx)
    assert same.dtype == mx.bool_ and same.tolist() == mask.tolist()


def test_targets_point_to_the_states_that_predict_them(to_tokens):
    document = asked("x", "yz")
    document.branches = [[Text("x", True)], [Text("yz", True)]]  # answers at once
    row = Row([to_tokens(asked("x"), 100), to_tokens(document, 100)])
    batch = collate([Row([]), row], length=24, pad=PAD, targets=8)

    # Row 1 starts at 24. The first document has 8 tokens: its x is token 6. The second
    # starts at 32 with a context of 4: x and y are both predicted by token 35.
    assert batch.target.tolist() == [X, EOS, X, EOS, Y, Z, EOS, 0]
    assert batch.source.tolist() == [29, 30, 35, 36, 35, 38, 39, 0]
    third = 3**-0.5
    weights = [HALF, HALF, HALF, HALF, third, third, third, 0]
    assert batch.weight.tolist() == pytest.approx(weights)
    assert batch.documents == 2 and len(batch.images) == 2
    assert batch.document[0].tolist() == [-1] * 24
    assert batch.document[1].tolist() == [0] * 8 + [1] * 9 + [-1] * 7
    assert batch.ids[1, 17:].tolist() == [PAD] * 7


def logits_of(model, batch: Batch, pictures: mx.array) -> mx.array:
    """Logits at every target of a batch."""
    hidden = model.decoder.hidden(
        None,
        None,
        model.embed(mx.array(batch.ids), pictures),
        mask=may_see(mx.array(batch.document), mx.array(batch.branch), mx),
        positions=mx.array(batch.position),
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    count = int((batch.weight > 0).sum())
    return model.decoder.head(flat[mx.array(batch.source[:count])])


def documents_of_some_kinds() -> list[Document]:
    two = Document(
        "interleaved",
        [1, 2],
        [Text("<user><image>"), Text("x", True), Text("<user><image>a")],
        [[Text("b<assistant>"), Text("y", True)], [Text("zz", True)]],
    )
    text = Document("text", [], [Text("<user>")], [[Text("ab"), Text("xy", True)]])
    return [asked("x", "yz", "zzzz"), two, text]


@pytest.mark.parametrize("training", [False, True])
def test_a_packed_document_has_the_logits_that_it_has_alone(training):
    model = small_model(SPARSE)
    model.train(training)  # training has its own attention on the CPU
    to_tokens = DocumentEncoder(encode_small, MARKS4)
    parts = [to_tokens(d, 100) for d in documents_of_some_kinds()]
    pictures = random_array(3, 16, 16, 3)
    rows = [Row(parts[:2]), Row(parts[2:])]
    packed = logits_of(model, collate(rows, 80, PAD), pictures)

    alone = []
    for part, own in zip(parts, (pictures[:1], pictures[1:], None), strict=True):
        batch = collate([Row([part])], len(part.ids), PAD)
        alone.append(logits_of(model, batch, own))

    # float32; sums of up to 80 terms in another order
    assert_close(packed, mx.concatenate(alone), atol=1e-5)


def test_a_branch_is_what_its_prompt_alone_would_be():
    """Each branch as a sequence of its own, without any mask but the causal one."""
    model = small_model(SPARSE)
    to_tokens = DocumentEncoder(encode_small, MARKS4)
    document = asked("x", "yz", "zzzz")
    picture = random_array(1, 16, 16, 3)
    packed = logits_of(
        model, collate([Row([to_tokens(document, 100)])], 60, PAD), picture
    )

    alone = []
    for branch in document.branches:
        one = Document("caption", ["p"], document.context, [branch])
        tokens = to_tokens(one, 100)
        logits = model(mx.array([tokens.ids]), picture)[0]
        learned = [j - 1 for j, w in enumerate(tokens.weight) if w]
        alone.append(logits[mx.array(learned)])
    assert_close(packed, mx.concatenate(alone), atol=1e-5)


def encode_small(text: str, place: str = "start") -> list[int]:
    """`encode` with ids below the 90 of the small model."""
    return [i if i < 90 else i - 60 for i in encode(text)]


MARKS4 = Marks(bos=BOS, eos=EOS, pad=PAD, image=IMAGE, tokens_per_image=4)


def test_the_gradient_of_a_row_is_the_sum_of_its_documents():
    model = small_model(SPARSE)
    to_tokens = DocumentEncoder(encode_small, MARKS4)
    parts = [to_tokens(d, 100) for d in documents_of_some_kinds()]
    pictures = random_array(3, 16, 16, 3)

    def gradient(rows, length, shots):
        batch = collate(rows, length, PAD)
        count = int((batch.weight > 0).sum())
        targets, weights = (mx.array(a[:count]) for a in (batch.target, batch.weight))

        def loss(weight):
            model.decoder.layers[0].attn.qkv_proj.weight = weight
            logits = logits_of(model, batch, shots)
            picked = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            return (weights * (mx.logsumexp(logits, axis=1) - picked)).sum()

        return mx.grad(loss)(start)

    start = model.decoder.layers[0].attn.qkv_proj.weight
    packed = gradient([Row(parts)], 80, pictures)
    shots = (pictures[:1], pictures[1:], None)
    apart = [
        gradient([Row([part])], len(part.ids), own)
        for part, own in zip(parts, shots, strict=True)
    ]
    # gradients reach 2; float32 sums in another order
    assert_close(packed, sum(apart[1:], apart[0]), atol=2e-5)


def test_padding_is_not_counted_by_the_router_losses():
    logits = random_array(6, MOE.num_local_experts)
    is_token = mx.array([True, True, True, True, False, False])
    assert_close(
        load_balance_loss(logits, is_token), load_balance_loss(logits[:4]), atol=1e-6
    )


# --- rows ----------------------------------------------------------------------------


def test_a_row_is_filled_until_a_document_does_not_fit(to_tokens):
    drawn = iter([asked("x"), asked("y"), asked("zzzz"), asked("x")])
    row = fill_row(lambda: next(drawn), to_tokens, 26)
    assert [len(part.ids) for part in row.parts] == [8, 8]  # 10 left, 11 needed
    assert next(drawn).branches[0][1].text == "x"
    assert row.length == 16 and len(row.images) == 2


def test_a_row_with_little_room_left_draws_no_more(to_tokens):
    assert to_tokens.smallest == 10
    drawn = iter([asked("x"), asked("y")])
    row = fill_row(lambda: next(drawn), to_tokens, 25)  # 9 left after the second
    assert len(row.parts) == 2


def test_documents_that_are_too_long_are_passed_over_for_a_while(to_tokens):
    long = asked("x" * 40)
    drawn = iter([long] * 19 + [asked("y")])
    assert len(fill_row(lambda: next(drawn), to_tokens, 12).parts) == 1
    with pytest.raises(DatasetError, match="Raise the row length"):
        fill_row(lambda: long, to_tokens, 12)


def made(rng, kind, progress):
    document = asked("x", image=kind != "text")
    document.kind = kind
    document.images = [rng.random() for _ in document.images]
    return document


@pytest.mark.parametrize("mix", [{"caption": 0.6, "text": 0.4}, {"caption": 1.0}])
def test_batches_have_one_shape_whatever_is_drawn(to_tokens, mix):
    mixer = DocumentMixer(made, mix)
    shapes = set()
    numbers = set()
    for seed in range(20):
        rng = random.Random(seed)
        rows = mixer.rows(rng, 4, 30, to_tokens, 1.0, max_images=7)
        images = sum(len(row.images) for row in rows)
        assert len(rows) == 4 and images <= 7
        batch = collate(rows, 30, PAD, targets=32)
        assert len(batch.images) == images
        numbers.add(images)
        shapes.add((batch.ids.shape, batch.source.shape, batch.target.shape))
    assert shapes == {((4, 30), (32,), (32,))}
    assert max(numbers) == 7 or "text" in mix


def test_a_row_has_one_kind_by_weight(to_tokens):
    mixer = DocumentMixer(made, {"caption": 0.45, "interleaved": 0.45, "text": 0.10})
    rng = random.Random(0)
    rows = mixer.rows(rng, 1000, 30, to_tokens, 1.0, max_images=10**6)
    without = sum(not row.images for row in rows)
    assert 70 < without < 130  # 100 expected, standard deviation 9.5
    assert all(len(row.images) in (0, len(row.parts)) for row in rows)


def test_rows_are_the_same_whatever_a_picture_takes():
    """Where pictures count as the same number of tokens."""

    def several(rng, kind, progress):
        answers = ["x" * rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
        return replace(asked(*answers), images=[rng.random()])

    def rows(tokens, counts_as):
        marks = replace(MARKS, tokens_per_image=tokens, counts_as=counts_as)
        mixer = DocumentMixer(several, {"caption": 1.0})
        encoder = DocumentEncoder(encode, marks)
        found = mixer.rows(random.Random(0), 20, 40, encoder, 1.0, max_images=60)
        for row in found:
            real = sum(len(part.ids) for part in row.parts)
            more = (max(counts_as, tokens) - tokens) * len(row.images)
            assert real + more == row.length <= 40
        return [[(p.images, len(p.tasks)) for p in row.parts] for row in found]

    assert rows(2, 9) == rows(5, 9) == rows(9, 0)
    assert rows(2, 0) != rows(9, 0)


def test_glances_count_as_they_are(to_tokens):
    """What is read of a picture is the same, whatever whole ones count as."""
    glanced = replace(asked("x"), kept=[[0]])
    marks = replace(MARKS, counts_as=9)
    assert DocumentEncoder(encode, marks)(glanced, 40).length == 7
    assert to_tokens(glanced, 40).length == 7


def test_a_picture_in_two_documents_is_one_picture():
    a, b = [1], [1]  # equal, but not the same
    assert distinct([a, b, a, a, b]) == ([0, 1], [0, 1, 0, 0, 1])
    assert distinct([]) == ([], [])


def test_room_is_for_different_pictures(to_tokens):
    shared = object()

    def same(rng, kind, progress):
        return replace(asked("x"), images=[shared])

    mixer = DocumentMixer(same, {"caption": 1.0})
    rows = mixer.rows(random.Random(0), 4, 30, to_tokens, 1.0, max_images=1)
    assert sum(len(row.images) for row in rows) == 12  # three in each row


def test_the_same_generator_gives_the_same_rows(to_tokens):
    mixer = DocumentMixer(made, {"caption": 0.5, "text": 0.5})

    def ids(seed):
        rows = mixer.rows(random.Random(seed), 8, 30, to_tokens, 1.0, max_images=5)
        batch = collate(rows, 30, PAD)
        return batch.ids.tolist(), batch.images

    assert ids(1) == ids(1) != ids(2)
