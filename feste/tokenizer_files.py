"""Tokenizer files of others: Hugging Face's tokenizer.json, GPT-2's vocab.json and merges.txt, tiktoken's ranks.

Each reader raises TokenizerError, which names the file and the reason, for whatever is not a byte-level BPE with
GPT-2's word pattern: a tokenizer that almost fits would give almost the right ids.
"""

from __future__ import annotations

import base64
import binascii
import json
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_FILE_BYTES = 256 << 20  # of a tokenizer file; GPT-2's is 1.3 MB


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, and why."""


def _byte_characters() -> list[str]:
    """GPT-2's visible stand-in for each byte: itself where it prints in Latin-1, else U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def visible(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


class Parts(NamedTuple):
    """What a tokenizer is made of: the bytes of each id, pairs of ids (n, 2) in the order of merging, special
    tokens."""

    tokens: list[bytes]
    merges: np.ndarray
    special_tokens: dict[str, int]


def load(path: Path, merges: Path | None) -> Parts:
    """Read whichever format `path` has."""
    text = _read(path)
    if merges is not None:
        return from_gpt2(text, _read(merges), f"{path} and {merges}")
    if path.name == "vocab.json":
        raise TokenizerError(f"{path} holds no merges; name its merges.txt too: load(vocab_json, merges_txt)")
    return from_huggingface(text, str(path)) if text.lstrip()[:1] == "{" else from_tiktoken(text, str(path))


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} has {size} bytes; a tokenizer file has at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not a tokenizer: not UTF-8 at byte {error.start}") from error


def _parse(text: str, source: str) -> dict:
    try:
        value = json.loads(text)
    except RecursionError:
        raise TokenizerError(f"{source} is not a tokenizer: nested too deeply") from None
    except ValueError as error:
        raise TokenizerError(f"{source} is not a tokenizer: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{source} is not a tokenizer: not a JSON object")
    return value


def from_huggingface(text: str, source: str) -> Parts:
    """Read tokenizer.json of `tokenizers`."""
    data = _parse(text, source)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise TokenizerError(f"{source} holds a {kind!r} model; feste reads byte-level BPE")
    _refuse_unsupported(data, model, source)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{source}: model.merges is not a list")
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) and isinstance(token.get("content"), str)
                                              and isinstance(token.get("id"), int) for token in added):
        raise TokenizerError(f"{source}: added_tokens is not a list of tokens")
    for option in ("lstrip", "rstrip", "single_word"):
        if any(token.get(option) for token in added):
            raise TokenizerError(f"{source}: an added token sets {option}, which feste does not support")
    return _build(model.get("vocab"), [_split_merge(merge, source) for merge in merges],
                  {token["content"]: token["id"] for token in added}, source)


def _refuse_unsupported(data: dict, model: dict, source: str) -> None:
    pre = data.get("pre_tokenizer")
    if not isinstance(pre, dict) or pre.get("type") != "ByteLevel" \
            or pre.get("add_prefix_space") is not False or not pre.get("use_regex", True):
        raise TokenizerError(f"{source} splits words by {pre!r:.80}; feste reads ByteLevel with GPT-2's pattern "
                             "and no prefix space")
    for part in ("normalizer", "truncation", "padding"):
        if data.get(part) is not None:
            raise TokenizerError(f"{source} has a {part}, which feste does not apply")
    for part in ("decoder", "post_processor"):
        kind = data.get(part)
        if kind is not None and not (isinstance(kind, dict) and kind.get("type") == "ByteLevel"):
            raise TokenizerError(f"{source} has the {part} {kind!r:.80}; feste reads ByteLevel")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                   "ignore_merges"):
        if model.get(option):
            raise TokenizerError(f"{source} sets model.{option}, which feste does not support")


def _split_merge(merge, source: str) -> tuple[str, str]:
    """A merge is a pair of strings, or in older files one string with a space between them."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
        raise TokenizerError(f"{source}: {merge!r:.80} is not a merge of two tokens")
    return parts[0], parts[1]


def from_gpt2(vocab_text: str, merges_text: str, source: str) -> Parts:
    """Read GPT-2's vocab.json and merges.txt. Tokens that no merge makes are special if they look so, like
    <|endoftext|> and [PAD]; of others the merges are missing, as from a file that was cut short."""
    vocab = _parse(vocab_text, source)
    lines = [line for line in merges_text.split("\n") if line and not line.startswith("#version")]
    merges = [_split_merge(line, source) for line in lines]
    made = {a + b for a, b in merges}
    special = {token: i for token, i in vocab.items() if len(token) > 1 and token not in made}
    for token in special:
        if token[0] + token[-1] not in ("<>", "[]") or len(token) < 3:
            raise TokenizerError(f"{source}: no merge makes the token {token!r:.80}; is the file of merges whole?")
    return _build({token: i for token, i in vocab.items() if token not in special}, merges, special, source)


def _build(vocab, merges: list[tuple[str, str]], special: dict[str, int],
           source: str) -> Parts:
    if not isinstance(vocab, dict):
        raise TokenizerError(f"{source}: the vocabulary is not a mapping of tokens to ids")
    ordinary = {token: i for token, i in vocab.items() if token not in special}
    size = len(ordinary) + len(special)
    ids = [*ordinary.values(), *special.values()]
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(size)):
        raise TokenizerError(f"{source}: the ids of {size} tokens are not 0 .. {size - 1}, each once")
    if "" in ordinary or "" in special:
        raise TokenizerError(f"{source}: a token is empty")
    tokens: list[bytes] = [b""] * size
    try:
        for token, i in ordinary.items():
            tokens[i] = bytes(CHARACTER_BYTES[character] for character in token)
        for token, i in special.items():
            tokens[i] = token.encode("utf-8")
        pairs = [(ordinary[a], ordinary[b]) for a, b in merges]
    except KeyError as error:
        raise TokenizerError(f"{source}: {error.args[0]!r:.80} in a token or merge is not in the vocabulary of bytes "
                             "and merges") from None
    except UnicodeEncodeError:
        raise TokenizerError(f"{source}: a special token has a lone surrogate") from None
    if len(set(tokens)) != size:
        raise TokenizerError(f"{source}: two ids stand for the same token")
    return Parts(tokens, np.array(pairs, np.int32).reshape(-1, 2), special)


def from_tiktoken(text: str, source: str) -> Parts:
    """Read a tiktoken rank file: a base64 token and its rank, which is its id, on each line."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            if int(rank) in tokens:
                raise TokenizerError(f"{source}, line {number}: rank {rank} stands twice")
            tokens[int(rank)] = base64.b64decode(token, validate=True)
        except TokenizerError:
            raise
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{source}, line {number}: {line!r:.60} is not a base64 token and a rank") from None
    if sorted(tokens) != list(range(len(tokens))):
        raise TokenizerError(f"{source}: the ranks of {len(tokens)} tokens are not 0 .. {len(tokens) - 1}")
    ordered = [tokens[rank] for rank in range(len(tokens))]
    if len(set(ordered)) != len(ordered):
        raise TokenizerError(f"{source}: two ranks stand for the same token")
    return Parts(ordered, np.array(_recover_merges(ordered, source), np.int32).reshape(-1, 2), {})


def _recover_merges(tokens: list[bytes], source: str) -> list[tuple[int, int]]:
    """The pair each token was merged from: what its bytes come to by the merges of lower rank."""
    id_of_byte = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
    if len(id_of_byte) != 256:
        raise TokenizerError(f"{source} lacks the bytes {sorted(set(range(256)) - set(id_of_byte))[:8]}; "
                             "a byte-level tokenizer has all 256")
    made: dict[tuple[int, int], int] = {}
    for i, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _merge([id_of_byte[byte] for byte in token], made)
        if len(parts) != 2:
            raise TokenizerError(f"{source}: token {i}, {token!r:.60}, is no merge of two tokens of lower rank")
        made[parts[0], parts[1]] = i
    return list(made)


def _merge(symbols: list[int], made: dict[tuple[int, int], int]) -> list[int]:
    """Merge the pair of lowest rank, the leftmost of equals, until there is none. Through a heap, so that a file of
    very long tokens takes no more than n log n."""
    left, right = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    heap = [(made[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in made]
    heapify(heap)
    while heap:
        new, at = heappop(heap)
        behind = right[at]
        if behind < 0 or made.get((symbols[at], symbols[behind])) != new:
            continue  # an earlier merge has changed this place
        symbols[at], symbols[behind], right[at] = new, -1, right[behind]
        if right[at] >= 0:
            left[right[at]] = at
        for start in (left[at], at):
            pair = (symbols[start], symbols[right[start]]) if start >= 0 and right[start] >= 0 else None
            if pair in made:
                heappush(heap, (made[pair], start))
    return [symbol for symbol in symbols if symbol >= 0]


def write_tiktoken(path: Path, tokens: list[bytes], special_ids: set[int]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens) if i not in special_ids]
    path.write_text("".join(lines), encoding="ascii")
