"""Sources that are mixed by weight, and where they are found: here, or on the hub."""

import json
import random
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest

from helpers import need
from mm1_mlx.cli.tuning import parser, sources
from mm1_mlx.errors import ConfigError, DatasetError, UsageError
from mm1_mlx.training.conversations import open_train
from mm1_mlx.training.mixtures import (
    Data,
    Mixture,
    Order,
    Source,
    Turns,
    find_data,
    wanted_files,
)


def write(folder: Path, count: int, split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"question": f"{folder.name} {k}", "answer": "b"} for k in range(count)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{split}.jsonl").write_text(text)
    return folder


# --- Turns and orders ---


@pytest.mark.parametrize(
    "weights",
    [
        (0.45, 0.45, 0.1),
        (1, 1),
        (1, 999),
        (0.3333, 0.3333, 0.3334),
        (665_298, 558_128, 40_688.5),
        (5, 1e-3, 1e-3, 2.5, 0.7),
    ],
)
def test_every_source_has_its_share_at_every_moment(weights):
    """At most 1 - 1/(2n - 2) off: Tijdeman's bound, which no order can beat."""
    turns, counts = Turns(weights), [0] * len(weights)
    exact = [Fraction(repr(w)) for w in weights]
    bound = 1 - Fraction(1, max(2 * len(weights) - 2, 2))
    for place in range(3000):
        source, earlier = turns[place]
        assert earlier == counts[source]
        counts[source] += 1
        for weight, count in zip(exact, counts, strict=True):
            assert abs(weight / sum(exact) * (place + 1) - count) <= bound


def test_turns_can_be_asked_in_any_order():
    weights = (0.45, 0.35, 0.2)
    straight = [Turns(weights)[place] for place in range(300)]
    turns, places = Turns(weights), list(range(300))
    random.Random(0).shuffle(places)
    assert {place: turns[place] for place in places} == dict(enumerate(straight))
    far = 10**12 + 7  # a period is known, so this is no walk
    assert turns[far][0] == turns[far % 20][0]


def test_a_mixture_gives_each_source_its_own_epochs(tmp_path):
    parts = [open_train(write(tmp_path / name, n)) for name, n in (("a", 6), ("b", 9))]
    mixture = Mixture(parts, ["a", "b"], [2, 1])
    assert len(mixture) == 15 and mixture.shares() == [2 / 3, 1 / 3]
    number_at = mixture.order(seed=4)
    numbers = [number_at(place) for place in range(54)]
    names = [mixture[n].messages[0]["content"].split() for n in numbers]
    mine = [int(k) for name, k in names if name == "a"]
    other = [int(k) for name, k in names if name == "b"]
    assert len(mine) == 36 and len(other) == 18
    for numbers, count in ((mine, 6), (other, 9)):
        epochs = [numbers[k : k + count] for k in range(0, len(numbers), count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert [mixture.part_of(n) for n in (0, 5, 6, 14)] == [0, 0, 1, 1]
    again = mixture.order(seed=4)
    backwards = [again(place) for place in reversed(range(54))]
    assert backwards[::-1] == [number_at(place) for place in range(54)]
    assert [mixture.order(seed=5)(p) for p in range(54)] != backwards[::-1]


def test_one_source_alone_comes_in_its_own_order(tmp_path):
    samples = open_train(write(tmp_path / "a", 20))
    found = Mixture([samples]).order(seed=3)
    wanted = Order(20, 3)
    assert [found(place) for place in range(60)] == [wanted[p] for p in range(60)]


def test_sources_of_one_length_are_not_shuffled_alike(tmp_path):
    parts = [open_train(write(tmp_path / name, 30)) for name in "ab"]
    number_at = Mixture(parts).order(seed=0)
    numbers = [number_at(place) for place in range(60)]
    assert [n for n in numbers if n < 30] != [n - 30 for n in numbers if n >= 30]


def test_what_a_fingerprint_of_a_mixture_covers(tmp_path):
    a, b = (open_train(write(tmp_path / name, 4)) for name in "ab")
    first = Mixture([a, b], ["a", "b"], [1, 1]).fingerprint()
    assert first == Mixture([a, b], ["a", "b"], [2, 2]).fingerprint()
    assert first["b"]["share"] == 0.5 and first["b"]["samples"] == 4
    assert first != Mixture([a, b], ["a", "b"], [1, 2]).fingerprint()
    assert first != Mixture([b, a], ["b", "a"], [1, 1]).fingerprint()
    assert Mixture([a]).fingerprint() == a.fingerprint()


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_none(tmp_path, weight):
    parts = [open_train(write(tmp_path / "a", 2))] * 2
    with pytest.raises(ConfigError, match=r"The weight of b is .*must be above 0"):
        Mixture(parts, ["a", "b"], [1, weight])


# --- Places ---


def test_sources_by_name_and_split(tmp_path):
    one, two = write(tmp_path / "one", 3), write(tmp_path / "two.v1", 5)
    write(two, 2, "validation")
    write(one, 4, "test")
    data = Data([Source(str(one), 3.0), Source(str(two))])
    assert data.names == ["one", "two.v1"]
    train = data.train()
    assert train.names == data.names and train.weights == [3.0, 1.0]
    assert data.split("valid").names == ["two.v1"]
    assert data.split("test").names == ["one"] and len(data.split("test")) == 4
    (two / "validation.jsonl").unlink()
    assert data.split("valid") is None


def test_sources_of_one_name(tmp_path):
    places = [write(tmp_path / f"{k}" / "mix", 1) for k in range(3)]
    (tmp_path / "mix.json").write_text('[{"question": "a", "answer": "b"}]')
    names = [*map(str, places), str(tmp_path / "mix.json")]
    assert Data([Source(n) for n in names]).names == ["mix", "mix-2", "mix-3", "mix-4"]


def test_a_source_without_samples(tmp_path):
    write(tmp_path / "a", 2)
    write(tmp_path / "b", 0)
    with pytest.raises(DatasetError, match=r"b/train\.jsonl is empty"):
        Data([Source(str(tmp_path / name)) for name in "ab"]).train()
    with pytest.raises(DatasetError, match=r"There is no data folder .*missing: exp"):
        Data([Source(str(tmp_path / "missing"))])


# --- The hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one folder per dataset, and what was asked of it."""
    asked = []

    class Api:
        def dataset_info(self, repo, revision=None, timeout=None):
            asked.append(("list", repo, revision))
            if (error := module.error) is not None:
                raise error
            names = (p for p in (tmp_path / repo).rglob("*") if p.is_file())
            names = [p.relative_to(tmp_path / repo).as_posix() for p in names]
            return types.SimpleNamespace(
                siblings=[types.SimpleNamespace(rfilename=n) for n in names]
            )

    def download(repo, *, repo_type, revision=None, local_files_only=False, **more):
        assert repo_type == "dataset"
        asked.append(("get", repo, more.get("allow_patterns")))
        if local_files_only and not module.kept:
            raise FileNotFoundError
        if module.constants.HF_HUB_OFFLINE and not module.kept:
            raise type("LocalEntryNotFoundError", (Exception,), {})("no")
        return str(tmp_path / repo)

    module = types.ModuleType("huggingface_hub")
    module.error, module.kept, module.asked = None, False, asked
    module.HfApi, module.snapshot_download = Api, download
    module.constants = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path.parent)  # where no folder has the name of a dataset
    return module


def test_a_dataset_on_the_hub(hub, tmp_path):
    folder = write(tmp_path / "org/cats", 3)
    (folder / "pictures").mkdir()
    for name in ("pictures/a.jpg", "b.PNG", "run.py", "README.md", "data.zip"):
        (folder / name).write_text("")
    data = Data([Source("org/cats@v1.0"), Source("org/cats")])
    assert data.names == ["cats", "cats-2"] and len(data.train()) == 6
    (_, repo, revision), (_, _, patterns), *_ = hub.asked
    assert (repo, revision) == ("org/cats", "v1.0")
    assert patterns == ["train.jsonl", "*.PNG", "*.jpg"]  # and no code


def test_a_folder_or_a_file_of_a_dataset(hub, tmp_path):
    write(tmp_path / "org/many/ai2d", 2)
    write(tmp_path / "org/many/ocr [new]", 3)
    (tmp_path / "org/many/mix.json").write_text('[{"question": "a", "answer": "b"}]')
    names = ["org/many/ai2d", "org/many/mix.json", "org/many/ocr [new]@refs/pr/1"]
    data = Data([Source(name) for name in names])
    assert data.names == ["ai2d", "mix", "ocr [new]"]
    assert [len(part) for part in data.train().parts] == [2, 1, 3]
    patterns = [what for kind, _, what in hub.asked if kind == "get"]
    assert patterns[:2] == [["ai2d/train.jsonl"], ["mix.json"]]
    assert patterns[2] == ["ocr [[]new]/train.jsonl"]
    assert hub.asked[4] == ("list", "org/many", "refs/pr/1")
    message = r"'org/many' on the hub has no train\.jsonl.* folders are ai2d, ocr \[n"
    with pytest.raises(DatasetError, match=message):
        find_data("org/many")
    with pytest.raises(DatasetError, match=r"nor numbered ones in nothing\.$"):
        find_data("org/many/nothing")


def test_what_is_here_goes_before_the_hub(hub, tmp_path, monkeypatch):
    write(tmp_path / "org/cats", 3)
    monkeypatch.chdir(tmp_path)
    assert find_data("org/cats") == Path("org/cats") and not hub.asked


def error_named(name: str, text: str = "") -> Exception:
    return type(name, (Exception,), {})(text)


@pytest.mark.parametrize(
    "error, message",
    [
        (error_named("RepositoryNotFoundError"), r"There is no dataset 'org/cats' on"),
        (error_named("GatedRepoError"), r"needs your consent to its licence"),
        (ConnectionError("x"), r"nor in the hub's cache, and the hub cannot be reach"),
        (ValueError("a\nb"), r"could not be downloaded from the hub: a b"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, error, message):
    hub.error = error
    with pytest.raises(DatasetError, match=message) as raised:
        find_data("org/cats")
    assert "\n" not in str(raised.value)


def test_without_network_what_was_downloaded_before(hub, tmp_path):
    write(tmp_path / "org/cats/small", 3)
    hub.constants.HF_HUB_OFFLINE = True
    with pytest.raises(DatasetError, match=r"the hub cannot be reached"):
        find_data("org/cats")
    hub.kept = True
    assert find_data("org/cats/small") == tmp_path / "org/cats/small"
    assert all(kind == "get" for kind, *_ in hub.asked)
    hub.constants.HF_HUB_OFFLINE, hub.error = False, ConnectionError("x")
    assert find_data("org/cats/small") == tmp_path / "org/cats/small"


def test_without_the_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DatasetError, match=r"run pip install huggingface_hub"):
        find_data("org/cats")


def test_the_real_hub_package_without_network():
    need("huggingface_hub")  # tests run with HF_HUB_OFFLINE=1
    with pytest.raises(DatasetError, match=r"nor in the hub's cache, and the hub can"):
        find_data("no-such-org-here/no-such-dataset")


def test_many_pictures_are_one_pattern():
    names = ["train.jsonl", *(f"images/{k}.jpg" for k in range(100_000))]
    assert wanted_files(names, "", "'a/b'") == ["train.jsonl", "*.jpg"]


# --- Flags ---


def given(*texts: str) -> list[Source]:
    return sources(parser().parse_args(["--model", "mm1-tiny", *texts]))


def test_flags_name_sources(tmp_path):
    found = given("--data", "A=0.45", "--data", "org/name@v1=2", "--data", "C")
    assert [(s.name, s.weight) for s in found] == [
        ("A", 0.45),
        ("org/name@v1", 2.0),
        ("C", 1.0),
    ]
    odd = write(tmp_path / "rate=0.1", 1)
    assert given("--data", str(odd)) == [Source(str(odd))]
    assert given("--data", f"{odd}=3") == [Source(str(odd), 3.0)]
    one = ["--data", "A", "--data", "B", "--image-folder", str(tmp_path)]
    assert [s.images for s in given(*one)] == [tmp_path, tmp_path]
    assert given(*one, "--image-folder", str(odd))[1].images == odd


@pytest.mark.parametrize(
    "texts, message",
    [
        (["A=0"], r"--data is 'A=0', but the weight after '=' must be a number above"),
        (["A=-1"], r"must be a number above 0"),
        (["A=nan"], r"must be a number above 0"),
        (["A=inf"], r"must be a number above 0"),
        (["A=big"], r"must be a number above 0"),
        (["=2"], r"must be a number above 0"),
        (["A", "--image-folder", "/no/such"], r"'/no/such', but there is no folder"),
        (["A", *["--image-folder", "."] * 2], r"1 --data and 2 --image-folder: give o"),
    ],
)
def test_flags_that_make_no_sense(texts, message):
    with pytest.raises(UsageError, match=message):
        given("--data", *texts)
