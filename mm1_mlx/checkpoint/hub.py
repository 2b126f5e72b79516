"""From what a user calls a model to a folder: built in, on disk, or on the hub."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError, DatasetError, MM1Error

_ASSETS = Path(__file__).resolve().parent.parent / "assets"

# Models inside the package: name -> folder.
BUILT_IN = {"mm1-tiny": _ASSETS / "mm1-tiny"}

# What a model folder is made of; nothing else is downloaded, above all no code.
_WANTED = ("*.json", "model*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")
_BESIDE = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md")
# Sub-folders that some source reads (AuroraCap); others hold other formats, or steps.
SUBFOLDERS = ("visual_encoder", "projector")
# Formats of weights, the best first: a repository often has the same in several.
_FORMATS = (".safetensors", ".bin", ".pt")
# Other formats of the same weights, and what training left.
_NEVER = re.compile(r"(optimizer|scheduler|training_args|rng_state|consolidated)")

# The hub's errors and those of the packages below it, by name: which one it is differs
# by their versions.
_UNREACHABLE = {
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError"),
    *("TransportError", "ConnectError", "TimeoutException", "ConnectTimeout"),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_folder(
    name_or_path: str | Path, *, revision: str | None = None, foreign: bool = False
) -> Path:
    """The folder of a built-in name, a path, or a hub id "org/name" (downloaded).

    A folder wins over a hub id of the same spelling. revision: of a hub id. foreign:
    it may be any checkpoint, so its weights may be .bin files and lie in sub-folders.
    CheckpointError says what was looked for.
    """
    text = str(name_or_path)
    if text in BUILT_IN:
        return _built_in(text)
    if not text.strip():
        raise CheckpointError(
            f"The model's name is empty. Built in: {', '.join(BUILT_IN)}."
        )
    folder = Path(text).expanduser()
    if folder.is_dir() and revision is not None:
        raise CheckpointError(
            f"{text} is a folder here, which has no revisions: leave out --revision."
        )
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{text} is a file. Give the folder that holds it, with its config.json."
        )
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(text):
        return _download(text, revision, foreign)
    raise CheckpointError(_unknown(text))


def _built_in(name: str) -> Path:
    folder = BUILT_IN[name]
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"The built-in model {name} is missing from {folder}: the installation is "
            f"not whole. Install mm1_mlx again."
        )
    return folder


def _unknown(text: str) -> str:
    import difflib

    from mm1_mlx.presets import MODELS, PRESETS

    if (name := text.lower()) in PRESETS:
        what = (
            "a size of the papers, without public weights"
            if name in MODELS
            else "an encoder alone, not a whole model"
        )
        return (
            f"'{name}' is {what}. Give a public checkpoint (a hub id like "
            f"'llava-hf/llava-1.5-7b-hf'), a folder that you made (mm1_mlx convert "
            f"assemble, mm1_mlx pretrain), or the built-in {', '.join(BUILT_IN)}."
        )
    names = ", ".join(BUILT_IN)
    close = difflib.get_close_matches(text.lower(), BUILT_IN, n=1, cutoff=0.5)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return (
        f"There is no model or folder '{text}'.{guess} Built in: {names}. Else give a "
        f"model folder, or a hub id like 'org/name'."
    )


def choose_files(names: list[str]) -> list[str]:
    """Of a repository's files those that a conversion needs.

    Configs and tokenizers of any folder, and weights in one format for each folder: a
    repository often has the same weights as .safetensors and as .bin.
    """
    names = [n for n in names if n.rpartition("/")[0] in ("", *SUBFOLDERS)]
    wanted = [n for n in names if any(fnmatch(n, pattern) for pattern in _BESIDE)]
    by_folder: dict[str, list[str]] = {}
    for name in names:
        file = name.rpartition("/")[2]
        if file.endswith(_FORMATS) and not _NEVER.match(file):
            by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    for folder, weights in by_folder.items():
        start = f"{folder}/" if folder else ""
        weights = of_one_layout(weights, f"{start}config.json" in names)
        ending = next(e for e in _FORMATS if any(n.endswith(e) for n in weights))
        same = [n for n in weights if n.endswith(ending)]
        plain = [n for n in same if n.rpartition("/")[2].startswith("model")]
        wanted += plain or same
    return wanted


def of_one_layout(weights: list[str], has_config: bool) -> list[str]:
    """Of weight files those that belong to a folder's config.

    Apple's DFN has its weights twice: open_clip_pytorch_model.bin for
    open_clip_config.json, pytorch_model.bin for config.json, which counts.
    """
    own = [n for n in weights if n.rpartition("/")[2].startswith("open_clip")]
    others = [n for n in weights if n not in own]
    return (others if has_config else own) if own and others else weights


def is_hub_id(name: str) -> bool:
    """Whether a name has the form "org/name"."""
    return _HUB_ID.fullmatch(name) is not None


def _download(repo: str, revision: str | None, foreign: bool) -> Path:
    """The hub's files of a model, in its cache on this machine."""
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"'{repo}' is not a folder here, and to download it from the hub "
            f"huggingface_hub is needed: run pip install huggingface_hub."
        ) from None
    try:
        with _quiet():
            wanted: list[str] = list(_WANTED)
            if foreign and not _offline():  # one question, which is not repeated
                asked = HfApi().model_info(repo, revision=revision, timeout=20)
                wanted = choose_files([file.rfilename for file in asked.siblings or ()])
            elif foreign:  # what an earlier download brought
                wanted = ["*"]
            found = snapshot_download(repo, revision=revision, allow_patterns=wanted)
            return Path(str(found))
    except Exception as error:  # the hub's own kinds of errors, and the network's
        before = local_snapshot(repo, revision) if _is_unreachable(error) else None
        if before is not None and any(before.glob("*config.json")):
            return before  # on a plane, what an earlier download brought must do
        raise CheckpointError(_no_download(repo, error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the hub's package logs about every try; its progress bars
    stay."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_unreachable(error: Exception) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(_UNREACHABLE & kinds) or isinstance(
        error, ConnectionError | TimeoutError
    )


def local_snapshot(
    name: str, revision: str | None = None, kind: str = "model"
) -> Path | None:
    """What an earlier download left of a hub id, perhaps not all of it; no network."""
    if Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name):
        return None
    try:
        from huggingface_hub import snapshot_download

        which: Any = {} if kind == "model" else {"repo_type": kind}
        found = snapshot_download(
            name, revision=revision, local_files_only=True, **which
        )
        return Path(str(found))
    except Exception:  # not there, or the package is not
        return None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download_dataset(
    repo: str, revision: str | None, choose: Callable[[list[str]], list[str]]
) -> Path:
    """The files of a dataset on the hub, in its cache on this machine.

    choose: from the names of all files to the patterns of those that are wanted.
    DatasetError says what is wrong. Without network, what an earlier download
    brought.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise DatasetError(
            f"'{repo}' is not a folder here, and to download it from the hub "
            f"huggingface_hub is needed: run pip install huggingface_hub."
        ) from None
    try:
        with _quiet():
            wanted = ["*"]  # of what an earlier download brought
            if not _offline():
                asked = HfApi().dataset_info(repo, revision=revision, timeout=20)
                wanted = choose([file.rfilename for file in asked.siblings or ()])
            found = snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=wanted
            )
            return Path(str(found))
    except MM1Error:  # what `choose` says
        raise
    except Exception as error:  # the hub's own kinds of errors, and the network's
        before = None
        if _is_unreachable(error):
            before = local_snapshot(repo, revision, "dataset")
        if before is not None:
            return before
        raise DatasetError(_no_download(repo, error, "dataset")) from error


def _no_download(repo: str, error: Exception, what: str = "model") -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"'{repo}' on the hub needs your consent to its licence: accept it on its "
            f"page there, then log in with `hf auth login`."
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            f"There is no {what} '{repo}' on the hub (or it is private: `hf auth "
            f"login`), and no such folder here."
        )
    if _is_unreachable(error):
        return (
            f"'{repo}' is neither a folder here nor in the hub's cache, and the hub "
            f"cannot be reached. Check the network (and HF_HUB_OFFLINE), or give the "
            f"path of a {what} folder."
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"'{repo}' could not be downloaded from the hub: {reason}"
