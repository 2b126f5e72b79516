"""The runner of evaluate: what is asked, what fails, and going on after a stop."""

import json
from dataclasses import replace

import pytest
from evaluation_kit import COLOUR, exact, write_dataset

from helpers import need_tiny
from mm1_mlx import evaluate, load
from mm1_mlx.errors import DatasetError, MM1Error
from mm1_mlx.evaluation.choosing import choose_samples, source_of, with_wrong_images
from mm1_mlx.evaluation.few_shot import (
    Pool,
    Question,
    TaskShots,
    ask_alone,
    pool_of,
    usual_form,
)
from mm1_mlx.evaluation.how import How
from mm1_mlx.evaluation.runner import batches
from mm1_mlx.evaluation.samples import Sample, Task
from mm1_mlx.inputs.examples import Example

# --- a task for the small random model: prompts are numbers ------------------------


def numbers(count: int = 21, **changes) -> Task:
    """Prompts of different lengths; every third has a picture."""

    def read(where, split):
        for i in range(count):
            text = " ".join(str(5 + (7 * i + k) % 80) for k in range(1 + i % 5))
            yield Sample(
                id=f"{split}{i}",
                images=(i,) if i % 3 == 0 else (),
                question=f"<image> {text}" if i % 3 == 0 else text,
                answers=(str(i),),
                fields={"where": f"numbers:{i + 1}", **changes.pop("fields", {})},
            )

    given = {
        "name": "numbers",
        "summary": "",
        "read": read,
        "split": "val",
        "shot_split": "train",
        "prompt": lambda sample: sample.question,
        "shot_prompt": None,
        "target": lambda sample: sample.answers[0],
        "max_tokens": 6,
        "clean": lambda text, sample: text.strip(),
        "metric": exact,
        "needs_data": False,
    }
    return Task(**(given | changes))


def run(model, processor, task=None, **settings):
    settings = {"form": "chat", "batch_size": 4, **settings}
    return evaluate(model, processor, task or numbers(), **settings)


def test_each_answer_is_what_generate_gives_alone(model, processor):
    from mm1_mlx import generate

    result = run(model, processor)
    assert [r["id"] for r in result.records] == [f"val{i}" for i in range(21)]
    for sample, record in zip(result.samples, result.records, strict=True):
        images = list(sample.images) or None
        alone = generate(model, processor, sample.question, images, max_tokens=6)
        assert record["answer"] == alone.text
        assert record["tokens"] == alone.generation_tokens
        assert record["prompt"] == sample.question
        assert record["value"] == alone.text.strip()
        assert record["where"] == sample.fields["where"]


def test_the_score_is_the_metrics(model, processor):
    """An answer is right by hand: the first one is made the reference."""
    first = run(model, processor).records[0]["value"]
    task = numbers()
    made = list(task.read(None, "val"))
    made[0] = replace(made[0], answers=(first,))
    result = run(model, processor, replace(task, read=lambda w, s: iter(made)))
    assert [r["score"] for r in result.records] == [1.0] + [0.0] * 20
    assert result.score.total == pytest.approx(100 / 21)
    assert str(result) == "numbers 0-shot: 4.8 [0.0, 14.8], 21 samples"


def test_questions_of_a_length_go_together():
    from mm1_mlx.inference.asked import Asked

    asked = [
        Question(Sample(id=str(i)), Asked("p" * (i % 7), [None] * (i % 2)))
        for i in range(40)
    ]
    found = list(batches(asked, 4))
    assert sorted(int(a.sample.id) for some in found for a in some) == list(range(40))
    assert all(len(some) == 4 for some in found)
    mixed = [some for some in found if len({len(a.asked.images) for a in some}) > 1]
    assert not mixed
    lengths = [len(a.asked.prompt) for some in found[:5] for a in some]
    assert lengths == sorted(lengths)


def test_the_pretraining_form_ends_and_cleans_its_answers_its_own_way(tmp_path):
    """Of a processor that reads text; the two forms give other stops and values."""
    from mm1_mlx.evaluation.runner import _generation

    task = numbers(stop=("a",), shot_stop=("b",), settings={"kv_bits": 8})
    chat, raw = (_generation(task, How(form=form), {}) for form in ("chat", "pretrain"))
    assert chat == {"max_tokens": 6, "seed": 0, "stop": ["a"], "kv_bits": 8}
    assert raw["stop"] == ["b", "\n"] and raw["use_template"] is False
    plain = _generation(replace(task, stop=(), settings={}), How(), {"temp": 0.5})
    assert plain == {"max_tokens": 6, "seed": 0, "temp": 0.5}

    need_tiny()
    model, processor = load("mm1-tiny")
    data = write_dataset(tmp_path, 2)
    task = replace(COLOUR, shot_clean=lambda text, sample: "cleaned")
    for form, value in (("chat", "red"), ("pretrain", "cleaned")):
        result = evaluate(model, processor, task, data=data, form=form, shots=2)
        assert result.records[0]["value"] == value
        prompt = result.records[0]["prompt"]
        assert isinstance(prompt, str) is (form == "pretrain")


# --- which samples ------------------------------------------------------------------


def test_a_limit_draws_with_the_seed_and_fewer_are_among_more():
    task = numbers(100)
    ids = [[s.id for s in choose_samples(task, "", n, 5)] for n in (10, 30)]
    assert len(ids[0]) == 10 and set(ids[0]) < set(ids[1])
    assert ids[0] != [f"val{i}" for i in range(10)]  # not merely the first
    places = [int(name[3:]) for name in ids[1]]
    assert places == sorted(places)
    assert ids[0] == [s.id for s in choose_samples(task, "", 10, 5)]
    assert ids[0] != [s.id for s in choose_samples(task, "", 10, 6)]
    first = choose_samples(replace(task, shuffled=True), "", 3, 5)
    assert [s.id for s in first] == ["val0", "val1", "val2"]
    assert len(choose_samples(task, "", 1000, 5)) == 100


def test_a_limit_does_not_part_pairs():
    made = [Sample(id=str(i), fields={"pair": i // 2}) for i in range(40)]
    task = numbers(read=lambda where, split: iter(made))
    chosen = choose_samples(task, "", 7, 0)
    assert len(chosen) == 8
    pairs = [s.fields["pair"] for s in chosen]
    assert all(pairs.count(pair) == 2 for pair in pairs)


def test_what_samples_are_refused(tmp_path):
    same = [Sample(id="a", fields={"where": f"a.json:{i}"}) for i in (3, 9)]
    task = numbers(read=lambda where, split: iter(same))
    with pytest.raises(DatasetError, match=r"id 'a' \(a\.json:3 and a\.json:9\)"):
        choose_samples(task, "", None, 0)
    none = numbers(read=lambda where, split: iter([]))
    with pytest.raises(DatasetError, match="folder has no samples of 'val'"):
        choose_samples(none, "folder", None, 0)
    with pytest.raises(DatasetError, match=r"colour has no usual place .*--data"):
        source_of(COLOUR, None)
    assert source_of(replace(COLOUR, hub="org/set"), None) == "org/set"
    assert source_of(COLOUR, str(tmp_path)) == tmp_path
    assert source_of(COLOUR, "org/other") == "org/other"
    with pytest.raises(DatasetError, match=r"--data /absent/x is not there"):
        source_of(COLOUR, "/absent/x")
    (tmp_path / "file").touch()  # the reader knows whether a file will do
    assert source_of(COLOUR, tmp_path / "file") == tmp_path / "file"
    assert source_of(COLOUR, "org/set@v2") == "org/set@v2"
    with pytest.raises(DatasetError, match=r"--data \./absent is not there"):
        source_of(COLOUR, "./absent")


def test_wrong_pictures_are_a_neighbours_other_ones():
    """By hand: the same picture twice is passed over, and none stays none."""
    pictures = ("a.png", "a.png", "b.png", None, "c.png")
    samples = [
        Sample(id=str(i), images=() if p is None else (p,))
        for i, p in enumerate(pictures)
    ]
    found = with_wrong_images(samples)
    assert [s.images for s in found] == [
        ("b.png",),
        ("b.png",),
        ("c.png",),
        (),
        ("a.png",),
    ]
    own = Sample(id="x", images=("a.png",), fields={"wrong_images": ("z.png",)})
    assert with_wrong_images([own, own])[0].images == ("z.png",)
    assert with_wrong_images(samples[:2])[0].images == ("a.png",)  # there is no other


# --- few-shot prompts ---------------------------------------------------------------


class Chat:
    """A processor as far as prompts need one."""

    chat_template = "llava-v1"

    class tokenizer:
        marks = {"</s>": 2}  # noqa: RUF012


def shot(name: str, colour: str) -> Sample:
    return Sample(
        id=name, images=(f"{name}.png",), question="Which?", answers=(colour,)
    )


def ask(task, query, shots, form, processor):
    """A question behind these shots."""
    how = How(len(shots), shot_choice="first", form=form)
    if not shots:
        return ask_alone(task, query, form, processor)
    examples = [Example(s.images, "", "", None, i) for i, s in enumerate(shots, 1)]
    pool = Pool(list(shots), examples, False)
    return TaskShots(task, pool, how, processor).before(query)


def test_the_pretraining_form_is_a_line_for_each_shot():
    shots = [shot("a", "red"), shot("b", "blue</s>")]
    asked = ask(COLOUR, shot("q", "?"), shots, "pretrain", Chat)
    assert asked.prompt.replace("\ufdd0", "") == (
        "<image>Question: Which? Answer: red\n"
        "<image>Question: Which? Answer: blue</s>\n"
        "<image>Question: Which? Answer:"
    )
    assert "</s>" not in asked.prompt  # of a dataset's text no mark is made
    assert asked.images == ["a.png", "b.png", "q.png"]
    alone = ask(COLOUR, shot("q", "?"), [], "pretrain", Chat)
    assert alone.prompt == "<image>Question: Which? Answer:"
    bare = replace(COLOUR, shot_prompt=lambda sample: "A photo of")
    marked = ask(bare, shot("q", "?"), [shot("a", "a cat")], "pretrain", Chat)
    assert marked.prompt == "<image>A photo of a cat\n<image>A photo of"


def test_the_chat_form_makes_earlier_turns_of_shots():
    asked = ask(COLOUR, shot("q", "?"), [shot("a", "red")], "chat", Chat)
    assert asked.prompt == [
        {"role": "user", "content": "<image>Which?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "<image>Which?"},
    ]  # what stands between them the template writes
    assert asked.images == ["a.png", "q.png"]
    assert ask(COLOUR, shot("q", "?"), [], "chat", Chat).prompt == "Which?"
    turns = [{"role": "user", "content": "<image> Hm?"}]
    talk = replace(COLOUR, prompt=lambda sample: turns)
    assert ask(talk, shot("q", "?"), [], "chat", Chat).prompt == turns
    with pytest.raises(DatasetError, match="sample q is a conversation"):
        ask(replace(talk, shot_prompt=None), shot("q", "?"), [], "pretrain", Chat)


def test_the_usual_form_is_the_models():
    class Plain:
        chat_template = None

    assert usual_form(Chat) == "chat"
    assert usual_form(Plain) == "pretrain"


def test_shots_are_the_seeds_and_fewer_are_the_first_of_more():
    task = numbers(50)
    one, two = (Sample(id=name, question="50") for name in ("val0", "val1"))

    def shown(query, k, seed, **how):
        how = How(k, seed, **how)
        shots = TaskShots(task, pool_of(task, "", how), how, Chat)
        return [shots.label(s.number) for s in shots.before(query).shots]

    few, more = (shown(one, k, 3) for k in (4, 8))
    assert few == more[:4] and len(set(more)) == 8
    assert all(name.startswith("train") for name in more)
    assert few == shown(two, 4, 3)  # the same for all
    assert few != shown(one, 4, 4)
    each = [shown(query, 4, 3, same_shots=False) for query in (one, one, two)]
    assert each[0] == each[1] != each[2]


def test_a_question_is_never_its_own_shot():
    task = numbers(9, shot_split="val")
    how = How(8)
    shots = TaskShots(task, pool_of(task, "", how), how, Chat)
    for sample in task.read("", "val"):
        shown = [shots.label(s.number) for s in shots.before(sample).shots]
        assert sample.id not in shown and len(shown) == 8


def test_the_same_id_in_another_split_is_another_sample():
    """Rows are counted in each split: the same shots stand before all questions."""

    def read(where, split):
        for sample in numbers(9).read(where, split):
            yield replace(sample, id=sample.id.removeprefix(split))

    task, how = numbers(9, read=read), How(4)
    shots = TaskShots(task, pool_of(task, "", how), how, Chat)
    shown = [
        tuple(s.number for s in shots.before(sample).shots)
        for sample in task.read("", "val")
    ]
    assert len(set(shown)) == 1


def test_what_shots_are_refused():
    with pytest.raises(DatasetError, match="has 9 samples, but 9 shots and one to"):
        pool_of(numbers(9), "", How(9))
    with pytest.raises(DatasetError, match=r"numbers has no few-shot form.*--shots 0"):
        pool_of(numbers(shot_split=None), "", How(1))


def test_shots_that_all_share_are_computed_once(model, processor, monkeypatch):
    """The tokens before the questions are read by the first batch alone."""
    from mm1_mlx.evaluation import runner

    responses = []

    def spy(*args, **settings):
        found = runner_generate(*args, **settings)
        responses.extend(found)
        return found

    runner_generate = runner.batch_generate
    monkeypatch.setattr(runner, "batch_generate", spy)
    task = numbers(9)
    how = How(16)
    shots = TaskShots(task, pool_of(numbers(40), "", how), how, processor)
    words = " ".join(f"{s.prompt} {s.answer}" for s in shots.choose()).split()
    shared = 1 + len(words) + 3 * words.count("<image>")
    task = replace(
        task,
        read=lambda w, s: numbers(40 if s == "train" else 9).read(w, s),
    )
    result = run(model, processor, task, shots=16, max_tokens=2)
    assert shared > 64 and len(responses) == 9
    # The rows of a batch begin in one column: a shorter one reads some tokens again,
    # at most those by which questions differ. The first row of all reads every one.
    least = shared - 8
    assert [r.reused_tokens >= least for r in responses] == [False] + 8 * [True]
    without = run(model, processor, task, shots=16, max_tokens=2, reuse=False)
    assert result.records == without.records


# --- what fails ---------------------------------------------------------------------


def too_long(places, count=9) -> Task:
    task = numbers(count)
    made = list(task.read("", "val"))
    for place in places:
        made[place] = replace(made[place], images=(), question="7 " * 600)
    return replace(task, read=lambda where, split: iter(made))


def test_a_sample_that_cannot_be_asked_is_recorded_and_the_others_are_asked(
    model, processor
):
    result = run(model, processor, too_long([2, 5]))
    whole = run(model, processor, numbers(9))
    assert [r["id"] for r in result.failed] == ["val2", "val5"]
    for place, (record, usual) in enumerate(
        zip(result.records, whole.records, strict=True)
    ):
        if place in (2, 5):
            assert record["answer"] == "" and record["score"] == 0.0
            assert "601 tokens, but the model's context has 512" in record["error"]
            assert record["where"] == f"numbers:{place + 1}"
        else:
            assert record == usual
    assert str(result).endswith("9 samples, 2 of them could not be asked")


def test_where_none_can_be_asked_it_says_why(model, processor, tmp_path):
    with pytest.raises(DatasetError, match=r"not one of 9 samples.*val0: .*601 tokens"):
        run(model, processor, too_long(range(9)), output=tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"form": "text"}, "form is 'text', but must be chat or pretrain"),
        ({"batch_size": 0}, "batch_size is 0, but must be a whole number of 1"),
        ({"shots": -1}, "shots is -1, but must be a whole number of 0"),
        ({"limit": 2.5}, "limit is 2.5, but must be"),
        ({"temp": -1}, "temp"),
    ],
)
def test_wrong_settings(model, processor, settings, message):
    with pytest.raises(MM1Error, match=message):
        run(model, processor, **settings)
    with pytest.raises(TypeError, match="unknown settings"):
        run(model, processor, warmth=1)


# --- pictures -----------------------------------------------------------------------


def test_pictures_are_named_or_kept_small(tmp_path):
    import numpy as np
    from PIL import Image

    from mm1_mlx.evaluation.references import reference

    write_dataset(tmp_path / "data", 1, 0)
    path = tmp_path / "data" / "val0.png"
    out = tmp_path / "out"
    out.mkdir()
    assert reference(path, out) == {"path": str(path)}
    data = path.read_bytes()
    kept = reference(data, out)
    import hashlib

    assert kept["sha256"] == hashlib.sha256(data).hexdigest()
    with Image.open(out / kept["copy"]) as small, Image.open(path) as own:
        assert np.array_equal(np.asarray(small.convert("RGB")), np.asarray(own))
    large = Image.new("RGB", (900, 300), "red")
    found = reference(large, out)
    with Image.open(out / found["copy"]) as small:
        assert small.size == (256, 85)
    assert reference(large, out) == found  # once
    assert len(list((out / "pictures").iterdir())) == 2
    assert "copy" not in reference(data, None)
    assert "no picture" in reference(b"", None)["broken"]


def test_the_journal_is_json_for_others(model, processor, tmp_path):
    run(model, processor, numbers(5), output=tmp_path)
    text = (tmp_path / "numbers-0shot.jsonl").read_text()
    header, *records = map(json.loads, text.splitlines())
    assert header["settings"]["task"] == "numbers"
    assert {"id", "images", "prompt", "answer", "value", "score"} <= set(records[0])
