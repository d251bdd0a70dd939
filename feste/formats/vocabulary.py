"""What every tokenizer format comes down to: the bytes of each id, the merges, the special tokens, all checked.

Each reader raises TokenizerError, which names the file and the reason, for whatever is not a byte-level BPE with
GPT-2's word pattern: a tokenizer that almost fits would give almost the right ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feste.errors import FesteError

MAX_FILE_BYTES = 256 << 20  # of a tokenizer file; GPT-2's is 1.3 MB


class TokenizerError(FesteError):
    """A tokenizer file that cannot be used, and why."""


def _byte_characters() -> list[str]:
    """GPT-2's visible stand-in for each byte: itself where it prints in Latin-1, else U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def visible(token: bytes) -> str:
    """A token in GPT-2's printable characters, one for each byte."""
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


class Parts(NamedTuple):
    """What a tokenizer is made of.

    tokens: the bytes of each id. merges (n, 2): pairs of ids in the order of merging. special_tokens: text -> id.
    """

    tokens: list[bytes]
    merges: np.ndarray
    special_tokens: dict[str, int]


def read_file(path: Path) -> str:
    """The text of a tokenizer file of a size such files have."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} has {size} bytes; a tokenizer file has at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not a tokenizer: not UTF-8 at byte {error.start}") from error


def parse_object(text: str, source: str) -> dict:
    """A JSON object."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise TokenizerError(f"{source} is not a tokenizer: nested too deeply") from None
    except ValueError as error:
        raise TokenizerError(f"{source} is not a tokenizer: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{source} is not a tokenizer: not a JSON object")
    return value


def split_merge(merge, source: str) -> tuple[str, str]:
    """A merge is a pair of strings, or in older files one string with a space between them."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
        raise TokenizerError(f"{source}: {merge!r:.80} is not a merge of two tokens")
    return parts[0], parts[1]


def build(vocab, merges: list[tuple[str, str]], special: dict[str, int], source: str) -> Parts:
    """A vocabulary and merges of visible tokens as Parts: ids 0 .. n - 1, each once, and nothing missing."""
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
