"""Turn text files of any size into a directory of tokens, for training on data larger than memory.

    python -m tools.prepare FILE... -o DIR (--tokenizer TOKENIZER.json | --vocab-size N)
                            [--jsonl-field text] [--layout nanogpt|llm.c]

A text file is one document; of a file named *.jsonl or *.ndjson each line is one. Behind each document stands the
token <|endoftext|>, if the tokenizer has it; a tokenizer trained here does. The directory then holds

    tokens.bin       all tokens in one file, little-endian uint16, or uint32 beyond 65,536 ids. Layout nanogpt: nothing
                     else. Layout llm.c: 256 int32 before them, of which the first three are magic, version, count.
    tokenizer.json   the tokenizer
    tokens.json      what tokens.bin holds; written last, so a directory that has it is complete

One file rather than many: a memory map of it is the array the trainer reads, whatever its size. While the work is
under way journal.json says how far it came. Run the same command again after an interruption and it continues
there: tokens are on the disk before the journal counts them, and what the journal does not count is cut off.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from feste import BPETokenizer, _bpe
from feste.data import INDEX_NAME

BLOCK_BYTES = 4 << 20  # of text between two entries of the journal
END_OF_TEXT = "<|endoftext|>"
TOKENS_NAME, JOURNAL_NAME, TOKENIZER_NAME = "tokens.bin", "journal.json", "tokenizer.json"
JSON_LINES = (".jsonl", ".ndjson")
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 1024


# ---- documents ---------------------------------------------------------------------------------------------


@dataclass
class Source:
    """An input file, and the field of its lines that holds the text if they are JSON."""

    path: Path
    size: int
    field: str | None


@dataclass
class Piece:
    """Part of a source: whole documents, or a part of one that can be split into words on its own."""

    texts: list[str]
    ends_document: bool  # whether a document ends behind each text
    offset: int          # where the piece ends in the file, in bytes
    lines: int = 0


def open_sources(paths: Sequence[str], field: str) -> list[Source]:
    """The input files, or ValueError for one that cannot be read."""
    sources = []
    for path in map(Path, paths):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; name text files or JSON lines") from None
        sources.append(Source(path, size, field if path.suffix in JSON_LINES else None))
    return sources


def pieces(source: Source, offset: int = 0, line: int = 0) -> Iterator[Piece]:
    """The text of a source from a place on where a piece ended. ValueError names what cannot be read."""
    with source.path.open("rb") as file:
        file.seek(offset)
        for piece in _json_pieces(file, source, line) if source.field else _text_pieces(file, source, offset):
            cut_short = not source.field and piece.ends_document and piece.offset < source.size
            if piece.offset > source.size or cut_short:
                break
            offset = piece.offset
            yield piece
        if file.tell() != source.size:
            raise ValueError(f"{source.path} changed while it was read: {source.size} bytes at first, then "
                             f"{os.fstat(file.fileno()).st_size}; run again when it is complete, with a new directory")


def _text_pieces(file, source: Source, offset: int) -> Iterator[Piece]:
    rest = b""
    while True:
        block = file.read(BLOCK_BYTES)
        rest += block
        cut = _last_split(rest) if block else len(rest)
        if cut or not block:
            text = _decode(rest[:cut], f"{source.path}, byte", offset)
            offset += cut
            rest = rest[cut:]
            yield Piece([text], not block, offset)
        if not block:
            return


def _last_split(data: bytes) -> int:
    """A place near the end where a word surely begins, or 0."""
    for back in (1 << 12, 1 << 16, 1 << 20, len(data)):
        cut = _bpe.safe_split(data, max(0, len(data) - back))
        if cut < len(data):
            return cut
    return 0


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} {offset + error.start}: not UTF-8; convert the file first, for example: "
                         "iconv -f LATIN1 -t UTF-8") from None


def _json_pieces(file, source: Source, line: int) -> Iterator[Piece]:
    while lines := file.readlines(BLOCK_BYTES):
        texts = [_document(data, source, line + i) for i, data in enumerate(lines, 1) if not data.isspace()]
        line += len(lines)
        yield Piece(texts, True, file.tell(), len(lines))


def _document(data: bytes, source: Source, number: int) -> str:
    where = f"{source.path}, line {number}"
    try:
        text = json.loads(_decode(data, f"{where}, byte", 0))[source.field]
        text.encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be an object") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: the text has a lone surrogate, which is no character; leave the line out") from None
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ValueError(f"{where}: no object with a string in {source.field!r}; name the field that holds the text "
                         "with --jsonl-field") from None
    return text


# ---- the directory -----------------------------------------------------------------------------------------


@dataclass
class Journal:
    """How far the work came: all before (file, offset) is in tokens.bin, which has `tokens` tokens of it."""

    settings: dict
    file: int = 0
    offset: int = 0
    line: int = 0
    documents: int = 0
    tokens: int = 0


def write_json(path: Path, value: dict) -> None:
    """Replace a file by one that is whole and on the disk."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict | None:
    """What write_json wrote, or None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value["settings"], dict):
            raise TypeError("settings")
        return value
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; remove {path.parent} and start again") from None


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold a directory, which is made, against a second process; gives its file descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"cannot make the directory {folder}: {error.strerror}; choose another with -o") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise ValueError(f"another process is preparing {folder}; wait for it, or choose another directory") from None
    finally:
        os.close(descriptor)


def begin(folder: Path, settings: dict) -> Journal | None:
    """The journal to continue from, a new one for an empty directory, or None if all is done."""
    for name in (INDEX_NAME, JOURNAL_NAME):
        found = read_json(folder / name)
        if found and found["settings"] != settings:
            changed = [key for key in settings if found["settings"].get(key) != settings[key]]
            raise ValueError(f"{folder} was prepared with other {' and '.join(changed)}; repeat the command it was "
                             "begun with, or choose another directory")
        if found:
            return None if name == INDEX_NAME else _journal(folder, found)
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no unfinished preparation; choose another directory")
    journal = Journal(settings)
    write_json(folder / JOURNAL_NAME, asdict(journal))
    return journal


def _journal(folder: Path, found: dict) -> Journal:
    try:
        journal = Journal(**found)
        if all(type(value) is int and value >= 0 for name, value in found.items() if name != "settings"):
            return journal
    except TypeError:
        pass
    raise ValueError(f"{folder / JOURNAL_NAME} is damaged; remove {folder} and start again")


def settings_of(sources: list[Source], tokenizer: BPETokenizer | None, vocab_size: int | None, layout: str) -> dict:
    """All that the tokens depend on."""
    files = [[str(s.path.resolve()), s.size, s.path.stat().st_mtime_ns, s.field] for s in sources]
    digest = hashlib.sha256(tokenizer.to_json().encode()).hexdigest() if tokenizer else None
    return {"files": files, "tokenizer": digest, "vocab size": vocab_size, "layout": layout}


# ---- the work ----------------------------------------------------------------------------------------------


def prepare(sources: list[Source], folder: Path, tokenizer: BPETokenizer | None, vocab_size: int | None,
            layout: str = "nanogpt") -> dict:
    """Make or finish a directory of tokens; returns its index. The tokenizer is trained unless it is given."""
    settings = settings_of(sources, tokenizer, vocab_size, layout)
    with locked(folder) as descriptor, progress_bar() as bar:
        journal = begin(folder, settings)
        if journal is not None:
            tokenizer = _tokenizer_of(folder, tokenizer, sources, vocab_size, bar)
            index = write_tokens(folder, journal, sources, tokenizer, layout, bar)
            write_json(folder / INDEX_NAME, index)
            os.fsync(descriptor)  # the index is there before the journal is not
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
        return read_json(folder / INDEX_NAME)


def progress_bar() -> Progress:
    console = Console(stderr=True)
    return Progress(TextColumn("{task.description:>9}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                    TimeRemainingColumn(), console=console, disable=not console.is_terminal)


def _tokenizer_of(folder: Path, tokenizer: BPETokenizer | None, sources: list[Source], vocab_size: int | None,
                  bar: Progress) -> BPETokenizer:
    """The tokenizer of the directory: the one that is there, or the given one, or one trained on all documents."""
    path = folder / TOKENIZER_NAME
    if path.exists():
        return BPETokenizer.load(path)
    if tokenizer is None:
        tokenizer = BPETokenizer.train(_training_texts(sources, bar), vocab_size, [END_OF_TEXT])
    tokenizer.save(path)
    return tokenizer


def _training_texts(sources: list[Source], bar: Progress) -> Iterator[str]:
    task = bar.add_task("learning", total=sum(source.size for source in sources))
    for source in sources:
        offset = 0
        for piece in pieces(source):
            yield from piece.texts
            bar.advance(task, piece.offset - offset)
            offset = piece.offset


def write_tokens(folder: Path, journal: Journal, sources: list[Source], tokenizer: BPETokenizer, layout: str,
                 bar: Progress) -> dict:
    """Write tokens.bin from where the journal stands; returns the index of the directory."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    if layout == "llm.c" and dtype.itemsize != 2:
        raise ValueError(f"the layout of llm.c has two bytes a token, too few for {tokenizer.vocab_size} ids; "
                         "use --layout nanogpt")
    header = LLMC_HEADER_BYTES if layout == "llm.c" else 0
    end = np.array([tokenizer.special_tokens[END_OF_TEXT]] if END_OF_TEXT in tokenizer.special_tokens else [], dtype)
    task = bar.add_task("encoding", total=sum(s.size for s in sources),
                        completed=sum(s.size for s in sources[:journal.file]) + journal.offset)
    with open_tokens(folder / TOKENS_NAME, header + journal.tokens * dtype.itemsize) as file:
        for i in range(journal.file, len(sources)):
            for piece in pieces(sources[i], journal.offset, journal.line):
                _append(file, piece, tokenizer, end, dtype, journal)
                bar.advance(task, piece.offset - journal.offset)
                journal.offset, journal.line = piece.offset, journal.line + piece.lines
                if piece.offset == sources[i].size:
                    journal.file, journal.offset, journal.line = i + 1, 0, 0
                write_json(folder / JOURNAL_NAME, asdict(journal))
        if header:
            _write_header(file, journal.tokens)
    return {"file": TOKENS_NAME, "dtype": dtype.name, "offset": header, "tokens": journal.tokens,
            "documents": journal.documents, "settings": journal.settings}


def _append(file, piece: Piece, tokenizer: BPETokenizer, end: np.ndarray, dtype: np.dtype, journal: Journal) -> None:
    """Write the tokens of a piece, and count them in the journal once they are on the disk."""
    parts = [np.empty(0, dtype)]
    for text in piece.texts:
        parts.append(tokenizer.encode_to_numpy(text))
        if piece.ends_document:
            parts.append(end)
            journal.documents += 1
    ids = np.concatenate(parts).astype(dtype, copy=False)
    file.write(ids.tobytes())
    file.flush()
    os.fsync(file.fileno())
    journal.tokens += len(ids)


def open_tokens(path: Path, size: int):
    """tokens.bin, cut to `size` bytes, at its end."""
    file = path.open("r+b" if path.exists() else "w+b")
    found = file.seek(0, os.SEEK_END)
    if found < size and found != 0:
        file.close()
        raise ValueError(f"{path} has {found} bytes, fewer than the {size} that were written; "
                         f"remove {path.parent} and start again")
    file.truncate(size)
    file.seek(size)
    return file


def _write_header(file, count: int) -> None:
    if count > 0x7FFFFFFF:
        raise ValueError(f"the layout of llm.c counts at most {0x7FFFFFFF} tokens, and there are {count}; "
                         "use --layout nanogpt, or divide the files between several directories")
    header = np.zeros(LLMC_HEADER_BYTES // 4, "<i4")
    header[:3] = LLMC_MAGIC, LLMC_VERSION, count
    file.seek(0)
    file.write(header.tobytes())
    file.flush()
    os.fsync(file.fileno())


# ---- the command line --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text, or JSON lines (*.jsonl, *.ndjson)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new or unfinished directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, or a rank file of tiktoken")
    which.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N tokens on the files")
    parser.add_argument("--jsonl-field", default="text", metavar="NAME", help="what holds the text (default: text)")
    parser.add_argument("--layout", choices=("nanogpt", "llm.c"), default="nanogpt", help="of tokens.bin")
    args = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        return _run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: cannot write {error.filename or args.output}: {error.strerror}; mend that and run the same "
              "command again, it continues", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 2


def _run(args: argparse.Namespace) -> int:
    if args.vocab_size is not None and args.vocab_size < 257:
        raise ValueError(f"--vocab-size must be at least 257, the bytes and {END_OF_TEXT}, got {args.vocab_size}")
    sources = open_sources(args.files, args.jsonl_field)
    tokenizer = BPETokenizer.load(args.tokenizer) if args.tokenizer else None
    if tokenizer and END_OF_TEXT not in tokenizer.special_tokens:
        print(f"note: the tokenizer has no {END_OF_TEXT}; nothing will stand between documents", file=sys.stderr)
    index = prepare(sources, Path(args.output), tokenizer, args.vocab_size, args.layout)
    print(f"{args.output}: {index['tokens']:,} tokens ({index['dtype']}), documents: {index['documents']:,}. "
          f"Train on it with --data {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
