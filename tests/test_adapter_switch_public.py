"""Several adapters beside each other, as a user writes it."""

import mlx.core as mx

import mm1_mlx
from helpers import need_tiny
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt

LORA = Target(pairs=PairSettings(rank=4, scale=2.0))


def test_the_public_names(tmp_path):
    model, processor = mm1_mlx.load(need_tiny())
    plan, folders = Plan(parts={"attention": LORA, "mlp": LORA}), {}
    for seed, name in enumerate(("one", "two")):
        other, _ = mm1_mlx.load(need_tiny())
        adapt(other, plan, seed)
        mx.random.seed(seed)
        weights = {
            name: mx.random.normal(a.shape) if name.endswith("lora_b") else a
            for name, a in adapter_weights(other).items()
        }
        folders[name] = tmp_path / name
        write_adapter(folders[name], weights, adapter_config(plan, "mm1-tiny"))
    adapters = mm1_mlx.load_adapters(model, folders)
    assert isinstance(adapters, mm1_mlx.Adapters)
    given = set()
    for name in ("one", "two", None):
        mm1_mlx.use_adapter(model, name)
        result = mm1_mlx.generate(model, processor, "What is it?", max_tokens=6)
        given.add(result.token_ids)
        single, _ = mm1_mlx.load(need_tiny(), adapter_path=folders.get(name))
        wanted = mm1_mlx.generate(single, processor, "What is it?", max_tokens=6)
        assert result.token_ids == wanted.token_ids
    assert len(given) == 3
    mm1_mlx.drop_adapter(model, "one")
    assert adapters.names == ("two",)
