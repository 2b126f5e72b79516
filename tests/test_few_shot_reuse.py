"""Examples before a question: the same tokens with less work."""

import pytest
from small import DENSE, SPARSE, SmallProcessor, small_model
from test_reuse import Work

from mm1_mlx import FewShot, Reuse, batch_generate, generate
from mm1_mlx.inference.generation import stream_generate

# Of SmallProcessor: words are tokens, a picture is four; images are numbers.
SMALL = [
    {"image": 1, "prompt": "5 17", "answer": "33"},
    {"image": 2, "prompt": "8 20 41", "answer": "7"},
    {"image": 3, "prompt": "12", "answer": "9 30"},
]
TEMPLATE = "{image} {prompt} {answer}"
IN_FRONT = (
    1 + (4 + 2 + 1) + (4 + 3 + 1) + (4 + 1 + 2)
)  # the first token, and three shots
QUERIES = [("50 51", 7), ("60 61 62 63", 8), ("70", 9), ("80 81", 7)]
SHORT = {"max_tokens": 12}


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


def by_hand(prompt: str) -> str:
    lines = [f"<image> {s['prompt']} {s['answer']}" for s in SMALL]
    return "\n".join([*lines, f"<image> {prompt}"])


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
@pytest.mark.parametrize("settings", [{}, {"kv_bits": 8}, {"lookup": 2}], ids=str)
def test_shots_are_read_once_for_many_questions(text, settings, work):
    model, processor = small_model(text), SmallProcessor()
    shots = FewShot(SMALL, template=TEMPLATE)
    for i, (prompt, image) in enumerate(QUERIES):
        given = {**SHORT, **settings}
        work.since()
        found = generate(model, processor, prompt, [image], shots=shots, **given)
        pictures, tokens = work.since()
        again = generate(
            model, processor, by_hand(prompt), [1, 2, 3, image],
            reuse=False, stop="\n", **given,
        )  # fmt: skip
        assert found.token_ids == again.token_ids
        assert found.prompt_tokens == IN_FRONT + 4 + len(prompt.split())
        assert found.shots == (1, 2, 3)
        assert (found.num_images, found.shot_images) == (4, 3)
        if i == 0:
            assert pictures == 4 and found.reused_tokens == 0
        elif image == 7 and i == 3:  # its picture was asked about before
            assert pictures == 0 and found.reused_tokens == IN_FRONT + 4
        else:
            assert pictures == 1 and found.reused_tokens == IN_FRONT
            if "kv_bits" not in settings:
                assert tokens == found.prompt_tokens - IN_FRONT


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
def test_shots_are_read_once_for_a_batch(text, work):
    model, processor = small_model(text), SmallProcessor()
    shots = FewShot(SMALL * 2, template=TEMPLATE)  # long enough to be read apart
    front = 1 + 2 * (IN_FRONT - 1)
    prompts, images = [p for p, _ in QUERIES], [[i] for _, i in QUERIES]
    work.since()
    found = batch_generate(model, processor, prompts, images, shots=shots, **SHORT)
    pictures, tokens = work.since()
    assert (
        pictures == 3 + 3
    )  # of the shots, which are there twice, and of the questions
    longest = max(each.prompt_tokens for each in found)
    assert tokens == front + len(QUERIES) * (longest - front)
    # Rows end together: a shorter one is read from as many columns before its end.
    others = [front - (longest - each.prompt_tokens) for each in found[1:]]
    assert [each.reused_tokens for each in found] == [0, *others]
    for each, prompt, image in zip(found, prompts, images, strict=True):
        alone = generate(
            model, processor, prompt, image, shots=shots, reuse=False, **SHORT
        )
        assert each.token_ids == alone.token_ids
        assert each.shots == (1, 2, 3, 4, 5, 6)


def test_a_later_batch_reads_no_shots(work):
    model, processor = small_model(SPARSE), SmallProcessor()
    shots, store = FewShot(SMALL, template=TEMPLATE), Reuse()
    prompts, images = ["50 51", "60"], [[7], [8]]
    given = {"shots": shots, "reuse": store, **SHORT}
    batch_generate(model, processor, prompts, images, **given)
    work.since()
    found = batch_generate(model, processor, ["70 71", "72 73"], [[9], [10]], **given)
    assert [each.reused_tokens for each in found] == [IN_FRONT] * 2
    assert work.since() == (2, 2 * (4 + 2))


def test_a_stream_has_shots_too():
    model, processor = small_model(), SmallProcessor()
    shots = FewShot(SMALL, template=TEMPLATE)
    pieces = list(stream_generate(model, processor, "50", [7], shots=shots, **SHORT))
    whole = generate(model, processor, "50", [7], shots=shots, **SHORT)
    assert [t for piece in pieces for t in piece.token_ids] == list(whole.token_ids)


def test_the_separator_ends_an_answer():
    model = small_model()
    first = generate(model, SmallProcessor(), by_hand("50"), [1, 2, 3, 7], **SHORT)
    words = {first.token_ids[2]: "\n"}
    shots = FewShot(SMALL, template=TEMPLATE)
    found = generate(model, SmallProcessor(words), "50", [7], shots=shots, **SHORT)
    assert found.token_ids == first.token_ids[:3]
    assert found.finish_reason == "stop" and "\n" not in found.text


def test_reasoning_and_answer_of_a_response():
    model = small_model()
    reasoned = [shot | {"reasoning": "4"} for shot in SMALL]
    settings = {"template": "{image} {prompt} {reasoning} 6 {answer}"}
    lines = [f"<image> {s['prompt']} 4 6 {s['answer']}" for s in SMALL]
    text = "\n".join([*lines, "<image> 50"])
    ids = generate(model, SmallProcessor(), text, [1, 2, 3, 7], **SHORT).token_ids
    processor = SmallProcessor({ids[2]: "6 "})
    shots = FewShot(reasoned, **settings)
    found = generate(model, processor, "50", [7], shots=shots, **SHORT)
    assert found.token_ids == ids
    reasoning, answer = found.text.rsplit("6", 1)
    assert (found.reasoning, found.answer) == (reasoning.strip(), answer.strip())
    (same,) = batch_generate(model, processor, ["50"], [[7]], shots=shots, **SHORT)
    assert (same.reasoning, same.answer) == (found.reasoning, found.answer)
