"""The whole model: image tokens in their places, for any batch, with gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import DENSE, IMAGE, SPARSE, random_array, small_model

from helpers import assert_close, assert_equal
from mm1_mlx.errors import MM1Error
from mm1_mlx.models.mm1 import place_image_features

# --- place_image_features --------------------------------------------------------


def test_images_fill_their_slots_in_reading_order():
    text = mx.zeros((2, 4, 1))
    images = mx.array([[[10.0], [11]], [[20], [21]]])  # two images, two tokens each
    is_image = mx.array([[False, True, True, False], [True, True, False, False]])
    out = place_image_features(text, images, is_image)
    assert out[..., 0].tolist() == [[0, 10, 11, 0], [20, 21, 0, 0]]


def test_rows_with_different_numbers_of_images():
    """A peer gave row 0 the image of row 1."""
    text = -mx.ones((3, 6, 1))
    images = mx.array([[[10.0], [11]], [[20], [21]], [[30], [31]]])
    slots = [[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    out = place_image_features(text, images, mx.array(slots) == 1)
    assert out[..., 0].tolist() == [
        [10, 11, -1, 20, 21, -1],
        [-1] * 6,
        [-1, -1, -1, 30, 31, -1],
    ]


def test_an_image_may_be_interrupted_and_stand_at_the_ends():
    images = mx.array([[[1.0], [2], [3]]])
    slots = mx.array([[True, False, True, False, True]])
    out = place_image_features(mx.zeros((1, 5, 1)), images, slots)
    assert out[..., 0].tolist() == [[1, 0, 2, 0, 3]]


def test_no_image_changes_nothing():
    text = random_array(2, 3, 4)
    none = mx.zeros((0, 2, 4))
    assert place_image_features(text, none, mx.zeros((2, 3), mx.bool_)) is text


def test_features_take_the_type_of_the_text():
    text = random_array(1, 2, 4).astype(mx.bfloat16)
    images = random_array(1, 1, 4)
    out = place_image_features(text, images, mx.array([[True, False]]))
    assert out.dtype == mx.bfloat16
    assert_equal(out[:, :1], images.astype(mx.bfloat16))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_goes_to_the_features_and_to_the_text_beside_them(compiled):
    """In MLX 0.32 the gradient of `e[:, places] = features` has a wrong shape, and a
    peer's training of the connector fails on it."""
    text, images = random_array(2, 5, 3), random_array(3, 2, 3, seed=1)
    slots = mx.array([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]]) == 1
    weight = random_array(2, 5, 3, seed=2)

    def loss(text, images):
        return (place_image_features(text, images, slots) * weight).sum()

    gradient = mx.grad(loss, argnums=(0, 1))
    if compiled:
        gradient = mx.compile(gradient)
    to_text, to_images = gradient(text, images)
    is_slot = np.array(slots)
    assert_equal(to_text, np.where(is_slot[..., None], 0, np.array(weight)))
    assert_equal(to_images, np.array(weight)[is_slot].reshape(3, 2, 3))


# --- The model -------------------------------------------------------------------


def row(*parts: int | str) -> list[int]:
    """Ids; "image" is four slots."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE] * 4 if isinstance(part, str) else [part]
    return ids


def test_logits_are_float32_of_the_whole_vocabulary(model):
    logits = model(mx.array([row(1, "image", 9)]), random_array(1, 16, 16, 3))
    assert logits.shape == (1, 6, 90)
    assert logits.dtype == mx.float32


def test_rows_of_a_batch_see_their_own_images(model):
    rows = [row(1, "image", 5, "image", 8), row(1, 7, "image", 9, 10, 11, 12, 13)]
    length = max(map(len, rows))
    rows = [ids + [0] * (length - len(ids)) for ids in rows]  # nobody sees the end
    pixels = random_array(3, 16, 16, 3)
    together = model(mx.array(rows), pixels)
    assert_close(together[:1], model(mx.array(rows[:1]), pixels[:2]), atol=2e-5)
    assert_close(together[1:], model(mx.array(rows[1:]), pixels[2:]), atol=2e-5)


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", [list, mx.array])
def test_padded_rows_equal_their_solo_runs(text, kind):
    """As Processor pads them. Without left_padding the padding is read as text."""
    model = small_model(text)
    rows = [row(1, "image", 5, "image", 8), row(1, 7, "image"), row(1, 40, 41)]
    pixels = random_array(3, 16, 16, 3)
    pictures = [pixels[:2], pixels[2:], None]
    padding = [len(rows[0]) - len(ids) for ids in rows]
    batch = mx.array([[0] * p + ids for p, ids in zip(padding, rows, strict=True)])
    together = model(batch, pixels, left_padding=kind(padding))
    assert mx.isfinite(together).all().item()
    blind = model(batch, pixels)
    for i, (ids, picture, start) in enumerate(
        zip(rows, pictures, padding, strict=True)
    ):
        alone = model(mx.array([ids]), picture)
        assert_close(together[i : i + 1, start:], alone, atol=5e-5)  # order of sums
        if start:
            assert mx.abs(blind[i : i + 1, start:] - alone).max().item() > 1e-2
    nothing = model(batch[:1], pixels[:2], left_padding=kind([0]))
    assert_equal(nothing, model(batch[:1], pixels[:2]))


def test_left_padding_that_does_not_fit(model):
    ids = mx.array([[0, 1, 5], [1, 5, 9]])
    for wrong in ([1], [1, 0, 0], [3, 0], [-1, 0]):
        with pytest.raises(MM1Error, match=r"must be 2 numbers from 0 to 2: one for"):
            model(ids, left_padding=wrong)
    with pytest.raises(MM1Error, match="cache knows its own padding: give left_padd"):
        model(ids, None, model.make_cache(left_padding=[1, 0]), left_padding=[1, 0])


def test_order_of_images_matters(model):
    ids = mx.array([row(1, "image", 5, "image", 8)])
    pixels = random_array(2, 16, 16, 3)
    one, other = model(ids, pixels), model(ids, pixels[::-1])
    assert mx.abs(one[:, 5:] - other[:, 5:]).max().item() > 1e-3
    assert_close(one[:, 0], other[:, 0], atol=1e-6)  # before any image


def test_embed_takes_features_that_are_known(model):
    ids, pixels = mx.array([row(1, "image", 9)]), random_array(1, 16, 16, 3)
    features = model.encode_images(pixels)
    assert features.shape == (1, 4, 32)
    found = model.embed(ids, image_features=features)
    assert_equal(found, model.embed(ids, pixels))
    assert_equal(found[:, 1:5], features)
    assert_equal(found[:, 0], model.decoder.embed_tokens(ids[:, 0]))


def test_text_only_uses_no_encoder(model):
    ids = mx.array([[1, 5, 9]])
    assert_equal(model(ids), model.decoder(ids))


def test_the_parts_are_public(model):
    pixels = random_array(2, 16, 16, 3)
    features = model.vision(pixels)
    assert features.shape == (2, 16, 16)
    assert_equal(model.connector(features), model.encode_images(pixels))
    assert model.layers is model.decoder.layers
    assert len(model.make_cache()) == 3


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
def test_gradient_reaches_every_part(text):
    """Full training of encoder, connector and decoder, two rows, three images."""
    model = small_model(text)
    model.train()
    rows = [row(1, "image", 5, "image", 8), row(1, 7, "image", 9, 10, 11, 12, 13)[:11]]
    rows[1] += [14] * (len(rows[0]) - len(rows[1]))
    ids, pixels = mx.array(rows), random_array(3, 16, 16, 3)

    def loss(model):
        logits = model(ids[:, :-1], pixels)
        return nn.losses.cross_entropy(logits, ids[:, 1:], reduction="mean")

    _, gradient = nn.value_and_grad(model, loss)(model)
    untouched = [
        path
        for path, array in tree_flatten(gradient)
        if mx.abs(array).max().item() == 0 and not path.startswith("vision.norm_out")
    ]
    assert untouched == []


def test_cached_decoding_with_images_equals_the_full_forward(model):
    ids = mx.array([row(1, "image", 5, "image", 8, 9, 10)])
    pixels = random_array(2, 16, 16, 3)
    expected = model(ids, pixels)
    cache = model.make_cache()
    embeddings = model.embed(ids, pixels)
    found = [
        model.decoder(None, cache, embeddings[:, start : start + 3])
        for start in range(0, ids.shape[1], 3)
    ]
    assert_close(mx.concatenate(found, axis=1), expected, atol=2e-5)
