"""The tokenizer, held to byte-pair encoding by its definition in reference.py, and that to GPT-2's own pattern."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from feste import BPETokenizer, _bpe, reference
from feste import tokenizer as module

GPT2_PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
ALPHABET = "aabbcde'strevml  \n\t\r0129½.,!\x1c\x85\xa0\u2003\u3000éÜßжд火人ʰ٣²🙂\u0301"  # of every class
TEXTS = st.text(alphabet=ALPHABET, max_size=60)
WORDY = st.lists(st.sampled_from(["ab", "aba", "abab", " the", " then", "'s", "'ll", " 12", "1", "  ", "\n", " Ü"]),
                 max_size=30).map("".join)


@given(TEXTS)
@settings(max_examples=300)
def test_words_are_those_of_gpt2s_pattern(text):
    words = reference.bpe_words(text)
    assert words == [word.encode() for word in GPT2_PATTERN.findall(text)] == _bpe.split_words(text.encode())
    assert b"".join(words).decode() == text


@given(st.lists(st.one_of(TEXTS, WORDY), max_size=6), st.integers(256, 300))
@settings(max_examples=200)
def test_training_is_that_of_the_definition(texts, vocab_size):
    expected = reference.bpe_train(texts, vocab_size)
    with pytest.warns() if len(expected) < vocab_size - 256 else nullcontext():
        tokenizer = BPETokenizer.train(texts, vocab_size)
    assert list(map(tuple, tokenizer.merges.tolist())) == expected


@given(st.lists(WORDY, min_size=1, max_size=5), st.lists(st.one_of(TEXTS, WORDY), max_size=5))
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore:the text yields only")
def test_encoding_is_that_of_the_definition(training, texts):
    tokenizer = BPETokenizer.train(training, 300)
    merges = list(map(tuple, tokenizer.merges.tolist()))
    expected = [reference.bpe_encode(text, merges) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected == tokenizer.encode_batch(texts)


def test_the_order_of_bytes_is_gpt2s():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [module.BYTE_CHARACTERS[byte] for byte in reference.BPE_BYTES] == alphabet
    assert list(reference.BPE_BYTES) == module.BASE_BYTES


def test_the_definition_knows_nothing_of_documents_that_touch():
    """A word ends where its document ends."""
    assert reference.bpe_train(["ab", "ab"], 257) == [tuple(reference.BPE_BYTES.index(byte) for byte in b"ab")]
    assert (b"ba" not in b"".join(reference.bpe_words("ab"))) and reference.bpe_train(["a", "b"], 300) == []
    tokenizer = BPETokenizer.train(["ab"] * 3 + ["ba"], 257)
    assert tokenizer.tokens[256] == b"ab" and tokenizer.encode_batch(["a", "b"]) == [tokenizer.encode("a"),
                                                                                      tokenizer.encode("b")]


# ---- many documents ----------------------------------------------------------------------------------------


def documents(n: int, length: int) -> list[str]:
    rng = np.random.default_rng(n)
    words = ["the", " quick", "'s", " naïve", "\n\n", " 東京", " 1984", "  ", "🙂", " fox", "", " x"]
    return ["".join(rng.choice(words, rng.integers(0, length))) for _ in range(n)]


@pytest.mark.parametrize("cores", [1, 2, 3, 7])
@pytest.mark.parametrize(("n", "length"), [(500, 5), (40, 400), (1, 9000), (0, 1)])
def test_documents_are_encoded_alike_by_any_number_of_threads(monkeypatch, cores, n, length):
    texts = [*documents(n, length), "", *documents(n, 3)]
    tokenizer = BPETokenizer.train(documents(200, 50), 320)
    expected = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(module, "_available_cores", lambda: cores)
    for chunk, group, some in ((1 << 18, 1 << 25, 1 << 12), (300, 1000, 3), (50, 1, 1)):
        for name, value in (("CHUNK_BYTES", chunk), ("GROUP_BYTES", group), ("GROUP_TEXTS", some)):
            monkeypatch.setattr(module, name, value)
        assert tokenizer.encode_batch(iter(texts)) == expected
        assert tokenizer.encode_batch(texts) == expected
        assert [tokenizer.encode_to_numpy(text).tolist() for text in texts] == expected
        assert BPETokenizer.train(iter(documents(200, 50)), 320).to_json() == tokenizer.to_json()


def test_kernels_refuse_ends_that_are_none():
    tokenizer = BPETokenizer.train(documents(20, 50), 300)
    out, out_ends = np.empty(9, np.int32), np.empty(3, np.int64)
    for ends in ([4, 2, 5], [5, 5, 6], [-1, 2, 5], [2, 4, 4], []):
        with pytest.raises(ValueError, match=r"ends must not fall|must end at 5"):
            tokenizer._encoder.encode(b"abcde", np.array(ends, np.int64), out, out_ends)
        with pytest.raises(ValueError, match=r"ends must not fall|must end at 5"):
            _bpe.WordTable().count(b"abcde", np.array(ends, np.int64))
    with pytest.raises(ValueError, match="out must have room"):
        tokenizer._encoder.encode(b"abcde", np.array([5], np.int64), out[:4], out_ends)


def test_copies_of_a_tokenizer():
    from test_copies import WAYS
    tokenizer = BPETokenizer.train(documents(200, 50), 320, ["<|endoftext|>"])
    for way in WAYS.values():
        twin = way(tokenizer)
        assert json.loads(twin.to_json()) == json.loads(tokenizer.to_json())
        assert twin.special_tokens == tokenizer.special_tokens
        for text in documents(20, 50):
            assert twin.encode(text) == tokenizer.encode(text) and twin.decode(twin.encode(text)) == text


def _encode_elsewhere(tokenizer, text, results) -> None:
    results.put((tokenizer.encode(text), tokenizer.encode_batch([text] * 5)[4]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_tokenizer_works_in_another_process(method):
    import multiprocessing
    tokenizer = BPETokenizer.train(documents(200, 50), 320)
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=_encode_elsewhere, args=(tokenizer, "naïve 東京", results))
    process.start()
    assert results.get() == (tokenizer.encode("naïve 東京"),) * 2
    process.join(60)
    assert process.exitcode == 0
