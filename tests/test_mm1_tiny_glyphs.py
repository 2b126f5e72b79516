"""mm1-tiny's pictures to read, pictures to decline, and scenes drawn elsewhere."""

import math
import random

import numpy as np
import pytest

from examples.mm1_tiny import elsewhere, glyph_sources, glyphs, photos, textures
from examples.mm1_tiny.scenes import Scene, Thing, sample_scene
from examples.mm1_tiny.words import TEST_WORDS, TRAIN_WORDS
from helpers import need, needs, run_python
from mm1_mlx.errors import DatasetError


@pytest.fixture
def fresh_sources():
    """Forget what was found on this machine, before and after a test."""
    caches = (
        glyph_sources.fonts,
        glyph_sources.handwriting,
        glyph_sources._font_numbers,
        glyph_sources._scaled_font,
        glyph_sources.rendered_glyph,
        photos.photos,
        photos._weights,
    )
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def without(package, monkeypatch, module):
    found = glyph_sources.package_folder
    monkeypatch.setattr(
        module, "package_folder", lambda name: None if name == package else found(name)
    )


# --- glyphs --------------------------------------------------------------------------


def sample_both(seed, split="train"):
    rng = random.Random(seed)
    return glyphs.sample_digits(rng, split), glyphs.sample_word(rng, split)


@needs("sklearn")
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_same_seed_gives_the_same_picture(split):
    for seed in range(20):
        for one, two in zip(
            sample_both(seed, split), sample_both(seed, split), strict=True
        ):
            assert one.image.tobytes() == two.image.tobytes()
            assert (one.text, one.regions) == (two.text, two.regions)
    assert sample_both(1)[1].image.tobytes() != sample_both(2)[1].image.tobytes()


@needs("sklearn")
def test_regions_spell_the_text():
    for seed in range(100):
        number, word = sample_both(seed)
        assert number.text.isdecimal() and 1 <= len(number.text) <= 3
        assert [r.text for r in number.regions] == [f"digit {c}" for c in number.text]
        assert word.text.isupper() and 2 <= len(word.text) <= 5
        expected = [f"letter {c}" for c in word.text.lower()]
        assert [r.text for r in word.regions] == expected


@needs("sklearn")
@pytest.mark.parametrize("split", ["train", "test"])
def test_canvas_and_glyph_sizes_stay_in_their_ranges(split):
    for seed in range(150):
        number, word = sample_both(seed, split)
        # Small letters may all be low, as in "nose": two thirds of 0.24 at least.
        low = set(word.text) <= set("ACEMNORSUVWXZ")
        for sample, least in ((number, 0.22), (word, 0.15 if low else 0.18)):
            width, height = sample.image.size
            assert sample.image.mode == "RGB"
            assert 64 <= max(width, height) <= 224
            assert max(width, height) <= 2.5 * min(width, height)
            tallest = max(r.box[3] - r.box[1] for r in sample.regions) * height
            assert tallest >= (least - 0.005) * max(width, height)


def ink_of(image):
    """Pixels that are clearly not paper: (height, width) bool."""
    pixels = np.asarray(image, np.float32)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.abs(pixels - np.median(edge, 0)).sum(-1)
    return distance > 0.6 * np.quantile(distance, 0.999)


@needs("sklearn")
def test_boxes_hold_all_ink_and_little_else():
    for seed in range(150):
        for sample in sample_both(seed):
            ink = ink_of(sample.image)
            height, width = ink.shape
            outside = ink.copy()
            for region in sample.regions:
                x0, y0, x1, y1 = region.box
                assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
                # One pixel of slack: bitmaps are placed on whole pixels.
                rows = slice(max(0, int(y0 * height) - 1), math.ceil(y1 * height) + 1)
                columns = slice(max(0, int(x0 * width) - 1), math.ceil(x1 * width) + 1)
                outside[rows, columns] = False
                assert ink[rows, columns].mean() > 0.04, (seed, region)
            assert outside.sum() <= 0.02 * ink.sum(), (seed, sample.text)


@needs("sklearn")
def test_pictures_have_contrast():
    for seed in range(100):
        for sample in sample_both(seed):
            grey = np.asarray(sample.image.convert("L"), np.float32)
            ink = ink_of(sample.image)
            assert abs(grey[ink].mean() - grey[~ink].mean()) > 45, (seed, sample.text)


def test_train_and_test_words_are_disjoint():
    assert len(TRAIN_WORDS) == len(set(TRAIN_WORDS)) >= 300
    assert len(TEST_WORDS) == len(set(TEST_WORDS)) >= 120
    assert not set(TRAIN_WORDS) & set(TEST_WORDS)
    for word in TRAIN_WORDS + TEST_WORDS:
        assert word.islower() and word.isascii() and 2 <= len(word) <= 5


def test_random_letters_never_spell_a_test_word():
    rng = random.Random(0)
    words = [glyphs._random_letters(rng) for _ in range(20000)]
    assert not set(words) & set(TEST_WORDS)
    assert {len(word) for word in words} == {2, 3, 4, 5}
    assert set("".join(words)) == set("abcdefghijklmnopqrstuvwxyz")


def test_test_words_come_from_the_test_list():
    rng = random.Random(0)
    for _ in range(100):
        assert glyphs.sample_word(rng, "test").text.lower() in TEST_WORDS


@needs("sklearn")
def test_handwriting_is_split_by_sample():
    sklearn_datasets = need("sklearn.datasets")
    labels = sklearn_datasets.load_digits().target
    test = np.arange(len(labels)) % 5 == 4
    for split, chosen in (("train", labels[~test]), ("test", labels[test])):
        counts = [len(samples) for samples in glyph_sources.handwriting(split)]
        assert counts == np.bincount(chosen, minlength=10).tolist()
    bitmaps = [
        {g.mask.tobytes() for samples in glyph_sources.handwriting(s) for g in samples}
        for s in ("train", "test")
    ]
    assert not bitmaps[0] & bitmaps[1]


@needs("sklearn")
def test_half_of_the_numbers_are_handwritten():
    rng = random.Random(0)
    sources = [glyphs.sample_digits(rng).source for _ in range(400)]
    assert 0.42 < sources.count("handwritten") / 400 < 0.58


@needs("matplotlib")
def test_one_font_family_is_for_the_test_only():
    families = {
        split: {
            glyph_sources.fonts()[glyph_sources.pick_font(rng, split)].family
            for rng in map(random.Random, range(400))
        }
        for split in ("train", "test")
    }
    assert families["test"] - families["train"] == {glyph_sources.HELD_OUT_FAMILY}
    assert families["train"] < families["test"] and len(families["train"]) == 5


def test_without_matplotlib_the_font_of_pillow_remains(monkeypatch, fresh_sources):
    without("matplotlib", monkeypatch, glyph_sources)
    assert [f.name for f in glyph_sources.fonts()] == ["Pillow default"]
    for split in ("train", "test"):
        assert glyphs.sample_word(random.Random(0), split).source == "Pillow default"


def test_without_scikit_learn_digits_say_what_to_install(monkeypatch, fresh_sources):
    without("sklearn", monkeypatch, glyph_sources)
    with pytest.raises(DatasetError, match=r"scikit-learn are missing.*\[train\]"):
        for seed in range(20):
            glyphs.sample_digits(random.Random(seed))


@pytest.mark.parametrize(
    "sample", [glyphs.sample_digits, glyphs.sample_word, photos.sample_unknown]
)
def test_an_unknown_split_is_refused(sample):
    with pytest.raises(DatasetError, match="split is 'valid'"):
        sample(random.Random(0), "valid")


@pytest.mark.parametrize("ask", [glyphs.digit_questions, glyphs.word_questions])
def test_questions_have_many_wordings(ask):
    wordings = {ask(random.Random(seed)) for seed in range(300)}
    assert len(wordings) >= 8
    assert all(w[0].isupper() and w[-1] in "?." for w in wordings)


# --- photographs and textures --------------------------------------------------------


@needs("skimage", "sklearn")
@pytest.mark.parametrize("split", ["train", "test"])
def test_unknown_pictures_depend_on_the_seed_only(split):
    def sample(seed):
        return photos.sample_unknown(random.Random(seed), split)

    for seed in range(20):
        image = sample(seed)
        assert image.mode == "RGB" and 24 <= min(image.size) <= max(image.size) <= 288
        assert image.tobytes() == sample(seed).tobytes()
        assert np.asarray(image).std() > 5


@needs("skimage", "sklearn")
def test_photographs_are_split_by_file():
    names = {
        split: {photo.path for photo, _ in photos.photos(split)}
        for split in ("train", "test")
    }
    assert len(names["test"]) >= 6
    assert not names["train"] & names["test"]


@needs("skimage", "sklearn")
def test_the_test_split_is_plain_crops_of_its_photographs(monkeypatch):
    def refuse(*args):
        raise AssertionError("the test split has no textures and no colour changes")

    for name in ("texture", "_changed", "_mixed", "_faces"):
        monkeypatch.setattr(photos, name, refuse)
    colours = set()
    for _, photo in photos.photos("test"):
        colours |= {c for _, c in photo.getcolors(photo.width * photo.height)}
    rng = random.Random(0)
    for _ in range(40):
        image = photos.sample_unknown(rng, "test")
        assert {c for _, c in image.getcolors(288 * 288)} <= colours


def test_missing_photographs_say_what_to_install(monkeypatch, fresh_sources):
    without("skimage", monkeypatch, photos)
    with pytest.raises(DatasetError, match=r"of skimage is missing.*\[train\]"):
        photos.sample_unknown(random.Random(0), "test")


def busy(pixels):
    """The share of neighbouring pixels that differ."""
    return (np.abs(np.diff(pixels.astype(np.int32), axis=1)).sum(-1) > 0).mean()


def test_each_kind_of_texture_is_repeatable_and_busier_than_a_scene():
    scene = elsewhere._numpy(
        sample_scene(random.Random(0), min_things=4),
        (96, 96), 96, [(0, 0, 0)] * 4, (255, 255, 255), 0.4,
    )  # fmt: skip
    for number in range(len(textures._KINDS)):
        image = textures.texture(number)
        assert image.mode == "RGB" and image.size == (96, 96)
        assert busy(np.asarray(image)) > 0.3 > 3 * busy(scene)
        textures.texture.cache_clear()
        assert textures.texture(number).tobytes() == image.tobytes()


@needs("skimage", "sklearn", "matplotlib")
def test_drawing_imports_none_of_the_packages_it_reads():
    code = (
        "import random, sys\n"
        "from examples.mm1_tiny import glyphs, photos\n"
        "for seed in range(5):\n"
        "    rng = random.Random(seed)\n"
        "    glyphs.sample_digits(rng), glyphs.sample_word(rng)\n"
        "    photos.sample_unknown(rng), photos.sample_unknown(rng, 'test')\n"
        "slow = {'matplotlib', 'sklearn', 'skimage', 'scipy', 'mlx'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    run = run_python("-c", code)
    assert run.stdout.strip() == "[]", run.stderr


# --- scenes drawn elsewhere ----------------------------------------------------------

BACKENDS = [
    pytest.param(name, marks=needs(*([] if name == "numpy" else [name])))
    for name in elsewhere._BACKENDS
]
STAR = 0.45


def fill(backend, thing, longer=400, size=(400, 300)):
    """How much of each pixel the thing covers, 0..1: (height, width)."""
    scene = Scene((thing,), size[0] / longer, size[1] / longer)
    pixels = elsewhere._BACKENDS[backend](
        scene, size, longer, [(0, 0, 0)], (255, 255, 255), STAR
    )
    assert pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.uint8
    return 1 - pixels[..., 0] / 255.0


def true_area(shape, r):
    return {
        "circle": math.pi * r * r,
        "square": 2 * r * r,
        "triangle": 3 * math.sqrt(3) / 4 * r * r,
        "star": 5 * math.sin(math.pi / 5) * STAR * r * r,
    }[shape]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star"])
@pytest.mark.parametrize("angle", [0.0, 25.0, 200.0])
def test_every_backend_fills_the_right_place(backend, shape, angle):
    thing = Thing("black", shape, 0.6, 0.3, 0.2, angle)
    cover = fill(backend, thing)

    radius = 0.2 * 400
    # Without antialiasing the edge is off by up to half a pixel along its length.
    assert cover.sum() == pytest.approx(true_area(shape, radius), rel=0.025)
    y, x = np.mgrid[0:300, 0:400] + 0.5
    # All these shapes have their centroid at their centre.
    assert (x * cover).sum() / cover.sum() == pytest.approx(240, abs=0.7)
    assert (y * cover).sum() / cover.sum() == pytest.approx(120, abs=0.7)
    # Corners point where the scene says.
    for px, py in thing.corners(STAR)[:: 2 if shape == "star" else 1]:
        inner = 0.93 * np.array([px - 0.6, py - 0.3]) + (0.6, 0.3)
        outer = 1.07 * np.array([px - 0.6, py - 0.3]) + (0.6, 0.3)
        assert cover[int(inner[1] * 400), int(inner[0] * 400)] > 0.5
        assert cover[int(outer[1] * 400), int(outer[0] * 400)] < 0.5


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree_with_each_other(backend):
    for seed in range(8):
        rng = random.Random(seed)
        for thing in sample_scene(rng).things:
            if thing.y + thing.radius > 0.75:
                continue
            one, two = fill("numpy", thing) > 0.5, fill(backend, thing) > 0.5
            assert (one & two).sum() / (one | two).sum() > 0.94, thing


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_scenes_have_their_colours_and_aspect(backend):
    for seed in range(25):
        scene = sample_scene(random.Random(seed), pairs="all")
        image = elsewhere.draw(scene, random.Random(seed), backend)
        again = elsewhere.draw(scene, random.Random(seed), backend)
        assert image.tobytes() == again.tobytes()
        longer = max(image.size)
        assert image.mode == "RGB" and 96 <= longer <= 1024
        assert abs(image.width - scene.width * longer) <= 1
        assert abs(image.height - scene.height * longer) <= 1
        for thing in scene.things:
            if thing.shape in ("moon", "ring"):
                continue  # nothing at their centre
            middle = image.getpixel((int(thing.x * longer), int(thing.y * longer)))
            near = min(
                elsewhere.PALETTES,
                key=lambda name: min(
                    math.dist(middle, elsewhere._rgb(code))
                    for code in elsewhere.PALETTES[name]
                ),
            )
            assert near == thing.colour, (seed, thing, middle)


def test_things_stand_out_from_the_background():
    rng = random.Random(3)
    for _ in range(2000):
        scene = sample_scene(rng, pairs="all")
        colours, paper = elsewhere.choose_colours(scene, rng)
        # 4 things from black over grey to white leave less, but never nothing.
        least = 90 if len({thing.colour for thing in scene.things}) < 3 else 60
        assert min(math.dist(colour, paper) for colour in colours) > least


def test_things_of_one_colour_share_their_shade():
    things = [Thing(c, "circle", 0.2, 0.2, 0.1) for c in ("red", "blue", "red")]
    colours, _ = elsewhere.choose_colours(Scene(tuple(things)), random.Random(0))
    assert colours[0] == colours[2] != colours[1]


def test_an_unknown_backend_is_refused():
    with pytest.raises(DatasetError, match=r"backend is 'crayon'\. Choose from"):
        elsewhere.draw(sample_scene(random.Random(0)), random.Random(0), "crayon")
