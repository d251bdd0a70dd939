"""Directories of tokens: a text that was tokenized once, for data larger than memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from feste.errors import FesteError
from feste.tokenizer import BPETokenizer

INDEX_NAME, TOKENIZER_NAME = "tokens.json", "tokenizer.json"  # the index is written last: without it a directory is
#                                                              not complete


def load_tokens(folder: str | os.PathLike) -> tuple[np.ndarray, BPETokenizer]:
    """The tokens of a prepared directory, mapped into memory and not read, and their tokenizer."""
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        tokens = np.memmap(folder / index["file"], dtype=index["dtype"], mode="r", offset=index.get("offset", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FesteError(f"{folder} is no finished directory of tokens ({error}); make one with "
                         f"python -m tools.prepare FILE... -o {folder}", "data") from None
    if len(tokens) != index.get("tokens"):
        raise FesteError(f"{folder} is damaged: {index['file']} has {len(tokens)} tokens, not {index.get('tokens')}")
    return tokens, BPETokenizer.load(folder / TOKENIZER_NAME)
