"""Directories of tokens: a text that was tokenized once, for data larger than memory. The format, writer and reader.

    tokens.bin       all tokens in one file, little-endian uint16, or uint32 beyond 65,536 ids. Layout nanogpt: nothing
                     else. Layout llm.c: 256 int32 before them, of which the first three are magic, version, count.
    tokenizer.json   the tokenizer
    tokens.json      what tokens.bin holds; written last, so a directory that has it is complete
    skipped.txt      what was left out, a line each, if anything was
    train.bin, val.bin   copies of its parts, in the same layout, if they were asked for; feste does not read them

One file rather than many: a map of it is the array the trainer reads, whatever its size. While the work is under way
journal.json says how far it came: tokens are on the disk before the journal counts them, and what the journal does not
count is cut off when the work goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from feste import disk
from feste.errors import FesteError
from feste.shards import LLMC_HEADER_BYTES, LLMC_MAGIC, LLMC_VERSION
from feste.tokenizer import BPETokenizer

INDEX, JOURNAL, TOKENS, TOKENIZER, SKIPPED, LOCK = ("tokens.json", "journal.json", "tokens.bin", "tokenizer.json",
                                                    "skipped.txt", ".lock")
LAYOUTS = ("nanogpt", "llm.c")
SPLIT_BLOCK = 1 << 22  # tokens that are copied at once


class TokensError(FesteError):
    """A directory of tokens that cannot be read, written, or continued, and why."""


# ---- reading -----------------------------------------------------------------------------------------------


def is_token_directory(folder: str | os.PathLike) -> bool:
    """Whether there are tokens in the directory, finished or not."""
    return any(Path(folder, name).exists() for name in (INDEX, JOURNAL, TOKENS))


def load_tokens(folder: str | os.PathLike) -> tuple[np.ndarray, BPETokenizer]:
    """The tokens of a finished directory, mapped into memory and not read, and their tokenizer."""
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        tokens = np.memmap(folder / index["file"], dtype=index["dtype"], mode="r", offset=index.get("offset", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokensError(f"{folder} is no finished directory of tokens ({error})", "prepare") from None
    if len(tokens) != index.get("tokens"):
        raise TokensError(f"{folder} is damaged: {index['file']} has {len(tokens)} tokens, not {index.get('tokens')}")
    return tokens, BPETokenizer.load(folder / TOKENIZER)


# ---- writing -----------------------------------------------------------------------------------------------


@dataclass
class Journal:
    """How far the work came: all before (file, position) is in tokens.bin, which has `tokens` tokens of it.

    settings: what the tokens depend on. position and sha256: bytes of the text of the file at hand, and their hash;
    line: how many lines these are. done: of each file before it the hash, the size and the time it was changed.
    skipped: lines of skipped.txt.
    """

    settings: dict
    file: int = 0
    position: int = 0
    sha256: str = ""
    line: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    done: list = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """TokensError for a file that is damaged, or was written by a feste that kept another journal."""
        value = _read_json(path)
        if "offset" in value:
            raise TokensError(f"{path.parent} was begun by an earlier feste; remove it and start again")
        try:
            journal = cls(**value)
            counts = (journal.file, journal.position, journal.line, journal.documents, journal.tokens, journal.skipped)
            if all(type(count) is int and count >= 0 for count in counts) and isinstance(journal.done, list):
                return journal
        except TypeError:
            pass
        raise TokensError(f"{path} is damaged; remove {path.parent} and start again")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value["settings"], dict):
            return value
    except (ValueError, KeyError, TypeError):
        pass
    raise TokensError(f"{path} is damaged; remove {path.parent} and start again")


class TokenDirectory:
    """A directory of tokens that is being made, or finished after an interruption. A context, which holds its lock.

    journal is None if the directory is finished. settings are what the tokens depend on; a directory that was begun
    with others is refused, with what is different.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not is_token_directory(path) and any(not file.name.startswith(".") for file in path.iterdir()):
                raise TokensError(f"{path} is not empty and holds no unfinished preparation", "output")
            self._lock = disk.Lock(path / LOCK)
            disk.remove_partial(path)
        except disk.Held:
            raise TokensError(f"another process is preparing {path}; wait for it", "output") from None
        except OSError as error:
            raise TokensError(f"cannot make the directory {path}: {error.strerror}; {disk.advice(error)}",
                              "output") from None
        try:
            self.journal = self._begin(settings)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> TokenDirectory:
        return self

    def __exit__(self, *error) -> None:
        self._lock.release()

    def _begin(self, settings: dict) -> Journal | None:
        finished, begun = self.path / INDEX, self.path / JOURNAL
        if finished.exists():
            self._refuse_others(_read_json(finished)["settings"], settings)
            return None
        if begun.exists():
            journal = Journal.read(begun)
            self._refuse_others(journal.settings, settings)
            return journal
        journal = Journal(settings)
        disk.write_json(begun, asdict(journal))
        return journal

    def _refuse_others(self, found: dict, settings: dict) -> None:
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            raise TokensError(f"{self.path} was prepared with other {' and '.join(changed)}; repeat the command it was "
                              "begun with", "output")

    def index(self) -> dict:
        """What a finished directory holds: tokens, documents, dtype and the rest of tokens.json."""
        return _read_json(self.path / INDEX)

    def writer(self, tokenizer: BPETokenizer, layout: str) -> TokenWriter:
        """The writer of tokens.bin, where the journal stands."""
        return TokenWriter(self.path, self.journal, tokenizer, layout)


class TokenWriter:
    """Appends to tokens.bin. A context; `finish` writes the index, without which the directory is not complete."""

    def __init__(self, path: Path, journal: Journal, tokenizer: BPETokenizer, layout: str) -> None:
        self.path, self.journal, self.tokenizer = path, journal, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        if layout == "llm.c" and self.dtype.itemsize != 2:
            raise TokensError(f"the layout of llm.c has two bytes a token, too few for {tokenizer.vocab_size} ids; "
                              "use the layout nanogpt", "layout")
        self.header = LLMC_HEADER_BYTES if layout == "llm.c" else 0
        end = tokenizer.end_of_text
        self._end = np.array([] if end is None else [end], self.dtype)  # behind each document

    def __enter__(self) -> TokenWriter:
        self._file = _open_at(self.path / TOKENS, self.header + self.journal.tokens * self.dtype.itemsize)
        try:
            self._skipped = _open_at_line(self.path / SKIPPED, self.journal.skipped)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._skipped.close()
        if not self.journal.skipped:
            (self.path / SKIPPED).unlink(missing_ok=True)

    def append(self, texts: list[str], ends_document: bool, skipped: Iterable[str] = ()) -> None:
        """Tokens of some texts, and lines about what was left out; the journal counts what is on the disk."""
        parts = [np.empty(0, self.dtype)]
        for text in texts:
            parts.append(self.tokenizer.encode_to_numpy(text))
            if ends_document:
                parts.append(self._end)
                self.journal.documents += 1
        ids = np.concatenate(parts).astype(self.dtype, copy=False)
        self._file.write(ids.tobytes())
        _to_disk(self._file)
        lines = [f"{line}\n" for line in skipped]
        if lines:
            self._skipped.write("".join(lines).encode("utf-8", errors="replace"))
            _to_disk(self._skipped)
        self.journal.tokens += len(ids)
        self.journal.skipped += len(lines)

    def keep(self) -> None:
        """Write the journal: everything appended so far is counted."""
        disk.write_json(self.path / JOURNAL, asdict(self.journal))

    def finish(self) -> dict:
        """Complete the directory; returns its index."""
        journal = self.journal
        if self.header:
            self._write_header(journal.tokens)
        index = {"file": TOKENS, "dtype": self.dtype.name, "offset": self.header, "tokens": journal.tokens,
                 "documents": journal.documents, "skipped": journal.skipped, "inputs": journal.done,
                 "settings": journal.settings}
        disk.write_json(self.path / INDEX, index)  # on the disk, with its name, before the journal is not
        (self.path / JOURNAL).unlink(missing_ok=True)
        return index

    def _write_header(self, count: int) -> None:
        if count > 0x7FFFFFFF:
            raise TokensError(f"the layout of llm.c counts at most {0x7FFFFFFF} tokens, and there are {count}; use the "
                              "layout nanogpt, or divide the files between several directories", "layout")
        self._file.seek(0)
        self._file.write(_header(count))
        _to_disk(self._file)


def write_split(folder: Path, fraction: float) -> dict[str, int]:
    """train.bin and val.bin for nanoGPT or llm.c: copies of tokens.bin, of which the last fraction is val.bin.

    Returns the tokens of each file. TokensError for a fraction that leaves nothing to one of them.
    """
    tokens, _ = load_tokens(folder)
    held_out = int(len(tokens) * fraction)
    if not 0 < held_out < len(tokens):
        raise TokensError(f"a fraction of {fraction} of {len(tokens):,} tokens leaves nothing to train.bin or to "
                          "val.bin", "split")
    parts = {"train.bin": tokens[:len(tokens) - held_out], "val.bin": tokens[len(tokens) - held_out:]}
    for name, part in parts.items():
        with disk.replacing(folder / name) as made, open(made, "wb") as file:
            if tokens.offset:  # the layout of llm.c
                file.write(_header(len(part)))
            for begin in range(0, len(part), SPLIT_BLOCK):
                file.write(part[begin:begin + SPLIT_BLOCK].tobytes())
            _to_disk(file)
    return {name: len(part) for name, part in parts.items()}


def _header(count: int) -> bytes:
    header = np.zeros(LLMC_HEADER_BYTES // 4, "<i4")
    header[:3] = LLMC_MAGIC, LLMC_VERSION, count
    return header.tobytes()


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open_at(path: Path, size: int):
    """tokens.bin, cut to `size` bytes, at its end."""
    file = path.open("r+b" if path.exists() else "w+b")
    found = file.seek(0, os.SEEK_END)
    if found < size and found != 0:
        file.close()
        raise TokensError(f"{path} has {found} bytes, fewer than the {size} that were written; remove {path.parent} "
                          "and start again")
    file.truncate(size)
    file.seek(size)
    return file


def _open_at_line(path: Path, count: int):
    """skipped.txt, cut behind `count` lines."""
    kept = path.read_bytes().splitlines(keepends=True)[:count] if path.exists() else []
    return _open_at(path, sum(map(len, kept)))
