"""How an adapter's pictures are read, in the forms that have no place for it."""

import json
from types import SimpleNamespace

import pytest
from adapter_kit import LORA, converted, respell, trained

from mm1_mlx.adapters.about import config_of, describe_adapter, reading_of
from mm1_mlx.adapters.folder import form_of
from mm1_mlx.convert.adapters.interchange import convert_adapter
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_adapter, load_model


@pytest.mark.parametrize("form", ["peft", "mlx-lm"])
def test_how_pictures_are_read_goes_there_and_back(form, tmp_path, tmp_path_factory):
    """In a file of its own: the others have no place for it, and one line says so."""
    model = converted("decoder_mixtral", tmp_path_factory)
    folders = [tmp_path / name for name in ("ours", "there", "back")]
    ours, there, back = folders
    trained(model, ours, parts={"attention": LORA})
    config = json.loads((ours / "adapter_config.json").read_text())
    told = []
    convert_adapter(ours, there, model, form, tell=told.append)
    assert not (there / "mm1_mlx.json").exists()  # the model's own needs none
    assert not any("trained with" in line for line in told)
    config["mm1_mlx"] |= {"resolution": "dynamic", "max_tiles": 4}
    respell(ours, **config)
    convert_adapter(ours, there, model, form, overwrite=True, tell=told.append)
    (line,) = [line for line in told if "trained with" in line]
    assert "with resolution dynamic, max_tiles 4: mm1_mlx.json keeps" in line
    assert form_of(there) == form and "mm1_mlx" not in json.loads(
        (there / "adapter_config.json").read_text()
    )
    convert_adapter(there, back, model)
    reading = {"resolution": "dynamic", "max_tiles": 4}
    for folder in folders:
        assert reading_of(config_of(folder)) == reading
        described = describe_adapter(folder)
        assert {key: described[key] for key in reading} == reading
        processor = SimpleNamespace(resolution=None, max_tiles=None)
        load_adapter(load_model(model), folder, processor=processor)
        assert vars(processor) == reading | {"names": (None, str(folder))}
    assert describe_adapter(there)["form"] == {"peft": "PEFT"}.get(form, form)
    (there / "mm1_mlx.json").write_text('{"mm1_mlx": {"resolution": "huge"}}')
    with pytest.raises(
        CheckpointError, match=r"resolution of mm1_mlx\.json cannot be 'huge'"
    ):
        load_adapter(load_model(model), there)
    respell(ours, mm1_mlx={**config["mm1_mlx"], "resolution": None, "max_tiles": None})
    convert_adapter(ours, there, model, form, overwrite=True)
    assert not (there / "mm1_mlx.json").exists()  # that of before is gone
