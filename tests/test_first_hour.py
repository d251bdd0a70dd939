"""What somebody meets first: mistyped flags, hints, prompts of their own text, and curves with an outlier."""

import re
import sys

import numpy as np
import pytest
from rich.text import Text

from feste import BPETokenizer, TrainConfig, ops, split_tokens
from feste.arguments import Parser
from feste.cli import explain, main, program, training_command
from feste.data import Text as Tokens
from feste.errors import FesteError
from tools import plot
from tools.comparison import cautions
from tools.monitor.line import same
from tools.runs import find_runs, open_runs


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "bees.txt"
    path.write_text("the bees of the garden\nsing to the roses\n" * 200)
    return path


def train(tmp_path, text_file, *flags, name="run"):
    small = ["--n-embd", "16", "--n-layers", "1", "--block-size", "16", "--seq-len", "16", "--vocab-size", "270"]
    return main(["--data", str(text_file), "--run-dir", str(tmp_path / name), "--steps", "4", *small, *flags])


# ---- flags and hints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["--stpes", "5"], "there is no --stpes, did you mean --steps?"),
    (["--steps=5", "--sede=3"], "there is no --sede, did you mean --seed?"),
    (["--qqqqqqqq"], "there is no --qqqqqqqq;"), (["extra"], "nothing is to be done with 'extra'"),
    (["--seed", "x"], "invalid int value"),
])
def test_a_mistyped_flag_is_one_line(words, said, capsys):
    parser = Parser(prog="feste train")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.count("\n") == 1 and err.startswith("feste train: error: ")


def test_errors_name_flags_as_they_are_typed():
    assert explain(FesteError("num_steps must be positive", "num_steps")) == "--steps must be positive"
    assert explain(FesteError("seed must be whole, not seedy", "seed")) == "--seed must be whole, not seedy"
    assert explain(FesteError("the seed of all evil", "seed")) == "the seed of all evil; see --seed"


def test_a_run_ends_with_the_commands_to_type_next(tmp_path, text_file, capsys):
    assert train(tmp_path, text_file) == 0
    out = capsys.readouterr().out
    assert f"{program()} repl {tmp_path / 'run'}" in out and f"{program()} plot {tmp_path / 'run'} -o loss.png" in out


def test_the_command_that_continues_is_the_one_that_began(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/05 tiny.py", "--steps", "3"])
    assert training_command() == "python 'examples/05 tiny.py'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/feste", "train"])
    assert training_command() == f"{program()} train"


def test_more_threads_than_cores_are_noted(tmp_path, text_file, capsys):
    try:
        assert train(tmp_path, text_file, "--threads", "99", "--dry-run") == 0
        assert "99 threads have the time of" in capsys.readouterr().out
        assert train(tmp_path, text_file, "--threads", "1", "--dry-run") == 0
        assert "threads have the time of" not in capsys.readouterr().out
    finally:
        ops.set_num_threads(0)


# ---- one's own text ----------------------------------------------------------------------------------------


def test_samples_of_ones_own_text_begin_with_its_words(tmp_path, text_file, capsys):
    assert train(tmp_path, text_file, "--sample-interval", "2") == 0
    out = capsys.readouterr().out
    assert "ROMEO" not in out and "To be" not in out
    begun = out.split("sample of step 2:\n")[1].split("\n")[0].strip()
    assert begun.split()[0] in ("the", "sing", "bees", "garden", "of", "to", "roses")
    assert train(tmp_path, text_file, "--sample-prompt", "ROMEO:", name="romeo") == 0
    assert "ROMEO:" in capsys.readouterr().out


def test_the_score_at_the_end_is_in_bits_per_byte_too(tmp_path, text_file, capsys):
    assert train(tmp_path, text_file) == 0
    found = re.search(r"loss over the whole held-out part: ([\d.]+) nats .*, ([\d.]+) bits per byte",
                      capsys.readouterr().out)
    tokenizer = BPETokenizer.load(tmp_path / "run" / "tokenizer.json")
    ids = tokenizer.encode_to_numpy(text_file.read_text())
    held_out = split_tokens(ids, 0.1)[1]
    scored = held_out[1:(len(held_out) - 1) // 16 * 16 + 1]
    bits = float(found[1]) / np.log(2) * len(scored) / len(tokenizer.decode_bytes(scored.tolist()))
    assert float(found[2]) == pytest.approx(bits, abs=2e-3)


def test_prompts_are_words_of_the_held_out_part():
    text = "to be or not to be that is the question " * 300
    tokenizer = BPETokenizer.train(text, 280)
    prompts = Tokens(tokenizer.encode_to_numpy(text)).sample_prompts(TrainConfig(seq_len=16), tokenizer, 3)
    assert prompts and all(prompt in text for prompt in prompts)
    assert Tokens(np.array([3, 4])).sample_prompts(TrainConfig(seq_len=1), tokenizer, 3) is not None


# ---- runs --------------------------------------------------------------------------------------------------


def test_files_among_several_paths_are_passed_over(tmp_path, text_file):
    train(tmp_path, text_file)
    assert find_runs([tmp_path / "run", text_file]) == [tmp_path / "run"]
    with pytest.raises(FesteError, match="is a run directory"):
        find_runs([text_file, text_file])
    with pytest.raises(FesteError, match="not a run directory"):
        find_runs([text_file])


def test_the_advice_for_other_tokenizers_can_be_followed(tmp_path, text_file):
    train(tmp_path, text_file)
    other = tmp_path / "other.txt"
    other.write_text("another text of other words and letters\n" * 300)
    train(tmp_path, other, name="second")
    assert any("--bits-per-byte FILE scores" in line for line in cautions(open_runs([tmp_path])))


def test_a_run_that_diverged_does_not_flatten_the_others(tmp_path, text_file):
    from matplotlib.figure import Figure
    train(tmp_path, text_file)
    train(tmp_path, text_file, name="wild")
    log = tmp_path / "wild" / "training_log.csv"
    head, first, *rest = log.read_text().split("\n")
    cells = first.split(",")
    cells[head.split(",").index("train_loss")] = "1e16"
    log.write_text("\n".join([head, ",".join(cells), *rest]))
    runs = open_runs([tmp_path])
    axes = Figure().subplots()
    plot.draw_panel(axes, "loss, nats per token", runs, plot.legend_names(runs), "step")
    assert axes.get_ylim()[1] < 20
    assert any("are left out" in text.get_text() for text in axes.texts)


def test_cells_of_another_style_are_others():
    assert same(Text("run", "bold"), Text("run", "bold"))
    assert not same(Text("run", "bold"), Text("run")) and not same("", Text("run"))
