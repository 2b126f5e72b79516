"""When a kernel is used: what is forced, the user's settings, the defaults."""

import json
import os
import stat

import mlx.core as mx
import pytest

from helpers import assert_equal
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.errors import ConfigError
from mm1_mlx.kernels import metal, trial
from mm1_mlx.kernels.metal import (
    MetalKernel,
    bits_of,
    chosen,
    forced,
    has_metal,
    settings_file,
    user_choices,
    watched,
    write_choices,
)

DOUBLE = MetalKernel(
    "mm1_test_double",
    inputs=["x"],
    outputs=["y"],
    source="y[thread_position_in_grid.x] = x[thread_position_in_grid.x] * "
    "as_type<float>(BY);",
)


def double(x: mx.array) -> mx.array:
    size = (x.size, 1, 1)
    return DOUBLE(
        [x],
        shapes=[x.shape],
        dtypes=[x.dtype],
        grid=size,
        threadgroup=size,
        template=[("BY", bits_of(2.0))],
    )[0]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A settings file of the test's own, on a machine with Metal."""
    file = tmp_path / "deep" / "settings.json"
    monkeypatch.setenv("MM1_MLX_SETTINGS", str(file))
    monkeypatch.setattr(metal, "has_metal", lambda: True)
    monkeypatch.setattr(trial, "proven", lambda name: True)
    user_choices.cache_clear()
    yield file
    user_choices.cache_clear()


def test_without_metal_nothing_is_chosen(monkeypatch):
    monkeypatch.setattr(metal, "has_metal", lambda: False)
    assert not chosen("router") and not chosen("router", default=True)
    with forced("router"):
        assert chosen("router") and not chosen("add_norm")


def test_a_cpu_stream_is_no_place_for_metal():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert not has_metal()
    finally:
        mx.set_default_device(before)


def test_forced_over_settings_over_default(settings):
    assert chosen("router") and not chosen("routed_experts", default=False)
    write_choices({"router": False, "routed_experts": True})
    assert not chosen("router") and chosen("routed_experts", default=False)
    assert chosen("add_norm")
    with forced("router"):
        assert chosen("router") and not chosen("routed_experts", default=False)
        with forced():
            assert not chosen("router")
        assert chosen("router")
    assert not chosen("router")


def test_settings_are_added_to_what_is_there(settings):
    assert settings_file() == settings
    assert user_choices() == {}
    assert write_choices({"router": False, "a": True}) == settings
    kept = json.loads(settings.read_text())
    settings.write_text(json.dumps(kept | {"theme": "dark"}))
    write_choices({"a": False, "b": True})
    assert json.loads(settings.read_text()) == {
        "kernels": {"router": False, "a": False, "b": True},
        "theme": "dark",
    }
    assert user_choices() == {"router": False, "a": False, "b": True}
    assert os.listdir(settings.parent) == ["settings.json"]  # no draft is left


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"kernels": {"router": 1}}', '{"kernels": []}', "\xff"]
)
def test_broken_settings_are_refused_and_kept(settings, text):
    settings.parent.mkdir()
    settings.write_bytes(text.encode("latin-1"))
    for use in (user_choices, lambda: write_choices({"router": True})):
        with pytest.raises(ConfigError, match=r"settings\.json is broken: expected"):
            use()
    assert settings.read_bytes() == text.encode("latin-1")


def test_settings_that_cannot_be_written(settings, tmp_path, monkeypatch):
    (tmp_path / "deep").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=r"cannot be written .*MM1_MLX_SETTINGS"):
        write_choices({"router": True})


def test_a_failed_write_leaves_the_old_settings(settings, monkeypatch):
    write_choices({"router": True})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metal.os, "replace", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_choices({"router": False})
    assert json.loads(settings.read_text()) == {"kernels": {"router": True}}
    assert os.listdir(settings.parent) == ["settings.json"]


def test_the_file_can_be_read_as_others_are(settings):
    """A draft's permissions are the owner's alone; a settings file's are as usual."""
    write_choices({"router": True})
    usual = settings.parent / "usual"
    usual.write_text("")
    assert stat.S_IMODE(settings.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_the_usual_place_is_in_the_home_folder(monkeypatch):
    monkeypatch.delenv("MM1_MLX_SETTINGS", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(settings_file()) == "/somewhere/.config/mm1_mlx/settings.json"


@needs_host
def test_a_kernel_is_built_for_the_host_and_for_metal_again():
    x = mx.array([1.0, -3.0, 0.5])
    with host_kernels(), watched() as names:
        assert_equal(double(x), x * 2)
    assert names == ["mm1_test_double"]
    if not has_metal():
        with pytest.raises(RuntimeError, match="No Metal back-end"):
            mx.eval(double(x))


@pytest.mark.metal
def test_a_kernel_on_a_mac():
    x = mx.array([1.0, -3.0, 0.5])
    assert_equal(double(x), x * 2)


@pytest.mark.parametrize("number", [1e-5, 1.0, -2.5, 0.0])
def test_a_number_by_its_bits(number):
    back = mx.array([bits_of(number)], mx.int32).view(mx.float32)
    assert_equal(back, mx.array([number]))
