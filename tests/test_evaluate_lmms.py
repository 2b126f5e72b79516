"""mm1_mlx as a model of lmms-eval, and the likelihoods it gives.

Against lmms-eval itself where it is installed (.ci/run), and against a stand-in with
the same abstract methods (lmms_eval/api/model.py, models/registry_v2.py of 0.7.3).
"""

import abc
import importlib
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from helpers import need, need_tiny
from mm1_mlx import generate, load
from mm1_mlx.errors import (
    ContextError,
    ImageError,
    MM1Error,
    PromptError,
    UsageError,
)
from mm1_mlx.evaluation.likelihood import Likelihood
from mm1_mlx.inputs.processor import Processor

PLUGIN = "mm1_mlx.evaluation.lmms_plugin"


def stand_in() -> dict[str, types.ModuleType]:
    """The modules of lmms-eval that the plug-in imports."""

    class lmms(abc.ABC):
        is_simple = True

        def __init__(self):
            self.cache_hook = SimpleNamespace(add_partial=lambda *given: None)
            self.task_dict = {}

        @classmethod
        def create_from_arg_string(cls, text, more=None):
            pairs = [part.split("=", 1) for part in text.split(",") if part]
            more = {k: v for k, v in (more or {}).items() if v is not None}
            return cls(**dict(pairs), **more)

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple = ()

    @dataclass
    class GenerationResult:
        text: str
        token_counts: object = None

    names = ("", ".api", ".api.model", ".api.instance", ".models")
    names = (*names, ".models.registry_v2")
    made = {f"lmms_eval{name}": types.ModuleType(f"lmms_eval{name}") for name in names}
    made["lmms_eval.api.model"].lmms = lmms
    made["lmms_eval.api.instance"].GenerationResult = GenerationResult
    made["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    return made


@pytest.fixture(scope="module", params=["stand-in", "real"])
def plugin(request):
    """The plug-in's module, above the stand-in and above the real lmms-eval."""
    need_tiny()
    if request.param == "real":
        need("lmms_eval.api.model")
    else:
        sys.modules.update(stand_in())
    yield importlib.import_module(PLUGIN)
    for name in list(sys.modules):
        if name.partition(".")[0] == "lmms_eval" or name == PLUGIN:
            del sys.modules[name]


@pytest.fixture(scope="module")
def tiny():
    need_tiny()
    return load("mm1-tiny")


def circle(colour: str) -> Image.Image:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 72, 72), fill=colour)
    return image


ASKED = "What colour is the circle?"


# --- likelihoods --------------------------------------------------------------------


def full_forward(model, ids, inputs, start):
    """Log-probability of ids[start:] and whether each is the likeliest, by one pass
    over everything without a cache."""
    logits = model(mx.array([ids]), inputs.pixel_values, layouts=inputs.layouts)
    logits = np.array(logits[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    steps = range(start, len(ids))
    total = sum(scores[i - 1, ids[i]] for i in steps)
    return total, all(scores[i - 1].argmax() == ids[i] for i in steps)


def as_encoded(processor, said):
    """The first of the tokens that were said that are those of their own text.

    A model outside its template may say a word in other pieces than the tokenizer's.
    """
    ids = [i for i in said if i not in processor.eos_token_ids]
    tokenizer = processor.tokenizer
    while ids and tokenizer.encode(tokenizer.decode(ids)) != ids:
        ids.pop()
    assert tokenizer.decode(ids).strip()
    return ids


@pytest.mark.parametrize("template", [None, "vicuna"])
@pytest.mark.parametrize("images", [["red"], ["red", "blue"], []])
def test_a_likelihood_is_that_of_the_models_own_logits(tiny, template, images):
    """The ids of the prompt are those that generate reads, those of the answer the
    first that it said; everything in one pass, without a cache."""
    model, own = tiny
    processor = own
    if template is not None:
        processor = Processor(
            own.tokenizer, own.image_settings, own.config, chat_template=template
        )
    pictures = [circle(colour) for colour in images]
    prompt = ASKED if images else "What is 2 plus 3?"
    said = generate(model, processor, prompt, pictures, max_tokens=5, reuse=False)
    ids = as_encoded(processor, said.token_ids)
    text = processor.tokenizer.decode(ids)
    inputs = processor(prompt, images=pictures)
    asked = inputs.input_ids.tolist()[0]
    expected, greedy = full_forward(model, asked + ids, inputs, len(asked))
    found = Likelihood(model, processor)(prompt, text, pictures)
    assert greedy and found[1] is True
    # float32 sums over 4 layers in another order: a cache, two passes.
    assert found[0] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("continuation", [" red", "red", "ness of a red circle"])
def test_without_a_template_the_text_simply_goes_on(tiny, continuation):
    model, own = tiny
    processor = Processor(
        own.tokenizer, own.image_settings, own.config, chat_template="plain"
    )
    inputs = processor(ASKED, images=[circle("red")])
    ids = inputs.input_ids.tolist()[0]
    more = own.tokenizer.encode(continuation, place="middle")
    expected = full_forward(model, ids + more, inputs, len(ids))
    found = Likelihood(model, processor)(ASKED, continuation, [circle("red")])
    assert found == (pytest.approx(expected[0], abs=2e-4), expected[1])


def test_another_answer_is_less_likely_and_not_greedy(tiny):
    model, processor = tiny
    score = Likelihood(model, processor)
    colours = ("red", "green", "blue", "there is no circle", "2")
    found = {c: score(ASKED, c, [circle("red")]) for c in colours}
    assert max(found, key=lambda c: found[c][0]) == "red"
    assert [c for c in colours if found[c][1]] == ["red"]
    assert all(total < 0 for total, _ in found.values())
    # What is computed once for all choices changes nothing.
    for colour in colours:
        alone = Likelihood(model, processor)(ASKED, colour, [circle("red")])
        assert found[colour][0] == pytest.approx(alone[0], abs=2e-4)
    # A space in front belongs to the chat template.
    assert score(ASKED, " red", [circle("red")]) == found["red"]


def test_one_score_after_another_of_other_prompts(tiny):
    model, processor = tiny
    asked = [
        (ASKED, "red", [circle("red")]),
        (ASKED, "red", [circle("blue")]),
        ("How many circles are there?", "1", [circle("blue")]),
        (ASKED, "blue", [circle("blue")]),
        ("", "a red circle", []),
        ([{"role": "user", "content": ASKED}], "red", [circle("red")]),
    ]
    score = Likelihood(model, processor)
    for prompt, text, images in asked:
        total, greedy = score(prompt, text, images)
        alone = Likelihood(model, processor)(prompt, text, images)
        assert total == pytest.approx(alone[0], abs=2e-4) and greedy == alone[1]


def test_a_text_alone_has_the_likelihood_after_the_begin_mark(tiny):
    model, processor = tiny
    text = "a red circle"
    ids = processor.tokenizer.encode_plain(text, add_special=True)
    inputs = SimpleNamespace(pixel_values=None, layouts=())
    expected, _ = full_forward(model, ids, inputs, 1)
    assert Likelihood(model, processor)("", text)[0] == pytest.approx(
        expected, abs=2e-4
    )


def test_what_has_no_likelihood(tiny):
    model, processor = tiny
    score = Likelihood(model, processor)
    with pytest.raises(PromptError, match="continuation is empty"):
        score(ASKED, " ", [circle("red")])
    context = model.config.text_config.max_position_embeddings
    with pytest.raises(PromptError, match=f"the model's context has {context}"):
        score("circle " * context, "red")
    before = score(ASKED, "red", [circle("red")])  # nothing is left behind by those
    assert before == Likelihood(model, processor)(ASKED, "red", [circle("red")])


# --- the plug-in --------------------------------------------------------------------


DOCUMENTS = [
    {"colour": "red", "images": ["red"]},
    {"colour": "blue", "images": ["blue"]},
    {"colour": "green", "images": ["green"]},
    {"colour": "red", "images": ["red", "blue"]},
]


def visual(document):
    return [circle(colour) for colour in document["images"]]


def make(kind, **settings):
    model = kind(**{"pretrained": "mm1-tiny", "batch_size": 2} | settings)
    model.task_dict = {"task": {"val": DOCUMENTS}}
    return model


def request(*arguments):
    return SimpleNamespace(args=arguments, arguments=arguments)


def simple(place, text=ASKED, **given):
    return request(text, given, visual, place, "task", "val")


def test_the_registry_is_told_of_both_classes(plugin):
    manifest = plugin.manifest()
    assert manifest.model_id == "mm1_mlx"
    for path, is_simple in (
        (manifest.simple_class_path, True),
        (manifest.chat_class_path, False),
    ):
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert issubclass(found, sys.modules["lmms_eval.api.model"].lmms)
        assert found.is_simple is is_simple
        assert not found.__abstractmethods__
    registry = sys.modules.get("lmms_eval.models.registry_v2")
    if hasattr(registry, "ModelRegistryV2"):  # the real one
        registered = registry.ModelRegistryV2()
        registered.register_manifest(manifest)
        assert registered.get_model_class("mm1_mlx") is plugin.ChatModel
        simple = registered.get_model_class("mm1", force_simple=True)
        assert simple is plugin.SimpleModel


def test_the_install_announces_it():
    from helpers import ROOT

    text = (ROOT / "setup.py").read_text()
    assert f'"lmms_eval.models": ["mm1_mlx = {PLUGIN}:manifest"]' in text


def test_answers_come_in_the_order_of_the_requests(plugin, tiny):
    model, processor = tiny
    lm = plugin.SimpleModel.create_from_arg_string(
        "pretrained=mm1-tiny", {"batch_size": 2, "device": None}
    )
    lm.task_dict = {"task": {"val": DOCUMENTS}}
    kept = []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *given: kept.append(given))
    asked = [
        simple(0, max_new_tokens=8),
        simple(1, "How many circles are there?", max_new_tokens=8),
        simple(2, max_new_tokens=8, until=["reen"]),
        simple(3, "<image> <image> Which circle is red, first or second?"),
        simple(1, "Is <image> it what? <image>", max_new_tokens=8),
    ]
    found = lm.generate_until(asked)
    expected = [
        generate(model, processor, ASKED, [circle("red")]).text,
        generate(model, processor, asked[1].args[0], [circle("blue")]).text,
        "g",
        generate(
            model, processor, asked[3].args[0], [circle("red"), circle("blue")]
        ).text,
        # Two marks for one picture: they are taken out.
        generate(model, processor, "Is  it what?", [circle("blue")], max_tokens=8).text,
    ]
    assert found == expected
    assert found[0] == "red"
    assert {given[0] for given in kept} == {"generate_until"} and len(kept) == 5


def test_messages_are_asked_as_they_are(plugin, tiny):
    model, processor = tiny

    def messages(document):
        parts = [{"type": "image", "url": image} for image in visual(document)]
        text = {"type": "text", "text": f"<image>{ASKED}"}
        return [{"role": "user", "content": [*parts, text]}]

    lm = make(plugin.ChatModel)
    asked = [
        request("", messages, {"max_new_tokens": 8}, i, "task", "val") for i in range(3)
    ]
    assert lm.generate_until(asked) == [
        generate(model, processor, ASKED, [circle(c)]).text
        for c in ("red", "blue", "green")
    ]


def test_rounds_of_both_kinds(plugin):
    def text(document, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx
        if round_idx == 2:
            return None, "", True, [o.upper() for o in previous_output], None
        assert previous_round_info is None
        return [circle("blue")], ASKED, False, previous_output, None

    lm = make(plugin.SimpleModel)
    asked = request(ASKED, {"max_new_tokens": 4}, visual, text, 0, "task", "val")
    assert lm.generate_until_multi_round([asked]) == [["RED", "BLUE"]]

    def messages(document, round_idx=0, previous_output=(), previous_round_info=None):
        image = circle(("red", "green", "blue")[round_idx])
        parts = [{"type": "image", "url": image}, {"type": "text", "text": ASKED}]
        made = [{"role": "user", "content": parts}]
        if round_idx == 0:
            return made
        assert list(previous_output) == ["red", "green"][:round_idx]
        assert previous_round_info == (None if round_idx == 1 else "told")
        return made, round_idx == 2, list(previous_output), "told"

    lm = make(plugin.ChatModel)
    asked = request(ASKED, messages, {"max_new_tokens": 4}, 0, "task", "val")
    assert lm.generate_until_multi_round([asked]) == [["red", "green"]]


def test_choices_give_what_lmms_eval_takes_the_least_of(plugin, tiny):
    model, processor = tiny
    score = Likelihood(model, processor)
    colours = ("blue", "red", "green")
    asked = [request(ASKED, f" {c}", visual, 0, "task", "val") for c in colours]
    expected = [score(ASKED, c, [circle("red")]) for c in colours]
    losses = make(plugin.SimpleModel).loglikelihood(asked)
    assert losses == [(-total, greedy) for total, greedy in expected]
    assert int(np.argmin([loss for loss, _ in losses])) == 1
    # Its evaluator takes the text of a GenerationResult, and makes strings of the rest.
    result = sys.modules["lmms_eval.api.instance"].GenerationResult
    assert all(isinstance(pair, result) for pair in losses)
    assert [pair.text for pair in losses] == losses
    # --use_cache keeps a text that is more than spaces, and would give a list back.
    assert isinstance(losses[0].text, tuple) and losses[0].text.strip() == ""
    assert losses[0].token_counts is None
    logprobs = make(plugin.SimpleModel, choices="logprob").loglikelihood(asked)
    assert logprobs == expected
    # output_type loglikelihood asks the document, and is given a log-probability.
    one = request(ASKED, lambda d: f" {d['colour']}", visual, 1, "task", "val")
    ((total, greedy),) = make(plugin.SimpleModel).loglikelihood([one])
    assert greedy and total == pytest.approx(
        score(ASKED, "blue", [circle("blue")])[0], abs=2e-4
    )
    prior = request("", "red circle")  # of acc_mutual_info
    ((total, _),) = make(plugin.SimpleModel).loglikelihood([prior])
    assert total == pytest.approx(score("", "red circle")[0], abs=2e-4)


def test_several_processes_gather_on_the_cpu(plugin):
    assert make(plugin.SimpleModel).device == "cpu"  # as torch.tensor takes it


def test_pictures_in_tiles(plugin):
    lm = make(plugin.SimpleModel, resolution="dynamic", max_tiles=4)
    usual = make(plugin.SimpleModel)
    counts = [
        model.processor(ASKED, images=[circle("red").resize((300, 200))]).image_tokens
        for model in (lm, usual)
    ]
    assert counts[0][0] > counts[1][0]
    asked = [simple(0, max_new_tokens=2)]
    assert isinstance(lm.generate_until(asked)[0], str)
    one = request(ASKED, " red", visual, 0, "task", "val")
    assert lm.loglikelihood([one])[0][0] != usual.loglikelihood([one])[0][0]


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"max_tokens": 1024}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1},
            {"max_tokens": 16},
        ),
        (
            {"until": ["\n\n", ""], "do_sample": False, "temperature": 0.7},
            {"max_tokens": 1024, "stop": ["\n\n"]},
        ),
        (
            {"until": "###", "do_sample": True, "temperature": 0.7, "top_p": 0.9},
            {"max_tokens": 1024, "stop": ["###"], "temp": 0.7, "top_p": 0.9},
        ),
        ({"temperature": 0.5}, {"max_tokens": 1024, "temp": 0.5}),
        ({"image_aspect_ratio": "pad", "until": None}, {"max_tokens": 1024}),
    ],
)
def test_generation_settings(plugin, given, expected):
    assert plugin.generation_settings(given) == expected


def test_videos_become_pictures(plugin, tiny, tmp_path):
    """A path of a simple task, a part of a message; as `generate` reads a video."""
    for i, colour in enumerate(("red", "red", "blue", "blue")):
        circle(colour).save(tmp_path / f"{i}.png")
    asked = "Which circle is blue, the first or the second?"
    expected = generate(*tiny, asked, [circle("red"), circle("blue")]).text
    lm = make(plugin.SimpleModel, frames="2")
    one = request(asked, {}, lambda d: [str(tmp_path)], 0, "task", "val")
    assert lm.generate_until([one]) == [expected]
    assert len(lm._ask(one.args)[1]) == 2
    still = request(asked, {}, lambda d: str(tmp_path / "0.png"), 0, "task", "val")
    assert lm._ask(still.args)[1] == [str(tmp_path / "0.png")]  # its tiles, too
    named = request(asked, {}, lambda d: {"path": str(tmp_path)}, 0, "task", "val")
    assert len(lm._ask(named.args)[1]) == 2
    whole = {"type": "video", "url": str(tmp_path)}

    def ask(video):
        parts = [video, {"type": "text", "text": asked}]
        return request(
            "", lambda d: [{"role": "user", "content": parts}], {}, 0, "task", "val"
        )

    lm = make(plugin.ChatModel, frames=2)
    assert lm.generate_until([ask(whole)]) == [expected]
    assert lm.generate_until([ask(whole | {"url": {"path": tmp_path}})]) == [expected]
    span = {"path": str(tmp_path), "video_start": 0, "video_end": 4}
    for part in (whole | {"start_time": 1.5}, whole | {"url": span}):
        with pytest.raises(MM1Error, match="shows a part of a video, but mm1_mlx"):
            lm.generate_until([ask(part)])
    for wrong in ("0", 5000):
        with pytest.raises(UsageError, match=f"frames is '?{wrong}'?, but must be a"):
            make(plugin.SimpleModel, frames=wrong)


def test_a_sample_that_cannot_be_asked_ends_no_run(plugin, tmp_path, caplog):
    """It is told, though lmms-eval turns all warnings off."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    lm = make(plugin.SimpleModel, batch_size=4)
    long = simple(1, "circle " * 5000, max_new_tokens=8)
    gone = request(ASKED, {"max_new_tokens": 8}, lambda d: broken, 0, "task", "val")
    whole = [simple(0, max_new_tokens=8), simple(2, max_new_tokens=8)]
    found = lm.generate_until([whole[0], long, gone, whole[1]])
    assert found == ["red", "", "", "green"]
    told = sorted(caplog.messages)
    assert len(told) == 2
    start = "mm1_mlx: document {} of task (val) has an empty answer, because it cannot"
    assert told[0].startswith(start.format(0)) and "broken.png" in told[0]
    assert told[1].startswith(start.format(1)) and "too long" in told[1]
    assert lm.generate_until([long]) == [""]  # as --use_cache asks for what is left
    # No loss is that of no answer: the least of them would be the first choice.
    beyond = request("circle " * 5000, " red", visual, 0, "task", "val")
    with pytest.raises(ContextError, match="tokens, but the model's context"):
        lm.loglikelihood([beyond])

    def text(document, previous_output, round_idx, previous_round_info):
        return broken, ASKED, round_idx == 2, list(previous_output), None

    several = request(ASKED, {"max_new_tokens": 4}, visual, text, 0, "task", "val")
    assert lm.generate_until_multi_round([several]) == [["red", ""]]


def test_a_missing_package_ends_the_run(plugin, tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"\0\0\0\x20ftypisom" + bytes(64))
    monkeypatch.setitem(sys.modules, "av", None)
    lm = make(plugin.SimpleModel)
    asked = request(ASKED, {}, lambda d: [film], 0, "task", "val")
    with pytest.raises(ImageError, match=r"pip install 'mm1_mlx\[video\]'"):
        lm.generate_until([asked, simple(0, max_new_tokens=4)])


def test_what_the_plug_in_refuses(plugin):
    with pytest.raises(MM1Error, match=r"num_beams 4.*does not have"):
        plugin.generation_settings({"num_beams": 4})
    with pytest.raises(UsageError, match=r"has conv_template, which mm1_mlx does not"):
        make(plugin.SimpleModel, conv_template="vicuna")
    with pytest.raises(UsageError, match="choices is 'best', but must be loss or"):
        make(plugin.SimpleModel, choices="best")
    with pytest.raises(UsageError, match="batch_size is 'auto'"):
        make(plugin.SimpleModel, batch_size="auto")
    lm = make(plugin.SimpleModel)
    sound = request("Hm?", {}, lambda d: [{"array": 1}], 0, "task", "val")
    with pytest.raises(MM1Error, match="a visual with array, but mm1_mlx takes pict"):
        lm.generate_until([sound])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_tiles": "x"}, r"--model_args: max_tiles is 'x', but must be a whole nu"),
        ({"max_tiles": 9999, "resolution": "dynamic"}, r"max_tiles is 9999, but"),
        ({"max_tiles": 4.5}, r"max_tiles is 4\.5, but must be a whole number"),
        ({"max_tiles": 4}, r"max_tiles is 4, but no picture is read in dynamic tiles"),
        ({"resolution": "huge"}, r"resolution is 'huge', but must be 'native', 'dyn"),
        ({"resolution": 7}, r"--model_args: .*resolution"),
        ({"kv_bits": 3}, r"kv_bits is 3, but must be"),
        ({"min_tiles": 2}, r"has min_tiles, which mm1_mlx does not know"),
    ],
)
def test_wrong_values_are_told_at_the_door(plugin, given, message):
    with pytest.raises(UsageError, match=message):
        make(plugin.SimpleModel, **given)


def test_values_may_be_texts(plugin):
    lm = make(plugin.SimpleModel, resolution="dynamic", max_tiles="4", kv_bits="8")
    assert lm.processor.max_tiles == 4 and lm._settings["kv_bits"] == 8
