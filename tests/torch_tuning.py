"""One small random model twice, in torch and converted by us, to be fine-tuned alike.

Torch's side is transformers' model and loss, with PEFT's layers where there are pairs.
Ours is TuneStage and Trainer: chunked loss, micro-batches, the clip. Both begin with
the same weights, pairs and samples.
"""

import json
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image
from small_tokenizers import write_tiny
from test_parity_transformers import make

from convert.conversion import convert
from convert.rules import plan, prefixed, rename
from convert.sources import llama, llava, mixtral
from helpers import need
from mm1_mlx.adapters.folder import adapted_layers, stored_name
from mm1_mlx.adapters.layers import AdaptedStack, PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.loading import load_model
from mm1_mlx.quantization.modules import quantize_model
from mm1_mlx.training.conversations import lesson_of
from mm1_mlx.training.json_samples import JsonLines
from mm1_mlx.training.trainer import Trainer
from mm1_mlx.training.tuning import TuneSettings, TuneStage

RANK, ALPHA = 4, 12.0
BATCH = 8

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.05,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_RULES = {
    "Llama": prefixed(llama.RULES, target="decoder."),
    "Mixtral": prefixed(mixtral.RULES, target="decoder."),
    "Llava": llava.RULES,
}
# Modules of ours under transformers' names; of vision also with PEFT's own.
_NAMES = {
    r"^decoder\.layers": "model.layers",
    r"^decoder\.lm_head": "lm_head",
    r"^vision\.layers": "model.vision_tower.encoder.layers",
    r"(vision_tower.*)\.o_proj": r"\1.out_proj",
    r"(vision_tower.*)\.up_proj": r"\1.fc1",
    r"(vision_tower.*)\.down_proj": r"\1.fc2",
    r"\.attn\.": ".self_attn.",
    r"\.moe\.": ".mlp.",
}


def write_data(folder):
    """Questions and answers of several lengths, some with a picture. BATCH * 3."""
    rng, lines = random.Random(0), []
    words = [
        "red",
        "green",
        "blue",
        "circle",
        "square",
        "star",
        "left",
        "right",
        "top",
        "three",
        "12",
    ]
    for number in range(BATCH * 3):
        asked = " ".join(rng.choices(words, k=rng.randint(1, 9)))
        answer = " ".join(rng.choices(words, k=rng.randint(1, 7)))
        colour = tuple(rng.randrange(256) for _ in range(3))
        picture = Image.new("RGB", (28, 28), colour)
        picture.paste(colour[::-1], (0, 0, rng.randrange(4, 24), 14))
        picture.save(folder / f"{number}.png")
        lines.append({"question": asked + "?", "answer": answer})
        if number % 4:
            lines[-1]["image"] = f"{number}.png"
    (folder / "images.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for line in lines:
        line.pop("image", None)
    (folder / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return write_tiny(folder)


class Twins:
    """A model of transformers and ours, converted from it, and data for both.

    packed: whether ours is of 4 bits, and theirs of the numbers that these stand for.
    more: settings of transformers' config of the decoder.
    """

    def __init__(self, name: str, data, folder, packed: bool = False, **more):
        self.data = data
        tokenizer = load_tokenizer(data)
        text = _TEXT | {"vocab_size": tokenizer.vocab_size}
        text |= (_EXPERTS if name == "Mixtral" else {}) | more
        if name == "Llava":
            transformers = need("transformers")
            text = {
                "vision_config": transformers.CLIPVisionConfig(**_TOWER),
                "text_config": transformers.LlamaConfig(**text),
                "image_token_index": tokenizer.token_to_id("<image>"),
            }
        self.theirs = make(name, **text)
        self._plain = dict(self.theirs.named_parameters())  # PEFT renames them
        self._rules = _RULES[name]
        for parameter in self._plain.values():
            parameter.requires_grad_(False)
        self.theirs.save_pretrained(folder / "theirs")
        convert(folder / "theirs", folder / "ours", dtype="float32")
        self.ours = load_model(folder / "ours")
        if packed:
            how = {"group_size": 32, "bits": 4, "mode": "affine"}
            parts = ("_proj",)  # not the router
            quantize_model(self.ours, lambda p: how if p.endswith(parts) else None)
        config = self.ours.config
        images = ImageSettings(size=28) if config.reads_images else None
        self._processor = Processor(tokenizer, images, config, chat_template="mm1-tiny")

    # --- What is trained -------------------------------------------------------------

    def train(
        self, parts=(), *, kind: str = "lora", whole=(), peft: bool = True
    ) -> None:
        """Give both the same pairs, which add something, and train `whole` whole.

        kind: of the pairs: "lora", "dora" or "rslora". peft: False: only ours get some.
        """
        scale = ALPHA / (RANK**0.5 if kind == "rslora" else RANK)
        pairs = PairSettings(rank=RANK, scale=scale, dora=kind == "dora")
        targets = {part: Target(pairs=pairs) for part in parts}
        adapt(self.ours, Plan(parts=targets | {part: Target() for part in whole}), 0)
        rng = np.random.default_rng(3)

        def noise(array):
            return mx.array(0.1 * rng.standard_normal(array.shape, np.float32))

        for layer in adapted_layers(self.ours).values():
            for pair in layer.pairs.values():
                pair.lora_b = noise(pair.lora_b)
                if "m" in pair:
                    pair.m = pair.m * (1 + noise(pair.m))
        self._copy_packed()
        trained = {name for name, _ in tree_flatten(self.ours.trainable_parameters())}
        if parts and peft:
            self._add_peft(kind)
        for job in plan(self._plain, self._rules).jobs:
            if job.target in {name.replace(".base.", ".") for name in trained}:
                for source in job.names:
                    self._plain[source].requires_grad_(True)

    def _copy_packed(self) -> None:
        """Give theirs what packed weights below our pairs stand for."""
        for path, layer in adapted_layers(self.ours).items():
            if isinstance(layer, AdaptedStack):
                held = {_theirs(path): layer.whole()}
            else:
                held = {
                    _theirs(stored_name(path, rows.name)) + ".weight": layer.weight()[
                        rows.start : rows.stop
                    ]
                    for rows in layer.projections
                }
            for name, array in held.items():
                self._plain[name].data.copy_(need("torch").tensor(np.array(array)))

    def _add_peft(self, kind: str) -> None:
        peft, torch = need("peft"), need("torch")
        modules, stacks = set(), set()
        for path, layer in adapted_layers(self.ours).items():
            if isinstance(layer, AdaptedStack):
                stacks.add(_theirs(path))
            else:
                modules |= {_theirs(stored_name(path, name)) for name in layer.pairs}
        # One pair for gates and ups of experts: ours are two, so it has twice the rank
        # and zeros in its B, at the same scale.
        double = {name for name in stacks if name.endswith("gate_up_proj")}
        alpha = ALPHA * (2**0.5 if kind == "rslora" else 2)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=sorted(modules) or None,
            target_parameters=sorted(stacks) or None,
            rank_pattern=dict.fromkeys(double, 2 * RANK),
            alpha_pattern=dict.fromkeys(double, alpha),
            use_dora=kind == "dora",
            use_rslora=kind == "rslora",
        )
        with warnings.catch_warnings():  # its patterns are for modules, it says
            warnings.simplefilter("ignore")
            self.theirs = peft.get_peft_model(self.theirs, config)
        self._wrapped = {}
        for name, module in self.theirs.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            inside = getattr(module, "parameter_name", None)
            self._wrapped[f"{name}.{inside}" if inside else name] = module
            torch.nn.init.zeros_(module.lora_B["default"].weight)
        for (path, name, key), tensor in self._peft(values_of).items():
            value = np.array(adapted_layers(self.ours)[path].pairs[name][key])
            tensor.copy_(torch.tensor(value))
        for module in self._wrapped.values():  # what ours does not have stays zero
            weight = module.lora_B["default"].weight
            if hasattr(module, "parameter_name"):
                weight.register_hook(lambda g, kept=(weight != 0): g * kept)

    def _peft(self, of) -> dict[tuple[str, str, str], Any]:
        """PEFT's arrays in our shapes. of: parameter -> its values or gradient."""
        found = {}
        for path, layer in adapted_layers(self.ours).items():
            for name in layer.pairs:
                if isinstance(layer, AdaptedStack):
                    module = self._wrapped[_theirs(path)]
                    a, b = _of_stack(module, of, name)
                else:
                    module = self._wrapped[_theirs(stored_name(path, name))]
                    a = of(module.lora_A["default"].weight).T
                    b = of(module.lora_B["default"].weight).T
                found[path, name, "lora_a"] = a
                found[path, name, "lora_b"] = b
                if layer.settings.dora:
                    length = module.lora_magnitude_vector["default"].weight
                    found[path, name, "m"] = of(length)
        return found

    def as_ours(self, of: Callable[[Any], Any]) -> dict[str, np.ndarray]:
        """What torch trains, under our names. of: parameter -> values or gradient."""
        found = {
            f"{path}.pairs.{name}.{key}": tensor.numpy()
            for (path, name, key), tensor in self._peft(of).items()
        }

        arrays = {name: of(array).numpy() for name, array in self._plain.items()}
        renamed = rename(arrays, self._rules)
        whole = (n for n, _ in tree_flatten(self.ours.trainable_parameters()))
        names = [name for name in whole if ".pairs." not in name]
        return found | {n: np.array(renamed[n.replace(".base.", ".")]) for n in names}

    # --- Steps -----------------------------------------------------------------------

    def trainer(self, folder, file: str = "train.jsonl", **settings) -> Trainer:
        """Ours, at its first step."""
        samples = JsonLines(self.data / file)
        settings = {
            "steps": 10,
            "batch": BATCH,
            "accumulate": 2,
            "chunk": 100,
        } | settings
        made = TuneSettings(**settings)
        stage = TuneStage(self.ours, self._processor, samples, made, seed=0)
        return Trainer(stage, folder, 0, {"recipe": {}})

    def batch(self, stage: TuneStage, step: int) -> dict[str, Any]:
        """The samples of a step, in one batch, as transformers takes them."""
        torch = need("torch")
        places = range(stage.settings.accumulate)
        numbers = [n for micro in places for n in stage.places(step, micro, 0, 1)]
        samples = stage.samples
        lessons = [lesson_of(samples[n], self._processor) for n in numbers]
        longest = max(len(lesson.ids) for lesson in lessons)
        ids = torch.full((len(lessons), longest), 3)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, lesson in enumerate(lessons):
            count = len(lesson.ids)
            ids[row, :count] = torch.tensor(lesson.ids)
            learned = torch.tensor(lesson.learned)
            labels[row, :count][learned] = ids[row, :count][learned]
            mask[row, :count] = 1
        made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        shots = [x.pixel_values for x in lessons if x.pixel_values is not None]
        if shots:
            pixels = np.concatenate(shots).transpose(0, 3, 1, 2)
            made["pixel_values"] = torch.tensor(pixels)
        return made


def values_of(parameter: Any) -> Any:
    return parameter.data


def gradient_of(parameter: Any) -> Any:
    """Zeros where torch has none: the parameter was not read."""
    grad = parameter.grad
    return need("torch").zeros_like(parameter) if grad is None else grad


def _theirs(path: str) -> str:
    """Transformers' name of a module or stack of ours."""
    for ours, name in _NAMES.items():
        path = re.sub(ours, name, path)
    return path


def _of_stack(module, of, name: str) -> tuple[Any, Any]:
    """A and B of one projection of all experts, from PEFT's pair of their stack."""
    count = module.num_experts
    a, b = of(module.lora_A["default"].weight), of(module.lora_B["default"].weight)
    a = a.view(count, -1, a.shape[-1])  # (E, R, in)
    b = b.view(len(b), -1, count).permute(2, 0, 1)  # (E, out, R)
    if module.parameter_name == "down_proj":
        return a, b
    half, rank = b.shape[1] // 2, a.shape[1] // 2
    if name == "gate_proj":
        return a[:, :rank], b[:, :half, :rank]
    return a[:, rank:], b[:, half:, rank:]
