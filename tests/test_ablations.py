"""The ablations: their list, runs that go on where they stopped, tables of results."""

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import asdict

import mlx.core as mx
import pytest

from examples.ablations import __main__ as command
from examples.ablations import findings, measure, plan, report, world
from examples.ablations.__main__ import main
from examples.ablations.findings import EFFECTS, Effect, mean_interval
from examples.ablations.plan import BASE, BY_NAME, FULL, QUICK, Cell, Run, Size
from examples.ablations.report import write_report
from examples.ablations.work import TOKENIZER, do_run, result_of, vocabulary
from helpers import ROOT, assert_fails, need_tiny, needs, run_here, run_python
from mm1_mlx import batch_generate, load
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.evaluation.report import FORMAT
from mm1_mlx.inference.identity import fingerprint
from mm1_mlx.training.documents import Document
from mm1_mlx.training.packing import DocumentMixer, Row
from mm1_mlx.training.pretraining import document_encoder
from mm1_mlx.training.recipe import Recipe

ALL = plan.runs_of(plan.BY_VALUE)

# --- the list ------------------------------------------------------------------------


def test_every_cell_of_every_table_is_run_with_every_seed():
    assert set(plan.BY_VALUE) == set(plan.TABLES)
    joint = [run for run in ALL if run.kind == "joint"]
    wanted = {(c, s) for t in plan.TABLES for c in t.cells for s in (0, 1, 2)}
    assert Counter((run.cell, run.seed) for run in joint) == Counter(wanted)
    # 15 connectors, and of the others what is not the base: 6 + 3 + 2 + 2.
    assert len(joint) == 3 * (15 + 6 + 3 + 2 + 2)


def test_the_grid_is_the_papers():
    cells = BY_NAME["connectors"].cells
    three = ("average_pool", "attention_pool", "c_abstractor")
    for kind in three:
        for tokens in (16, 36):
            for pixels in (48, 72):
                assert Cell(connector=kind, tokens=tokens, pixels=pixels) in cells
    assert 36 / 16 == 144 / 64 and 72 / 48 == 336 / 224  # MM1's ratios


def test_names_are_unique_and_parts_come_first():
    assert len({run.name for run in ALL}) == len(ALL) == len(set(ALL))
    for i, run in enumerate(ALL):
        assert set(run.needs) <= set(ALL[:i]), run.name
    assert Run("joint", BASE, 2).name == "c_abstractor-16-48-seed2"
    assert Cell(mix=(0, 100, 0), encoder="none").name == (
        "c_abstractor-16-48-mix_0_100_0-none"
    )


def test_effects_compare_cells_of_their_own_table():
    for effect in EFFECTS:
        cells = set(BY_NAME[effect.table].cells)
        assert {*effect.more, *effect.less} <= cells, effect.what
        assert effect.measure in measure.MEASURES
        assert len(effect.more) == len(effect.less)


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_every_recipe_is_one(size):
    for run in ALL:
        Recipe.from_dict(run.recipe(size))


def test_the_rates_of_encoders_are_those_that_the_readme_states():
    text = (ROOT / "examples/ablations/README.md").read_text(encoding="utf-8")
    for encoder, rate in (("regions", 0.2), ("global", 0.2), ("none", 1.0)):
        recipe = Run("joint", Cell(encoder=encoder), 0).recipe(FULL)
        assert recipe["stages"]["joint"]["vision_rate"] == rate
        assert f"rate ({rate}: " in text


def weights(decoder: str, active: bool) -> int:
    """Of the decoder's MLPs, by hand: two matrices each, no gate."""
    config = plan.model_config(Cell(decoder=decoder), FULL)["text_config"]
    width, inner = config["hidden_size"], config["intermediate_size"]
    layers, experts = config["num_hidden_layers"], config.get("moe_config")
    if not experts:
        return layers * 2 * width * inner
    assert layers == 3 and experts["first_sparse_layer"] == 0  # layers 0 and 2
    used = 2 if active else experts["num_local_experts"]
    return 2 * width * (inner + 2 * used * experts["moe_intermediate_size"])


def test_experts_are_as_active_as_dense_and_as_many_as_wide():
    assert weights("experts", active=True) == weights("dense", active=True)
    assert weights("experts", active=False) == weights("wide", active=True)


# --- data and questions --------------------------------------------------------------


def rows_of(cell: Cell, monkeypatch, steps: int = 12) -> list[list[Row]]:
    """What a run of seed 0 reads in its steps; nothing is drawn."""
    from mm1_mlx.training.model_folder import make_processor

    monkeypatch.setattr(world, "draw", lambda found, rng: rng.random())
    recipe = Recipe.from_dict(Run("joint", cell, 0).recipe(FULL))
    processor = make_processor(recipe.model, recipe.images, TOKENIZER)
    s = recipe.stages["joint"]
    encode = processor.tokenizer.encode
    encode = document_encoder(recipe.model, encode, s.image_counts_as)
    room = round(s.batch * s.images_per_row)
    mixer = DocumentMixer(world.document, s.mix)
    return [
        mixer.rows(random.Random(step), s.batch, s.row_length, encode, 1.0, room)
        for step in range(steps)
    ]


def test_runs_with_other_tokens_and_pixels_read_the_same_rows(monkeypatch):
    """Else a difference along that axis would be one of documents, too."""

    def read(cell):
        return [
            [(part.images, [t for t in part.ids if t != 4]) for part in row.parts]
            for step in rows_of(cell, monkeypatch)
            for row in step
        ]

    base = read(Cell())
    assert all(base)
    for cell in (Cell(tokens=4), Cell(tokens=36), Cell(connector="mlp", tokens=36)):
        assert read(cell) == base, cell.name
    assert read(Cell(pixels=72)) == base
    assert read(Cell(mix=(50, 50, 0))) != base


@pytest.mark.parametrize("mix", [cell.mix for cell in BY_NAME["mix"].cells])
def test_rows_are_mixed_as_the_plan_says(mix, monkeypatch):
    """Rows that find no room for their pictures turn to text, or stay empty."""
    rows = [row for step in rows_of(Cell(mix=mix), monkeypatch, 30) for row in step]
    assert sum(not row.parts for row in rows) <= 0.02 * len(rows)
    captions = sum(len(row.images) == len(row.parts) > 0 for row in rows)
    text = sum(not row.images for row in rows)
    shares = captions, len(rows) - captions - text, text
    for share, planned in zip(shares, mix, strict=True):
        # Three standard deviations of 240 rows, and a hundredth.
        planned = planned / sum(mix)
        reach = 3 * (planned * (1 - planned) / len(rows)) ** 0.5 + 0.01
        assert abs(share / len(rows) - planned) <= reach, (shares, mix)


def supervised(document: Document) -> list[str]:
    pieces = [*document.context, *(p for b in document.branches for p in b)]
    return [piece.text.strip() for piece in pieces if piece.supervised]


def test_interleaved_documents_learn_all_but_the_first_name():
    rng = random.Random(3)
    for _ in range(60):
        found = world.document(rng, "interleaved")
        pictures = len(found.images)
        text = "".join(piece.text for piece in found.context)
        assert text.count("<image>") == pictures in (2, 3, 4)
        named = "?" not in text and text.count("<user>") == 1
        assert len(supervised(found)) == pictures - named


def test_the_same_questions_for_all_and_the_same_last_picture():
    one, same = world.naming(6, 3), world.naming(6, 3)
    bare = world.naming(6, 0)
    for a, b, c in zip(one, same, bare, strict=True):
        assert (a.prompt, a.answer) == (b.prompt, b.answer)
        assert a.answer == c.answer and c.prompt == "<image>"
        assert a.images[-1].tobytes() == b.images[-1].tobytes() == c.images[0].tobytes()
        assert len(a.images) == a.prompt.count("<image>") == 4
    asked = world.with_shots(2, 3)
    assert {item.task for item in asked} == set(world.TASKS)
    for item in asked:
        assert [turn["role"] for turn in item.prompt] == ["user", "assistant"] * 3 + [
            "user"
        ]


def test_evaluate_counts_what_the_model_says():
    """The measures are tasks: the answers of batch_generate, counted by hand."""
    model, processor = load(need_tiny(), dtype=mx.float32)
    found = measure.measured(model, processor, "mm1-tiny", 1)
    assert found["format"] == FORMAT and found["weights"] == fingerprint(model)
    questions = measure.test_questions(1)
    entries = {entry["task"]: entry for entry in found["results"]}
    assert entries.keys() == {f"ablations_{name}" for name in questions}
    right = 0
    for name, make in questions.items():
        counts: dict[str, list[int]] = {}
        asked = make()
        prompts, images = [a.prompt for a in asked], [a.images or None for a in asked]
        answers = batch_generate(model, processor, prompts, images, max_tokens=24)
        for item, answer in zip(asked, answers, strict=True):
            counts.setdefault(item.task, []).append(answer.text.strip() == item.answer)
        entry = entries[f"ablations_{name}"]
        assert entry["n"] == sum(map(len, counts.values())) and not entry["failed"]
        shares = {task: 100 * sum(own) / len(own) for task, own in counts.items()}
        assert entry["groups"] == pytest.approx(shares)
        mean = sum(shares.values()) / len(shares) / 100
        assert measure.share({"evaluation": found}, name) == pytest.approx(mean)
        right += sum(map(sum, counts.values()))
    assert right > 0  # some of it mm1-tiny knows


def test_the_measures_are_tasks_of_the_command(tmp_path):
    need_tiny()
    done = run_here(
        "evaluate", "--model", "mm1-tiny", "--tasks-from", "examples.ablations.measure",
        "--task", "ablations_facts", "ablations_naming0", "--limit", "3",
        "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "ablations_facts 0-shot",
        "ablations_naming0 0-shot",
    ]
    entries = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [entry["n"] for entry in entries] == [3, 3]


# --- results to tables ---------------------------------------------------------------


def test_intervals_by_hand():
    # sd 0.1, t of 2 degrees 4.303: 4.303 * 0.1 / sqrt(3)
    mean, reach = mean_interval([0.5, 0.6, 0.7])
    assert (mean, reach) == pytest.approx((0.6, 0.24843), abs=1e-5)
    assert mean_interval([0.5]) == (0.5, None)
    assert findings.t_quantile(2) == 4.303
    assert findings.t_quantile(11) == findings.t_quantile(10)


def effect(expected):
    return Effect("mix", "a instead of b", "zero", (BASE,), (BASE,), expected, "x")


@pytest.mark.parametrize(
    "expected, mean, reach, said",
    [
        (1, 0.2, 0.1, "agrees"),
        (1, -0.2, 0.1, "disagrees"),
        (1, 0.05, 0.1, "open"),
        (0, 0.02, 0.03, "agrees"),
        (0, 0.02, 0.04, "open"),
        (0, 0.2, 0.1, "a difference"),
        (None, 0.2, 0.1, "a difference"),
        (None, 0.0, 0.1, "open"),
        (1, 0.2, None, "one seed"),
    ],
)
def test_verdicts(expected, mean, reach, said):
    assert effect(expected).verdict(mean, reach) == said


def made_result(cell: Cell, seed: int, right: int, size: Size = FULL) -> dict:
    run = Run("joint", cell, seed)
    return {
        "name": run.name,
        "kind": "joint",
        "cell": plan.as_dict(cell),
        "seed": seed,
        "recipe": json.loads(json.dumps(run.recipe(size))),
        "vocabulary": vocabulary(),
        "data": world.digest(),
        "size": asdict(size),
        "measured_seconds": 30.0,
        "seconds": {"cpu": 120.0, "wall": 130.0},
        "documents": 10,
        "curve": [[10, 1.5]],
        "weights": {"decoder": 700_000, "vision": 300_000},
        "evaluation": {
            "results": [
                {
                    "task": f"ablations_{name}",
                    "groups": {"count": 10 * right, "colour": 100},
                }
                for name in (*measure.MEASURES, "naming0")
            ]
        },
    }


def test_the_vocabulary_is_the_studys_own():
    """mm1-tiny is trained anew, with another one; runs that are done stay good."""
    assert TOKENIZER.parent == ROOT / "examples/ablations"
    assert vocabulary() == "ce1906be30210e7c"


def test_other_data_have_another_digest(monkeypatch):
    """Of what is drawn, asked or answered: runs of before are not compared with."""
    before = world.digest()
    assert world.digest.__wrapped__() == before
    draw, said = world.drawing.draw, world.facts.text_only
    with monkeypatch.context() as patch:
        patch.setattr(world.drawing, "draw", lambda *a, **k: draw(*a, **k).rotate(90))
        assert world.digest.__wrapped__() != before
    with monkeypatch.context() as patch:
        patch.setattr(world.facts, "text_only", lambda rng: (said(rng)[0], "no"))
        assert world.digest.__wrapped__() != before


def made_runs(folder, rights) -> None:
    """Results of cells by seed: {cell: rights}."""
    for cell, numbers in rights.items():
        for seed, right in enumerate(numbers):
            result = made_result(cell, seed, right)
            own = folder / result["name"]
            own.mkdir()
            (own / "result.json").write_text(json.dumps(result))


@needs("matplotlib")
def test_a_report_comes_from_stored_results_alone(tmp_path):
    none = Cell(encoder="none")
    more = Cell(tokens=36)
    made_runs(tmp_path, {BASE: (4, 6, 8), none: (1, 2, 3), more: (4, 6, 7)})
    written = write_report(tmp_path)
    assert [file.name for file in written] == [
        "report.md",
        "connectors.png",
        "connectors-tokens.png",  # nothing differs in the other two keys alone
        "encoders.png",
    ]
    text = written[0].read_text()
    # (0.4 + 1) / 2 and so on: 70, 80, 90 percent; t interval 4.303 * 10 / sqrt(3)
    assert "| regions | 80.0 ± 24.8 | 80.0 ± 24.8 |" in text
    assert "| none | 60.0 ± 12.4 |" in text
    # Paired by seed: 15, 20 and 25 points apart.
    assert re.search(r"\| regions instead of none .* \| \+20.0 ± 12.4 \|", text)
    assert re.search(r"\+20.0 ± 12.4 .* a difference \|", text)
    assert "9 measured runs, 3 of 28 cells, seeds 0, 1, 2; 18 minutes" in text
    assert "1.00 | 1.5 | 3 |" in text  # 120 seconds, 30 of them the questions
    assert "before it has 72.8 (mean of all)" in text
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in written[1:])


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    made_runs(tmp_path, {BASE: (4, 6, 8), Cell(encoder="none"): (1, 2, 3)})
    assert command.main(["report", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'report.md'}\n"
    assert "no plots: they need matplotlib" in printed.err
    assert "| none | 60.0" in (tmp_path / "report.md").read_text()


@needs("matplotlib")
def test_tables_go_into_a_readme_between_their_marks(tmp_path):
    made_runs(tmp_path, {BASE: (4,), Cell(encoder="none"): (1,)})
    readme = tmp_path / "README.md"
    places = "<!-- note -->\nold\n<!-- end note -->\n"
    readme.write_text(f"before\n{places}")
    with pytest.raises(CheckpointError, match=r"no place.*<!-- encoders -->"):
        write_report(tmp_path, readme)
    assert readme.read_text() == f"before\n{places}"
    readme.write_text(f"before\n{places}<!-- encoders --><!-- end encoders -->after\n")
    write_report(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- note -->\n2 measured runs")
    assert "| regions | 70.0 |" in text and "one seed" in text
    assert text.endswith("<!-- end encoders -->after\n") and "old" not in text


def test_the_projects_readme_has_a_place_for_every_table():
    text = (ROOT / "examples/ablations/README.md").read_text(encoding="utf-8")
    for name in ("note", *BY_NAME):
        assert text.count(f"<!-- {name} -->") == 1, name
        assert text.count(f"<!-- end {name} -->") == 1, name


# --- runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with the parts of the base's first seed, of --quick."""
    folder = tmp_path_factory.mktemp("parts")
    for part in Run("joint", BASE, 0).needs:
        assert do_run(folder, part, QUICK)
    return folder


def test_a_stopped_run_goes_on_exactly(parts, tmp_path):
    run = Run("joint", BASE, 0)
    results, models = [], []
    for name, limit in (("whole", 100), ("stopped", 2)):
        folder, seen = tmp_path / name, []
        shutil.copytree(parts, folder)
        found = do_run(
            folder,
            run,
            QUICK,
            progress=seen.append,
            stop=lambda seen=seen, limit=limit: len(seen) >= limit,
        )
        if limit == 2:
            assert found is None and result_of(folder, run, QUICK) is None
            found = do_run(folder, run, QUICK, progress=seen.append)
        assert seen == [0.25, 0.5, 0.75, 1.0]
        results.append(found)
        models.append(mx.load(str(folder / run.name / "model/model.safetensors")))
    whole, stopped = results
    for key in ("curve", "documents", "weights", "recipe"):
        assert whole[key] == stopped[key], key
    scores = [
        [(entry["task"], entry["groups"]) for entry in found["evaluation"]["results"]]
        for found in results
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 5
    for name, array in models[0].items():
        assert mx.array_equal(array, models[1][name]), name


def test_a_run_starts_from_its_parts(parts, tmp_path):
    """With nothing but the connector trained, encoder and decoder are the parts'."""
    folder = tmp_path / "runs"
    shutil.copytree(parts, folder)
    run = Run("joint", Cell(trained="connector only"), 0)
    assert do_run(folder, run, QUICK)
    model = mx.load(str(folder / run.name / "model/model.safetensors"))
    encoder = mx.load(str(folder / run.needs[0].name / "encoder_weights.safetensors"))
    decoder = mx.load(str(folder / run.needs[1].name / "model/model.safetensors"))
    for name, array in model.items():
        if name.startswith("vision."):
            assert mx.array_equal(array, encoder[name].astype(mx.float16)), name
        if name.startswith("decoder."):
            assert mx.array_equal(array, decoder[name]), name
    with pytest.raises(CheckpointError, match=r"starts from encoder-global.*not been"):
        do_run(folder, Run("joint", Cell(encoder="global"), 0), QUICK)


@needs("matplotlib")
def test_the_commands(parts, tmp_path):
    """One table of one seed, two beside each other; again; a report."""
    out = tmp_path / "runs"
    shutil.copytree(parts, out)
    flags = ("--quick", "--seeds", "1", "--out", out)
    command = ("-m", "examples.ablations", "run", "parts", *flags, "--workers", "2")
    first = run_python(*command)
    assert first.returncode == 0, first.stderr
    assert "2 of 5 runs are there" in first.stderr
    assert "[5/5] " in first.stderr and "all 5 runs are done" in first.stderr
    before = {file: file.read_bytes() for file in out.glob("*/result.json")}
    assert len(before) == 5
    again = run_python(*command)
    assert again.returncode == 0 and "5 of 5 runs are there" in again.stderr
    assert {file: file.read_bytes() for file in before} == before
    report = run_python("-m", "examples.ablations", "report", "--out", out)
    assert report.stdout.splitlines() == [f"{out}/report.md", f"{out}/parts.png"]
    assert "Made with --quick" in (out / "report.md").read_text()
    mixed = run_python("-m", "examples.ablations", "run", "parts", "--out", out)
    assert_fails(
        mixed,
        "is of another recipe than today's encoder-regions-48-seed0",
    )


def test_the_list_is_printed(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [run.name for run in ALL]
    assert lines[-1].startswith("108 runs, 84 of them measured; ")
    assert main(["list", "experts", "--seeds", "1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 + 3 + 1 + 1  # cells, decoders, an encoder, the total


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["list", "conectors"], 2, "unknown table 'conectors'; did you mean 'connec"),
        (["one", "c_abstracter-16-48-seed0", "--out", "x"], 2, "unknown run"),
        (["run", "mix"], 2, "--out"),
        (["run", "mix", "--out", "x", "--workers", "0"], 2, "1 or more, not '0'"),
        (["report", "--out", "no/such/folder"], 1, "There is no folder no/such"),
    ],
)
def test_wrong_inputs_are_one_line(words, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(words)
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err
    assert found == code and said in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_results_that_are_none(tmp_path):
    run = Run("joint", BASE, 0)
    with pytest.raises(CheckpointError, match="has no measured run"):
        write_report(tmp_path)
    file = tmp_path / run.name / "result.json"
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read.*Remove it"):
        result_of(tmp_path, run, QUICK)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="is not the result of a run"):
        write_report(tmp_path)
    for key, value in {"vocabulary": "a", "recipe": {}, "data": "of before"}.items():
        file.write_text(json.dumps(made_result(BASE, 0, 1, QUICK) | {key: value}))
        words = f"is of another {key} than today's c_abstractor"
        with pytest.raises(ConfigError, match=words):
            result_of(tmp_path, run, QUICK)
        if key != "data":  # a report needs no data, only the same ones
            with pytest.raises(ConfigError, match=words):
                write_report(tmp_path)


def test_runs_of_two_sizes_are_not_compared(tmp_path):
    made_runs(tmp_path, {BASE: (4, 5)})
    file = tmp_path / Run("joint", BASE, 1).name / "result.json"
    file.write_text(json.dumps(made_result(BASE, 1, 5, QUICK)))
    with pytest.raises(CheckpointError, match="runs of several sizes"):
        write_report(tmp_path)
    other = made_result(BASE, 1, 5) | {"data": "of before"}
    file.write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="runs of several data"):
        write_report(tmp_path)
