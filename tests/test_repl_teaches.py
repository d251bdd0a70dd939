"""/probs, /surprise and /load: what the model expects, what surprises it, and another model in its place."""

import math
import os

import numpy as np
import pytest

from feste import GPT2, BPETokenizer, Checkpoint, Config
from tools.repl import teach
from tools.repl.answers import LoadedModel, Settings
from tools.repl.loop import Repl, find_command

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer, naïve 漢字. " * 20


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints; the models have room for more tokens than their tokenizer has."""
    tokenizer = BPETokenizer.train(TEXT, 300)
    for seed, name in enumerate(("a.bin", "b.bin"), 1):
        model = GPT2(Config(vocab_size=330, n_embd=32, n_layers=1, n_heads=2, block_size=16), seed)
        model.flat_params *= 8.0
        Checkpoint.save(tmp_path / name, model, tokenizer, step=7)
    return tmp_path


def repl_of(folder, *names: str) -> Repl:
    return Repl([LoadedModel(folder / name) for name in names], Settings(), interactive=False)


def test_what_is_expected_next(folder):
    loaded = LoadedModel(folder / "a.bin")
    found = teach.expected(loaded, "To be, or not to", 300)
    assert [token.probability for token in found] == sorted((token.probability for token in found), reverse=True)
    assert sum(token.probability for token in found) == pytest.approx(1.0)
    ids = loaded.tokenizer.encode("To be, or not to")
    [likeliest] = loaded.model.generate(ids, 1, temperature=0.0, vocab_size=300)[len(ids):]
    assert found[0].text == loaded.tokenizer.tokens[likeliest]


def test_surprises_add_up_to_the_loss(folder):
    loaded = LoadedModel(folder / "a.bin")
    loaded.model = GPT2(Config(vocab_size=300, n_embd=32, n_layers=1, n_heads=2, block_size=16), 3)
    ids = loaded.tokenizer.encode("or not to be, that is")
    tokens = teach.surprises(loaded, "or not to be, that is")
    loss = loaded.model.loss(np.array([ids[:-1]]), np.array([ids[1:]]))
    assert sum(token.bits for token in tokens) == pytest.approx(loss * len(tokens) / math.log(2.0), rel=1e-5)
    with pytest.raises(ValueError, match="single token"):
        teach.surprises(loaded, "T")


def test_a_text_beyond_the_context_is_cut_to_its_end(folder):
    loaded = LoadedModel(folder / "a.bin")
    assert len(teach.surprises(loaded, TEXT)) == 16
    assert len(teach.expected(loaded, TEXT)) == teach.EXPECTED


def test_colours_grow_with_the_surprise_and_nothing_steers_the_terminal():
    tokens = [teach.Token(b"a", 0.9), teach.Token(b"\x1b[31mred", 1e-2), teach.Token("é".encode()[:1], 1e-9),
              teach.Token(b"z", 0.0)]
    painted = teach.coloured("first ", tokens)
    assert "\x1b" not in painted.plain and painted.plain.startswith("first a") and "·" in painted.plain
    styles = [str(span.style) for span in painted.spans]
    assert styles[0] == teach.SURPRISE[-1][1] and styles[-1] == teach.SURPRISE[0][1] and len(set(styles)) == 3
    assert " ".join(teach.legend().plain.split()) == "0 to 2 bits 2 to 4 bits 4 to 7 bits 7 to 10 bits 10 bits and more"


def test_the_commands(folder, capsys):
    repl = repl_of(folder, "a.bin", "b.bin")
    for line in ("/probs To be", "/surprise To be, or not", "/load " + os.fspath(folder / "b.bin")):
        repl.obey(line)
    said = capsys.readouterr().err
    assert said.count("%") == 2 * teach.EXPECTED and said.count("bits per byte") == 2
    assert [loaded.path.name for loaded in repl.models] == ["b.bin"]
    for line, words in (("/probs", "name a text"), ("/load", "name a checkpoint"), ("/load /nowhere", "neither")):
        with pytest.raises(ValueError, match=words):
            repl.obey(line)
    assert find_command("probs") and find_command("surprise")
