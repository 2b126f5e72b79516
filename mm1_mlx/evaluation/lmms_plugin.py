"""mm1_mlx as a model of lmms-eval: `lmms-eval --model mm1_mlx --model_args ...`.

An install of this package announces it (setup.py, entry points "lmms_eval.models"), so
that lmms-eval 0.6 and later find it by themselves:

    lmms-eval --model mm1_mlx --model_args pretrained=FOLDER --tasks mme --batch_size 8

Videos become so many pictures, as `generate --video` reads them. A sample that cannot
be asked (a broken picture, a prompt beyond the context) is told and has an empty
answer; where likelihoods are compared there is none that is empty, so it ends the run.
Two classes, because lmms-eval has two kinds of tasks: chat ones give messages, simple
ones (--force_simple, and all tasks that compare likelihoods) a text and pictures.
Importing this module imports lmms-eval, and with it torch.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lmms_eval.api.model import lmms  # type: ignore[import-not-found]

from mm1_mlx.errors import ContextError, ImageError, MM1Error, UsageError
from mm1_mlx.evaluation.likelihood import Likelihood
from mm1_mlx.evaluation.lmms_media import cleaned, pictures_of, with_marks
from mm1_mlx.inference.generation import batch_generate
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inputs.video import FRAMES, MOST_FRAMES
from mm1_mlx.loading import load

MAX_TOKENS = 1024  # where a task says nothing, as lmms-eval's own models have it
_CHOICES = ("loss", "logprob")
_log = logging.getLogger(__name__)
_SKIPPED = ContextError, ImageError  # of a sample, not of the run
Asked = tuple[Any, list[Any]]  # a prompt and its pictures


def manifest() -> Any:
    """What lmms-eval's registry is told of the two classes."""
    from lmms_eval.models.registry_v2 import (  # type: ignore[import-not-found]
        ModelManifest,
    )

    return ModelManifest(
        model_id="mm1_mlx",
        simple_class_path=f"{__name__}.SimpleModel",
        chat_class_path=f"{__name__}.ChatModel",
        aliases=("mm1",),
    )


class _Model(lmms):
    """What both kinds share.

    pretrained (or model): name, folder or hub id. adapter_path: of lora. system: a
    system prompt. kv_bits: 4 or 8. resolution, max_tiles: as generate's. frames: of a
    video, its --frames. choices: what
    `loglikelihood` gives for the choices of a multiple_choice task: "loss", the
    negative, because lmms-eval takes the least there (api/task.py of 0.7: "we just use
    the argmin"), or "logprob". Everything else is a log-probability, as its base class
    says.

    device and max_batch_size are taken and not used: MLX has one device.
    """

    def __init__(
        self,
        pretrained: str = "",
        model: str = "",
        adapter_path: str | None = None,
        batch_size: int | str = 1,
        system: str | None = None,
        kv_bits: str | int | None = None,
        resolution: str | int | None = None,
        max_tiles: str | int | None = None,
        frames: str | int = FRAMES,
        choices: str = "loss",
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise UsageError(
                f"--model_args has {', '.join(sorted(unknown))}, which mm1_mlx does "
                f"not know. It knows pretrained, adapter_path, system, kv_bits, "
                f"resolution, max_tiles, frames, choices."
            )
        if choices not in _CHOICES:
            raise UsageError(
                f"choices is {choices!r}, but must be {' or '.join(_CHOICES)}"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(
                f"--batch_size is {batch_size!r}, but must be a whole number of 1 or "
                f"more"
            )
        if not str(frames).isdecimal() or not 0 < int(frames) <= MOST_FRAMES:
            raise UsageError(
                f"frames is {frames!r}, but must be a whole number from 1 to "
                f"{MOST_FRAMES}"
            )
        self._frames = int(frames)
        chosen = _chosen(kv_bits=kv_bits, resolution=resolution, max_tiles=max_tiles)
        name = pretrained or model or "mm1-tiny"
        self.model, self.processor = load(name, adapter_path=adapter_path)
        self.batch_size = int(batch_size)
        self._read_pictures(chosen.resolution, chosen.max_tiles)
        self._settings = {"system": system, "kv_bits": chosen.kv_bits}
        self._choices = choices

    @property
    def device(self) -> str:
        """Where lmms-eval, with torch, gathers what several processes found."""
        return "cpu"

    def _read_pictures(self, resolution: Any, max_tiles: int | None) -> None:
        """So, where it is given; else as the model's, or its adapter's, own."""
        if resolution is None and max_tiles is None:
            return
        with _model_args():
            self.processor.ways(1, resolution, max_tiles)
        if resolution is not None:
            self.processor.resolution = resolution
        if max_tiles is not None:
            self.processor.max_tiles = max_tiles

    # --- answers ---------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request, in their order."""
        found = [""] * len(requests)
        for settings, places in self._batches(requests):
            args = [requests[place].args for place in places]
            answers = self._answers(args, settings)
            for place, text in zip(places, answers, strict=True):
                found[place] = text
                request = requests[place].args
                self.cache_hook.add_partial("generate_until", request[:2], text)
        return found

    def _batches(
        self, requests: Sequence[Any]
    ) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Places of requests with the same settings, short texts with short ones."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            key = json.dumps(self._given(request.args), sort_keys=True, default=str)
            groups.setdefault(key, []).append(place)
        for members in groups.values():
            members.sort(key=lambda place: len(str(requests[place].args[0])))
            settings = self._given(requests[members[0]].args)
            for start in range(0, len(members), self.batch_size):
                yield settings, members[start : start + self.batch_size]

    def _given(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """The request's generation settings, as lmms-eval names them."""
        return next(one for one in args[1:3] if isinstance(one, dict))

    def _answers(
        self, requests: Sequence[tuple[Any, ...]], given: dict[str, Any]
    ) -> list[str]:
        """Answers to a batch; "" to one that cannot be asked."""
        try:
            return self._answer([self._ask(args) for args in requests], given)
        except _SKIPPED:
            asks = [partial(self._ask, args) for args in requests]
            each = zip(asks, requests, strict=True)
            return [self._one(ask, given, args[-3:]) for ask, args in each]

    def _one(
        self, ask: Callable[[], Asked], given: dict[str, Any], where: Sequence[Any]
    ) -> str:
        """An answer; "" and a line that says why to what cannot be asked. where:
        document, task and split. A package that is missing ends the run."""
        try:
            return self._answer([ask()], given)[0]
        except _SKIPPED as error:
            if isinstance(error.__cause__, ImportError):
                raise
            place, task, split = where
            # Not warnings.warn: lmms-eval turns all warnings off.
            _log.warning(
                f"mm1_mlx: document {place} of {task} ({split}) has an empty answer, "
                f"because it cannot be asked: {error}"
            )
            return ""

    def _answer(self, asked: Sequence[Asked], given: dict[str, Any]) -> list[str]:
        responses = batch_generate(
            self.model,
            self.processor,
            [prompt for prompt, _ in asked],
            [images or None for _, images in asked],
            **self._settings,
            **generation_settings(given),
        )
        return [response.text for response in responses]

    def _document(self, task: str, split: str, place: Any) -> Any:
        return self.task_dict[task][split][place]

    def _ask(self, args: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        """Prompt and pictures of a request."""
        raise NotImplementedError

    # --- likelihoods -----------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request how likely its continuation is, and whether it is greedy.

        A continuation that is given as text is a choice: see `choices`. One that a
        document is asked for (output_type: loglikelihood) gives a log-probability, and
        so does one without a document (the prior of acc_mutual_info).
        """
        score = Likelihood(self.model, self.processor)
        found = []
        for request in requests:
            total, greedy = self._score(score, *request.args)
            is_choice = len(request.args) > 2 and isinstance(request.args[1], str)
            if is_choice and self._choices == "loss":
                total = -total
            found.append(_pair(total, greedy))
        return found

    def _score(
        self, score: Likelihood, context: str, continuation: Any, *rest: Any
    ) -> tuple[float, bool]:
        images: list[Any] = []
        if rest:
            doc_to_visual, place, task, split = rest
            document = self._document(task, split, place)
            images = pictures_of(doc_to_visual(document), self._frames)
            if not isinstance(continuation, str):
                continuation = continuation(document)
        return score(
            with_marks(context, len(images)),
            continuation,
            images,
            system=self._settings["system"],
        )


class SimpleModel(_Model):
    """For tasks that give a text and pictures."""

    is_simple = True

    def _ask(self, args: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        context, _, doc_to_visual, place, task, split = args
        document = self._document(task, split, place)
        images = pictures_of(doc_to_visual(document), self._frames)
        return with_marks(context, len(images)), images

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds; what is asked next the task decides."""
        found = []
        for request in requests:
            context, given, doc_to_visual, doc_to_text, place, task, split = (
                request.args
            )
            document = self._document(task, split, place)
            visuals = doc_to_visual(document)
            rounds: list[str] = []
            known = None
            while True:
                ask = partial(self._round, context, visuals)
                rounds.append(self._one(ask, given, (place, task, split)))
                visuals, context, ended, outputs, known = doc_to_text(
                    document,
                    previous_output=list(rounds),
                    round_idx=len(rounds),
                    previous_round_info=known,
                )
                if ended:
                    found.append(list(outputs))
                    break
        return found

    def _round(self, context: str, visuals: Any) -> Asked:
        images = pictures_of(visuals, self._frames)
        return with_marks(context, len(images)), images


class ChatModel(_Model):
    """For tasks that give messages."""

    is_simple = False

    def _ask(self, args: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        _, doc_to_messages, _, place, task, split = args
        messages = doc_to_messages(self._document(task, split, place))
        return cleaned(messages, self._frames), []

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds; what is asked next the task decides."""
        found = []
        for request in requests:
            _, doc_to_messages, given, place, task, split = request.args
            document = self._document(task, split, place)
            rounds: list[str] = []
            messages, known = doc_to_messages(document), None
            while True:
                ask = partial(self._round, messages)
                rounds.append(self._one(ask, given, (place, task, split)))
                payload = doc_to_messages(
                    document,
                    round_idx=len(rounds),
                    previous_output=list(rounds),
                    previous_round_info=known,
                )
                if not isinstance(payload, tuple):  # a task of one round
                    break
                messages, ended, _, known = payload
                if ended:
                    break
            found.append(rounds)
        return found

    def _round(self, messages: Any) -> Asked:
        return cleaned(messages, self._frames), []


@contextmanager
def _model_args() -> Iterator[None]:
    """What is wrong with a value of --model_args is a UsageError that says so."""
    try:
        yield
    except MM1Error as error:
        raise UsageError(f"--model_args: {str(error).removesuffix('.')}") from error


def _chosen(**given: Any) -> Settings:
    """The values of --model_args, their numbers as numbers, if they can be."""
    for name, value in given.items():
        if isinstance(value, str) and value.isdecimal():
            given[name] = int(value)
    with _model_args():
        return Settings.of(given)


def generation_settings(given: dict[str, Any]) -> dict[str, Any]:
    """generate's settings from lmms-eval's generation_kwargs.

    What concerns other models (image_aspect_ratio, use_cache, ...) is passed over.
    MM1Error for a beam search, which this package does not have.
    """
    if (given.get("num_beams") or 1) > 1:
        raise MM1Error(
            f"The task asks for a beam search (num_beams {given['num_beams']}), which "
            f"mm1_mlx does not have: set num_beams=1 with --gen_kwargs."
        )
    found: dict[str, Any] = {"max_tokens": given.get("max_new_tokens") or MAX_TOKENS}
    until = given.get("until") or []
    if stops := [until] if isinstance(until, str) else [text for text in until if text]:
        found["stop"] = stops
    warm = given.get("temperature") or 0.0
    if given.get("do_sample", warm > 0) and warm > 0:
        found["temp"] = float(warm)
        names = {"top_p": "top_p", "top_k": "top_k", "seed": "seed"}
        for theirs, ours in names.items():
            if given.get(theirs) is not None:
                found[ours] = given[theirs]
    if given.get("repetition_penalty"):
        found["repetition_penalty"] = given["repetition_penalty"]
    return found


def _pair(total: float, greedy: bool) -> tuple[float, bool]:
    """The pair that `loglikelihood` gives, as lmms-eval 0.7 can take it.

    Its evaluator makes a string of every response that is not a GenerationResult
    (unwrap_generation_output), of pairs too, and its own tasks then fail at it. So the
    pair is one as well: its text is the pair.
    """
    try:
        from lmms_eval.api.instance import (  # type: ignore[import-not-found]
            GenerationResult,
        )
    except ImportError:  # before 0.7
        return total, greedy

    class Text(tuple):
        def strip(self) -> str:
            """Nothing, so that --use_cache keeps none: it would give a list back, and
            a list becomes a string there."""
            return ""

    class Pair(tuple, GenerationResult):
        def __init__(self, pair: Any):  # not a text, as GenerationResult says
            text: Any = Text(pair)
            GenerationResult.__init__(self, text=text)

    return Pair((total, greedy))
