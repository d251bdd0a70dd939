"""The one reader of texts: what the bytes of a file mean, for training, preparing, comparing and scoring.

A file that is compressed (gzip, bzip2, xz, zstd) is read through that. It is decoded as the mark at its beginning says
(UTF-8, UTF-16, UTF-32), else as UTF-8, or as the encoding that is named. The mark is no part of the text, and every
line ends with a line feed, whether the file has CR LF, CR or LF. The bytes of a text are those of its UTF-8 after that.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from feste.errors import FesteError

BLOCK_BYTES = 1 << 22
ERRORS = ("strict", "replace")
UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
ZSTD = b"\x28\xb5\x2f\xfd"
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
OTHER_FILES = {  # first bytes -> what such a file is
    b"%PDF": "a PDF document", b"PK\3\4": "a zip archive (.docx and .epub are)",
    b"PAR1": "a Parquet file, of which `feste prepare` reads a column if it is named .parquet",
    b"\x89PNG": "an image", b"\xff\xd8\xff": "an image", b"GIF8": "an image", b"SQLite format 3": "a SQLite database",
    b"7z\xbc\xaf": "a 7z archive", b"\x7fELF": "a program",
    b"\xd0\xcf\x11\xe0": "an Office document"}


class TextError(FesteError):
    """A file that is no text, or not in the encoding that it is read in: names file, place and what would help."""


def read_text(path: str | os.PathLike, encoding: str | None = None, errors: str = "strict") -> str:
    """The whole text of a file. errors="replace" puts U+FFFD for what cannot be decoded. TextError, also if empty."""
    text = "".join(TextFile(path, encoding, errors))
    if not text:
        raise TextError(f"{path} is empty", "data")
    return text


class TextFile:
    """A text file; iterating reads it from the beginning, in blocks of text. The blocks may end anywhere.

    size: bytes on the disk, None for a pipe. consumed: how many of them were read, for a display.
    """

    def __init__(self, path: str | os.PathLike, encoding: str | None = None, errors: str = "strict",
                 block_bytes: int = BLOCK_BYTES) -> None:
        if errors not in ERRORS:
            raise TextError(f"errors must be one of {', '.join(ERRORS)}, got {errors!r}", "errors")
        try:
            "".encode(encoding or "utf-8")
        except LookupError:
            raise TextError(f"there is no encoding {encoding!r}; common ones are utf-8, utf-16, cp1252 and gb18030",
                            "encoding") from None
        self.path, self.encoding, self.errors, self.block_bytes = Path(path), encoding, errors, block_bytes
        self.consumed = 0
        try:
            status = os.stat(path)
            self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
            if self.size is not None:  # a pipe can be opened only once
                open(path, "rb").close()
        except OSError as error:
            raise self._unreadable(error) from error

    def __iter__(self) -> Iterator[str]:
        try:
            with open(self.path, "rb") as raw:
                yield from self._decoded(raw)
                if self.size is not None and os.fstat(raw.fileno()).st_size != self.size:
                    raise TextError(f"{self.path} changed while it was read: {self.size} bytes at first, then "
                                    f"{os.fstat(raw.fileno()).st_size}; start again when it is complete")
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise TextError(f"{self.path} is compressed and damaged: {error}") from error
        except OSError as error:
            raise self._unreadable(error) from error
        except Exception as error:  # zstd has an error of its own, in a module that may not be there
            if type(error).__name__ != "ZstdError":
                raise
            raise TextError(f"{self.path} is compressed and damaged: {error}") from error

    def _zstd(self) -> ModuleType:
        """The module of Python 3.14, or its backport."""
        for name in ("compression.zstd", "backports.zstd"):
            with suppress(ImportError):
                return import_module(name)
        raise TextError(f"{self.path} is compressed with zstd, which Python reads from 3.14 on, or with "
                        "pip install 'feste[zstd]'", "data")

    def _decoded(self, raw: io.BufferedReader) -> Iterator[str]:
        start = raw.peek(16)
        opener = next((opener for mark, opener in COMPRESSED.items() if start.startswith(mark)), None)
        if start.startswith(ZSTD):
            opener = self._zstd().open
        file = raw if opener is None else io.BufferedReader(opener(raw))
        start = file.peek(4096)
        self._refuse_other_files(start)
        encoding = self.encoding or _encoding_of(start)
        decoder = codecs.getincrementaldecoder(encoding)(self.errors)
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        offset = n_lines = 0  # of the bytes that were decoded
        first = True
        while True:
            block = file.read(self.block_bytes)
            held = decoder.getstate()[0]
            try:
                text = lines.decode(decoder.decode(block, final=not block), final=not block)
            except UnicodeDecodeError as error:
                raise self._not_decodable(error, encoding, offset - len(held), n_lines) from None
            offset, n_lines = offset + len(block), n_lines + text.count("\n")
            self.consumed = offset if self.size is None else raw.tell()
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not block:
                return

    def _refuse_other_files(self, start: bytes) -> None:
        """TextError for bytes that decode to something although they are no text, or none in this encoding."""
        kind = next((kind for mark, kind in OTHER_FILES.items() if start.startswith(mark)), None)
        if kind is not None:
            raise TextError(f"{self.path} is {kind}, not a text; export or unpack its text first", "data")
        even, odd = start[::2].count(0), start[1::2].count(0)
        if self.encoding is not None or (even + odd) * 10 <= len(start) or start.startswith((*UTF_32, *UTF_16)):
            return
        if min(even, odd) * 10 <= max(even, odd):
            encoding = "utf-16-le" if odd > even else "utf-16-be"
            raise TextError(f"{self.path} looks like UTF-16 without a mark (every second byte is zero); read it with "
                            f"encoding {encoding}", "encoding")
        raise TextError(f"{self.path} is no text: {even + odd} of its first {len(start)} bytes are zero", "data")

    def _not_decodable(self, error: UnicodeDecodeError, encoding: str, offset: int, n_lines: int) -> TextError:
        """Where the damage is, and whether it looks like damage or like another encoding."""
        data, place = error.object, offset + error.start
        line = n_lines + 1 + data[:error.start].count(b"\n")
        replaced = data.decode(encoding, errors="replace")
        wrong = replaced.count("\ufffd") - data.count("\ufffd".encode())
        what = f"{self.path} is not {encoding.upper()} at byte {place:,} (0x{data[error.start]:02X}, line {line:,})"
        if wrong * 500 <= len(replaced):
            return TextError(f'{what}; {1 - wrong / len(replaced):.3%} of what is around it are, so it is damaged '
                             'there; mend it, or read it with errors "replace", which puts U+FFFD', "errors")
        return TextError(f"{what}, nor in {wrong:,} places of the {len(replaced):,} characters around it; it is in "
                         "another encoding, perhaps cp1252", "encoding")

    def _unreadable(self, error: OSError) -> TextError:
        return TextError(f"cannot read {self.path}: {error.strerror or error}", "data")


def _encoding_of(start: bytes) -> str:
    """What the mark at the beginning of a text says, else UTF-8."""
    if start.startswith(UTF_32):
        return "utf-32"
    return "utf-16" if start.startswith(UTF_16) else "utf-8"
