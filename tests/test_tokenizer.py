"""Tokenizers of all three file formats, against each other's reference."""

import json
import time

import pytest
from small_tokenizers import (
    TEXTS,
    TRICKY,
    byte_level_json,
    random_texts,
    sentencepiece_model,
    write_byte_level,
    write_llama,
    write_ranks,
    write_tiny,
)

from helpers import need, run_python
from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.inputs import backends
from mm1_mlx.inputs import ranks as rank_files
from mm1_mlx.inputs.prompts import guard
from mm1_mlx.inputs.tokenizer import Detokenizer, load_tokenizer

WRITERS = [write_tiny, write_llama, write_byte_level, write_ranks]


@pytest.fixture(scope="module", params=WRITERS, ids=lambda w: w.__name__[6:])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_tokenizer(write_tiny(tmp_path_factory.mktemp("tiny")))


def test_round_trips(tokenizer):
    for text in TRICKY + TEXTS[:8] + random_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_detokenizer_gives_the_same_in_pieces(tokenizer):
    for text in TRICKY + TEXTS[:8] + random_texts(50):
        ids = tokenizer.encode(text)
        detokenizer = tokenizer.detokenizer()
        pieces = [detokenizer.add(i) for i in ids]
        for piece in pieces:
            piece.encode()  # no halves of surrogate pairs
            assert "\ufffd" not in piece
        assert "".join(pieces) + detokenizer.finish() == text


def test_every_id_has_a_piece_and_none_raises(tokenizer):
    for i in [*range(-2, tokenizer.vocab_size + 5), 2**31 - 1]:
        detokenizer = Detokenizer(tokenizer)
        text = detokenizer.add(i)
        assert isinstance(text, str)
        if i < 0 or i >= tokenizer.vocab_size:
            assert text == "" and tokenizer.decode([i]) == ""
    assert tokenizer.token_to_id("no such token") is None


def test_padded_rows_give_nothing(tokenizer):
    ids = tokenizer.encode("red circles")
    beyond = tokenizer.vocab_size + 7
    spread = [i for pair in zip(ids, [beyond] * len(ids), strict=True) for i in pair]
    assert tokenizer.decode(spread) == "red circles"


def test_broken_utf8_is_never_emitted(tokenizer):
    if tokenizer.token_to_id("<0xF0>") is not None:
        first = tokenizer.token_to_id("<0xF0>")
    else:
        first = tokenizer.token_to_id(rank_files.byte_letters()[0xF0])
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add(first) == ""  # the start of a character
    assert detokenizer.finish() == ""  # cut off there: left out
    assert detokenizer.add(first) == ""
    a = tokenizer.encode("a", place="middle")[0]
    assert detokenizer.add(a) == "\ufffda"  # certainly broken
    assert tokenizer.decode([a, first]) == "a"


def test_time_is_linear(tiny):
    def seconds(n: int) -> float:
        ids = tiny.encode("a red circle ") * n
        best = 1e9
        for _ in range(3):
            detokenizer, start = tiny.detokenizer(), time.perf_counter()
            for i in ids:
                detokenizer.add(i)
            best = min(best, time.perf_counter() - start)
        return best

    # 16 times the ids; a quadratic one would take 256 times as long.
    assert seconds(4000) < 80 * max(seconds(250), 1e-4)


def test_guarded_marks_are_plain_text(tokenizer):
    special = set(tokenizer.marks.values())
    for mark in tokenizer.marks:
        if mark == "<image>":
            continue
        for text in (mark, f"a{mark}b", f"{mark}{mark} {mark[:-1]}{mark}"):
            assert tokenizer.decode(tokenizer.encode(text)) != text  # it is special
            ids = tokenizer.encode(guard(text, tokenizer.marks))
            assert not special & set(ids)
            assert tokenizer.decode(ids) == text
            assert tokenizer.encode_plain(text) == ids


def test_bos_once(tokenizer):
    bos = tokenizer.bos_token_id
    ids = tokenizer.encode("red", add_special=True)
    if bos is None:
        assert ids == tokenizer.encode("red")
        return
    assert ids == [bos, *tokenizer.encode("red")]
    assert ids.count(bos) == 1
    again = tokenizer.encode("<s>red", add_special=True)
    assert again[0] == bos and again.count(bos) == 1
    assert tokenizer.encode("", add_special=True) == [bos]


def test_add_bos_token_of_the_config(tmp_path):
    tokenizer = load_tokenizer(write_llama(tmp_path, add_bos_token=False))
    assert tokenizer.encode("red", add_special=True) == tokenizer.encode("red")


def test_special_ids_are_shown_on_request(tokenizer):
    mark, i = next(iter(tokenizer.marks.items()))
    assert tokenizer.decode([i]) == ""
    assert tokenizer.decode([i], skip_special=False) == mark


def test_not_text(tiny):
    with pytest.raises(PromptError, match="type int, but text was expected"):
        tiny.encode(3)
    with pytest.raises(PromptError, match="broken character at position 1"):
        tiny.encode("a\ud800")


# --- sentencepiece -------------------------------------------------------------------


def test_tiny_marks_and_ids(tiny):
    assert tiny.bos_token_id == 1 and tiny.eos_token_ids == (2,)
    assert tiny.pad_token_id == 3 and tiny.unk_token_id == 0
    assert {"<image>", "<user>", "<assistant>"} <= tiny.marks.keys()
    ids = tiny.encode("<user><image>Hi<assistant>Red</s>")
    names = {i: mark for mark, i in tiny.marks.items()}
    assert [names[i] for i in ids if i in names] == [
        "<user>",
        "<image>",
        "<assistant>",
        "</s>",
    ]


def test_ordinary_pieces_in_brackets_are_no_marks(tmp_path):
    import io

    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["red<br>blue<br>"] * 30),
        model_writer=file,
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        split_by_unicode_script=False,
        minloglevel=5,
        user_defined_symbols=["<user>"],
    )
    (tmp_path / "tokenizer.model").write_bytes(file.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_to_id("<br>") is not None
    assert "<br>" not in tokenizer.marks and "<user>" in tokenizer.marks
    assert tokenizer.decode(tokenizer.encode("<br>")) == "<br>"


def test_sentencepiece_alone_equals_the_package():
    import sentencepiece

    for kind, tiny_marks in (("unigram", True), ("bpe", False)):
        proto = sentencepiece_model(kind, tiny=tiny_marks)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
        ours = backends.SentencePieceBackend(proto)
        for text in TRICKY + TEXTS + random_texts():
            assert ours.encode(text, "start") == theirs.encode(text)


def test_places_of_a_text(tiny, tmp_path):
    # Unigram pieces of one letter each: nothing merges over the border
    start = tiny.encode("xqx")
    middle = tiny.encode("xqx", place="middle")
    assert tiny.decode(start) == "xqx" and b"".join(map(tiny.piece, start))[:1] == b" "
    assert b"".join(map(tiny.piece, middle)) == b"xqx"
    old = load_tokenizer(write_llama(tmp_path, legacy=True))
    assert old.encode("red", place="mark") == old.encode("red")
    new = load_tokenizer(write_llama(tmp_path, legacy=False))
    assert b"".join(map(new.piece, new.encode("red", place="mark"))) == b"red"
    assert b"".join(map(new.piece, new.encode("red", place="start"))) == b" red"


@pytest.mark.parametrize("where", ["config", "added_tokens"])
def test_added_tokens_are_split_out(tmp_path, where):
    write_llama(tmp_path)
    if where == "config":
        token = {"content": "<image>", "special": True}
        values = {"added_tokens_decoder": {"350": token}}
        name = "tokenizer_config.json"
    else:
        values, name = {"<image>": 350}, "added_tokens.json"
    (tmp_path / name).write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 351
    ids = tokenizer.encode("red<image>\nblue</s>")
    red, blue = tokenizer.encode("red"), tokenizer.encode("\nblue")
    assert ids == [*red, 350, *blue, 2]
    assert tokenizer.decode(ids) == "red \nblue"  # legacy: a space after each mark
    assert tokenizer.decode([350], skip_special=False) == "<image>"


def test_special_tokens_map_is_read(tmp_path):
    write_llama(tmp_path)
    values = {"pad_token": {"content": "<unk>"}, "eos_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(values))
    assert load_tokenizer(tmp_path).pad_token_id == 0


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_equals_transformers(tmp_path, legacy):
    transformers = need("transformers")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {
            str(i): {"content": text, "special": True, "normalized": False}
            for i, text in enumerate(("<unk>", "<s>", "</s>"))
        },
    }
    write_llama(tmp_path, **config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    # A text that starts with a space keeps it in sentencepiece and in transformers 4;
    # transformers 5 puts no second one in front.
    texts = [t for t in TEXTS + random_texts() if not t.startswith(" ")]
    texts += ["a</s>b", "a </s>b", "</s>\nred", "red</s></s>blue"]
    for text in texts:
        assert ours.encode(text, add_special=True) == theirs.encode(text), text


# --- tokenizer.json ------------------------------------------------------------------


def test_byte_level_equals_the_package(tmp_path):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(byte_level_json())
    ours = load_tokenizer(write_byte_level(tmp_path))
    for text in TRICKY + TEXTS + random_texts():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def llama_json(scheme: str) -> str:
    """A Llama-like tokenizer.json: spaces as letters, bytes where nothing fits."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    letters = sorted({c for t in TEXTS for c in t.replace(" ", "▁") if c.isascii()})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", *(c for c in letters if c not in " ▁\n\t"), "▁r", "re", "ed", "▁re"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "r"), ("▁r", "e"), ("e", "d")]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()


@pytest.mark.parametrize("scheme", ["normalizer", "first", "always"])
def test_llama_json(tmp_path, scheme):
    import tokenizers

    text = llama_json(scheme)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_str(text)
    ours = load_tokenizer(tmp_path)
    for sample in [*TRICKY, *TEXTS, *random_texts(100), "red</s>red", "</s> red"]:
        ids = theirs.encode(sample, add_special_tokens=False).ids
        assert ours.encode(sample) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    middle = ours.encode("red", place="middle")
    assert b"".join(map(ours.piece, middle)) == b"red"
    mark = b"".join(map(ours.piece, ours.encode("red", place="mark")))
    assert mark == (b"red" if scheme == "first" else b" red")
    ids = ours.encode_plain("red</s>red")
    assert 2 not in ids and ours.decode(ids) == "red</s>red"


def test_a_rare_decoder(tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {"[UNK]": 0, "red": 1, "##dish": 2, "star": 3}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.encode("reddish star red")) == "reddish star red"


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(byte_level_json())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]
    assert len(ours.encode("a")) == 1


# --- folders -------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__[6:])
def test_save_and_load_again(tmp_path, write):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    first = load_tokenizer(write(source, chat_template="{{ messages }}"))
    first.save(target)
    again = load_tokenizer(target)
    for text in TRICKY + TEXTS + ["<user>a</s>b", "<image>"]:
        assert again.encode(text) == first.encode(text)
    for name in ("vocab_size", "marks", "bos_token_id", "eos_token_ids", "adds_bos"):
        assert getattr(again, name) == getattr(first, name)
    assert again.pad_token_id == first.pad_token_id
    assert again.chat_template == "{{ messages }}"


def test_chat_templates_are_found(tmp_path):
    write_tiny(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    assert load_tokenizer(tmp_path).chat_template == "old"
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    write_tiny(tmp_path, chat_template=named)
    assert load_tokenizer(tmp_path).chat_template == "y"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert load_tokenizer(tmp_path).chat_template == "new"


def test_folder_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"folder .*none does not exist"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*found vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"is empty \(0 bytes\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match=r"not a sentencepiece model.*Git LFS"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer of the tokenizers"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold an object"):
        load_tokenizer(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_tokenizer(write_tiny(tmp_path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CheckpointError, match="pip install tokenizers"):
        load_tokenizer(write_byte_level(tmp_path))


@pytest.mark.parametrize(
    "write, other", [(write_tiny, "tokenizers"), (write_byte_level, "sentencepiece")]
)
def test_only_the_package_at_hand_is_imported(tmp_path, write, other):
    write(tmp_path)
    code = (
        "import sys; from mm1_mlx.inputs.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(tmp_path)!r}).encode('red'); "
        f"print([m for m in ({other!r}, 'PIL', 'mlx', 'jinja2', 'numpy', "
        "'transformers') if m in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
