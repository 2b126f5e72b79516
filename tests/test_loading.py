"""load and save: the same model comes back, whatever thread uses it."""

import gc
import importlib
import math
import sys
import threading
import types
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SPARSE, SmallProcessor, random_array, small_config, small_model

from helpers import assert_close, assert_equal, need, need_tiny, run_python
from mm1_mlx.checkpoint.folder import read_weights, write_folder
from mm1_mlx.errors import CheckpointError, MM1Error, PromptError
from mm1_mlx.inference.generation import batch_generate, generate, generate_step
from mm1_mlx.loading import load, load_model, save


class Processor(SmallProcessor):
    """SmallProcessor, kept in a folder as one file."""

    @classmethod
    def from_folder(cls, folder, config):
        if not (folder / "words.txt").is_file():
            raise CheckpointError(f"{folder} has no tokenizer.")
        return cls()

    def save(self, folder):
        (folder / "words.txt").write_text("1 2 3")


@pytest.fixture(autouse=True)
def small_processor(monkeypatch):
    module = types.ModuleType("mm1_mlx.inputs.processor")
    module.Processor = Processor
    monkeypatch.setitem(sys.modules, "mm1_mlx.inputs.processor", module)


@pytest.fixture
def folder(tmp_path):
    save(small_model(), Processor(), tmp_path / "model")
    return tmp_path / "model"


def named(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
def test_saved_model_is_loaded_again(tmp_path, text):
    model = small_model(text)
    save(model, Processor(), tmp_path / "model")
    again, processor = load(str(tmp_path / "model"))
    assert again.config == model.config
    assert isinstance(processor, Processor)
    assert not again.training
    expected = named(model)
    assert named(again).keys() == expected.keys()
    for name, array in named(again).items():
        assert_equal(array, expected[name], what=name)
    ids, pixels = mx.array([[1, 3, 3, 3, 3, 9]]), random_array(1, 16, 16, 3)
    assert_equal(again(ids, pixels), model(ids, pixels))


def test_unknown_model():
    with pytest.raises(CheckpointError, match="no model or folder 'mm1-tinny'"):
        load("mm1-tinny")


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16], ids=str)
def test_16_bit_weights_are_float32_on_the_cpu(tmp_path, stored):
    model = small_model()
    model.set_dtype(stored)
    save(model, Processor(), tmp_path / "model")
    on_disk = read_weights(tmp_path / "model")
    assert {array.dtype for array in on_disk.values()} == {stored}
    found, _ = load(tmp_path / "model")
    on_cpu = mx.default_device().type == mx.cpu
    expected = mx.float32 if on_cpu else stored
    assert {array.dtype for array in named(found).values()} == {expected}
    for name, array in named(found).items():
        assert_equal(array, on_disk[name].astype(expected), what=name)
    kept, _ = load(tmp_path / "model", dtype=stored)
    assert {array.dtype for array in named(kept).values()} == {stored}
    by_name, _ = load(tmp_path / "model", dtype="float16")
    assert {array.dtype for array in named(by_name).values()} == {mx.float16}


def test_a_machine_that_is_too_small(monkeypatch):
    monkeypatch.setattr("mm1_mlx.loading.machine_memory", lambda: 2_000_000)
    with pytest.raises(CheckpointError, match=r"take 4\.\d MB .*machine has 2\.0 MB"):
        load_model(need_tiny())
    load_model(need_tiny(), lazy=True)  # nothing is read yet


@pytest.mark.parametrize("dtype", ["float64", "int8", mx.int32, 16])
def test_unknown_dtype(folder, dtype):
    with pytest.raises(MM1Error, match="but must be one of float32, float16, bfloat16"):
        load(folder, dtype=dtype)


def test_16_bit_model_answers_on_this_back_end(folder):
    """On the CPU gather_mm is float32 only: weights of experts are cast there."""
    expected = generate(*load(folder), "5 6", max_tokens=4)
    model, processor = load(folder, dtype="bfloat16")
    found = generate(model, processor, "5 6", max_tokens=4)
    assert found.generation_tokens == expected.generation_tokens


def test_missing_unexpected_and_misshaped_weights_are_named(tmp_path):
    weights = named(small_model())
    weights["decoder.norm.weigth"] = weights.pop("decoder.norm.weight")
    weights["decoder.lm_head.weight"] = weights["decoder.lm_head.weight"].T
    write_folder(tmp_path / "model", small_config(), weights, Processor().save)
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path / "model")
    message = str(raised.value)
    assert "1 missing: decoder.norm.weight;" in message
    assert "1 unexpected: decoder.norm.weigth;" in message
    assert "decoder.lm_head.weight is (32, 90) but must be (90, 32)" in message
    assert "\n" not in message


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="was cut off"):
        load(folder)


def test_nothing_is_evaluated_when_lazy(folder):
    gc.collect()  # what other tests left must not be freed in the middle
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = load_model(folder, lazy=True)
    total = sum(array.nbytes for array in named(model).values())
    # Neither the weights nor the random values that stood there before them.
    assert mx.get_peak_memory() - before < 0.2 * total
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before >= 0.9 * total


def test_saving_over_the_folder_that_was_loaded(folder):
    model, processor = load(folder, lazy=True)
    expected = named(small_model())
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save(model, processor, folder)
    save(model, processor, folder, overwrite=True)
    for name, array in named(load(folder)[0]).items():
        assert_equal(array, expected[name], what=name)


def test_16_bit_weights_stay_16_bit_when_saved_again(tmp_path, folder):
    model, processor = load(folder, dtype="float16")
    save(model, processor, tmp_path / "again")
    kinds = {array.dtype for array in read_weights(tmp_path / "again").values()}
    assert kinds == {mx.float16}


@pytest.mark.parametrize("rope", [None, "llama3"])
def test_load_in_one_thread_and_generate_in_another(tmp_path, rope):
    """Apps do that. MLX's streams are per thread: what a thread leaves lazy is lost
    with it, so load evaluates all weights and constants."""
    text = SPARSE
    if rope is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
        text = replace(SPARSE, rope_scaling=scaling)
    save(small_model(text), Processor(), tmp_path / "model")
    expected = generate(*load(tmp_path / "model"), "5 <image> 6", [1], max_tokens=8)
    kept: dict = {}

    def loads():
        with mx.stream(mx.new_stream(mx.default_device())):  # as on a GPU
            kept["loaded"] = load(tmp_path / "model")

    def generates():
        try:
            kept["answer"] = generate(*kept["loaded"], "5 <image> 6", [1], max_tokens=8)
        except Exception as error:
            kept["answer"] = error

    for work in (loads, generates):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    assert str(kept["answer"]) == expected.text
    again = generate(*kept["loaded"], "5 <image> 6", [1], max_tokens=8)
    assert again.token_ids == expected.token_ids


def test_quantized_folder_is_loaded(tmp_path):
    """`quantize` writes what nn.quantize makes; config.quantization says how."""
    settings = {"group_size": 32, "bits": 8}
    model = small_model(DENSE)
    whole = model(mx.array([[1, 5, 9]]))
    nn.quantize(
        model,
        **settings,
        class_predicate=lambda path, module: (
            path.startswith("decoder.layers")
            and isinstance(module, nn.Linear)
            and module.weight.shape[1] % 32 == 0
        ),
    )
    config = replace(small_config(DENSE), quantization=settings)
    weights = named(model)
    write_folder(tmp_path / "model", config, weights, Processor().save)
    found, _ = load(tmp_path / "model", dtype="float32")
    assert "decoder.layers.0.attn.qkv_proj.scales" in named(found)
    logits = found(mx.array([[1, 5, 9]]))
    assert_equal(logits, model(mx.array([[1, 5, 9]])))
    assert_close(logits, whole, atol=0.2)


def test_load_imports_no_heavy_package(folder):
    """torch, transformers and mlx_lm take seconds; the hub client is for downloads."""
    code = (
        "import sys; from mm1_mlx.loading import load_model; "
        "from mm1_mlx.inference import generation; import pathlib; "
        "load_model(pathlib.Path(sys.argv[1])); "
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    done = run_python("-c", code, folder)
    assert done.returncode == 0, done.stderr
    heavy = "torch transformers mlx_lm huggingface_hub requests httpx matplotlib scipy"
    assert not set(heavy.split()) & set(eval(done.stdout))
    assert "mlx.optimizers" not in done.stdout


def real_processor(folder, config):
    """A byte-level tokenizer and 16-pixel pictures, in files as the hub has them."""
    import json

    tokenizers = need("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: 10 + i for i, word in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    module = importlib.import_module("mm1_mlx.inputs.processor")
    return module.Processor.from_folder(folder, config)


def test_real_processor_from_question_to_text(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real one
    model = small_model(replace(SPARSE, vocab_size=300))
    picture = need("PIL.Image").new("RGB", (20, 30), (200, 10, 10))
    processor = real_processor(tmp_path / "tokenizer", model.config)
    save(model, processor, tmp_path / "model")
    loaded = load(tmp_path / "model")
    prompts = ["What is <image> this?", "Hi"]
    batch = batch_generate(*loaded, prompts, [picture, None], max_tokens=12)
    for prompt, image, row in zip(prompts, [picture, None], batch, strict=True):
        expected = generate(model, processor, prompt, image, max_tokens=12)
        found = generate(*loaded, prompt, image, max_tokens=12)
        assert found.token_ids == row.token_ids == expected.token_ids
        assert found.text == row.text == processor.decode(found.token_ids)
    assert (batch[0].num_images, batch[0].image_tokens) == (1, 4)
    assert batch[0].prompt_tokens == len("What is  this?") + 4
    with pytest.raises(PromptError, match="has 2 <image> but"):
        generate(*loaded, "<image><image>", picture)


@pytest.fixture
def tiny(monkeypatch):
    need_tiny()
    monkeypatch.undo()  # its real processor
    return load("mm1-tiny")


def drawn_picture():
    draw = need("PIL.ImageDraw")
    picture = need("PIL.Image").new("RGB", (160, 120), (255, 255, 255))
    pen = draw.Draw(picture)
    pen.ellipse((15, 20, 65, 70), fill=(220, 30, 30))
    pen.rectangle((95, 55, 140, 100), fill=(30, 60, 220))
    return picture


QUESTIONS = [
    "What colour is the circle?",
    "How many shapes are there?",
    "Is there a blue square?",
    "Describe the picture.",
]


def test_the_built_in_model_answers(tiny):
    answers = {
        str(generate(*tiny, q, drawn_picture(), max_tokens=32)) for q in QUESTIONS
    }
    assert len(answers) == len(QUESTIONS)
    assert all(answer.strip() for answer in answers)


def test_a_batch_of_the_built_in_model_equals_its_solo_runs(tiny):
    pictures = [drawn_picture() for _ in QUESTIONS]
    batch = batch_generate(*tiny, QUESTIONS, pictures, max_tokens=32)
    for question, row in zip(QUESTIONS, batch, strict=True):
        alone = generate(*tiny, question, drawn_picture(), max_tokens=32)
        assert (row.text, row.token_ids) == (alone.text, alone.token_ids)


def test_8_bit_cache_keeps_the_built_in_models_answers(tiny):
    """Greedy tokens are the same; a log-probability of a token that has one percent or
    more moves by at most 0.1."""
    model, processor = tiny
    for question in QUESTIONS:
        inputs = processor(question, drawn_picture())
        steps = [
            generate_step(
                model,
                inputs.input_ids,
                pixel_values=inputs.pixel_values,
                max_tokens=12,
                kv_bits=bits,
            )
            for bits in (None, 8)
        ]
        for (one, plain), (two, eight) in zip(*steps, strict=True):
            assert one == two, question
            likely = plain > math.log(0.01)
            moved = mx.where(likely, mx.abs(plain - eight), 0).max().item()
            assert moved < 0.1, question
