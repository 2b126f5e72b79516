"""The memory of pictures in other sizes and in tiles: counted, and what would fit."""

import mlx.core as mx
import pytest
from small import small_model
from test_memory_counted import Peak
from test_memory_generate import EYES, WIDE

from mm1_mlx.config import TilingConfig
from mm1_mlx.errors import MemoryPlanError
from mm1_mlx.inference.memory_plan import Work, plan_answers, plan_generation
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.steps import encode_images

DYNAMIC = TilingConfig(type="dynamic", min_tiles=1, max_tiles=16)


def wide_model(**settings):
    model = small_model(WIDE, vision_config=EYES, **settings)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("side, tiles", [(96, 17), (192, 1), (192, 3)])
def test_what_pictures_take_is_what_is_predicted(side, tiles):
    """Tiles of MM1.5 go eight at a time, however many a picture has."""
    model = wide_model(tiling_config=DYNAMIC)
    pixels = mx.zeros((tiles, side, side, 3))
    mx.eval(pixels)
    with Peak() as peak:
        encode_images(model, pixels)
    work = Work(
        prompt=9, answer=1, pictures=tiles, tiles=tiles, number=4,
        side=None if side == EYES.image_size else side,
    )  # fmt: skip
    predicted = plan_generation(model.config, work, weights=0).pictures
    assert 0.85 * peak.bytes <= predicted <= 2 * peak.bytes


def test_what_is_counted():
    model = wide_model(tiling_config=DYNAMIC)

    def work(pictures, side=None, **asked):
        return plan_answers(model, Settings(**asked), [[5]], pictures, 9, side).work

    found = work([5, 1], 192, resolution="dynamic")
    assert (found.images, found.pictures, found.tiles) == (2, 6, 5)
    assert found.side == 192 and found.dynamic
    assert work([5]).dynamic and not work([5], resolution=1344).dynamic


def dynamic_plan(limit: int, **changes):
    """A picture of 16 tiles and an overview, four tokens each."""
    config = wide_model(tiling_config=DYNAMIC).config
    work = {
        "prompt": 1500, "answer": 2, "pictures": 17, "tiles": 17, "images": 1,
        "number": 4, "dynamic": True, "packed": True,
    }  # fmt: skip
    return plan_generation(config, Work(**(work | changes)), weights=0, limit=limit)


def test_fewer_tiles_are_advised_where_they_help():
    """The largest number that fits is told, and one more would not."""
    whole = dynamic_plan(1 << 40)
    some = dynamic_plan(1 << 40, pictures=4, tiles=4)
    assert some.pictures < whole.pictures
    limit = some.pictures
    with pytest.raises(
        MemoryPlanError, match=r"max_tiles=3 \(--max-tiles 3\)"
    ) as found:
        dynamic_plan(limit, prompt=20).check()
        raise MemoryPlanError(dynamic_plan(limit, prompt=20)._numbers())
    assert "resolution='native' (--resolution native)" in str(found.value)
    assert dynamic_plan(limit, pictures=4, tiles=4, prompt=20).fits
    assert not dynamic_plan(limit, pictures=5, tiles=5, prompt=20).fits


def test_a_smaller_size_is_advised_where_there_are_no_tiles():
    size = {"pictures": 1, "tiles": 1, "dynamic": False, "prompt": 20}
    limit = dynamic_plan(1 << 40, **size).peak
    plan = dynamic_plan(limit, side=672, **size)
    with pytest.raises(MemoryPlanError, match=r"resolution='native' \(--resolution"):
        plan.check()
    assert "max_tiles" not in plan._numbers()


def test_tiles_that_belong_together_are_not_taken_apart():
    tiling = TilingConfig(type="anyres", grids=[[4, 4]])
    config = wide_model(tiling_config=tiling).config
    work = Work(prompt=900, answer=2, pictures=17, tiles=17, images=1, number=4)
    plan = plan_generation(config, work, weights=0, limit=1000)
    with pytest.raises(MemoryPlanError) as found:
        plan.check()
    assert "native" not in str(found.value) and "max_tiles" not in str(found.value)
