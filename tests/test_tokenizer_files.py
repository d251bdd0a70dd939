"""Tokenizer files: every format loads, and whatever is wrong raises one TokenizerError that names the file."""

import base64
import json
import random

import pytest
import tokenizers as hf

import feste.tokenizer as module
from feste import BPETokenizer
from feste.tokenizer import TokenizerError

END = "<|endoftext|>"
TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: naïve 東京 🙂\n\n  1609 " * 3


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 330, [END, "<|ü|>"])


def same(ours: BPETokenizer, other: BPETokenizer) -> bool:
    return (ours.tokens == other.tokens and ours.special_tokens == other.special_tokens
            and (ours.merges == other.merges).all() and ours.encode(TEXT) == other.encode(TEXT))


# ---- formats -------------------------------------------------------------------------------------------------


def test_tokenizer_json_comes_back_whole(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert same(BPETokenizer.load(path), tokenizer)
    assert path.read_text(encoding="utf-8") == BPETokenizer.load(path).to_json()
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def test_loads_what_huggingface_writes(tokenizer, tmp_path):
    """Their file of our tokenizer, and one that they trained."""
    path = tmp_path / "theirs.json"
    hf.Tokenizer.from_str(tokenizer.to_json()).save(str(path))
    assert same(BPETokenizer.load(path), tokenizer)
    theirs = hf.ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], vocab_size=320, special_tokens=[END], show_progress=False)
    theirs.save(str(path))
    loaded = BPETokenizer.load(path)
    assert loaded.special_tokens == {END: 0}  # theirs come first
    assert loaded.encode(TEXT + END, allow_special=True) == theirs.encode(TEXT + END).ids


def test_loads_the_older_form_of_merges(tokenizer, tmp_path):
    data = json.loads(tokenizer.to_json())
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert same(BPETokenizer.load(tmp_path / "old.json"), tokenizer)


def gpt2_files(tokenizer, folder, newline="\n"):
    data = json.loads(tokenizer.to_json())
    vocab = data["model"]["vocab"] | tokenizer.special_tokens
    merges = ["#version: 0.2", *(" ".join(merge) for merge in data["model"]["merges"]), ""]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_bytes(newline.join(merges).encode())
    return folder / "vocab.json", folder / "merges.txt"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_loads_vocab_and_merges(tokenizer, tmp_path, newline):
    vocab, merges = gpt2_files(tokenizer, tmp_path, newline)
    loaded = BPETokenizer.load(vocab, merges)
    assert same(loaded, tokenizer)
    assert loaded.encode(TEXT) == hf.ByteLevelBPETokenizer(str(vocab), str(merges)).encode(TEXT).ids


def test_loads_tiktoken_ranks(tokenizer, tmp_path):
    path = tmp_path / "ranks.tiktoken"
    tokenizer.export_tiktoken(path)
    loaded = BPETokenizer.load(path)
    assert loaded.tokens == tokenizer.tokens[:-2] and (loaded.merges == tokenizer.merges).all()
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))  # the order of the lines says nothing
    assert BPETokenizer.load(path).tokens == loaded.tokens


def test_save_replaces_the_file_or_leaves_it(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def fail(*args):
        raise OSError("no")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        tokenizer.save(path)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


# ---- wrong files ---------------------------------------------------------------------------------------------


def refused(path, *parts, merges=None):
    with pytest.raises(TokenizerError) as caught:
        BPETokenizer.load(path, merges)
    message = str(caught.value)
    assert str(path) in message or str(merges) in message, message
    assert all(part in message for part in parts), message
    assert len(message) < 400 + len(str(path)) and "\n" not in message, message


def model(**changes):
    return lambda data: data["model"].update(changes)


def top(**changes):
    return lambda data: data.update(changes)


def vocab(change):
    return lambda data: change(data["model"]["vocab"])


def added(**changes):
    return lambda data: data["added_tokens"][0].update(changes)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WRONG = {
    "another model": (model(type="WordPiece"), "WordPiece"),
    "a model without name": (model(type=None), "None"),
    "no model": (lambda data: data.pop("model"), "model"),
    "a list for a model": (top(model=[1]), "model"),
    "no pre-tokenizer": (top(pre_tokenizer=None), "None"),
    "another pre-tokenizer": (top(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "two pre-tokenizers": (top(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}), "Sequence"),
    "a prefix space": (top(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "prefix space"),
    "the prefix space of an empty object": (top(pre_tokenizer={"type": "ByteLevel"}), "prefix space"),
    "no word pattern": (top(pre_tokenizer=BYTE_LEVEL | {"use_regex": False}), "pattern"),
    "a normalizer": (top(normalizer={"type": "NFC"}), "normalizer"),
    "a template": (top(post_processor={"type": "TemplateProcessing"}), "post_processor"),
    "another decoder": (top(decoder={"type": "WordPiece"}), "decoder"),
    "truncation": (top(truncation={"max_length": 5}), "truncation"),
    "padding": (top(padding={"strategy": "BatchLongest"}), "padding"),
    "dropout": (model(dropout=0.1), "dropout"),
    "an unknown token": (model(unk_token="<unk>"), "unk_token"),
    "a subword prefix": (model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "a word suffix": (model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "byte fallback": (model(byte_fallback=True), "byte_fallback"),
    "ignored merges": (model(ignore_merges=True), "ignore_merges"),
    "no merges": (lambda data: data["model"].pop("merges"), "merges"),
    "merges that are an object": (model(merges={}), "merges"),
    "a merge of three": (model(merges=[["a", "b", "c"]]), "merge of two"),
    "a merge of numbers": (model(merges=[[1, 2]]), "merge of two"),
    "a merge of an unknown token": (model(merges=[["a", "qqqq"]]), "qqqq"),
    "a merge into an unknown token": (model(merges=[["q", "q"]]), "qq"),
    "a very long merge": (model(merges=[["a", "b" * 100_000]]), "not in the vocabulary"),
    "no vocabulary": (lambda data: data["model"].pop("vocab"), "vocabulary"),
    "a vocabulary that is a list": (model(vocab=["a"]), "vocabulary"),
    "an id twice": (vocab(lambda v: v.update(a=v["b"])), "each once"),
    "a missing id": (vocab(lambda v: v.pop("a")), "each once"),
    "a missing byte": (lambda data: (data.update(added_tokens=[]), data["model"].update(vocab={"a": 0}, merges=[])),
                       "lacks the bytes"),
    "a negative id": (vocab(lambda v: v.update(a=-1)), "each once"),
    "an id beyond all": (vocab(lambda v: v.update(a=10**30)), "each once"),
    "an id that is a fraction": (vocab(lambda v: v.update(a=float(v["a"]))), "each once"),
    "an id that is text": (vocab(lambda v: v.update(a="5")), "each once"),
    "an id that is true": (vocab(lambda v: v.update({next(t for t, i in v.items() if i == 1): True})), "each once"),
    "an id that is null": (vocab(lambda v: v.update(a=None)), "each once"),
    "a token of no bytes": (vocab(lambda v: v.update({"東": v.pop("a")})), "東"),
    "an empty token": (vocab(lambda v: v.update({"": len(v) + 2})), "empty"),
    "special tokens that are no list": (top(added_tokens={"a": 1}), "added_tokens"),
    "a special token without id": (lambda data: data["added_tokens"][0].pop("id"), "added_tokens"),
    "a special token at a taken id": (added(id=5), "each once"),
    "a special token that is text": (added(id="328"), "added_tokens"),
    "an empty special token": (added(content=""), "empty"),
    "a special token with half a character": (added(content="\ud800"), "surrogate"),
    "a special token that strips": (added(lstrip=True), "lstrip"),
    "a special token of single words": (added(single_word=True), "single_word"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses_a_tokenizer_json_with(tokenizer, tmp_path, name):
    change, *parts = WRONG[name]
    data = json.loads(tokenizer.to_json())
    change(data)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(data))
    refused(path, *parts)


def test_refuses_files_that_are_no_tokenizer(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    for data in (b"", b"null", b"[]", b'"text"', b"{}", b"{", b"\x00" * 100, b"\xff\xfe{}", b"\xef\xbb\xbf{}",
                 b"[" * 200_000, b'{"model":' * 200_000, b'{"model": {"type": "BPE"}}', b'{"model": NaN}',
                 b"1" * 10_000, b'{"a": ' + b"1" * 10_000 + b"}", b"QQ== 0\nQg==", b"QQ== x", b"QQ== -1", b"!!!! 0",
                 b"QQ== 0\nQQ== 1", b"QQ== 0\nQg== 0", b"QQ== 1", b"QQ== 0", b" 0", b"QQ== " + b"9" * 10_000):
        path.write_bytes(data)
        refused(path)
    refused(tmp_path)
    refused(tmp_path / "nowhere.json", "No such file")
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    monkeypatch.setattr("feste.formats.vocabulary.MAX_FILE_BYTES", 100)
    refused(path, "at most 100")


def test_refuses_every_truncation(tokenizer, tmp_path):
    whole, path = tokenizer.to_json().encode(), tmp_path / "short.json"
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        refused(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(10 << 30)  # sparse: takes no space
    refused(path, str(10 << 30))


def test_flipped_bytes_load_whole_or_not_at_all(tokenizer, tmp_path):
    """Whatever a damaged file holds, the answer is a tokenizer that still round-trips, or one TokenizerError."""
    whole, path, rng, refusals = tokenizer.to_json().encode(), tmp_path / "damaged.json", random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 20])):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'{}[]",:0918 \\'])
        path.write_bytes(data)
        try:
            assert (loaded := BPETokenizer.load(path)).decode(loaded.encode(TEXT)) == TEXT
        except TokenizerError as error:
            refusals += 1
            assert str(path) in str(error)
    assert refusals > 100


def test_refuses_wrong_vocab_and_merges(tokenizer, tmp_path):
    vocab, merges = gpt2_files(tokenizer, tmp_path)
    refused(vocab, "merges.txt")
    good_vocab, good_merges = vocab.read_text(), merges.read_text(encoding="utf-8")
    for end in range(0, len(good_merges), 7):  # special tokens were in the way of seeing that merges are missing
        merges.write_text(good_merges[:end], encoding="utf-8")
        if end < len(good_merges) - 1:
            refused(vocab, merges=merges)
    for text in ("a b c\n", "ab\n", "a qqqq\n", good_merges + "q z\n", "\ud800".encode("utf-8", "surrogatepass")):
        merges.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(vocab, merges=merges)
    merges.write_text(good_merges, encoding="utf-8")
    for text in ("[]", "{}", '{"a": 0}', '{"a": {}}', good_vocab[:500], good_vocab.replace("{", '{"": 330, ')):
        vocab.write_text(text)
        refused(vocab, merges=merges)
    refused(vocab, merges=tmp_path / "none.txt")


def test_refuses_ranks_that_no_merges_make(tokenizer, tmp_path):
    path = tmp_path / "ranks.tiktoken"
    tokenizer.export_tiktoken(path)
    lines = path.read_text().splitlines()
    for extra in (b"xyzzyx", b"", b"\x00\x01\x02"):
        path.write_text("\n".join([*lines, f"{base64.b64encode(extra).decode()} {len(lines)}"]))
        refused(path)
    path.write_text("\n".join(lines[:100]))
    refused(path, "lacks the bytes")


def test_very_long_tokens_take_no_quadratic_time(tmp_path):
    """A doubling chain up to 131,072 bytes: a scan of all pairs for each merge would take hours."""
    tokens = [bytes([b]) for b in range(256)] + [b"a" * 2**k for k in range(1, 18)]
    path = tmp_path / "ranks.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    tokenizer = BPETokenizer.load(path)
    assert tokenizer.encode("a" * 2**17) == [len(tokens) - 1]
