"""--resolution and --max-tiles through the real commands, and info's pictures."""

import base64
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from small import DENSE, VISION, small_config

from helpers import assert_fails, need_tiny, run_cli, run_here
from mm1_mlx.benchmarks.first_token import measure_speed, operations
from mm1_mlx.config import TilingConfig
from mm1_mlx.fuse import main as fuse
from mm1_mlx.generate import main as generate
from mm1_mlx.grids import Layout
from mm1_mlx.info import main as info
from mm1_mlx.inputs.images import ImageSettings
from mm1_mlx.inputs.resolution import Way
from mm1_mlx.inputs.tile_drawing import Box, draw_tiles, seen_area
from mm1_mlx.lora import main as lora
from mm1_mlx.memory import count_parameters

DYNAMIC = TilingConfig(type="dynamic", min_tiles=1)
LINE = (255, 64, 32)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """500 x 300: two rows of three tiles, with padding above and below."""
    need_tiny()
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.new("RGB", (500, 300), (0, 90, 200)).save(path)
    return path


def ask(picture, *flags):
    return run_here("generate", "--image", picture, "-p", "What?", "-m", 2, *flags)


def test_an_answer_about_tiles(picture):
    found = {}
    for flags in (
        ("--resolution", "native"),
        ("--resolution", "dynamic", "--max-tiles", 2),
        ("--resolution", 192),
    ):
        done = ask(picture, "--json", "--quiet", *flags)
        assert done.returncode == 0, done.stderr
        values = json.loads(done.stdout)
        found[flags[1]] = values["image_tiles"], values["image_tokens"]
    assert found == {"native": (1, 64), "dynamic": (3, 3 * 64), 192: (1, 64)}
    done = ask(picture, "--resolution", "dynamic", "--max-tiles", 2)
    assert "Image: 1 in 3 tiles (96x96), 192 tokens, encode" in done.stderr


def test_a_plan_counts_tiles(picture):
    plans = {
        flag: json.loads(ask(picture, "--plan", "--json", "--resolution", flag).stdout)
        for flag in ("native", "672", "1344")
    }
    work = {flag: plan["plan"]["work"] for flag, plan in plans.items()}
    assert [w["pictures"] for w in work.values()] == [1, 1, 5]
    assert [w["side"] for w in work.values()] == [None, 672, 672]
    needed = [plan["plan"]["pictures"] for plan in plans.values()]
    assert all(a < b for a, b in pairwise(needed))


def test_wrong_flags(picture):
    for flags, message in (
        (
            ("--resolution", "high"),
            r"--resolution: must be native, dynamic or a number",
        ),
        (("--resolution", "-3"), r"--resolution: must be native, dynamic or a number"),
        (("--max-tiles", 0), r"--max-tiles: must be a whole number from 1 to 256"),
    ):
        assert_fails(ask(picture, *flags), message, code=2)
    message = r"resolution is 100, but must be a multiple of the patch size \(8\): take"
    assert_fails(ask(picture, "--resolution", 100), message)
    message = r"max_tiles is 3, but no picture is read in dynamic tiles.*--resolution d"
    assert_fails(ask(picture, "--max-tiles", 3, "--resolution", "native"), message)


def test_more_tiles_than_the_context_holds(picture, tmp_path):
    """One line: how many tokens, what fits, and by which flag; what it names fits."""
    flags = ["--resolution", "dynamic", "--max-tiles"]
    files = [str(tmp_path / f"{n}.png") for n in range(2)]
    for file in files:
        Image.new("RGB", (1600, 1600)).save(file)
    many = ["-p", "What?", "-m", "1", "--quiet", "--image", *files]
    done = run_here("generate", *many, *flags, 256)
    message = (
        r"text tokens \+ \d+ image tokens \(2 images in \d+ tiles of 64\) \+ \d+ that "
        r"mark tiles = \d+, but the model's context is \d+\. "
        r"What fits: --max-tiles \d+ \(max_tiles=\d+\); or --resolution native"
    )
    assert_fails(done, message)
    most = done.stderr.partition("--max-tiles ")[2].split()[0]
    done = run_here("generate", *many, *flags, most, "--plan")
    assert done.returncode == 0, done.stderr


def test_training_reads_pictures_so(picture, tmp_path, capsys):
    """And what cannot be is refused before a sample is read."""
    line = {"question": "What?", "answer": "Sky.", "image": str(picture)}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    flags = ["--model", "mm1-tiny", "--data", str(tmp_path), "--check", "--json"]
    tokens = []
    for more in (["native"], ["dynamic", "--max-tiles", "2"]):
        assert lora([*flags, "--resolution", *more]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["train"]["tokens"])
    assert 2 * 64 < tokens[1] - tokens[0] < 2 * 64 + 60  # and text between tiles
    assert lora([*flags, "--resolution", "100"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: resolution is 100, but must be a multiple of")


def test_training_on_pictures_that_gain_nothing_by_tiles(picture, tmp_path, capsys):
    """All are small, or all are too many for tiles; one large one is enough."""
    need_tiny()
    small = str(tmp_path / "small.png")
    Image.new("RGB", (40, 90)).save(small)
    flags = ["--model", "mm1-tiny", "--data", str(tmp_path), "--check", "--json"]
    flags += ["--resolution", "dynamic"]
    warned = "gains nothing on these data: of the {} looked at none"

    def said(*samples: list[str]) -> str:
        lines = [
            {"messages": [{"role": "user", "content": "What?"},
                          {"role": "assistant", "content": "Sky."}], "images": images}
            for images in samples
        ]  # fmt: skip
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
        lora(flags)
        return capsys.readouterr().err

    assert warned.format("2 pictures") in said([small], [small])
    assert warned.format("3 pictures") in said([str(picture)] * 3)
    assert "warning" not in said([small], [str(picture)])
    assert "warning" not in said([])


def trained(picture, tmp_path, resolution: str, *more: str) -> tuple[str, str]:
    """An adapter of one step, and where the fused model may lie."""
    line = {"question": "What?", "answer": "Sky.", "image": str(picture)}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    out = str(tmp_path / "adapter")
    flags = ["--model", "mm1-tiny", "--data", str(tmp_path), "--adapter-path", out]
    flags += ["--iters", "1", "--batch-size", "1", "--rank", "2"]
    assert lora([*flags, "--resolution", resolution, *more]) == 0
    return out, str(tmp_path / "fused")


def test_an_adapter_remembers_its_resolution(picture, tmp_path, capsys):
    """In its config; what is loaded and what is fused reads pictures so."""
    out, fused = trained(picture, tmp_path, "dynamic", "--max-tiles", "2")
    capsys.readouterr()
    assert info([out]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "pictures resolution dynamic, at most 2 tiles" in told

    def tiles(*more: str) -> int:
        asked = ["--image", str(picture), "-p", "What?", "-m", "1", "--json"]
        assert generate([*asked, *more]) == 0
        told = capsys.readouterr()
        assert "warning" not in told.err
        return json.loads(told.out)["image_tiles"]

    assert tiles("--adapter-path", out) == 3
    assert tiles("--adapter-path", out, "--resolution", "native") == 1
    planned = []
    for more in ([], ["--resolution", "native"]):
        asked = ["--image", str(picture), "-p", "What?", "--plan", "--json", *more]
        assert generate(["--adapter-path", out, *asked]) == 0
        planned.append(json.loads(capsys.readouterr().out)["plan"]["pictures"])
    assert planned[0] > 2 * planned[1]  # bytes of three tiles, and of one
    assert fuse(["--model", "mm1-tiny", "--adapter-path", out, "--save-path", fused,
                 "--json"]) == 0  # fmt: skip
    capsys.readouterr()
    assert tiles("--model", fused) == 3
    assert tiles("--model", fused, "--resolution", "native") == 1


def test_a_resolution_that_a_folder_cannot_say(picture, tmp_path, capsys):
    out, fused = trained(picture, tmp_path, "128")
    assert fuse(["--model", "mm1-tiny", "--adapter-path", out, "--save-path", fused,
                 "--json"]) == 0  # fmt: skip
    assert "--resolution 128, which the fused model's" in capsys.readouterr().err


# --- info ----------------------------------------------------------------------------


def test_a_pictures_tiles(picture, tmp_path):
    out = tmp_path / "tiles.png"
    done = run_cli(
        "info", "--image", picture, "--tiles", "--output", out,
        "--resolution", "dynamic", "--max-tiles", 6,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    for expected in (
        "picture 500 x 300 pixels", "grid 2 x 3 tiles (rows x columns) and an overview",
        "tile 96 x 96 pixels", "tokens per tile 64", "tokens 448 + ",
        "predicted memory", "to the first token, an estimate:", f"drawing {out}",
    ):  # fmt: skip
        assert expected in told
    work = re.search(r"estimate: ([\d,.]+) (m|b)illion operations at", told)
    assert work and float(work[1].replace(",", "")) > 0
    rows = [row for row in done.stdout.splitlines()[2:] if str(out) not in row]
    assert max(map(len, rows)) <= 88
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.png"]
    drawn = np.asarray(Image.open(out))
    # 500 x 333 with padding, and a foot with the overview.
    assert drawn.shape == (333 + 116, 500, 3)
    lines = (drawn[:333] == LINE).all(axis=-1)
    assert np.flatnonzero(lines.mean(axis=0) > 0.95).tolist() == [
        0, 1, 165, 166, 167, 168, 331, 332, 333, 334, 498, 499,
    ]  # fmt: skip


@pytest.mark.parametrize("tiles", [False, True])
def test_a_picture_in_the_address_itself(picture, tmp_path, monkeypatch, capsys, tiles):
    """Its name is "picture", and no page of letters is repeated."""
    monkeypatch.chdir(tmp_path)
    coded = base64.b64encode(picture.read_bytes()).decode()
    address = f"data:image/png;base64,{coded}"
    assert info(["--image", address, *(["--tiles"] if tiles else [])]) == 0
    told = capsys.readouterr().out
    assert re.match(r"data:image/png;base64,.{1,300}\.\.\., as mm1-tiny reads it", told)
    assert [path.name for path in tmp_path.iterdir()] == ["picture-tiles.png"][:tiles]


def test_a_picture_as_json(picture, capsys):
    assert info(["--image", str(picture), "--json", "--resolution", "192"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tiles"], found["tile_size"], found["tokens"]) == (1, 192, 64)
    assert (found["overview"], found["too_long"]) == (False, "")
    work = sum(found["operations"].values())
    assert found["seconds"] == pytest.approx(work / found["operations_per_second"])
    assert found["memory"]["peak"] > found["memory"]["weights"] > 0


def test_a_picture_of_a_preset(picture, capsys):
    """No weights, no tokenizer: MM1 at 1344, 720 tokens."""
    flags = ["--image", str(picture), "--model", "mm1-3b", "--json"]
    assert info([*flags, "--resolution", "1344"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["image_tokens"], found["text_tokens"]) == (720, 0)
    assert found["tile_size"] == 672 and found["tiles"] == 5


def test_what_does_not_fit_is_told(picture, tmp_path, capsys):
    Image.new("RGB", (4000, 4000)).save(tmp_path / "a.png")
    flags = ["--image", str(tmp_path / "a.png"), "--resolution", "dynamic"]
    assert info([*flags, "--max-tiles", "256"]) == 0
    told = capsys.readouterr().out
    assert "The prompt is too long" in told and "What fits: --max-tiles " in told


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--tiles"], 2, "--tiles goes with --image FILE"),
        (["--max-tiles", "4"], 2, "--max-tiles goes with --image FILE"),
        (["--image", "PICTURE", "--output", "x.png"], 2, "give --tiles, too"),
        (["--allow-url"], 2, "--allow-url goes with --image FILE"),
        (["--image", "PICTURE", "--tiles", "--output", "x.jpg"], 2, "end with .png"),
        (["--image", "PICTURE", "--max-image-pixels", "9"], 1, "pixels"),
        (["--image", "http://a.example/a", "--allow-url"], 1, "https"),
        (["--image", "PICTURE", "adapter"], 2, "an adapter or --image, not both"),
        (["--image", "missing.png"], 1, "No image file missing.png"),
        (["--image", "PICTURE", "--model", "vit-l-14-336"], 1, "an encoder alone"),
        (["--image", "PICTURE", "--tiles", "--output", "PICTURE"], 1, "itself: name"),
        (
            ["--image", "PICTURE", "--tiles", "--output", "no/where/a.png"], 1,
            "cannot be written: No such file",
        ),
    ],
)  # fmt: skip
def test_wrong_input_of_info(
    picture, tmp_path, monkeypatch, capsys, flags, code, message
):
    monkeypatch.chdir(tmp_path)
    before = picture.read_bytes()
    given = [str(picture) if flag == "PICTURE" else flag for flag in flags]
    assert info(given) == code
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1
    assert picture.read_bytes() == before and not list(tmp_path.iterdir())


# --- what is drawn -------------------------------------------------------------------


def way(mode: str, tiling: TilingConfig | None = None) -> Way:
    return Way(ImageSettings(size=10, resize_mode=mode), tiling)


@pytest.mark.parametrize(
    "mode, tiling, layout, area",
    [
        ("squash", None, Layout(0, 0, 30, 20), Box(0, 0, 30, 20)),
        ("pad", None, Layout(0, 0, 30, 20), Box(0, -5, 30, 25)),
        ("crop", None, Layout(0, 0, 30, 20), Box(5, 0, 25, 20)),
        # 20 x 10 on one row of three tiles: as wide as it is, so 5 on either side.
        ("crop", DYNAMIC, Layout(1, 3, 20, 10), Box(-5, 0, 25, 10)),
        # 60 x 60 on two by two tiles: three times as small.
        ("crop", DYNAMIC, Layout(2, 2, 60, 60), Box(0, 0, 60, 60)),
        ("pad", TilingConfig(type="sub_images"), Layout(2, 2, 30, 20),
         Box(0, -5, 30, 25)),
        ("pad", TilingConfig(type="crops", grids=[[2, 2]]), Layout(2, 2, 20, 30),
         Box(-5, 0, 25, 30)),
    ],
)  # fmt: skip
def test_what_tiles_cover(mode, tiling, layout, area):
    assert seen_area(way(mode, tiling), layout) == area


def test_padding_is_seen_and_what_is_cropped_is_dark():
    image = Image.new("RGB", (400, 200), (0, 200, 0))
    padded = np.asarray(draw_tiles(image, way("pad"), Layout(0, 0, 400, 200)))
    assert padded.shape == (440, 400, 3)  # a square, and a line of text
    assert (padded[150:250, 50:350] == (0, 200, 0)).all()
    colours = {tuple(pixel) for pixel in padded[60:90, 60:340].reshape(-1, 3)}
    assert colours == {(122, 116, 104), (160, 160, 160)}  # padding, hatched
    cropped = np.asarray(draw_tiles(image, way("crop"), Layout(0, 0, 400, 200)))
    assert (cropped[50:150, 5:95] == (0, 82, 0)).all()  # 200 x (1 - 150 / 255)
    assert (cropped[60:150, 110:290] == (0, 200, 0)).all()


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(5000, 1), (2, 3200)])
def test_a_picture_like_a_thread_is_drawn(mode, size):
    image = Image.new("RGB", size)
    for tiling, layout in ((None, Layout(0, 0, *size)), (DYNAMIC, Layout(2, 2, *size))):
        assert draw_tiles(image, way(mode, tiling), layout).size > (1, 1)


def test_the_overview_of_llava_next_is_the_first():
    """Its grid is numbered from 2 on; MM1.5's from 1 on."""
    image = Image.new("RGB", (40, 20))
    anyres = TilingConfig(type="anyres", grids=[[1, 2]])
    layout = Layout(1, 2, 40, 20)
    drawn = [
        np.asarray(draw_tiles(image, way("squash", tiling), layout))
        for tiling in (anyres, DYNAMIC)
    ]
    assert drawn[0].shape == drawn[1].shape
    assert (drawn[0] != drawn[1]).any()


# --- predicted time ------------------------------------------------------------------


def test_operations_by_hand():
    """Two for each weight and position; attention's scores and sums on top."""
    config = small_config(DENSE)
    found = operations(config, tiles=3, side=16, prompt=10)
    parts = count_parameters(config)
    weights = 2 * 16 * (parts.vision.total + parts.connector.total)
    scores = 2 * 4 * 16**2 * 16  # layers, 16 patches, 16 wide
    assert found.pictures == 3 * (weights + scores)
    larger = operations(config, tiles=3, side=32, prompt=10)
    assert 4 * found.pictures < larger.pictures < 16 * found.pictures
    more = operations(config, tiles=3, side=16, prompt=20)
    assert more.pictures == found.pictures and more.prompt > 2 * found.prompt


def test_a_speed_is_measured():
    wide = replace(VISION, hidden_size=64, intermediate_size=128)
    for number in (2, 4):
        assert 1e4 < measure_speed(wide, number) < 1e16
