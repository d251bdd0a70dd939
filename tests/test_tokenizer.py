"""The tokenizer against Hugging Face's `tokenizers` and OpenAI's tiktoken, and against its own definition."""
# ruff: noqa: RUF001

import inspect
import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
import tokenizers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

import feste.tokenizer as module
from feste import BPETokenizer, _bpe, shakespeare_text
from feste.formats.vocabulary import visible
from feste.tokenizer import BASE_BYTES, TokenizerError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END, LONGER = "<|endoftext|>", "<|endoftext|>>"
LANGUAGES = """
Die Würde des Menschen ist unantastbar. Größe, Maß und Übung; 3,14 × 2 = 6,28 €.  Ça va? L'été, c'est déjà fini !
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι. Все люди рождаются свободными. כל בני האדם נולדו בני חורין. يولد جميع الناس
सभी मनुष्य जन्म से स्वतंत्र हैं १२३ ४५. 人人生而自由，在尊严和权利上一律平等。すべての人間は、生まれながらにして自由。모든 인간은
I'll say they've what you'd call 'the's'; it's HE'S DON'T 'tis we're\tyes\r\n\n   indented\u00a0no-break\u3000wide 🙂
👩‍👩‍👧 ½ Ⅷ ²
"""


def varied_text() -> str:
    """Program text, many languages, and numbers; the same on every machine with one Python."""
    return inspect.getsource(random) + 20 * LANGUAGES + inspect.getsource(inspect)


def corpus(size: int | None = None) -> str:
    return shakespeare_text()[:size]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(varied_text(), 2000, [END, LONGER])


@pytest.fixture(scope="module")
def peers(tokenizer, tmp_path_factory):
    """encode of Hugging Face with the saved file, and of tiktoken with the exported ranks."""
    return make_peers(tokenizer, tmp_path_factory.mktemp("peers"))


def make_peers(tokenizer, folder):
    tokenizer.save(folder / "tokenizer.json")
    tokenizer.export_tiktoken(folder / "ranks.tiktoken")
    theirs = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ranks = load_tiktoken_bpe(str(folder / "ranks.tiktoken"))
    openai = tiktoken.Encoding("feste", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda text: theirs.encode(text).ids, openai.encode_ordinary


def check_equal(tokenizer, peers, text):
    huggingface, openai = peers
    ids = tokenizer.encode(text)
    assert ids == openai(text)
    assert tokenizer.encode(text, allow_special=True) == huggingface(text)
    assert tokenizer.decode(ids) == text


# ---- ids -----------------------------------------------------------------------------------------------------

SPACES = "".join(chr(c) for c in range(0x110000) if chr(c).isspace()) + "\u200b\u180e\ufeff"
DIGITS = st.characters(categories=["Nd", "Nl", "No"])
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.text(st.characters(categories=["L"]), max_size=6),
    st.text(st.characters(min_codepoint=0x10000, max_codepoint=0x10FFFF), max_size=3),
    st.tuples(st.characters(categories=["L"]), st.text(st.characters(categories=["M"]), max_size=3)).map("".join),
    st.text(DIGITS, max_size=4),
    st.text(st.sampled_from(SPACES), max_size=4),
    st.text(st.characters(categories=["P", "S"]), max_size=4),
    st.text("etaoin ", max_size=12),
    st.sampled_from(["'s", "'S", "'ll", "'ve", "'re", "'r", "'", "''t", " 'd", "’s", "\r\n", "  ", END, LONGER, "<|"]),
    st.sampled_from(varied_text()[:4000].split(" ")),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_ids_equal_the_peers_on_any_unicode(tokenizer, peers, text):
    check_equal(tokenizer, peers, text)


@pytest.mark.long
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(TEXTS, min_size=50, max_size=50))
def test_ids_equal_the_peers_on_200000_texts(tokenizer, peers, texts):
    for text in texts:
        check_equal(tokenizer, peers, text)


@pytest.mark.parametrize(("first", "last"), [
    (0, 0x20000), pytest.param(0x20000, 0x110000, marks=pytest.mark.long)])
def test_every_code_point_between_all_kinds_of_neighbours(tokenizer, peers, first, last):
    """Each character of Unicode behind and before a letter, a number, a mark and a space."""
    for start in range(first, last, 0x1000):
        characters = [chr(c) for c in range(start, start + 0x1000) if not 0xD800 <= c < 0xE000]
        text = "".join(f"a{c}1{c} {c}!{c}" for c in characters)
        ids = tokenizer.encode(text)
        assert ids == peers[0](text), f"from U+{start:04X} on"
        assert ids == peers[1](text), f"from U+{start:04X} on"


def test_ids_equal_the_peers_on_varied_text_and_the_corpus(tokenizer, peers):
    check_equal(tokenizer, peers, varied_text())
    check_equal(tokenizer, peers, corpus(300_000))


@pytest.mark.parametrize("vocab_size", [512, pytest.param(20534, marks=pytest.mark.long)])
def test_ids_equal_the_peers_after_training_on_the_corpus(tmp_path, vocab_size):
    text = corpus(None if vocab_size > 512 else 200_000)
    tokenizer = BPETokenizer.train(text, vocab_size)
    check_equal(tokenizer, make_peers(tokenizer, tmp_path), text)


@pytest.mark.filterwarnings("ignore:the text yields only")
@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", "etaoin", " \n", "é", "1,"])
def test_long_words_equal_huggingface(alphabet):
    """Runs of few letters, where the leftmost of equal pairs and long tokens matter most."""
    rng = random.Random(alphabet)
    text = "".join(rng.choice(alphabet) for _ in range(3000))
    tokenizer = BPETokenizer.train(" ".join(text[i:i + 50] for i in range(0, 3000, 50)), 330)
    theirs = hf.Tokenizer.from_str(tokenizer.to_json())
    for length in [*range(1, 60), 127, 128, 129, 500, 2999, 3000]:
        assert tokenizer.encode(text[:length]) == theirs.encode(text[:length]).ids
    assert tokenizer.encode(alphabet[0] * 5000) == theirs.encode(alphabet[0] * 5000).ids


def by_definition(data: bytes, base: list[int], pairs: list[tuple[int, int]], ids: list[int]) -> list[int]:
    """Merge the pair of lowest rank, the leftmost of equals, until there is none."""
    rank = {}
    for k, pair in enumerate(pairs):
        rank.setdefault(pair, k)
    symbols = [base[byte] for byte in data]
    while candidates := [(rank[p], i) for i, p in enumerate(pairwise(symbols)) if p in rank]:
        lowest, i = min(candidates)
        symbols[i:i + 2] = [ids[lowest]]
    return symbols


def random_merges(rng: random.Random) -> tuple[list[tuple[int, int]], list[int]]:
    """Merges in any order, of which several may make one token."""
    tokens, pool = [bytes([b]) for b in range(256)], [ord(c) for c in "abc"]
    id_of, pairs, ids = {token: i for i, token in enumerate(tokens)}, [], []
    for _ in range(rng.randint(1, 25)):
        pair = rng.choice(pool), rng.choice(pool)
        made = tokens[pair[0]] + tokens[pair[1]]
        if len(made) > 12 or pair in pairs:
            continue
        if made not in id_of:
            id_of[made] = len(tokens)
            tokens.append(made)
            pool.append(id_of[made])
        pairs.append(pair)
        ids.append(id_of[made])
    order = rng.sample(range(len(pairs)), len(pairs)) if rng.random() < 0.5 else range(len(pairs))
    return [pairs[i] for i in order], [ids[i] for i in order]


@pytest.mark.filterwarnings("ignore:the text yields only")
def test_any_merges_are_applied_by_definition():
    """Consistent merges go from left to right, others through the heap; both give what the definition gives."""
    rng, kinds = random.Random(0), set()
    for trial in range(150):
        if trial % 2:
            pairs, ids = random_merges(rng)
            base = np.arange(256, dtype=np.int32)
        else:
            text = " ".join("".join(rng.choices("aab", k=rng.randint(1, 30))) for _ in range(20))
            pairs = list(map(tuple, BPETokenizer.train(text, 256 + rng.randint(1, 50)).merges.tolist()))
            base, ids = np.argsort(BASE_BYTES).astype(np.int32), [256 + i for i in range(len(pairs))]
        merges = _bpe.Merges(base, np.array(pairs, np.int32).reshape(-1, 2), np.array(ids, np.int32))
        encoder = _bpe.Encoder(merges)
        kinds.add(merges.consistent)
        for length in (1, 2, 3, 8, 30, 150):
            data = "".join(rng.choices("abc", k=length)).encode()
            out = np.empty(length, np.int32)
            ends = np.array([length], np.int64)
            n = encoder.encode(data, ends, out, np.empty_like(ends))
            assert out[:n].tolist() == by_definition(data, base.tolist(), pairs, ids)
    assert kinds == {True, False}


def test_time_is_linear_in_the_length_of_a_word(tokenizer):
    """Eight times the letters, at most 24 times the time on however busy a machine; a quadratic encoder takes 64."""
    def seconds(n: int) -> float:
        text = "".join(random.Random(0).choices("etaoinshrdlu", k=n))
        timings = []
        for _ in range(5):
            begun = time.perf_counter()
            tokenizer.encode_to_numpy(text)
            timings.append(time.perf_counter() - begun)
        return min(timings)

    assert seconds(800_000) < 24 * seconds(100_000)


# ---- special tokens ------------------------------------------------------------------------------------------


def test_special_tokens_cannot_be_forged(tokenizer):
    special = set(tokenizer.special_tokens.values())
    text = f"a{END}b {LONGER}"
    ids = tokenizer.encode(text)
    assert not special & set(ids) and tokenizer.decode(ids) == text
    allowed = tokenizer.encode(text, allow_special=True)
    assert [i for i in allowed if i in special] == [tokenizer.special_tokens[END], tokenizer.special_tokens[LONGER]]
    assert tokenizer.decode(allowed) == text
    assert tokenizer.encode("plain", allow_special=True) == tokenizer.encode("plain")


# ---- training ------------------------------------------------------------------------------------------------


def huggingface_merges(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    import json
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([text], hf.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet,
                                                              show_progress=False))
    merges = json.loads(theirs.to_str())["model"]["merges"]
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


def check_merges(text: str, vocab_size: int) -> None:
    ours = BPETokenizer.train(text, vocab_size)
    names = [visible(token) for token in ours.tokens]
    assert [(names[a], names[b]) for a, b in ours.merges.tolist()] == huggingface_merges(text, vocab_size)


@pytest.mark.parametrize("vocab_size", [256, 300, 1500])
def test_merges_equal_huggingface(vocab_size):
    check_merges(varied_text(), vocab_size)


@pytest.mark.filterwarnings("ignore:the text yields only")
@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=12))
def test_merges_equal_huggingface_where_ties_abound(words):
    check_merges(" ".join(words), 300)


@pytest.mark.long
@pytest.mark.parametrize("vocab_size", [256, 512, 1024, 1536, 20534])
def test_merges_equal_huggingface_on_the_corpus(vocab_size):
    check_merges(corpus(), vocab_size)


def test_training_on_a_stream_equals_training_on_the_whole():
    documents = [varied_text()[i:i + 3000] for i in range(0, 60_000, 3000)]
    streamed = BPETokenizer.train((document for document in documents), 600)
    words = [word for document in documents for word in _bpe.split_words(document.encode())]
    table = _bpe.WordTable()
    for word in words:
        table.count(word, np.array([len(word)], np.int64))
    base = np.argsort(BASE_BYTES).astype(np.int32)
    assert (streamed.merges == _bpe.Trainer(table, base).train(344, 256)).all()
    # Where the parts end between words the whole text has the same words.
    whole = varied_text()
    parts, start = [], 0
    while start < len(whole):
        end = whole.find("\nd", start + 2000)
        end = len(whole) if end < 0 else end
        parts.append(whole[start:end])
        start = end
    assert len(parts) > 5
    assert BPETokenizer.train(iter(parts), 600).to_json() == BPETokenizer.train(whole, 600).to_json()


@pytest.mark.parametrize("cores", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(monkeypatch, cores):
    text = varied_text()
    want = BPETokenizer.train(text, 700)
    want_ids = want.encode_to_numpy(text)
    assert len(text.encode()) < 2 * module.CHUNK_BYTES  # so that this was one piece
    monkeypatch.setattr(module, "_available_cores", lambda: cores)
    monkeypatch.setattr(module, "CHUNK_BYTES", 500)
    assert BPETokenizer.train(text, 700).to_json() == want.to_json()
    assert (want.encode_to_numpy(text) == want_ids).all()


@pytest.mark.parametrize(("text", "splits"), [
    ("ab cd", True), ("ab\ncd", True), ("人人。\n生而", True), ("é \u3042", False), ("\u3042 b", True), ("🙂 b", True),
    ("a\u00a0 b", False), ("a\u0085\nb", False), ("a\u3000 b", False), ("a\u2009 b", False), ("abc", False)])
def test_texts_split_where_a_word_begins_in_any_script(text, splits):
    data = text.encode()
    at = _bpe.safe_split(data, 1)
    assert (at < len(data)) == splits
    assert _bpe.split_words(data[:at]) + _bpe.split_words(data[at:]) == _bpe.split_words(data)
    for junk in (b"\xff \xff", b"\xf8\x88\x80\x80\x80 ", b"\xf4\xbf\xbf\xbf ", b"\x80 ", b"\xc2 ", b"\xe3\x80 "):
        assert 0 < _bpe.safe_split(junk, 0) <= len(junk)  # prepare looks for a place before it knows the bytes


def test_threads_may_share_a_tokenizer(tokenizer):
    """Each thread encodes texts of new words, so that the tables behind the encoder grow under the others."""
    def text(seed: int) -> str:
        rng = random.Random(seed)
        return " ".join("".join(rng.choices("etaoins", k=9)) for _ in range(20_000))

    want = [BPETokenizer.from_json(tokenizer.to_json()).encode(text(seed)) for seed in range(4)]
    for _ in range(3):
        shared, texts = BPETokenizer.from_json(tokenizer.to_json()), [text(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(shared.encode, texts)) == want


def test_a_text_without_enough_pairs_yields_fewer_tokens_and_says_so():
    with pytest.warns(UserWarning, match="only 257 tokens, not the 300"):
        tokenizer = BPETokenizer.train("ab", 300)
    assert tokenizer.vocab_size == 257 and tokenizer.decode(tokenizer.encode("abba")) == "abba"


# ---- decoding ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_survive(tokenizer, data):
    ids = [BASE_BYTES.index(byte) for byte in data]
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
    text = data.decode("utf-8", errors="ignore")
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 1999), max_size=60))
def test_any_ids_decode_to_the_bytes_of_their_tokens(tokenizer, ids):
    assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.tokens[i] for i in ids)
    decoder = tokenizer.stream_decoder()
    assert "".join([*map(decoder.feed, ids), decoder.flush()]) == tokenizer.decode(ids)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_stream_decoder_never_emits_half_a_character(tokenizer, text):
    for ids in ([BASE_BYTES.index(byte) for byte in text.encode()], tokenizer.encode(text)):
        decoder, shown = tokenizer.stream_decoder(), ""
        for k, token_id in enumerate(ids, 1):
            shown += decoder.feed(token_id)
            assert "\ufffd" not in shown
            assert tokenizer.decode_bytes(ids[:k]).startswith(shown.encode()), "shown before it was there"
            assert len(tokenizer.decode_bytes(ids[:k])) - len(shown.encode()) < 4, "a whole character held back"
        assert shown == text and decoder.flush() == ""


# ---- types and errors ----------------------------------------------------------------------------------------


def test_ids_come_as_a_list_and_as_the_smallest_array(tokenizer):
    text = LANGUAGES
    array = tokenizer.encode_to_numpy(text)
    assert array.dtype == np.uint16 and array.tolist() == tokenizer.encode(text)
    assert tokenizer.encode_batch([text, "", "a"]) == [tokenizer.encode(text), [], tokenizer.encode("a")]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "" and tokenizer.decode(np.empty(0, np.uint16)) == ""
    for dtype in (np.uint16, np.int32, np.int64, np.uint64):
        assert tokenizer.decode(array.astype(dtype)) == text


@pytest.mark.parametrize(("call", "error", "parts"), [
    (lambda t: t.encode("ab\ud800"), ValueError, ["U+D800", "position 2", "UTF-8"]),
    (lambda t: t.encode("\udfff", allow_special=True), ValueError, ["U+DFFF"]),
    (lambda t: BPETokenizer.train("\udc80", 300), ValueError, ["U+DC80"]),
    (lambda t: BPETokenizer.train(["a", "\udc80"], 300), ValueError, ["U+DC80"]),
    (lambda t: t.encode(b"bytes"), TypeError, ["str", "bytes"]),
    (lambda t: t.encode(b"bytes", allow_special=True), TypeError, ["str", "bytes"]),
    (lambda t: t.encode_batch("one string"), TypeError, ["one string"]),
    (lambda t: t.encode(None), TypeError, ["NoneType"]),
    (lambda t: t.decode([0, 2000]), ValueError, ["0 .. 1999", "2000"]),
    (lambda t: t.decode([-1]), ValueError, ["-1"]),
    (lambda t: t.decode([2**40]), ValueError, [str(2**40)]),
    (lambda t: t.decode([-2**40]), ValueError, [str(-2**40)]),
    (lambda t: t.decode([0.5]), ValueError, ["float64"]),
    (lambda t: t.decode([[1, 2]]), ValueError, ["(1, 2)"]),
    (lambda t: BPETokenizer.train("text", 255), ValueError, ["256", "255"]),
    (lambda t: BPETokenizer.train("text", 256, [END]), ValueError, ["256", "1 for the special"]),
    (lambda t: BPETokenizer.train("text", 300.0), ValueError, ["300.0"]),
    (lambda t: BPETokenizer.train(b"text", 300), TypeError, ["str", "bytes"]),
    (lambda t: BPETokenizer.train("text", 300, [1]), TypeError, ["[1]"]),
    (lambda t: BPETokenizer.train("text", 300, ["\ud800"]), ValueError, ["U+D800"]),
    (lambda t: BPETokenizer.train("text", 258, ["a"]), TokenizerError, ["b'a'"]),
    (lambda t: BPETokenizer(t.tokens, t.merges - 300), TokenizerError, ["0 .. 1999", "-"]),
    (lambda t: BPETokenizer(t.tokens, t.merges + 2000), TokenizerError, ["0 .. 1999"]),
    (lambda t: BPETokenizer(t.tokens, t.merges, {"<x>": 9999}), TokenizerError, ["<x>", "9999"]),
    (lambda t: BPETokenizer([b"a"], np.empty((0, 2))), TokenizerError, ["lacks the bytes"]),
])
def test_errors_name_the_value(tokenizer, call, error, parts):
    with pytest.raises(error) as caught:
        call(tokenizer)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
