"""Evaluations that are cut off go on where they were, and refuse what is not theirs."""

import pytest
from evaluation_kit import COLOUR, exact, write_dataset
from test_evaluate import numbers, run

from helpers import need_tiny
from mm1_mlx import load
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.choosing import choose_samples
from mm1_mlx.evaluation.few_shot import (
    TaskShots,
    pool_of,
)
from mm1_mlx.evaluation.how import How


class Stop(Exception):
    pass


def stopped_after(count):
    """A watch that ends the run when so many samples are done."""

    def watch(now):
        if now.done >= count:
            raise Stop

    return watch


def test_a_run_goes_on_where_it_was_cut_off(model, processor, tmp_path):
    """Cut at any byte of what was written by then, it gives the whole run's file."""
    run(model, processor, output=tmp_path / "whole")
    whole = (tmp_path / "whole" / "numbers-0shot.jsonl").read_bytes()
    with pytest.raises(Stop):
        run(model, processor, output=tmp_path / "part", watch=stopped_after(12))
    file = tmp_path / "part" / "numbers-0shot.jsonl"
    part = file.read_bytes()
    lines = part.splitlines(keepends=True)
    assert len(lines) == 1 + 12
    begins = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
    cuts = [0, 1, 25, begins[1], begins[1] + 5, begins[3], begins[5], begins[9] - 1]
    for cut in [*cuts, begins[-1] - 1, begins[-1]]:
        file.write_bytes(part[:cut])
        seen = []
        result = run(model, processor, output=file.parent, watch=seen.append)
        assert file.read_bytes() == whole, f"cut at byte {cut}"
        whole_batches = sum(cut >= begins[k] for k in (5, 9, 13))
        assert result.answered == 21 - 4 * whole_batches
        assert seen[0].done == seen[0].known == 4 * whole_batches
        assert seen[-1].done == seen[-1].total == 21


def test_a_finished_run_asks_nothing_again(model, processor, tmp_path):
    first = run(model, processor, output=tmp_path)
    file = tmp_path / "numbers-0shot.jsonl"
    before = file.read_bytes()
    again = run(model, processor, output=tmp_path)
    assert file.read_bytes() == before
    assert again.answered == 0 and again.score == first.score


def test_a_larger_limit_goes_on_with_a_smaller_one(model, processor, tmp_path):
    run(model, processor, numbers(40), limit=8, output=tmp_path)
    result = run(model, processor, numbers(40), limit=20, output=tmp_path)
    assert result.n == 20 and 12 <= result.answered < 20
    alone = run(model, processor, numbers(40), limit=20)
    assert result.records == alone.records
    fewer = run(model, processor, numbers(40), limit=8, output=tmp_path)
    assert fewer.answered == 0 and fewer.n == 8
    lines = (tmp_path / "numbers-0shot.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 20  # what is known stays


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"seed": 4}, r"seed \(0 there, 4 now\)"),
        ({"batch_size": 3}, r"batch_size \(4 there, 3 now\)"),
        ({"max_tokens": 7}, r"generation \(\{'max_tokens': 6\} there, "),
        ({"same_shots": False}, r"same_shots \(True there, False now\)"),
    ],
)
def test_other_settings_are_refused_and_named(
    model, processor, tmp_path, settings, named
):
    run(model, processor, numbers(5), output=tmp_path)
    file = tmp_path / "numbers-0shot.jsonl"
    before = file.read_bytes()
    with pytest.raises(DatasetError, match=f"begun with other settings: {named}"):
        run(model, processor, numbers(5), output=tmp_path, **settings)
    assert file.read_bytes() == before
    forced = run(model, processor, numbers(5), output=tmp_path, force=True, **settings)
    assert forced.answered == 5


def test_another_model_is_refused(model, processor, tmp_path):
    from small import small_model

    run(model, processor, numbers(5), output=tmp_path)
    with pytest.raises(DatasetError, match=r"has results of another model \("):
        run(small_model(seed=1), processor, numbers(5), output=tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(DatasetError, match=r"other settings: model \("):
        run(small_model(seed=1), processor, numbers(5), output=tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("chat_template", "llava-v1"),
        ("resolution", "native"),
        ("max_tiles", 3),
    ],
)
def test_another_way_to_read_is_refused(
    model, processor, tmp_path, monkeypatch, name, value
):
    """A mended template must not get the old one's answers."""
    run(model, processor, numbers(5), output=tmp_path)
    assert run(model, processor, numbers(5), output=tmp_path).answered == 0
    monkeypatch.setattr(processor, name, value, raising=False)
    with pytest.raises(DatasetError, match=r"other settings: processor \("):
        run(model, processor, numbers(5), output=tmp_path)


def test_with_wrong_pictures_the_limit_decides(model, processor, tmp_path):
    """The picture shown is that of another chosen sample."""
    run(model, processor, numbers(5), output=tmp_path, limit=2, wrong_images=True)
    with pytest.raises(DatasetError, match=r"other settings: limit \(2 there, 4 now\)"):
        run(model, processor, numbers(5), output=tmp_path, limit=4, wrong_images=True)


def test_other_prompts_are_refused(model, processor, tmp_path):
    run(model, processor, numbers(5), output=tmp_path)
    other = numbers(5, prompt=lambda sample: f"{sample.question} 9")
    with pytest.raises(DatasetError, match=r"prompt of sample val0 was another one"):
        run(model, processor, other, output=tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1}\n', "is not a file of this command"),
        ("not json\n", "line 1 is not a JSON object"),
        ("some text", "is not a file of this command"),
    ],
)
def test_a_foreign_file_is_not_overwritten(model, processor, tmp_path, text, message):
    file = tmp_path / "numbers-0shot.jsonl"
    file.write_text(text)
    with pytest.raises(DatasetError, match=message):
        run(model, processor, numbers(5), output=tmp_path)
    assert file.read_text() == text


def test_a_damaged_line_is_named(model, processor, tmp_path):
    run(model, processor, numbers(5), output=tmp_path)
    file = tmp_path / "numbers-0shot.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], "{]\n", *lines[4:]]))
    with pytest.raises(DatasetError, match=r"line 4 is not a JSON object.*--force"):
        run(model, processor, numbers(5), output=tmp_path)
    file.write_text("".join([*lines[:3], '{"a": 1}\n', *lines[4:]]))
    with pytest.raises(DatasetError, match="line 4 is no record of a sample"):
        run(model, processor, numbers(5), output=tmp_path)


def test_a_record_without_an_answer_is_named(model, processor, tmp_path):
    run(model, processor, numbers(5), output=tmp_path)
    file = tmp_path / "numbers-0shot.jsonl"
    first, *_ = file.read_text().splitlines()
    file.write_text(first + '\n{"id": "val0", "prompt": "x"}\n')
    with pytest.raises(DatasetError, match=r"line 2 is no record of a sample, with"):
        run(model, processor, numbers(5), output=tmp_path)


def test_two_runs_do_not_share_a_folder(model, processor, tmp_path):
    from mm1_mlx.checkpoint.disk import locked
    from mm1_mlx.errors import CheckpointError

    with locked(tmp_path), pytest.raises(CheckpointError, match="Another run"):
        run(model, processor, numbers(5), output=tmp_path)


def test_a_running_score_is_shown(model, processor):
    seen = []
    run(model, processor, watch=seen.append)
    assert [now.done for now in seen] == [0, 4, 8, 12, 16, 20, 21]
    assert seen[0].score is None and seen[-1].score is not None
    assert seen[-1].how == "0-shot" and seen[-1].seconds > 0


def test_a_running_score_that_fails_ends_nothing(model, processor):
    def whole_only(answered):
        assert len(answered) == 21
        return exact(answered)

    seen = []
    task = numbers(metric=whole_only)
    assert run(model, processor, task, watch=seen.append).n == 21
    assert seen[1].score is None


def test_pictures_that_were_read_ahead_are_not_decoded_again(tmp_path, monkeypatch):
    """In another thread, as a run does it; a broken one is told when it is asked."""
    import threading

    from mm1_mlx.evaluation import runner
    from mm1_mlx.inference.reuse import Reuse
    from mm1_mlx.inputs import known

    need_tiny()
    model, processor = load("mm1-tiny")
    data = write_dataset(tmp_path, 5, 3)
    (data / "val3.png").write_bytes(b"broken")
    decoded, names = known.decoded, []

    def spy(data, name, *limits):
        names.append(name.rpartition("/")[2])
        return decoded(data, name, *limits)

    monkeypatch.setattr(known, "decoded", spy)
    how, given = How(shots=2), {"max_tokens": 4}
    shots = TaskShots(COLOUR, pool_of(COLOUR, data, how), how, processor)
    work = runner._Run(model, processor, COLOUR, how, given, Reuse(), None, shots)
    asked = work.questions(choose_samples(COLOUR, data, None, 0))
    thread = threading.Thread(target=work._warm, args=(asked,))
    thread.start()
    thread.join()
    assert set(names) >= {"val3.png", "val4.png"}
    names.clear()
    records = work._records(asked, None)
    assert set(names) == {"val3.png"}
    assert ["error" in record for record in records] == [False] * 3 + [True, False]
    assert records[4]["answer"] == "orange"
