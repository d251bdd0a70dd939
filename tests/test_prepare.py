"""Directories of tokens: what stands in them, and that no interruption loses or repeats a document."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from feste import BPETokenizer
from feste import documents as reader
from feste import text as text_module
from feste.data import Batches
from feste.tokens import TokenDirectory, TokensError, TokenWriter, load_tokens
from tools import prepare

END = "<|endoftext|>"
WORDS = ["the", "quick", "fox,", "jumps\n\nover", "", "lazy", "dog's", "tail;", "naïve", "東京", "½", "🙂", "1984"]


def some_text(n_words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer = BPETokenizer.train(some_text(500), 300, [END])
    tokenizer.save(tmp_path / "given.json")
    return tokenizer


def command(tmp_path, *files, out="out", **flags):
    flags = {"tokenizer": tmp_path / "given.json"} | flags
    options = [str(part) for name, value in flags.items() if value is not None
               for part in (f"--{name.replace('_', '-')}", value)]
    return [*map(str, files), "-o", str(tmp_path / out), *options]


def write_lines(path, documents, field="text"):
    path.write_text("".join(json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(documents)))
    return path


def expected(tokenizer, documents):
    return [i for text in documents for i in [*tokenizer.encode(text), tokenizer.special_tokens[END]]]


@pytest.mark.parametrize("block", [1, 7, 64, 1000, reader.BLOCK_BYTES])
def test_text_and_json_lines_for_any_size_of_block(tmp_path, tokenizer, monkeypatch, block):
    monkeypatch.setattr(reader, "BLOCK_BYTES", block)
    texts = [some_text(300), "", "oneword" * 400, " \n\t lead and trail \n\n"]
    documents = ["a", "", "two\nlines \u2028 and 🙂", some_text(50, 1)]
    files = []
    for i, text in enumerate(texts):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(text, encoding="utf-8", newline="")
    files.insert(2, write_lines(tmp_path / "lines.jsonl", documents))
    assert prepare.main(command(tmp_path, *files)) == 0
    tokens, loaded = load_tokens(tmp_path / "out")
    assert tokens.tolist() == expected(tokenizer, [*texts[:2], *documents, *texts[2:]])
    assert isinstance(tokens, np.memmap) and loaded.to_json() == tokenizer.to_json()
    names = [name for name in os.listdir(tmp_path / "out") if not name.startswith(".")]
    assert sorted(names) == ["tokenizer.json", "tokens.bin", "tokens.json"]


def test_layouts_are_those_of_nanogpt_and_llmc(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(some_text(100), encoding="utf-8")
    want = expected(tokenizer, [some_text(100)])
    prepare.main(command(tmp_path, path))
    prepare.main(command(tmp_path, path, out="c", layout="llm.c"))
    assert np.fromfile(tmp_path / "out" / "tokens.bin", np.uint16).tolist() == want
    header = np.fromfile(tmp_path / "c" / "tokens.bin", np.int32, count=256)
    assert header[:3].tolist() == [20240520, 1, len(want)] and not header[3:].any()
    assert np.fromfile(tmp_path / "c" / "tokens.bin", np.uint16, offset=1024).tolist() == want
    assert load_tokens(tmp_path / "c")[0].tolist() == want


def test_large_vocabularies_take_four_bytes(tmp_path):
    special = [f"<{i}>" for i in range(1 << 16)]
    tokenizer = BPETokenizer.train("ab ab", 256 + len(special), special)
    tokenizer.save(tmp_path / "given.json")
    (tmp_path / "text.txt").write_text("ab ab")
    assert prepare.main(command(tmp_path, tmp_path / "text.txt")) == 0
    tokens, _ = load_tokens(tmp_path / "out")
    assert tokens.dtype == np.uint32 and tokens.tolist() == tokenizer.encode("ab ab")
    assert prepare.main(command(tmp_path, tmp_path / "text.txt", out="c", layout="llm.c")) == 2


def test_trains_the_tokenizer_on_all_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 50)
    whole, documents = some_text(200), [some_text(40, i) for i in range(5)]
    (tmp_path / "text.txt").write_text(whole, encoding="utf-8")
    lines = write_lines(tmp_path / "lines.jsonl", documents, field="body")
    flags = {"tokenizer": None, "vocab_size": 290, "jsonl_field": "body"}
    assert prepare.main(command(tmp_path, tmp_path / "text.txt", lines, **flags)) == 0
    tokens, tokenizer = load_tokens(tmp_path / "out")
    assert tokenizer.to_json() == BPETokenizer.train([whole, *documents], 290, [END]).to_json()
    assert tokens.tolist() == expected(tokenizer, [whole, *documents])


def test_batches_of_a_directory_are_those_of_the_string(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(some_text(500), encoding="utf-8")
    prepare.main(command(tmp_path, tmp_path / "text.txt"))
    tokens, _ = load_tokens(tmp_path / "out")
    string = np.array(expected(tokenizer, [some_text(500)]), np.uint16)
    for (ids, targets), (want_ids, want_targets) in zip(Batches(tokens, 16, 1).batch(3, 4),
                                                        Batches(string, 16, 1).batch(3, 4), strict=True):
        assert (ids == want_ids).all() and (targets == want_targets).all()


def test_forged_end_of_text_stays_text(tmp_path, tokenizer):
    lines = write_lines(tmp_path / "lines.jsonl", [f"a{END}b"])
    prepare.main(command(tmp_path, lines))
    tokens = load_tokens(tmp_path / "out")[0].tolist()
    assert tokens.count(tokenizer.special_tokens[END]) == 1


# ---- interruptions -----------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def test_continues_from_a_crash_at_every_write(tmp_path, tokenizer, monkeypatch):
    """Dies at the first, the second, ... of all calls that change the disk, each time from a fresh directory."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 300)
    documents = [some_text(n, n) for n in range(0, 40, 3)]
    lines, path = write_lines(tmp_path / "lines.jsonl", documents), tmp_path / "text.txt"
    path.write_text(some_text(200), encoding="utf-8")
    want = expected(tokenizer, [*documents, some_text(200)])
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    left = 0

    def dying(name):
        def call(*args):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            return real[name](*args)
        return call

    for name in real:
        monkeypatch.setattr(os, name, dying(name))
    crashes = 0
    while True:
        args = command(tmp_path, lines, path, out=f"out{crashes}")
        left = crashes + 1
        try:
            assert prepare.main(args) == 0
            break
        except Crash:
            crashes += 1
        assert prepare.main(args) == 0
        assert load_tokens(args[args.index("-o") + 1])[0].tolist() == want
    assert crashes > 30


CHILD = """
import sys
from feste import documents
from tools import prepare
documents.BLOCK_BYTES = 1500
sys.exit(prepare.main(sys.argv[1:]))
"""


def _documents_done(folder) -> int:
    try:
        return json.loads((folder / "journal.json").read_text())["documents"]
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.long)])
def test_killed_at_random_moments(tmp_path, tokenizer, kills):
    documents = [some_text(n % 90, n) for n in range(4000)]
    lines = write_lines(tmp_path / "lines.jsonl", documents)
    child = [sys.executable, "-c", CHILD, *command(tmp_path, lines)]
    rng, out, killed_at = random.Random(kills), tmp_path / "out", []
    for target in sorted(rng.randrange(1, len(documents)) for _ in range(kills)):
        process = subprocess.Popen(child, stdout=subprocess.DEVNULL)
        while process.poll() is None and _documents_done(out) < target:
            time.sleep(rng.random() / 1000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(_documents_done(out))
    assert 0 < killed_at[0] < len(documents), "the first kill came too late to show anything"
    assert subprocess.run(child, stdout=subprocess.DEVNULL).returncode == 0
    assert load_tokens(out)[0].tolist() == expected(tokenizer, documents)
    assert json.loads((out / "tokens.json").read_text())["documents"] == len(documents)


def test_a_finished_directory_is_left_as_it_is(tmp_path, tokenizer, capsys):
    lines = write_lines(tmp_path / "lines.jsonl", ["a", "b"])
    prepare.main(command(tmp_path, lines))
    before = (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns
    assert prepare.main(command(tmp_path, lines)) == 0
    assert (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns == before


# ---- errors ------------------------------------------------------------------------------------------------


def refused(args, capsys, *parts):
    assert prepare.main(args) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(part in message for part in parts), message


def test_refuses_what_it_cannot_read(tmp_path, tokenizer, capsys):
    bad = tmp_path / "bad.jsonl"
    for i, (data, parts) in enumerate([
            (b'{"text": "a"}\n{"text": 7}\n', ("line 2", "--json-field")), (b'{"text": "a"}\n\n[1]\n', ("line 3",)),
            (b"no json\n", ("line 1", "not JSON")), (b'{"text": "\\ud800"}\n', ("line 1", "surrogate")),
            (b'{"text": "\xff"}\n', ("line 1", "not UTF-8 at byte 10")), (b"[" * 100_000, ("line 1",))]):
        bad.write_bytes(data)
        refused(command(tmp_path, bad, out=f"out{i}"), capsys, str(bad), *parts)
    (tmp_path / "bad.txt").write_bytes(b"text \xe9t\xe9")
    refused(command(tmp_path, tmp_path / "bad.txt", out="latin"), capsys, "bad.txt", "byte 5", "UTF-8")
    refused(command(tmp_path, tmp_path / "none.txt"), capsys, "none.txt", "No such file")
    refused(command(tmp_path, bad, tokenizer=bad), capsys, str(bad))
    refused(command(tmp_path, bad, tokenizer=None, vocab_size=256), capsys, "256")


@pytest.mark.parametrize("name", ["text.txt", "lines.jsonl"])
@pytest.mark.parametrize("change", [-30, 30])
def test_refuses_a_file_that_changes_while_it_is_read(tmp_path, tokenizer, capsys, monkeypatch, name, change):
    """And nothing of the next file is taken from the wrong place."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 100)
    path = write_lines(tmp_path / name, [some_text(5, i) for i in range(9)])
    make = text_module.TextFile.__init__

    def make_with_another_size(file, *args):
        make(file, *args)
        file.size -= change  # as if it had had another size when it was opened

    monkeypatch.setattr(text_module.TextFile, "__init__", make_with_another_size)
    refused(command(tmp_path, path, path), capsys, name, "changed while it was read")


def test_refuses_a_directory_that_is_not_its_own(tmp_path, tokenizer, capsys):
    lines = write_lines(tmp_path / "lines.jsonl", ["a", "b"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    refused(command(tmp_path, lines, out="full"), capsys, "not empty")
    refused(command(tmp_path, lines, out="lines.jsonl"), capsys, "lines.jsonl")
    prepare.main(command(tmp_path, lines))
    refused(command(tmp_path, lines, layout="llm.c"), capsys, "other layout")
    write_lines(lines, ["a", "b", "c"])
    refused(command(tmp_path, lines), capsys, "other files")


def test_refuses_a_second_process_and_a_damaged_directory(tmp_path, tokenizer, capsys, monkeypatch):
    lines = write_lines(tmp_path / "lines.jsonl", ["a", "b"] * 50)
    with TokenDirectory(tmp_path / "out", {}):
        refused(command(tmp_path, lines), capsys, "another process")
    shutil.rmtree(tmp_path / "out")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenWriter, "_write_header", stop)
    assert prepare.main(command(tmp_path, lines, layout="llm.c")) == 130
    os.truncate(tmp_path / "out" / "tokens.bin", 1030)
    refused(command(tmp_path, lines, layout="llm.c"), capsys, "1030 bytes", "remove")
    whole = json.loads((tmp_path / "out" / "journal.json").read_text())
    for damage in ({"position": -1}, {"tokens": "7"}, {"unknown": 1}):
        (tmp_path / "out" / "journal.json").write_text(json.dumps(whole | damage))
        refused(command(tmp_path, lines, layout="llm.c"), capsys, "journal.json", "damaged")
    (tmp_path / "out" / "journal.json").write_text("{")
    refused(command(tmp_path, lines, layout="llm.c"), capsys, "journal.json", "damaged")


# ---- bad lines, pipes, folders -----------------------------------------------------------------------------


def refuse_and_mend(tmp_path, capsys, lines: list[str], mend) -> tuple[list[int], int]:
    """Stop at a bad line, mend the file, and give the same command: tokens, and documents tokenized before that."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(lines))
    refused(command(tmp_path, path), capsys, "lines.jsonl, line 301", "--on-bad-line skip")
    before = json.loads((tmp_path / "out" / "journal.json").read_text())["documents"]
    path.write_text("".join(mend(lines)))
    assert prepare.main(command(tmp_path, path)) == 0, capsys.readouterr().err
    return load_tokens(tmp_path / "out")[0].tolist(), before


@pytest.mark.parametrize("bad", ["no json\n", '{"text": null}\n', '{"text": "\\ud83d"}\n', '{"other": "x"}\n'])
def test_a_bad_line_costs_nothing_that_was_done(tmp_path, tokenizer, capsys, monkeypatch, bad):
    """Left out as advised, or with more lines behind: the work goes on where it stopped."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 500)
    documents = [some_text(n % 20, n) for n in range(310)]
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    lines.insert(300, bad)
    tokens, before = refuse_and_mend(tmp_path, capsys, lines, lambda lines: [*lines[:300], *lines[301:], lines[0]])
    assert tokens == expected(tokenizer, [*documents, documents[0]]) and before > 250


def test_what_was_done_of_a_file_must_stay_as_it_was(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 500)
    lines = [json.dumps({"text": f"line {n}"}) + "\n" for n in range(300)]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join([*lines, "no json\n"]))
    refused(command(tmp_path, path), capsys, "line 301")
    path.write_text("".join(lines).replace("line 7", "line seven"))
    refused(command(tmp_path, path), capsys, "not the file it was", "have changed")


def test_bad_lines_may_be_skipped(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 100)
    bad = {3: "no json", 50: '{"text": null}', 51: '{"text": "a \\udc00"}', 99: "[1]", 100: '{"texts": "b"}', 101: "7"}
    lines = [bad.get(n, json.dumps({"text": f"line {n}"})) for n in range(1, 121)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(lines))
    refused(command(tmp_path, path), capsys, "line 3")  # the same directory goes on with skipping
    assert prepare.main(command(tmp_path, path, on_bad_line="skip")) == 0
    said = capsys.readouterr().err
    assert "6 bad lines were left out" in said and said.count("lines.jsonl, line") == prepare.SHOWN
    tokens, _ = load_tokens(tmp_path / "out")
    assert tokens.tolist() == expected(tokenizer, [f"line {n}" for n in range(1, 121) if n not in bad])
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [int(line.split("line ")[1].split(":")[0]) for line in listed] == list(bad)
    assert "lone surrogate (\\udc00)" in listed[2] and "no object with a string in 'text'" in listed[1]
    assert json.loads((tmp_path / "out" / "tokens.json").read_text())["skipped"] == 6


def test_skipped_lines_are_listed_once_after_interruptions(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 60)
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'{{"text": "line {n}"}}\n' if n % 3 else "bad\n" for n in range(60)))
    keep, calls = TokenWriter.keep, 0

    def dying(writer):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise Crash
        keep(writer)

    monkeypatch.setattr(TokenWriter, "keep", dying)
    args = command(tmp_path, path, on_bad_line="skip")
    while True:
        try:
            assert prepare.main(args) == 0
            break
        except Crash:
            pass
    assert calls > 20 and len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 20
    assert load_tokens(tmp_path / "out")[0].tolist() == expected(tokenizer, [f"line {n}" for n in range(60) if n % 3])


@pytest.mark.parametrize("name", ["/dev/stdin", "fifo.jsonl"])
def test_pipes_are_read(tmp_path, tokenizer, name):
    path = tmp_path / name if name.startswith("fifo") else name
    documents = [some_text(50, n) for n in range(200)]
    data = ("".join(json.dumps({"text": text}) + "\n" for text in documents) if name.startswith("fifo")
            else "\r\n".join(documents)).encode()
    if name.startswith("fifo"):
        os.mkfifo(path)
        threading.Thread(target=lambda: path.write_bytes(data), daemon=True).start()
    done = subprocess.run([sys.executable, "-m", "tools.prepare", *command(tmp_path, path)], capture_output=True,
                          input=None if name.startswith("fifo") else data, timeout=60)
    assert done.returncode == 0, done.stderr
    want = documents if name.startswith("fifo") else ["\n".join(documents)]
    assert load_tokens(tmp_path / "out")[0].tolist() == expected(tokenizer, want)


def test_a_tokenizer_is_not_trained_on_a_pipe(tmp_path, tokenizer, capsys):
    os.mkfifo(tmp_path / "fifo")
    refused(command(tmp_path, tmp_path / "fifo", tokenizer=None, vocab_size=300), capsys, "is a pipe", "--tokenizer")
    assert not (tmp_path / "out").exists()


def test_folders_compressed_files_and_arrays(tmp_path, tokenizer, capsys):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.TXT").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}\r\n{"text": "five\\r"}'))
    (folder / "c.json").write_text(json.dumps([{"text": "six"}, "seven"]))
    (folder / "d.JSON").write_text('{"text": "eight"}\n{"text": "nine"}\n')
    (folder / "more" / "e.md").write_text("ten", encoding="utf-16")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    assert prepare.main(command(tmp_path, folder)) == 0
    want = ["one\ntwo\nthree", "four", "five\r", "six", "seven", "eight", "nine", "ten"]
    assert load_tokens(tmp_path / "out")[0].tolist() == expected(tokenizer, want)
    (tmp_path / "none").mkdir()
    refused(command(tmp_path, tmp_path / "none", out="other"), capsys, "holds no files named like texts")
    (folder / "c.json").write_text('[{"text": "six"}')
    refused(command(tmp_path, folder / "c.json", out="other"), capsys, "c.json", "not JSON")


def test_an_unfinished_directory_of_an_earlier_feste_is_named(tmp_path, tokenizer, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.json").write_text('{"settings": {}, "file": 0, "offset": 12}')
    lines = write_lines(tmp_path / "lines.jsonl", ["a"])
    refused(command(tmp_path, lines), capsys, "begun by an earlier feste")


def test_a_directory_without_its_index_is_not_read(tmp_path, tokenizer):
    lines = write_lines(tmp_path / "lines.jsonl", ["a", "b"])
    prepare.main(command(tmp_path, lines))
    with (tmp_path / "out" / "tokens.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(ValueError, match="damaged"):
        load_tokens(tmp_path / "out")
    (tmp_path / "out" / "tokens.json").unlink()
    with pytest.raises(TokensError, match="no finished directory of tokens") as raised:
        load_tokens(tmp_path / "out")
    assert raised.value.names == ("prepare",)  # of which the command line says how one is made


# ---- Parquet -----------------------------------------------------------------------------------------------


def write_parquet(path, texts, column="text", **types):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({column: texts, "n": list(range(len(texts)))}), path, row_group_size=7, **types)
    return path


def test_rows_of_parquet_are_documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("feste.parquet.ROWS", 5)
    texts = ["a", "", *(some_text(20, i) for i in range(40)), "naïve 東京 🙂"]
    path = write_parquet(tmp_path / "rows.parquet", texts)
    assert prepare.main(command(tmp_path, path)) == 0
    assert load_tokens(tmp_path / "out")[0].tolist() == expected(tokenizer, texts)
    assert prepare.main(command(tmp_path, path)) == 0  # finished, and the same file
    os.utime(path, (1, 1))
    assert prepare.main(command(tmp_path, path)) == 0  # touched: read again
    write_parquet(path, [*texts[:-1], "another"])
    assert prepare.main(command(tmp_path, path)) == 2


def test_a_preparation_of_parquet_goes_on_where_it_stopped(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("feste.parquet.ROWS", 5)
    texts = [some_text(20, i) for i in range(60)]
    path, reading = write_parquet(tmp_path / "rows.parquet", texts), reader.Reading()
    pieces = list(reader.pieces(path, reading))
    for i, piece in enumerate(pieces[:-1]):
        rest = [text for other in reader.pieces(path, reading, piece.position, piece.sha256) for text in other.texts]
        assert rest == [text for other in pieces[i + 1:] for text in other.texts]
    with pytest.raises(text_module.TextError, match="is not the file it was"):
        list(reader.pieces(path, reading, pieces[3].position, pieces[4].sha256))
    with pytest.raises(text_module.TextError, match="is not the file it was"):
        list(reader.pieces(path, reading, pieces[-1].position + 1, pieces[-1].sha256))


def test_a_parquet_file_without_rows_and_rows_without_a_text(tmp_path, tokenizer, capsys):
    pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "rows.parquet", ["a", None, "b"])
    assert prepare.main(command(tmp_path, path)) == 2
    assert "row 2: no object with a string in 'text'" in capsys.readouterr().err
    assert prepare.main(command(tmp_path, path, out="skip", on_bad_line="skip")) == 0
    assert load_tokens(tmp_path / "skip")[0].tolist() == expected(tokenizer, ["a", "b"])


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read as Parquet"),
    (lambda path: path.write_bytes(b"PAR1"), "cannot be read as Parquet"),
    (lambda path: write_parquet(path, ["a"], "words"), "has no column 'text', only words, n"),
    (lambda path: write_parquet(path, [1, 2]), "holds int64, not strings"),
    (lambda path: path.unlink(), "cannot read"),
])
def test_parquet_that_cannot_be_read_is_one_error(tmp_path, tokenizer, capsys, damage, said):
    path = write_parquet(tmp_path / "rows.parquet", ["a", "b"])
    damage(path)
    assert prepare.main(command(tmp_path, path)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_training_on_parquet_names_the_way(tmp_path, capsys):
    from feste.cli import main
    assert main(["--data", str(write_parquet(tmp_path / "rows.parquet", ["a"]))]) == 2
    assert "feste prepare" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["nanogpt", "llm.c"])
def test_a_split_for_other_programs(tmp_path, tokenizer, capsys, layout):
    from feste.shards import load_shards
    path = tmp_path / "text.txt"
    path.write_text(some_text(3000), encoding="utf-8")
    assert prepare.main(command(tmp_path, path, layout=layout, split=0.1)) == 0
    assert "val.bin" in capsys.readouterr().out
    tokens, n = load_tokens(tmp_path / "out")[0], len(load_tokens(tmp_path / "out")[0])
    (tmp_path / "theirs").mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.move(tmp_path / "out" / name, tmp_path / "theirs" / name)
    train, held_out = load_shards(tmp_path / "theirs")
    assert len(held_out) == int(n * 0.1)
    assert np.array_equal(np.concatenate([np.asarray(train), np.asarray(held_out)]), tokens)
    assert prepare.main(command(tmp_path, path, layout=layout, split=1.5)) == 2
    assert prepare.main(command(tmp_path, path, layout=layout, split=1e-9)) == 2
    assert "leaves nothing" in capsys.readouterr().err
