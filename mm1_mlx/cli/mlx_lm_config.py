"""mlx-lm's YAML keys of a fine-tuning run, where they mean what a flag here means.

Most have the names of flags already. The others are said in our flags where that is the
same, passed over where they hold what is done anyway, and refused, with what to write
instead, where the run would be another one than in mlx-lm.
"""

from collections.abc import Collection
from typing import Any

from mm1_mlx.errors import UsageError

_PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip

# Keys that may hold this only (None and what is empty, too), and what to do else.
_ONLY: dict[str, tuple[Any, str]] = {
    "mask_prompt": (True, "only answers are learned here, as with mask_prompt: true"),
    "resume_adapter_file": (
        None,
        "use --resume, which goes on from the folder of adapter_path",
    ),
    "clear_cache_threshold": (0, "memory is not cleared by a threshold here"),
    "trust_remote_code": (False, "no code of a model's folder is ever run"),
    "hf_dataset": (None, "here data names it, as OWNER/NAME, and its columns are ours"),
    "config": (None, "a file cannot name another one"),
}
_PASSED_OVER = ("test", "test_batches")  # test.jsonl is measured where there is one
# What no file of ours has: such a file means batches as mlx-lm does.
_THEIRS = (
    "lora_parameters", "lr_schedule", "val_batches", "optimizer_config", "test",
    "mask_prompt", "resume_adapter_file", "report_to", "clear_cache_threshold",
)  # fmt: skip


def from_mlx_lm(values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A file's values under our own keys. known: those. Raises UsageError."""
    theirs = any(values.get(key) is not None for key in _THEIRS)
    found = dict(values)
    for key in _PASSED_OVER:
        found.pop(key, None)
    for key, (only, instead) in _ONLY.items():
        if key in found and key not in known:
            value = found.pop(key)
            if value is not None and value != "" and value != only:
                raise UsageError(f"the config has {key}: {value}, but {instead}")
    if isinstance(found.get("train"), bool) and not found.pop("train"):
        raise UsageError("the config has train: false, but this command trains")
    _check_batches(found, theirs)
    for key, says in _SAID.items():
        if (value := found.pop(key, None)) is None:
            continue
        for ours, said in says(value, found).items():
            if ours in values and ours not in ("learning_rate", "warmup"):
                raise UsageError(f"the config has {ours} and {key}, which says it, too")
            found[ours] = said
    return found


def _check_batches(found: dict, theirs: bool) -> None:
    steps = found.get("grad_accumulation_steps", 1)
    if theirs and steps not in (None, 1):
        size = found.get("batch_size", 4)
        raise UsageError(
            f"the config has mlx-lm's keys and grad_accumulation_steps: {steps}; there "
            f"batch_size ({size}) and iters count micro-batches, here updates: give "
            f"--batch-size, --iters and --grad-accumulation-steps by hand"
        )


def _object(key: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) - set(known):
        raise UsageError(
            f"the config has {key}: {value}, but it must be a mapping of "
            f"{', '.join(known)}"
        )
    return {name: held for name, held in value.items() if held is not None}


def _lora_parameters(value: Any, found: dict) -> dict[str, Any]:
    value = _object("lora_parameters", value, ("keys", "rank", "scale", "dropout"))
    if "keys" in value:
        value["projections"] = _projections(value.pop("keys"))
    return value


def _projections(keys: Any) -> str:
    if not isinstance(keys, list) or not keys:
        raise UsageError(f"lora_parameters has keys: {keys}, but no list of names")
    names = [str(key).rpartition(".")[2] for key in keys]
    for key, name in zip(keys, names, strict=True):
        if name not in _PROJECTIONS:
            raise UsageError(
                f"lora_parameters has the key '{key}', but pairs are put beside "
                f"{', '.join(_PROJECTIONS)}; other parts go into 'train', see --help"
            )
    return ",".join(dict.fromkeys(names))


def _lr_schedule(value: Any, found: dict) -> dict[str, Any]:
    known = ("name", "warmup", "warmup_init", "arguments")
    value = _object("lr_schedule", value, known)
    name, arguments = value.get("name"), value.get("arguments")
    if name != "cosine_decay":
        raise UsageError(
            f"lr_schedule is {name}, but the rate falls by a cosine here: take "
            f"cosine_decay, or learning_rate, warmup and floor in place of lr_schedule"
        )
    try:
        peak, steps, *end = [float(number) for number in arguments or ()]
        warmup, iters = int(value.get("warmup", 0)), int(found.get("iters", 1000))
        start = float(value.get("warmup_init", 0))
    except (TypeError, ValueError):
        raise UsageError(
            f"lr_schedule has the arguments {arguments}, but they must be [peak, "
            f"steps, end]"
        ) from None
    if steps != iters - warmup or len(end) > 1 or start > 0.1 * peak:
        raise UsageError(
            f"lr_schedule warms up from {start:g} in {warmup} steps and decays in "
            f"{steps:g}, but here the first begins near 0 and both together are iters "
            f"({iters}): write [{peak:g}, {iters - warmup}, end]"
        )
    floor = end[0] / peak if end else 0.0
    return {"learning_rate": peak, "warmup": warmup, "floor": floor}


def _optimizer_config(value: Any, found: dict) -> dict[str, Any]:
    chosen = found.get("optimizer", "adamw")
    if not isinstance(value, dict):
        raise UsageError(f"the config has optimizer_config: {value}, but no mapping")
    own = value.get(chosen) or {}
    held = _object(f"optimizer_config of {chosen}", own, ("weight_decay",))
    return held


def _val_batches(value: Any, found: dict) -> dict[str, Any]:
    size = found.get("batch_size", 4)
    if value == -1:
        return {"val_samples": 10**9}
    if not all(type(number) is int for number in (value, size)):
        raise UsageError(f"the config has val_batches: {value}, but no whole number")
    return {"val_samples": value * size}


def _report_to(value: Any, found: dict) -> dict[str, Any]:
    if value != "wandb":
        raise UsageError(f"the config has report_to: {value}, but only wandb is known")
    return {"wandb": found.pop("project_name", None) or "mm1_mlx"}


def _project_name(value: Any, found: dict) -> dict[str, Any]:
    return {}  # without report_to it says nothing


_SAID = {
    "lora_parameters": _lora_parameters,
    "lr_schedule": _lr_schedule,
    "optimizer_config": _optimizer_config,
    "val_batches": _val_batches,
    "report_to": _report_to,
    "project_name": _project_name,
}
