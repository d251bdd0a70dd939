"""The one reader of texts, held to Python's own codecs."""

import bz2
import codecs
import gzip
import importlib
import lzma
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from compression import zstd
except ImportError:
    from backports import zstd

from feste import GPT2, BPETokenizer, Config
from feste.cli import run_preset
from feste.corpus import Source
from feste.evaluation import bits_per_byte
from feste.text import TextError, TextFile, read_text

MARKED = {"utf-8-sig": b"", "utf-16": b"", "utf-32": b"", "utf-16-le": codecs.BOM_UTF16_LE,
          "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}
LINES = st.lists(st.text(alphabet="ab \r\n\u2028é火🙂", max_size=8), max_size=20).map("".join)


def normal(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


@given(LINES.filter(bool), st.sampled_from([*MARKED, "utf-8"]), st.integers(1, 9))
@settings(max_examples=200)
def test_every_marked_encoding_gives_the_text(tmp_path_factory, text, encoding, block_bytes):
    """Whatever the blocks: CR LF, characters and marks may be cut anywhere."""
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(MARKED.get(encoding, b"") + text.encode(encoding))
    assert "".join(TextFile(path, block_bytes=block_bytes)) == normal(text)
    assert read_text(path) == normal(text)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd.compress])
def test_compressed_texts_are_read(tmp_path, compress):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(compress(("Grüße\r\n" * 50_000).encode("utf-16")))
    assert "".join(TextFile(path, block_bytes=1000)) == "Grüße\n" * 50_000
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TextError, match="is compressed and damaged"):
        read_text(path)


def test_an_encoding_may_be_named(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße €\r".encode("cp1252"))
    assert read_text(path, "cp1252") == "Grüße €\n"
    path.write_bytes("Grüße".encode("utf-16-le"))
    assert read_text(path, "utf-16-le") == "Grüße"
    for name in ("klingon", "hex"):
        with pytest.raises(TextError, match=f"no encoding '{name}'"):
            read_text(path, name)
    with pytest.raises(TextError, match="errors must be one of strict, replace"):
        read_text(path, errors="ignore")


def test_a_damaged_stretch_is_named_and_can_be_replaced(tmp_path):
    path = tmp_path / "text.txt"
    data = bytearray(("Grüße aus Elsinore\n" * 20_000).encode())
    data[200_000:200_002] = b"\xff\xfe"
    path.write_bytes(data)
    line = data[:200_000].count(b"\n") + 1
    for block_bytes in (100_000, 1 << 22):
        with pytest.raises(TextError, match=rf"is not UTF-8 at byte 200,000 \(0xFF, line {line:,}\); 99\.\d+%.*damaged "
                                            r"there.*U\+FFFD") as raised:
            list(TextFile(path, block_bytes=block_bytes))
        assert raised.value.names == ("errors",)
    assert read_text(path, errors="replace") == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "koi8-r", "gb18030", "shift-jis"])
def test_another_encoding_is_called_that(tmp_path, encoding):
    text = {"koi8-r": "Быть или не быть. ", "gb18030": "生存还是毁灭。", "shift-jis": "生きるべきか。"}.get(
        encoding, "Être ou ne pas être, là est la question. ")
    path = tmp_path / "text.txt"
    path.write_bytes((text * 2000).encode(encoding))
    with pytest.raises(TextError, match=r"is not UTF-8 at byte .* it is in another encoding") as raised:
        read_text(path)
    assert raised.value.names == ("encoding",) and read_text(path, encoding) == text * 2000


@pytest.mark.parametrize(("data", "said"), [
    ("no mark at all " .encode("utf-16-le") * 9, "looks like UTF-16 without a mark.*utf-16-le"),
    ("no mark at all ".encode("utf-16-be") * 9, "looks like UTF-16 without a mark.*utf-16-be"),
    (b"%PDF-1.7\n" * 9, "is a PDF document"), (b"PK\3\4" + bytes(90), "is a zip archive"),
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"PAR1" + bytes(90), "Parquet"), (bytes(range(256)) * 9, "not UTF-8"),
    (bytes(4000), "is no text: 4000 of its first 4000 bytes are zero"), (b"", "is empty")])
def test_what_is_no_text_is_called_what_it_is(tmp_path, data, said):
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    with pytest.raises(TextError, match=said):
        read_text(path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:40] + b"x" * 9 + data[49:]])
def test_a_damaged_zstd_file_says_so(tmp_path, damage):
    path = tmp_path / "text.txt.zst"
    text = np.random.default_rng(0).integers(97, 122, 99_999, np.uint8).tobytes()
    path.write_bytes(damage(zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1})))
    with pytest.raises(TextError, match="is compressed and damaged"):
        read_text(path)


def test_zstd_without_its_module_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "text.txt.zst"
    path.write_bytes(zstd.compress(b"to be"))
    monkeypatch.setattr("feste.text.import_module", lambda name: importlib.import_module("no.such"))
    with pytest.raises(TextError, match=r"feste\[zstd\]"):
        read_text(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TextError, match=r"cannot read .*missing\.txt: No such file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(TextError, match="cannot read"):
        read_text(tmp_path)


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    data = gzip.compress(b"\xef\xbb\xbf" + b"to be\r\n" * 10_000)
    threading.Thread(target=lambda: path.write_bytes(data), daemon=True).start()
    file = TextFile(path)
    assert file.size is None and "".join(file) == "to be\n" * 10_000


def test_a_few_zeros_are_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a\0b" + b"words " * 100)
    assert read_text(tmp_path / "text.txt").startswith("a\0b")


def test_all_doors_read_the_same_text(tmp_path):
    """Training, preparing and scoring: the same file in any dress gives the same tokens and the same bits per byte."""
    from feste.tokens import load_tokens
    from tools import prepare
    text = "To be, or not to be:\nthat is the question.\n" * 200
    dresses = {"plain": text.encode(), "crlf": text.replace("\n", "\r\n").encode(),
               "cr": text.replace("\n", "\r").encode(), "mark": b"\xef\xbb\xbf" + text.encode(),
               "wide": text.encode("utf-16"), "packed": gzip.compress(text.encode())}
    tokenizer = BPETokenizer.train(text, 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    model = GPT2(Config(tokenizer.vocab_size, 16, 1, 1, 32))
    expected = tokenizer.encode(text)
    for name, data in dresses.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(data)
        tokens, _ = Source(str(path)).load(280, tokenizer)
        assert tokens.tolist() == expected, name
        made = prepare.main([str(path), "-o", str(tmp_path / name), "--tokenizer", str(tmp_path / "tokenizer.json")])
        assert made == 0
        assert load_tokens(tmp_path / name)[0].tolist() == expected, name
        assert bits_per_byte(model, tokenizer, read_text(path), 32) == bits_per_byte(model, tokenizer, text, 32)


@pytest.mark.parametrize(("data", "flags", "said"), [
    ("Être là. ".encode("cp1252") * 900, [], "see --encoding"),
    (b"ok " * 9000 + b"\xff" + b"ok " * 9000, [], "see --errors"),
    (b"%PDF-1.4 " * 900, [], "name a text file with --data FILE")])
def test_the_command_line_names_the_flags_that_help(tmp_path, monkeypatch, capsys, data, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_bytes(data)
    assert run_preset("tiny", ["--data", "my.txt", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and "iconv" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["my.txt"]


def test_a_run_on_a_text_with_flags_is_resumed_with_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_bytes("Être là, ou ne pas être. ".encode("cp1252") * 300)
    quick = ["--vocab-size", "270", "--block-size", "16", "--steps", "6", "--n-embd", "16", "--sample-tokens", "2"]
    assert run_preset("tiny", ["--data", "my.txt", "--encoding", "cp1252", "--run-dir", "run", *quick]) == 0
    assert run_preset("tiny", ["--resume", "run", "--steps", "9"]) == 0
    assert "finished at step 9" in capsys.readouterr().out
