"""From a trained model to the folder that `load` reads."""

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.inputs.backends import SentencePieceBackend
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tokenizer import Tokenizer
from mm1_mlx.loading import save
from mm1_mlx.models.mm1 import MM1


def make_processor(
    config: MM1Config,
    images: ImageSettings,
    tokenizer: Path,
    chat_template: str = "mm1-tiny",
) -> Processor:
    """The processor of a model that was trained with a sentencepiece .model file.

    CheckpointError where there is no such file, ConfigError where its ids are not those
    of the config: a model with other ids would be trained without an error and useless.
    """
    if not tokenizer.is_file():
        raise CheckpointError(f"There is no sentencepiece model {tokenizer}.")
    backend = SentencePieceBackend.read(tokenizer, {}, legacy=False)
    _check_ids(config, backend, tokenizer)
    names = {"bos_token": backend.bos, "eos_token": backend.eos}
    names |= {"pad_token": backend.pad, "unk_token": backend.unk}
    marks = {i: text for text, i in backend.marks.items()}
    settings = {key: marks[i] for key, i in names.items() if i in marks}
    settings |= {"add_bos_token": True, "legacy": False}
    return Processor(
        Tokenizer(backend, settings), images, config, chat_template=chat_template
    )


def _check_ids(config: MM1Config, backend: SentencePieceBackend, path: Path) -> None:
    vocab = config.text_config.vocab_size
    if backend.size > vocab:
        raise ConfigError(
            f"{path} has {backend.size} pieces, but text_config.vocab_size is {vocab}: "
            f"make it at least {backend.size}."
        )
    eos = config.eos_token_ids[0] if config.eos_token_ids else None
    wanted = {
        "image_token_id": (config.image_token_id, backend.id_of("<image>"), "<image>"),
        "bos_token_id": (config.bos_token_id, backend.bos, "begin of text"),
        "eos_token_id": (eos, backend.eos, "end of text"),
        "pad_token_id": (config.pad_token_id, backend.pad, "padding"),
    }
    for key, (ours, theirs, what) in wanted.items():
        if theirs is not None and ours != theirs:
            raise ConfigError(
                f"model.{key} is {ours}, but {path} has {what} at {theirs}. Make them "
                f"the same."
            )


def float16_model(model: MM1) -> MM1:
    """A copy with the weights as they are shipped. CheckpointError if any is lost."""
    weights = dict(tree_flatten(model.parameters()))
    lost = [
        name
        for name, value in weights.items()
        if not mx.isfinite(value.astype(mx.float16)).all().item()
    ]
    if lost:
        raise CheckpointError(
            f"{len(lost)} weights are not finite numbers in 16 bit; first: {lost[0]}. "
            f"The run went wrong: lower its learning rate."
        )
    copy = MM1(model.config)
    copy.update(tree_map(lambda x: x.astype(mx.float16), model.parameters()))
    return copy


def write_model(folder: Path, model: MM1, processor: Processor) -> None:
    """Write the model folder, weights in 16 bit; a model that is there is replaced."""
    save(float16_model(model), processor, folder, overwrite=True)
