"""A model folder to the hub."""

from pathlib import Path

from mm1_mlx.errors import CheckpointError


def check_upload(repo: str) -> None:
    """Raise CheckpointError where an upload could not even begin.

    Asked before a conversion, which may take long: is `repo` an "org/name", is
    huggingface_hub there, and is somebody logged in?
    """
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError:
        raise CheckpointError(
            "--upload-repo needs huggingface_hub: run pip install huggingface_hub."
        ) from None
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(
            f"--upload-repo is {repo!r}, but a hub id like 'org/name' was expected: "
            f"{' '.join(str(error).split())}"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            "--upload-repo needs the network, but HF_HUB_OFFLINE is set. Unset it."
        )
    if get_token() is None:
        raise CheckpointError(
            "--upload-repo needs you to be logged in on the hub: run `hf auth login`."
        )


def upload(folder: Path, repo: str) -> str:
    """Send a model folder to the hub id `repo`, which is made if need be; its address.

    Nothing of the folder changes. CheckpointError says what the hub refused, and how to
    send it again without converting again.
    """
    check_upload(repo)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=made.repo_id)
    except Exception as error:  # the hub's own kinds of errors, and the network's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{folder} is whole, but was not uploaded to {repo}: {reason} Send it with "
            f"`hf upload {repo} {folder}`."
        ) from error
    return str(made)
