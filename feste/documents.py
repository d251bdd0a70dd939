"""Files as documents: a text file is one, each line of JSON lines, element of a JSON array, and row of Parquet is one.

A document that cannot be used (no JSON, no text in its field, a lone surrogate) stops the reading, or is left out and
listed, as `on_bad_line` says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feste import _bpe, parquet
from feste.text import TextError, TextFile

BLOCK_BYTES = 4 << 20  # of text in a piece
JSON_LINES, JSON, PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
TEXTS = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", *JSON_LINES, *JSON, *PARQUET)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ON_BAD_LINE = ("stop", "skip")


@dataclass(frozen=True)
class Reading:
    """How files are read. json_field: what holds the text of a JSON object; the rest as in `text`."""

    json_field: str = "text"
    encoding: str | None = None
    errors: str = "strict"
    on_bad_line: str = "stop"


@dataclass
class Piece:
    """Part of a file: whole documents, or a part of one that can be split into words on its own.

    position, sha256: where it ends in the text of the file, in bytes, and the hash of all bytes so far; lines: how many
    of them it is; skipped: what was left out, a line each; last: whether the file ends with it.
    """

    texts: list[str]
    ends_document: bool  # whether a document ends behind each text
    position: int
    sha256: str
    lines: int = 0
    skipped: list[str] = field(default_factory=list)
    last: bool = False


def files_of(paths: Sequence[str]) -> list[Path]:
    """The files that some paths mean: a folder means the texts in it, in the order of their names."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in TEXTS)
        if not inside:
            raise TextError(f"{path} holds no files named like texts ({', '.join(TEXTS)}); name files", "data")
        found += inside
    return found


def _kind(path: Path) -> str:
    """The suffix of a file, small, without that of its compression."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return os.path.splitext(name)[1]


def pieces(path: Path, reading: Reading, position: int = 0, sha256: str = "", line: int = 0) -> Iterator[Piece]:
    """The documents of a file, from a place on where a piece ended. TextError names what cannot be read.

    To continue, the text before that place is read again and must have the hash it had.
    """
    kind = _kind(path)
    if kind in PARQUET:
        return _rows(path, reading, position, sha256)
    stream = _Stream(TextFile(path, reading.encoding, reading.errors, BLOCK_BYTES))
    stream.skip(position, sha256)
    if kind in JSON:
        stream.more()
        kind = ".json" if stream.rest.lstrip().startswith(b"[") else ".jsonl"
    if kind in JSON_LINES:
        return _lines(stream, reading, line)
    return _array(stream, reading) if kind in JSON else _text(stream)


def hash_of(path: Path, reading: Reading) -> str:
    """SHA-256 of all of the text of a file."""
    if _kind(path) in PARQUET:
        return list(_rows(path, reading))[-1].sha256
    stream = _Stream(TextFile(path, reading.encoding, reading.errors, BLOCK_BYTES))
    while not stream.ended:
        stream.more()
        stream.take(len(stream.rest))
    return stream.piece([], True).sha256


class _Stream:
    """The text of a file as UTF-8: `rest` is what was read and not taken; position and hash are of what was taken."""

    def __init__(self, file: TextFile) -> None:
        self.file, self.position, self.rest, self.ended = file, 0, b"", False
        self._blocks, self._hash = iter(file), hashlib.sha256()

    def more(self) -> None:
        """Read another block, unless there is none."""
        block = next(self._blocks, None)
        self.ended = block is None
        self.rest += (block or "").encode()

    def take(self, n: int) -> bytes:
        taken, self.rest = self.rest[:n], self.rest[n:]
        self._hash.update(taken)
        self.position += len(taken)
        return taken

    def skip(self, position: int, sha256: str) -> None:
        while self.position < position and not self.ended:
            self.more()
            self.take(position - self.position)
        if position and (self.position, self._hash.hexdigest()) != (position, sha256):
            raise _changed(self.file.path, position)

    def piece(self, texts: list[str], ends_document: bool, **more) -> Piece:
        return Piece(texts, ends_document, self.position, self._hash.hexdigest(), last=self.ended and not self.rest,
                     **more)


def _changed(path: Path, position: int) -> TextError:
    return TextError(f"{path} is not the file it was: its first {position:,} bytes of text have changed since they "
                     "were tokenized; choose another directory, or put it back")


def _text(stream: _Stream) -> Iterator[Piece]:
    while True:
        stream.more()
        cut = len(stream.rest) if stream.ended else _last_split(stream.rest)
        if cut or stream.ended:
            text = stream.take(cut).decode()
            yield stream.piece([text], stream.ended)
        if stream.ended:
            return


def _last_split(data: bytes) -> int:
    """A place near the end where a word surely begins, or 0."""
    for back in (1 << 12, 1 << 16, 1 << 20, len(data)):
        cut = _bpe.safe_split(data, max(0, len(data) - back))
        if cut < len(data):
            return cut
    return 0


def _lines(stream: _Stream, reading: Reading, line: int) -> Iterator[Piece]:
    while True:
        whole = stream.rest.rfind(b"\n") + 1 or (len(stream.rest) if stream.ended else 0)
        if whole:
            lines = stream.take(whole).removesuffix(b"\n").split(b"\n")
            texts, skipped = [], []
            for number, data in enumerate(lines, line + 1):
                if not data.isspace() and data:
                    _add(texts, skipped, f"{stream.file.path}, line {number}", reading, data)
            line += len(lines)
            yield stream.piece(texts, True, lines=len(lines), skipped=skipped)
        if stream.ended:
            if not whole:
                yield stream.piece([], True)
            return
        stream.more()


def _array(stream: _Stream, reading: Reading) -> Iterator[Piece]:
    """The elements of a JSON array; the file is read whole."""
    while not stream.ended:
        stream.more()
    data, texts, skipped = stream.take(len(stream.rest)), [], []
    try:
        elements = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{stream.file.path} is not JSON ({error}); a .json file must be an array, or have an object "
                        "on each line") from None
    for number, element in enumerate(elements, 1):
        _add(texts, skipped, f"{stream.file.path}, element {number}", reading, element)
    yield stream.piece(texts, True, skipped=skipped)


def _rows(path: Path, reading: Reading, position: int = 0, sha256: str = "") -> Iterator[Piece]:
    """The rows of a Parquet file. Its text, by which places are known, is that of all rows with a zero behind each."""
    digest, done, row = hashlib.sha256(), 0, 0
    if not position:  # so that a file without rows has a piece too
        yield Piece([], True, 0, digest.hexdigest())
    for batch in parquet.rows(path, reading.json_field):
        texts, skipped = [], []
        for text in batch:
            row += 1
            _add(texts, skipped, f"{path}, row {row}", reading, {reading.json_field: text})
        data = b"".join(b"%b\0" % (text or "").encode() for text in batch)
        digest.update(data)
        done += len(data)
        if done > position:
            yield Piece(texts, True, done, digest.hexdigest(), skipped=skipped)
        elif done == position and digest.hexdigest() != sha256:
            raise _changed(path, position)
    if done < position:
        raise _changed(path, position)
    yield Piece([], True, done, digest.hexdigest(), last=True)


def _add(texts: list[str], skipped: list[str], where: str, reading: Reading, found) -> None:
    """Add the text of a line or an element, or what is wrong with it to `skipped`, or raise that."""
    try:
        texts.append(_document(found, reading.json_field))
    except TextError as error:
        if reading.on_bad_line == "stop":
            raise TextError(f"{where}: {error}", "on_bad_line", *error.names) from None
        skipped.append(f"{where}: {error}")


def _document(found, json_field: str) -> str:
    try:
        element = json.loads(found) if isinstance(found, bytes) else found
        text = element if isinstance(element, str) else element[json_field]
        text.encode("utf-8")
    except json.JSONDecodeError as error:
        raise TextError(f"not JSON ({error}); each line must be an object") from None
    except UnicodeEncodeError as error:
        raise TextError(f"the text has a lone surrogate (\\u{ord(text[error.start]):04x}), which is no "
                        "character") from None
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise TextError(f"no object with a string in {json_field!r}", "json_field") from None
    return text
