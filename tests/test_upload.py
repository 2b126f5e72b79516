"""convert --upload-repo: what is sent, and what is refused before any work."""

import sys
import types

import pytest

from mm1_mlx.convert.upload import check_upload, upload
from mm1_mlx.errors import CheckpointError


class Address(str):
    repo_id = "org/name"


def fake_hub(monkeypatch, *, token="x", offline=False, send=lambda **k: None) -> dict:
    """A hub package that keeps what it is asked for."""
    asked: dict = {}

    class Api:
        def create_repo(self, repo, **settings):
            asked["made"] = (repo, settings)
            return Address("the address of org/name")

        def upload_folder(self, **settings):
            asked["sent"] = settings
            send(**settings)

    def validate(repo):
        if repo.count("/") != 1:
            raise refused("not an id:\n" + repo)

    refused = type("HFValidationError", (ValueError,), {})
    module = types.ModuleType("huggingface_hub")
    module.HfApi, module.get_token = Api, lambda: token
    module.constants = types.SimpleNamespace(HF_HUB_OFFLINE=offline)
    utils = types.ModuleType("huggingface_hub.utils")
    utils.HFValidationError, utils.validate_repo_id = refused, validate
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    return asked


def test_the_folder_is_sent(monkeypatch, tmp_path):
    asked = fake_hub(monkeypatch)
    assert upload(tmp_path, "org/name") == "the address of org/name"
    assert asked["made"] == ("org/name", {"repo_type": "model", "exist_ok": True})
    assert asked["sent"] == {"folder_path": str(tmp_path), "repo_id": "org/name"}


@pytest.mark.parametrize(
    "repo, settings, message",
    [
        ("a/b/c", {}, r"a hub id like 'org/name' was expected: not an id: a/b/c"),
        ("org/name", {"token": None}, "run `hf auth login`"),
        ("org/name", {"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_sent_is_refused_first(monkeypatch, repo, settings, message):
    fake_hub(monkeypatch, **settings)
    with pytest.raises(CheckpointError, match=message):
        check_upload(repo)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        check_upload("org/name")


def test_a_refusal_says_how_to_go_on(monkeypatch, tmp_path):
    def send(**settings):
        raise OSError("quota\nexceeded")

    fake_hub(monkeypatch, send=send)
    with pytest.raises(
        CheckpointError, match=r"is whole, .*quota exceeded .*hf upload"
    ):
        upload(tmp_path, "org/name")
