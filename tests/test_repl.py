"""The REPL, driven through a pseudo-terminal and through pipes, on a tiny model with random weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from feste import GPT2, BPETokenizer, Checkpoint, Config
from feste.generation import Decoder
from feste.terminal import clean
from feste.tokenizer import END_OF_TEXT
from tools.repl.answers import DIALS, Answer, Conversation, LoadedModel, Settings
from tools.repl.loop import COMMANDS, Repl, read_prompt, telling_names, token_text

ROOT = Path(__file__).parent.parent
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer, naïve 漢字. " * 20
REPORT = r"tokens/s;\s+seed\s+\d+\]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, a run directory with one of them, and one without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = BPETokenizer.train(TEXT, 300)
    config = Config(vocab_size=300, n_embd=32, n_layers=1, n_heads=2, block_size=32)
    (folder / "run").mkdir()
    Checkpoint.save(folder / "run" / "checkpoint_best.bin", GPT2(config, 1), tokenizer, step=7, best_val_loss=5.5)
    Checkpoint.save(folder / "other.bin", GPT2(config, 2), tokenizer, step=9)
    Checkpoint.save(folder / "bare.bin", GPT2(config, 3))
    return folder


@pytest.fixture
def loaded(folder):
    return LoadedModel(folder / "run")


def environment(folder):
    return os.environ | {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm", "COLUMNS": "100"}


# ---- in a script -------------------------------------------------------------------------------------------


def pipe(folder, *arguments, lines):
    """The REPL in a folder without runs of its own: the checkout may have some in data."""
    return subprocess.run([sys.executable, "-m", "tools.repl", *map(str, arguments)], cwd=folder, capture_output=True,
                          input=lines if isinstance(lines, bytes) else lines.encode(),
                          env=environment(folder) | {"PYTHONPATH": str(ROOT)})


def completion(loaded, prompt, tokens, **how):
    ids = loaded.tokenizer.encode(prompt)
    return loaded.tokenizer.decode(loaded.model.generate(ids, tokens, **how)[len(ids):])


def test_answers_on_standard_output_are_those_of_generate_and_nothing_else(folder, loaded):
    done = pipe(folder, folder / "run", "--tokens", 40, "--seed", 5, "--temp", 0.9, "--top-k", 50, "--top-p", 0.8,
                "--null", lines="To be\n\nWhether naïve \n//x\nlast, without a line end")
    expected = [completion(loaded, prompt, 40, temperature=0.9, top_k=50, top_p=0.8, seed=5)
                for prompt in ("To be", "Whether naïve ", "/x", "last, without a line end")]
    assert done.stdout == "".join(f"{text}\0" for text in expected).encode()
    assert (done.stderr, done.returncode) == (b"", 0)


def test_a_line_of_a_script_may_go_on_in_the_next_one(folder, loaded):
    done = pipe(folder, folder / "run", "--tokens", 9, "--temp", 0, lines="ROMEO:\\\nTo\n")
    assert done.stdout.decode() == completion(loaded, "ROMEO:\nTo", 9, temperature=0.0) + "\n"


def test_commands_in_a_script_write_nothing_to_standard_output(folder, loaded):
    done = pipe(folder, folder / "run", "--seed", 1, lines="/tokens 6\n/info\n/help\nTo be\n/quit\nnever read\n")
    assert done.stdout.decode() == completion(loaded, "To be", 6, temperature=0.8, seed=1) + "\n"
    assert b"validation loss" in done.stderr and done.returncode == 0


def test_compare_in_a_script_answers_from_both(folder, loaded):
    done = pipe(folder, "--compare", folder / "run", folder / "other.bin", "--tokens", 8, "--temp", 0, "--null",
                lines="To\n")
    expected = [completion(v, "To", 8, temperature=0.0) for v in (loaded, LoadedModel(folder / "other.bin"))]
    assert done.stdout.decode() == "".join(f"{text}\0" for text in expected)
    assert expected[0] != expected[1]


def test_samples_in_a_script_are_those_of_generate_batch(folder, loaded):
    done = pipe(folder, folder / "run", "--samples", 3, "--tokens", 40, "--seed", 2, "--null", lines="To be\n")
    ids = loaded.tokenizer.encode("To be")
    batch = loaded.model.generate_batch(ids, 3, 40, temperature=0.8, seed=2)
    assert done.stdout.decode() == "".join(f"{loaded.tokenizer.decode(one[len(ids):])}\0" for one in batch)


@pytest.mark.parametrize(("arguments", "lines", "words"), [
    ([], "", "data is neither a checkpoint nor a run directory"),
    (["{}/run", "--compare", "{}/run", "{}/run"], "", "--compare A B"),
    (["{}/nothing"], "", "nothing is neither a checkpoint nor a run directory"),
    (["{}/bare.bin"], "", "holds no tokenizer"),
    (["{}/run", "--temp", "warm"], "", "--temp: 'warm' is not a number"),
    (["{}/run", "--temp", "-1"], "", "temperature must be 0 or more, got -1"),
    (["{}/run", "--top-k", "0"], "", "top_k must be at least 1"),
    (["{}/run", "--top-p", "1.5"], "", "top_p must lie in (0, 1]"),
    (["{}/run", "--tokens", "0"], "", "tokens must be at least 1, got 0"),
    (["{}/run", "--seed", "-3"], "", "seed must be 0 or more, got -3"),
    (["{}/run", "--seed", "x"], "", "'x' is not a whole number or 'random'"),
    (["{}/run"], "/tempp 1\n", "did you mean /temp?"),
    (["{}/run"], "/zzz\n", "/help lists them"),
    (["{}/run"], "/again\n", "no prompt yet"),
    (["{}/run"], "/tokens-of\n", "name a text"),
    (["{}/run"], "/save\n", "name a file"),
    (["{}/run"], "/save /nowhere/at/all\n", "cannot write /nowhere/at/all"),
    (["{}/run"], b"\xff\n", "standard input is not UTF-8"),
])
def test_bad_input_is_one_line_and_exit_code_2(folder, arguments, lines, words):
    done = pipe(folder, *(argument.format(folder) for argument in arguments), lines=lines)
    assert done.returncode == 2 and done.stdout == b""
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("error: ") and words in line


def test_a_reader_that_has_enough_is_no_error(folder):
    command = f"yes To | {sys.executable} -m tools.repl {folder / 'run'} --tokens 500 | head -c 10 > /dev/null"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, env=environment(folder))
    assert done.stderr == b""


# ---- at a terminal -----------------------------------------------------------------------------------------


class Terminal(pexpect.spawn):
    """A pseudo-terminal that leaves out bold and colours, also where a sequence arrives in pieces."""

    unfinished = ""

    def read_nonblocking(self, size=1, timeout=-1):
        text = self.unfinished + super().read_nonblocking(size, timeout)
        self.unfinished = re.search(r"(\x1b(\[[\d;]*)?)?$", text)[0]
        return re.sub(r"\x1b\[[\d;]*m", "", text.removesuffix(self.unfinished))


class Session:
    """The REPL at a pseudo-terminal."""

    def __init__(self, folder, *arguments, columns=100):
        self.child = Terminal(sys.executable, ["-m", "tools.repl", *map(str, arguments)], cwd=str(ROOT),
                              env=environment(folder) | {"COLUMNS": str(columns)}, encoding="utf-8",
                              codec_errors="strict", dimensions=(40, columns), timeout=60)
        self.child.expect("Ctrl.D ends")
        self.child.expect_exact("> ")

    def send(self, line, reply):
        """Send a line; wait for the reply and the next prompt. Returns what came before and with the reply."""
        self.child.sendline(line)
        self.child.expect(reply)
        text = self.child.before + self.child.after
        self.child.expect_exact("> ")
        return text

    def end(self):
        self.child.sendeof()
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def session(folder):
    session = Session(folder, folder / "run", "--tokens", "12", "--seed", "4")
    yield session
    session.child.close(force=True)


def test_prompt_stream_speed_and_end_of_input(session, loaded):
    shown = session.send("To be, or", REPORT)
    expected = clean(completion(loaded, "To be, or", 12, temperature=0.8, seed=4)).split("\n")[0].split("    ")[0]
    assert f"To be, or{expected}" in shown
    assert re.search(r"\[12 tokens in [\d.]+ s, [\d,]+ tokens/s; seed 4\]", shown)
    assert session.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(session):
    session.send("/tokens 100000000", "tokens 100000000\r\n")
    session.child.sendline("To be")
    session.child.expect("To be.*To be.{40}")  # echo, then the prompt and its continuation: it streams
    session.child.sendintr()
    session.child.expect(r"\[stopped, [\d,]+ tokens in .*tokens/s; seed 4\]")
    session.child.expect_exact("> ")
    session.send("/tokens 5", "tokens 5\r\n")
    session.send("To be", r"\[5 tokens in .*seed 4\]")
    assert session.end() == 0


def test_ctrl_c_at_the_prompt_gives_up_the_line(session):
    session.child.send("abandoned")
    session.child.expect_exact("abandoned")
    session.child.sendintr()
    session.child.expect_exact("> ")
    assert "abandoned" not in session.send("fresh", REPORT).replace("\r\n> ", "")
    assert session.end() == 0


def test_lines_that_end_in_a_backslash_go_on(session, tmp_path):
    session.child.sendline("ROMEO:\\")
    session.child.expect_exact(". ")
    session.send("To be", REPORT)
    session.send(f"/save {tmp_path / 'said.txt'}", "1 answers")
    assert "seed 4\nROMEO:\nTo be" in (tmp_path / "said.txt").read_text(encoding="utf-8")


def test_saved_settings_draw_the_saved_answer_again(session, loaded, tmp_path):
    session.send("/seed random", "seed random")
    session.send("/temp 0.123456789", "temp 0.123456789")
    session.send("To be", REPORT)
    session.send(f"/save {tmp_path / 'said.txt'}", "1 answers")
    head, _, said = (tmp_path / "said.txt").read_text(encoding="utf-8").partition("\n")
    seed = int(re.search(r"seed (\d+)$", head)[1])
    assert said == f"To be{completion(loaded, 'To be', 12, temperature=0.123456789, seed=seed)}\n"


def test_a_mistake_is_told_and_forgiven(session):
    session.send("/temp warm", "error: /temp: 'warm' is not a number")
    session.send("/top-p 2", "error: /top-p: top_p must lie in")
    session.send("/top-p", "top-p off")
    session.send("x", REPORT)


def test_a_prompt_longer_than_the_context_is_not_cut_in_silence(session):
    session.send("漢" * 20, r"the prompt has \d+ tokens; run/checkpoint_best.bin sees the last 32[\s\S]*" + REPORT)


COMMAND_TESTS = {
    "temp": [("/temp 0.5", "temp 0.5"), ("/temp", "temp 0.5")],
    "top-k": [("/top-k 7", "top-k 7"), ("/top-k off", "top-k off")],
    "top-p": [("/top-p 0.9", "top-p 0.9"), ("/top-p", "top-p 0.9")],
    "tokens": [("/tokens 3", "tokens 3"), ("To be", r"\[3 tokens in .*seed 4\]")],
    "samples": [("/samples 2", "samples 2"), ("To be", r"─ 1 ─+╮╭─+ 2 ─[\s\S]*\[24 tokens in .*seed 4\]")],
    "seed": [("/seed 99", "seed 99"), ("To be", "seed 99]"), ("/seed random", "seed random"), ("To", REPORT)],
    "again": [("/again", "error: there is no prompt yet"), ("To be", REPORT),
              ("/again", "again[\\s\\S]*\rTo be[\\s\\S]*" + REPORT)],
    "chat": [("/chat", r"has no <\|endoftext\|>, so the model was not taught"), ("/chat off", "no conversation"),
             ("/chat x", "/chat off ends it; got 'x'")],
    "tokens-of": [("/tokens-of naïve é",
                   r"\d+ tokens for 9 bytes, [\d.]+ bytes a token\r\n\d+ '.*' │ \d+ '\\xc3' │ \d+ '\\xa9'")],
    "probs": [("/probs To be", r"after 'To be':[\s\S]*\d+\.\d %[\s\S]*'")],
    "surprise": [("/surprise To be, or not", r"bits for \d+ bytes, [\d.]+ bits per byte[\s\S]*10 bits and more")],
    "load": [("/load /nowhere", "error: /nowhere is neither a checkpoint nor a run"), ("/load", "error: name a")],
    "info": [("/info", r"step +7[\s\S]*5\.5000 nats, perplexity 244\.69[\s\S]*300 tokens[\s\S]*temp 0.8, top-k off")],
    "save": [("To be", REPORT), ("/save {}/a b", "1 answers with"), ("/save {}/a b", "exists and is not overwritten")],
    "help": [("/help", "[\\s\\S]*".join(re.escape(f"/{name}") for name in COMMANDS) + r"[\s\S]*Ctrl\+D")],
    "quit": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(session, tmp_path, name):
    for line, reply in COMMAND_TESTS[name]:
        session.send(line.format(tmp_path), reply)
    session.child.sendline("/quit")
    session.child.expect(pexpect.EOF)
    session.child.close()
    assert session.child.exitstatus == 0


def test_history_outlives_the_session_and_lines_can_be_edited(folder):
    first = Session(folder, folder / "run", "--tokens", "2")
    first.send("remember me", REPORT)
    first.end()
    second = Session(folder, folder / "run", "--tokens", "2")
    second.send("\x1b[A", r"remember me[\s\S]*" + REPORT)
    second.send("temp\x01/", "temp 0.8\r\n")  # Ctrl+A: to the start of the line
    second.send("/tokens-o\tTo", "1 tokens for 2 bytes")
    second.end()
    assert (folder / "state" / "feste" / "repl_history").stat().st_size > 0


def test_messages_break_between_words(folder):
    session = Session(folder, folder / "run", columns=40)
    session.send("/nonsense", r"no command /nonsense; \r\n/help lists them, // begins a prompt \r\nwith a slash")
    assert session.end() == 0


def test_compare_answers_side_by_side(folder):
    session = Session(folder, "--compare", folder / "run", folder / "other.bin", "--tokens", "6")
    shown = session.send("To be", r"\[run/checkpoint_best.bin: 6 tokens in .*other.bin: 6\s+tokens .*seed\s+\d+\]")
    assert re.search(r"run/checkpoint_best.bin ─*╮╭─.*other.bin ─*╮", shown)
    assert session.end() == 0


# ---- parts -------------------------------------------------------------------------------------------------


def test_every_dial_is_a_command_and_a_flag_of_its_own_setting():
    assert set(DIALS) <= set(COMMANDS) and set(COMMAND_TESTS) == set(COMMANDS)
    assert [dial.field for dial in DIALS.values()] == list(Settings.__dataclass_fields__)


class Writes:
    """Standard output that remembers each write."""

    def __init__(self):
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return len(text)

    def flush(self):
        pass


def scripted(monkeypatch, text):
    """Make every model emit the bytes of a text, one token each."""
    tokenizer = BPETokenizer.train("", 256)
    ids = [tokenizer.encode(chr(byte))[0] if byte < 128 else tokenizer.tokens.index(bytes([byte]))
           for byte in text.encode()]
    monkeypatch.setattr(Decoder, "stream", lambda *_: ([i] for i in ids))


def test_characters_of_several_bytes_arrive_whole(monkeypatch, loaded):
    text = "naïve 漢字 🎭!"
    scripted(monkeypatch, text)
    pieces = [piece for [piece] in Answer(loaded, "To", Settings(), 0)]
    assert [piece for piece in pieces if piece] == list(text)


def test_a_broken_character_at_the_end_is_not_lost(monkeypatch, loaded):
    scripted(monkeypatch, "ab")
    half = loaded.tokenizer.tokens.index(b"\xc3")
    monkeypatch.setattr(Decoder, "stream", lambda *_: iter([[half]]))
    assert [piece for [piece] in Answer(loaded, "To", Settings(), 0)] == ["", "\ufffd"]


def test_a_token_beyond_the_tokenizer_is_never_drawn(loaded, tmp_path):
    """A model may have room for more tokens than its tokenizer knows."""
    large = GPT2(Config(2000, 16, 1, 1, 16))
    Checkpoint.save(tmp_path / "large.bin", large, loaded.tokenizer)
    answer = Answer(LoadedModel(tmp_path / "large.bin"), "To", Settings(temperature=5.0, tokens=100), 0)
    assert "".join(piece for [piece] in answer) and answer.tokens == 100


@pytest.fixture
def taught(tmp_path):
    """A model whose tokenizer has an <|endoftext|>, and room for 40 tokens."""
    tokenizer = BPETokenizer.train("", 257, [END_OF_TEXT])
    Checkpoint.save(tmp_path / "taught.bin", GPT2(Config(257, 16, 1, 1, 40)), tokenizer)
    return LoadedModel(tmp_path / "taught.bin")


def test_an_answer_ends_at_the_end_of_text(monkeypatch, taught):
    a, end = taught.tokenizer.encode("a")[0], taught.tokenizer.end_of_text
    monkeypatch.setattr(Decoder, "stream", lambda *_: iter([[a, a], [a, end], [end, a]]))
    answer = Answer(taught, "To", Settings(samples=2), 0)
    assert [pieces for pieces in answer][:3] == [["a", "a"], ["a", ""], ["", ""]]
    assert answer.texts == ["aa", "a"] and answer.drawn == [[a, a], [a]] and answer.tokens == 3


def test_a_conversation_keeps_what_fits_into_the_context(taught):
    chat, tokenizer = Conversation(taught), taught.tokenizer
    assert tokenizer.decode(chat.ask("a?", tokens=5)) == "User: a?\nAssistant:"
    chat.answered(tokenizer.encode(" b"))
    both = tokenizer.decode(chat.ask("c?", tokens=1))
    assert both == "User: c?\nAssistant:"  # 22 + 19 + 1 tokens are more than 40
    chat.turns = [[1, 2, 3], [4, 5]]
    assert chat.ask("c?", tokens=18) == [4, 5, *tokenizer.encode("User: c?\nAssistant:")]


def test_a_conversation_goes_on_and_ends(monkeypatch, taught):
    out, end = Writes(), taught.tokenizer.end_of_text
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(Decoder, "stream", lambda *_: iter([[taught.tokenizer.encode("y")[0]], [end]]))
    repl = Repl([taught], Settings(tokens=2), interactive=False)
    repl.console.file = out
    for line in ("/chat", "a", "b"):
        repl.obey(line)
    turns = [taught.tokenizer.decode(turn) for turn in repl.conversations[0].turns]
    assert turns == [f"User: {said}\nAssistant:y{END_OF_TEXT}" for said in "ab"]
    with pytest.raises(ValueError, match="/samples 1, or /chat off"):
        repl.obey("/samples 2")
        repl.obey("c")
    for line in ("/samples 1", "/chat off", "c"):
        repl.obey(line)
    assert not repl.conversations


def test_a_model_cannot_steer_the_terminal(monkeypatch, loaded):
    scripted(monkeypatch, "a\x1b[2J\rb\tc\n\x07")
    out = Writes()
    monkeypatch.setattr(sys, "stdout", out)
    repl = Repl([loaded], Settings(), interactive=True)
    repl.console.file = out
    repl.answer("To\x1b]0;title\x07")
    shown = "".join(out.pieces)
    assert "[2J\nb    c\n" in shown and "To" in shown and "title" not in shown
    assert not set("\x1b\r\x07\t") & set(shown)


@pytest.mark.parametrize(("names", "telling"), [
    (["a/best"], ["a/best"]), (["a/best", "b/best"], ["a", "b"]), (["a/one", "a/two"], ["one", "two"]),
    (["a/one", "b/two"], ["a/one", "b/two"]), (["a/one", "a/one"], ["a/one", "a/one"])])
def test_names_in_a_comparison_say_what_differs(names, telling):
    assert telling_names(names) == telling


@pytest.mark.parametrize(("lines", "prompt"), [
    (["one"], "one"), (["a\\", "b\\", "c"], "a\nb\nc"), (["a\\", ""], "a\n"), (["a\\"], "a"), (["a\\ "], "a\\ ")])
def test_read_prompt(lines, prompt):
    source = iter(lines)

    def read_line(_):
        for line in source:
            return line
        raise EOFError

    assert read_prompt(read_line) == prompt
    with pytest.raises(EOFError):
        read_prompt(read_line)


def test_token_text_shows_what_is_there():
    tokens = (b" be", b"\n", b"\xc3", "é".encode())
    assert [token_text(token) for token in tokens] == ["' be'", r"'\n'", r"'\xc3'", "'é'"]


def test_of_several_runs_the_newest_with_a_checkpoint_answers(folder, tmp_path):
    """data/shakespeare_tiny_* is one run today and two tomorrow."""
    import json
    import shutil
    for name, started in (("old", "2026-01-01"), ("new", "2026-03-01"), ("bare", "2026-04-01")):
        shutil.copytree(folder / "run", tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps({"started": started}))
    for path in (tmp_path / "bare").glob("*.bin"):
        path.unlink()
    for paths in ([tmp_path / name for name in ("old", "new", "bare")], [tmp_path]):
        done = subprocess.run([sys.executable, "-m", "tools.repl", *map(str, paths), "--tokens", "3"], cwd=ROOT,
                              input=b"To be\n", capture_output=True)
        assert done.returncode == 0 and done.stderr.decode() == f"{tmp_path / 'new'}: the newest of 3 runs\n"
