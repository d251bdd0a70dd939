"""Turn text files of any size into a directory of tokens, for training on data larger than memory.

    python -m tools.prepare FILE... -o DIR (--tokenizer TOKENIZER.json | --vocab-size N)
                            [--json-field text] [--layout nanogpt|llm.c] [--on-bad-line stop|skip]

A text file is one document; of a file named *.jsonl or *.ndjson each line is one, of a JSON array each element. A
folder means the texts in it; compressed files (.gz, .bz2, .xz) are read through that; a pipe can be read too, with
--tokenizer. Behind each document stands the token <|endoftext|>, if the tokenizer has it; one trained here does.

Run the same command again after an interruption and it continues: what it had done is read again, to see that it is the
same, and not tokenized again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from feste.arguments import Parser
from feste.cli import guarded
from feste.documents import ON_BAD_LINE, Reading, files_of, hash_of, pieces
from feste.errors import FesteError
from feste.text import ERRORS, TextFile
from feste.tokenizer import END_OF_TEXT, BPETokenizer
from feste.tokens import LAYOUTS, SKIPPED, TOKENIZER, Journal, TokenDirectory, TokenWriter, write_split

HINTS = {"data": "name text files or JSON lines", "encoding": "name the encoding with --encoding",
         "errors": "use --errors replace", "json_field": "name the field that holds the text with --json-field",
         "on_bad_line": "leave it out with --on-bad-line skip", "layout": "use --layout nanogpt",
         "output": "choose another directory with -o", "tokenizer": "name a tokenizer with --tokenizer",
         "vocab_size": "choose another --vocab-size"}
SHOWN = 5  # skipped lines that are printed


PROG = "python -m tools.prepare"
EXAMPLES = """
Stopped or killed, the same command continues.

examples:
  {0} books/ -o tokens --vocab-size 4096                  every text in a folder, and a tokenizer made of them
  {0} crawl.jsonl.gz -o tokens --tokenizer tokenizer.json --on-bad-line skip
  {0} <(zcat *.gz) -o tokens --tokenizer tokenizer.json
then:
  feste train --data tokens
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.partition("\n")[0], epilog=EXAMPLES.format(prog))
    parser.add_argument("files", nargs="+", metavar="FILE", help="texts, JSON lines (*.jsonl, *.ndjson), folders")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="a new or unfinished directory")
    parser.add_argument("--layout", choices=LAYOUTS, default="nanogpt", help="of tokens.bin (default: nanogpt)")
    parser.add_argument("--split", type=float, metavar="FRACTION", help="also write train.bin and val.bin for other "
                        "programs, with the last FRACTION of the tokens in val.bin")
    tokenizer = parser.add_argument_group("the tokenizer, one of")
    which = tokenizer.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, or a rank file of tiktoken")
    which.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N tokens on the files")
    reading = parser.add_argument_group("how files are read")
    reading.add_argument("--json-field", "--jsonl-field", default="text", metavar="NAME",
                         help="what holds the text of a JSON object (default: text)")
    reading.add_argument("--encoding", metavar="NAME", help="of the files (default: as their mark says, else utf-8)")
    reading.add_argument("--errors", choices=ERRORS, default="strict",
                         help="what cannot be decoded stops the work, or becomes U+FFFD (default: strict)")
    reading.add_argument("--on-bad-line", choices=ON_BAD_LINE, default="stop",
                         help=f"a bad line of JSON stops the work, or is left out and listed in DIR/{SKIPPED}")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)
    code = guarded(lambda: _run(args), HINTS)
    if code == 130:
        print("run the same command again to continue", file=sys.stderr)
    return code


def _run(args: argparse.Namespace) -> int:
    if args.vocab_size is not None and args.vocab_size < 257:
        raise FesteError(f"a vocabulary must have at least 257 tokens, the bytes and {END_OF_TEXT}; got "
                         f"{args.vocab_size}", "vocab_size")
    tokenizer = BPETokenizer.load(args.tokenizer) if args.tokenizer else None
    if tokenizer and tokenizer.end_of_text is None:
        print(f"note: the tokenizer has no {END_OF_TEXT}; nothing will stand between documents", file=sys.stderr)
    if args.split is not None and not 0 < args.split < 1:
        raise FesteError(f"--split must lie between 0 and 1, got {args.split}")
    reading = Reading(args.json_field, args.encoding, args.errors, args.on_bad_line)
    index = prepare(files_of(args.files), args.output, reading, tokenizer, args.vocab_size, args.layout)
    print(f"{args.output}: {index['tokens']:,} tokens ({index['dtype']}), documents: {index['documents']:,}. "
          f"Train on it with --data {args.output}")
    if args.split is not None:
        print("for other programs: " + ", ".join(f"{args.output / name}, {count:,} tokens"
                                                 for name, count in write_split(args.output, args.split).items()))
    if index.get("skipped"):
        _show_skipped(args.output / SKIPPED, index["skipped"])
    return 0


def _show_skipped(path: Path, count: int) -> None:
    print(f"{count:,} bad lines were left out; all of them stand in {path}:", file=sys.stderr)
    with path.open(encoding="utf-8") as file:
        for _, line in zip(range(SHOWN), file, strict=False):
            print(f"    {line.rstrip()}", file=sys.stderr)


# ---- the work ----------------------------------------------------------------------------------------------


def prepare(files: list[Path], folder: Path, reading: Reading, tokenizer: BPETokenizer | None = None,
            vocab_size: int | None = None, layout: str = "nanogpt") -> dict:
    """Make or finish a directory of tokens; returns its index. The tokenizer is trained unless it is given."""
    opened = [TextFile(path, reading.encoding, reading.errors) for path in files]  # an error before anything is made
    pipes = [file.path for file in opened if file.size is None]
    if pipes and tokenizer is None:
        raise FesteError(f"{pipes[0]} is a pipe, which can be read once, and training a tokenizer on it takes another "
                         "reading; save it to a file first", "tokenizer")
    settings = {
        "files": [str(path.absolute()) for path in files], "json field": reading.json_field,
        "encoding": reading.encoding, "errors": reading.errors, "vocab size": vocab_size, "layout": layout,
        "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest() if tokenizer else None,
    }
    total = None if pipes else sum(file.size for file in opened)
    with TokenDirectory(folder, settings) as directory, _progress_bar() as bar:
        if directory.journal is None:
            _require_same(files, directory.index().get("inputs", []), reading, folder)
            return directory.index()
        _require_same(files, directory.journal.done, reading, folder)
        tokenizer = _tokenizer_of(folder, tokenizer, files, reading, vocab_size, bar, total)
        with directory.writer(tokenizer, layout) as writer:
            _write(writer, files, reading, bar, total)
            return writer.finish()


def _require_same(files: list[Path], done: list, reading: Reading, folder: Path) -> None:
    """FesteError if a file that was tokenized is another one now. A file is read again if it was touched."""
    for path, (sha256, *before) in zip(files, done, strict=False):
        status = path.stat()
        if [status.st_size, status.st_mtime_ns] != before and hash_of(path, reading) != sha256:
            raise FesteError(f"{folder} was prepared with other files: {path} has changed since it was tokenized",
                             "output")


def _write(writer: TokenWriter, files: list[Path], reading: Reading, bar: Progress, total: int | None) -> None:
    """Tokens of all documents, from where the journal stands."""
    journal: Journal = writer.journal
    task, done = bar.add_task("encoding", total=total), 0
    for path in files[journal.file:]:
        for piece in pieces(path, reading, journal.position, journal.sha256, journal.line):
            writer.append(piece.texts, piece.ends_document, piece.skipped)
            bar.update(task, completed=done + piece.position)
            journal.position, journal.sha256, journal.line = piece.position, piece.sha256, journal.line + piece.lines
            if piece.last:
                done += piece.position
                status = path.stat()
                journal.done.append([piece.sha256, status.st_size, status.st_mtime_ns])
                journal.file, journal.position, journal.sha256, journal.line = journal.file + 1, 0, "", 0
            writer.keep()


def _tokenizer_of(folder: Path, tokenizer: BPETokenizer | None, files: list[Path], reading: Reading,
                  vocab_size: int | None, bar: Progress, total: int | None) -> BPETokenizer:
    """The tokenizer of the directory: the one that is there, or the given one, or one trained on all documents."""
    path = folder / TOKENIZER
    if path.exists():
        return BPETokenizer.load(path)
    if tokenizer is None:
        tokenizer = BPETokenizer.train(_training_texts(files, reading, bar, total), vocab_size, [END_OF_TEXT])
    tokenizer.save(path)
    return tokenizer


def _training_texts(files: list[Path], reading: Reading, bar: Progress, total: int | None) -> Iterator[str]:
    task, done = bar.add_task("learning", total=total), 0
    for path in files:
        for piece in pieces(path, reading):
            yield from piece.texts
            bar.update(task, completed=done + piece.position)
        done += piece.position


def _progress_bar() -> Progress:
    console = Console(stderr=True)
    return Progress(TextColumn("{task.description:>9}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                    TimeRemainingColumn(), console=console, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
