"""A saved cache goes on where it was, and a foreign file is refused."""

import mlx.core as mx
import pytest
from small import small_decoder, small_model

from helpers import assert_equal
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inference.generation import generate_step
from mm1_mlx.inference.prompt_cache import load_cache, save_cache
from mm1_mlx.models.cache import QuantizedKVCache

IDS = [5, 17, 33, 8, 71, 12]


@pytest.mark.parametrize("settings", [{}, {"kv_bits": 8}, {"kv_bits": 4}], ids=str)
@pytest.mark.parametrize("padding", [None, [0, 2]])
def test_a_saved_cache_goes_on(tmp_path, settings, padding):
    decoder = small_decoder()
    cache = decoder.make_cache(left_padding=padding, **settings)
    ids = mx.array([IDS, [0, 0, *IDS[:4]]])
    decoder(ids, cache)
    path = tmp_path / "prompt.safetensors"
    save_cache(path, cache, {"model": "small"})
    found, metadata = load_cache(path)
    assert metadata == {"model": "small"}
    assert [type(entry) for entry in found] == [type(entry) for entry in cache]
    assert [entry.offset for entry in found] == [6, 6, 6]
    assert found[0].left_padding == padding
    if settings:
        assert isinstance(found[0], QuantizedKVCache)
        assert found[0].bits == settings["kv_bits"]
    step = mx.array([[7], [9]])
    for _ in range(3):
        assert_equal(decoder(step, found), decoder(step, cache))
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_answers_continue_from_a_file(tmp_path):
    model = small_model()
    ids = mx.array([[1, *IDS]])
    whole = [token for token, _ in generate_step(model, ids, max_tokens=8)]
    cache = model.make_cache()
    model.decoder.hidden(ids[:, :4], cache)
    save_cache(tmp_path / "c.safetensors", cache)
    for _ in range(2):  # the file is not used up
        loaded, _ = load_cache(tmp_path / "c.safetensors")
        steps = generate_step(model, ids[:, 4:], cache=loaded, max_tokens=8)
        assert [token for token, _ in steps] == whole


def test_an_empty_cache_and_an_overwritten_file(tmp_path):
    decoder = small_decoder()
    path = tmp_path / "c.safetensors"
    cache = decoder.make_cache()
    decoder(mx.array([IDS]), cache)
    save_cache(path, cache)
    save_cache(path, decoder.make_cache(left_padding=[1, 0]))
    found, metadata = load_cache(path)
    assert [entry.offset for entry in found] == [0, 0, 0]
    assert found[0].left_padding == [1, 0]
    assert metadata == {}


def test_files_that_are_no_cache(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not end in \.safetensors"):
        save_cache(tmp_path / "c.bin", [])
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_cache(tmp_path / "none.safetensors")
    path = tmp_path / "c.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="is not a saved cache of this version"):
        load_cache(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        load_cache(path)


@pytest.mark.parametrize(
    "entries, reason",
    [
        ('[{"left_padding": null}]', "KeyError: '0.1'"),
        ('[{"left_padding": null, "bits": 5}]', "ValueError: 5 bits"),
        ("[5]", "AttributeError|TypeError"),
        ("{", "JSONDecodeError"),
    ],
)
def test_broken_caches(tmp_path, entries, reason):
    path = tmp_path / "c.safetensors"
    about = {"format": "mm1_mlx cache 1", "entries": entries, "metadata": "{}"}
    mx.save_safetensors(str(path), {"0.0": mx.zeros((1, 1, 2, 8))}, metadata=about)
    with pytest.raises(CheckpointError, match=f"is a broken cache .*({reason})"):
        load_cache(path)


def test_arrays_must_fit_together(tmp_path):
    path = tmp_path / "c.safetensors"
    about = {
        "format": "mm1_mlx cache 1",
        "entries": '[{"left_padding": null}]',
        "metadata": "{}",
    }
    arrays = {"0.0": mx.zeros((1, 1, 2, 8)), "0.1": mx.zeros((1, 1, 3, 8))}
    mx.save_safetensors(str(path), arrays, metadata=about)
    with pytest.raises(CheckpointError, match="arrays of layer 0 do not fit together"):
        load_cache(path)
