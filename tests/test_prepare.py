"""Directories of tokens: what stands in them, and that no interruption loses or repeats a document."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from feste import BPETokenizer
from feste.data import Batches, load_tokens
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


@pytest.mark.parametrize("block", [1, 7, 64, 1000, prepare.BLOCK_BYTES])
def test_text_and_json_lines_for_any_size_of_block(tmp_path, tokenizer, monkeypatch, block):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block)
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
    assert sorted(os.listdir(tmp_path / "out")) == ["tokenizer.json", "tokens.bin", "tokens.json"]


def test_layouts_are_those_of_nanogpt_and_llmc(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text(some_text(100), encoding="utf-8")
    want = expected(tokenizer, [some_text(100)])
    prepare.main(command(tmp_path, text))
    prepare.main(command(tmp_path, text, out="c", layout="llm.c"))
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
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 50)
    text, documents = some_text(200), [some_text(40, i) for i in range(5)]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    lines = write_lines(tmp_path / "lines.jsonl", documents, field="body")
    flags = {"tokenizer": None, "vocab_size": 290, "jsonl_field": "body"}
    assert prepare.main(command(tmp_path, tmp_path / "text.txt", lines, **flags)) == 0
    tokens, tokenizer = load_tokens(tmp_path / "out")
    assert tokenizer.to_json() == BPETokenizer.train([text, *documents], 290, [END]).to_json()
    assert tokens.tolist() == expected(tokenizer, [text, *documents])


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
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 300)
    documents = [some_text(n, n) for n in range(0, 40, 3)]
    lines, text = write_lines(tmp_path / "lines.jsonl", documents), tmp_path / "text.txt"
    text.write_text(some_text(200), encoding="utf-8")
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
        args = command(tmp_path, lines, text, out=f"out{crashes}")
        left = crashes + 1
        try:
            assert prepare.main(args) == 0
            break
        except Crash:
            crashes += 1
        assert prepare.main(args) == 0
        assert load_tokens(args[args.index("-o") + 1])[0].tolist() == want
    assert crashes > 30


CHILD = "import sys; from tools import prepare; prepare.BLOCK_BYTES = 1500; sys.exit(prepare.main(sys.argv[1:]))"


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
            (b'{"text": "a"}\n{"text": 7}\n', ("line 2", "--jsonl-field")), (b'{"text": "a"}\n\n[1]\n', ("line 3",)),
            (b"no json\n", ("line 1", "not JSON")), (b'{"text": "\\ud800"}\n', ("line 1", "surrogate")),
            (b'{"text": "\xff"}\n', ("line 1", "not UTF-8")), (b"[" * 100_000, ("line 1",))]):
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
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 100)
    path = write_lines(tmp_path / name, [some_text(5, i) for i in range(9)])
    real = prepare.open_sources

    def open_and_change(*args):
        sources = real(*args)
        sources[0].size -= change  # as if it had had another size
        return sources

    monkeypatch.setattr(prepare, "open_sources", open_and_change)
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
    with prepare.locked(tmp_path / "out"):
        refused(command(tmp_path, lines), capsys, "another process")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_write_header", stop)
    assert prepare.main(command(tmp_path, lines, layout="llm.c")) == 130
    os.truncate(tmp_path / "out" / "tokens.bin", 1030)
    refused(command(tmp_path, lines, layout="llm.c"), capsys, "1030 bytes", "remove")
    whole = json.loads((tmp_path / "out" / "journal.json").read_text())
    for damage in ({"offset": -1}, {"tokens": "7"}, {"unknown": 1}):
        (tmp_path / "out" / "journal.json").write_text(json.dumps(whole | damage))
        refused(command(tmp_path, lines, layout="llm.c"), capsys, "journal.json", "damaged")
    (tmp_path / "out" / "journal.json").write_text("{")
    refused(command(tmp_path, lines, layout="llm.c"), capsys, "journal.json", "damaged")


def test_a_directory_without_its_index_is_not_read(tmp_path, tokenizer):
    lines = write_lines(tmp_path / "lines.jsonl", ["a", "b"])
    prepare.main(command(tmp_path, lines))
    with (tmp_path / "out" / "tokens.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(ValueError, match="damaged"):
        load_tokens(tmp_path / "out")
    (tmp_path / "out" / "tokens.json").unlink()
    with pytest.raises(ValueError, match=r"tools\.prepare"):
        load_tokens(tmp_path / "out")
