"""From what a user calls a model to a folder: built in, on disk, or on the hub."""

import re
from pathlib import Path

from mm1_mlx.errors import CheckpointError

_ASSETS = Path(__file__).resolve().parent.parent / "assets"

# Models inside the package: name -> folder.
BUILT_IN = {"mm1-tiny": _ASSETS / "mm1-tiny"}

# What a model folder is made of; nothing else is downloaded, above all no code.
_WANTED = ("*.json", "model*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_folder(name_or_path: str | Path) -> Path:
    """The folder of a built-in name, a path, or a hub id "org/name" (downloaded).

    A folder wins over a hub id of the same spelling. CheckpointError says what was
    looked for.
    """
    text = str(name_or_path)
    if text in BUILT_IN:
        return _built_in(text)
    if not text.strip():
        raise CheckpointError(
            f"The model's name is empty. Built in: {', '.join(BUILT_IN)}."
        )
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{text} is a file. Give the folder that holds it, with its config.json."
        )
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(text):
        return _download(text)
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
            f"'{name}' is {what}. Pretrain a model (python -m mm1_mlx pretrain) and "
            f"give its folder, or use the built-in {', '.join(BUILT_IN)}."
        )
    names = ", ".join(BUILT_IN)
    close = difflib.get_close_matches(text.lower(), BUILT_IN, n=1, cutoff=0.5)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return (
        f"There is no model or folder '{text}'.{guess} Built in: {names}. Else give a "
        f"model folder, or a hub id like 'org/name'."
    )


def _download(repo: str) -> Path:
    """The hub's files of a model, in its cache on this machine."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"'{repo}' is not a folder here, and to download it from the hub "
            f"huggingface_hub is needed: run pip install huggingface_hub."
        ) from None
    try:
        return Path(snapshot_download(repo, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's own kinds of errors, and the network's
        raise CheckpointError(_no_download(repo, error)) from error


def _no_download(repo: str, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"'{repo}' on the hub needs your consent to its licence: accept it on its "
            f"page there, then log in with `hf auth login`."
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            f"There is no model '{repo}' on the hub (or it is private: `hf auth "
            f"login`), and no such folder here."
        )
    if {"OfflineModeIsEnabled", "LocalEntryNotFoundError"} & kinds or isinstance(
        error, ConnectionError | TimeoutError
    ):
        return (
            f"'{repo}' is neither a folder here nor in the hub's cache, and the hub "
            f"cannot be reached. Check the network (and HF_HUB_OFFLINE), or give the "
            f"path of a model folder."
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"'{repo}' could not be downloaded from the hub: {reason}"
