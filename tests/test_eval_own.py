"""Questions of one's own through `evaluate`: files as people have them."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from helpers import need_tiny
from mm1_mlx import load
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.choosing import choose_samples
from mm1_mlx.evaluation.datasets.own import read_own
from mm1_mlx.evaluation.runner import evaluate
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.evaluation.table import find_task

EXACT = find_task("own_exact")


@pytest.fixture(scope="module")
def tiny():
    need_tiny()
    return load("mm1-tiny")


def write(place, *lines):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return place


def asked(number: int, **more) -> dict:
    return {"question": f"What is {number}?", "answer": f"a{number}", **more}


def test_a_file_that_is_asked_gives_no_shots(tiny, tmp_path):
    """They would be the questions themselves, with their answers."""
    file = write(tmp_path / "mine.jsonl", *map(asked, range(6)))
    with pytest.raises(DatasetError, match=r"one file, which is asked, .*shots-from"):
        evaluate(*tiny, EXACT, data=file, shots=2)
    write(tmp_path / "both" / "test.jsonl", *map(asked, range(6)))
    write(tmp_path / "both" / "train.jsonl", *map(asked, range(6, 9)))
    result = evaluate(*tiny, EXACT, data=tmp_path / "both", shots=2, max_tokens=1)
    assert all(len(record["shots"]) == 2 for record in result.records)


def test_columns_that_other_benchmarks_go_by_mean_nothing_here(tmp_path):
    odd = {"pair": [1, 2], "where": 7, "wrong_images": 3, "kind": "x", "level": 4}
    file = write(tmp_path / "mine.jsonl", *(asked(i, **odd) for i in range(6)))
    samples = choose_samples(EXACT, file, 2, 0)
    assert len(samples) == 2 and samples[0].fields["level"] == 4
    assert not {"pair", "kind", "wrong_images"} & set(samples[0].fields)


def test_pictures_lie_beside_the_file_in_whatever_folder(tmp_path):
    file = write(tmp_path / "deep" / "mine" / "test.jsonl", asked(1, image="a.png"))
    Image.new("RGB", (9, 9)).save(file.parent / "a.png")
    (sample,) = read_own(tmp_path, "test")
    assert sample.images == (file.parent / "a.png",)


def test_half_a_character_is_kept(tiny, tmp_path):
    """JSON can say it, UTF-8 cannot; and names of files can have it."""
    file = write(tmp_path / "mine.jsonl", asked(1, id="\ud83d"), asked(2))
    whole = [
        evaluate(*tiny, EXACT, data=file, output=tmp_path / "out").records for _ in "12"
    ]
    assert whole[0] == whole[1] and whole[0][0]["id"] == "\ud83d"
    assert r"\ud83d" in (tmp_path / "out" / "own_exact-0shot.jsonl").read_text()


def test_a_limit_has_a_pair_of_each_category():
    """MME adds up its categories: one without a question would count as 0."""
    made = [
        Sample(id=f"{c}-{p}-{i}", fields={"category": f"c{c}", "pair": f"{c}-{p}"})
        for c, pairs in enumerate((1, 2, 50))
        for p in range(pairs)
        for i in (0, 1)
    ]

    def read(where, split):
        return iter(made)

    task = replace(EXACT, read=read)
    for seed in range(5):
        few, more = (choose_samples(task, "", n, seed) for n in (6, 20))
        assert {s.fields["category"] for s in few} == {"c0", "c1", "c2"}
        assert len(few) == 6 and {s.id for s in few} < {s.id for s in more}
