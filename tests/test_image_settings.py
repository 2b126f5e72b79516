"""preprocessor_config.json: read strictly, written so that others can read it."""

import pytest

from helpers import FIXTURES, assert_close, need
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.inputs import images
from mm1_mlx.inputs.images import ImageSettings, load_image, pixels

CLIP = {
    "crop_size": {"height": 56, "width": 56},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(images.CLIP_MEAN),
    "image_std": list(images.CLIP_STD),
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 56},
}
OLD_CLIP = CLIP | {"size": 56, "crop_size": 56}
SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 70, "width": 70},
}


def test_the_hubs_files_are_read():
    crop = ImageSettings(size=56, resize_mode="crop")
    half = (0.5, 0.5, 0.5)
    assert ImageSettings.from_dict(CLIP) == crop
    assert ImageSettings.from_dict(OLD_CLIP) == crop
    squash = ImageSettings(size=70, image_mean=half, image_std=half)
    assert ImageSettings.from_dict(SIGLIP) == squash
    pad = ImageSettings.from_dict(OLD_CLIP | {"resize_mode": "pad"})
    assert pad == ImageSettings(size=56, resize_mode="pad")
    assert ImageSettings.from_dict(CLIP | {"do_pad": True}) == pad
    assert ImageSettings.from_dict(OLD_CLIP | {"do_center_crop": None}) == crop
    raw = ImageSettings.from_dict({"size": 8, "do_normalize": False})
    assert raw.image_mean == (0, 0, 0) and raw.image_std == (1, 1, 1)


@pytest.mark.parametrize("mode", images.RESIZE_MODES)
def test_settings_round_trip(tmp_path, mode):
    settings = ImageSettings(
        size=48, resize_mode=mode, image_mean=(0.1, 0.2, 0.3), image_std=(1, 2, 3.5)
    )
    assert ImageSettings.from_dict(settings.to_dict()) == settings
    settings.write(tmp_path)
    assert ImageSettings.read(tmp_path) == settings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"size": 8, "colour": 1}, r"unknown keys \['colour'\]"),
        ({}, "'size' is missing"),
        ({"size": 0}, "size is 0"),
        ({"size": {"height": 8, "width": 9}}, "equal height and width"),
        ({"size": {"shortest_edge": 8}, "do_center_crop": False}, "needs do_center_cr"),
        ({"size": {"shortest_edge": 9}, "crop_size": 8}, r"equal to crop_size \(8\)"),
        ({"size": 8, "crop_size": 9, "resize_mode": "crop"}, r"equal to size \(8\)"),
        ({"size": 8, "resize_mode": "stretch"}, "'squash', 'crop', 'pad'"),
        ({"size": 8, "resample": 2}, r"resample is 2, but only 3 \(bicubic\)"),
        ({"size": 8, "do_resize": False}, "do_resize is False"),
        ({"size": 8, "do_rescale": False}, "do_rescale is False"),
        ({"size": 8, "rescale_factor": 1.0}, "only 1/255 is supported"),
        ({"size": 8, "image_mean": [0.5]}, "image_mean is .*three numbers"),
        ({"size": 8, "image_std": [1, 1, 0]}, "image_std is .*above 0"),
        ({"size": 8, "pad_color": [1, 2, 300]}, "from 0 to 255"),
        ([], "must be an object"),
    ],
)
def test_settings_are_strict(values, message):
    with pytest.raises(ConfigError, match=message):
        ImageSettings.from_dict(values)


def test_settings_file_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json does not"):
        ImageSettings.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ImageSettings.read(tmp_path)


@pytest.mark.parametrize("photo", ("portrait", "landscape", "tiny"))
@pytest.mark.parametrize("values", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_pixels_equal_transformers(photo, values):
    transformers = need("transformers")
    name = values["image_processor_type"] + "Pil"
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    reference = getattr(transformers, name)(**values)
    image = load_image(FIXTURES / "preprocessing" / f"{photo}.png")
    theirs = reference(image, return_tensors="np")["pixel_values"][0]
    ours = pixels(image, ImageSettings.from_dict(values))
    # One rounding more or less in float32
    assert_close(ours.transpose(2, 0, 1), theirs, atol=2e-6)
