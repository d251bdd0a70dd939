"""Questions and answers: what counts, how they are read and batched, and training on them."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feste import GPT2, AdamW, BPETokenizer, Checkpoint, Config, TrainConfig, train_gpt2
from feste.cli import main
from feste.config import IGNORED
from feste.corpus import Source, shakespeare_text
from feste.errors import FesteError
from feste.pairs import Pairs, PairsError, read_pairs
from feste.tokenizer import END_OF_TEXT
from tools.export import main as export

ROOT = Path(__file__).parent.parent

SMALL = Config(vocab_size=300, n_embd=32, n_layers=2, n_heads=2, block_size=64)
TOKENIZER = BPETokenizer.train("what is one and one and what is two " * 20, 270, [END_OF_TEXT])


def write(path, *values):
    path.write_text("".join(f"{value if isinstance(value, str) else json.dumps(value)}\n" for value in values))
    return path


def pair(question, answer):
    return {"prompt": question, "completion": answer}


def examples(tmp_path, n=40):
    return write(tmp_path / "pairs.jsonl", *[pair(f"{i} and one is", f" {i + 1}") for i in range(n)])


def pairs_of(path) -> Pairs:
    return Pairs(read_pairs(path), TOKENIZER)


def targets_text(targets) -> str:
    return TOKENIZER.decode([i for i in targets.tolist() if i != IGNORED])


# ---- the loss ----------------------------------------------------------------------------------------------


def gradients(model, *batches):
    """Mean loss and gradient over all tokens that count, by accumulation."""
    counts = [np.count_nonzero(targets != IGNORED) for _, targets in batches]
    model.zero_grad()
    loss = sum(model.forward_backward(ids, targets, n / sum(counts)) * n / sum(counts)
               for (ids, targets), n in zip(batches, counts, strict=True))
    return loss, model.flat_grads.copy()


@pytest.mark.parametrize("tie_weights", [False, True])
def test_ignored_targets_leave_loss_and_gradient(tie_weights):
    """The loss of some tokens is that of all, by the losses of each token alone."""
    model = GPT2(Config(**(SMALL.to_dict() | {"tie_weights": tie_weights})))
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 300, (2, 3, 20))
    keep = rng.random((3, 20)) < 0.3
    loss, grads = gradients(model, (ids, np.where(keep, targets, IGNORED)))
    single = [gradients(model, (ids, np.where(np.arange(60).reshape(3, 20) == i, targets, IGNORED)))
              for i in np.flatnonzero(keep)]
    assert loss == pytest.approx(np.mean([each for each, _ in single]), abs=1e-6)
    np.testing.assert_allclose(grads, np.mean([each for _, each in single], axis=0), atol=1e-6)
    assert loss == pytest.approx(model.loss(ids, np.where(keep, targets, IGNORED)), abs=1e-6)


def test_accumulation_of_uneven_counts_is_the_big_batch():
    model, rng = GPT2(SMALL), np.random.default_rng(1)
    ids, targets = rng.integers(0, 300, (2, 4, 30))
    targets[0, 5:], targets[1, :2], targets[3, 1:29] = IGNORED, IGNORED, IGNORED
    whole = gradients(model, (ids, targets))
    parts = gradients(model, *[(ids[i:i + 1], targets[i:i + 1]) for i in range(4)])
    assert whole[0] == pytest.approx(parts[0], abs=1e-6)
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)


def test_padding_changes_nothing(tmp_path):
    pairs, model = pairs_of(examples(tmp_path)), GPT2(SMALL)
    long = write(tmp_path / "long.jsonl", pair("one and " * 12, " two"), pair("3 and one is", " 4"))
    alone, together = pairs.padded([3]), pairs_of(long).padded([0, 1])
    assert together[0].shape[1] > alone[0].shape[1]
    assert model.loss(*alone) == pytest.approx(model.loss(together[0][1:], together[1][1:]), abs=1e-6)


def test_a_batch_without_an_answer_is_refused():
    ids = np.zeros((1, 8), np.int32)
    with pytest.raises(ValueError, match="no target counts"):
        GPT2(SMALL).forward_backward(ids, np.full_like(ids, IGNORED))
    with pytest.raises(ValueError, match="targets must lie in"):
        GPT2(SMALL).forward_backward(ids, np.full_like(ids, -99))
    with pytest.raises(ValueError, match="ids must lie in"):
        GPT2(SMALL).forward_backward(np.full_like(ids, IGNORED), ids)


# ---- reading -----------------------------------------------------------------------------------------------


def test_what_counts(tmp_path):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "One and one?"},
                {"role": "assistant", "content": "Two."}, {"role": "user", "content": "And one?"},
                {"role": "assistant", "content": "Three."}]
    pairs = pairs_of(write(tmp_path / "both.jsonl", pair("one and one is", " two"), "", {"messages": messages}))
    assert pairs.lines == [1, 3]
    ids, targets = pairs.padded([0])
    assert TOKENIZER.decode(ids[0][:len(TOKENIZER.encode("one and one is"))].tolist()) == "one and one is"
    assert targets_text(targets[0]) == f" two{END_OF_TEXT}"
    ids, targets = pairs.padded([1])
    assert targets_text(targets[0]) == f" Two.{END_OF_TEXT} Three.{END_OF_TEXT}"
    said = TOKENIZER.decode(pairs.ids[pairs.ends[1]:].tolist())
    assert said == (f"System: Be short.\nUser: One and one?\nAssistant: Two.{END_OF_TEXT}User: And one?\nAssistant: "
                    f"Three.{END_OF_TEXT}")
    assert pairs.prompts == ["one and one is", "System: Be short.\nUser: One and one?\nAssistant:"]


BAD = [
    ("{", "no JSON"), ("[1]", "an object is expected"), ("3", "an object is expected"), ('"x"', "an object is"),
    ({}, "it has none"), ({"prompt": "a"}, "neither"), ({"completion": "a"}, "neither"),
    ({"prompt": 3, "completion": "a"}, '"prompt" must be a text, got 3'),
    ({"prompt": "a", "completion": ""}, '"completion" must be a text that is not empty'),
    ({"prompt": "a", "completion": None}, "must be a text"), ({"prompt": "\ud800", "completion": "b"}, "surrogate"),
    ({"messages": []}, "at least one message"), ({"messages": "hello"}, "at least one message"),
    ({"messages": [3]}, "needs a role"), ({"messages": [{"role": "boss", "content": "x"}]}, "got 'boss'"),
    ({"messages": [{"role": "user"}]}, '"content" must be a text'),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "needs a role"),
    ({"messages": [{"role": "user", "content": "x"}]}, "must be an answer of the assistant"),
    ("[" * 100_000, "line 3"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_line_is_one_error_with_its_number(tmp_path, bad, reason, capsys):
    path = write(tmp_path / "pairs.jsonl", pair("a", "b"), pair("a", "b"), bad, pair("a", "b"))
    with pytest.raises(PairsError, match="line 3") as caught:
        read_pairs(path)
    assert reason in str(caught.value)
    assert main(["--data", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "line 3" in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_too_few_and_too_long(tmp_path):
    with pytest.raises(PairsError, match="has 1 examples"):
        read_pairs(write(tmp_path / "one.jsonl", pair("a", "b")))
    long = pairs_of(write(tmp_path / "long.jsonl", pair("a", "b"), pair("one " * 200, "b"), pair("z " * 99, "b")))
    with pytest.raises(PairsError, match=r"line 2 has .* tokens, .* holds seq_len \+ 1 = 65; 2 are too long"):
        train_gpt2(GPT2(SMALL), TOKENIZER, long, 3, 1e-3, 64)
    with pytest.raises(FesteError, match="with_special_tokens"):
        Pairs(read_pairs(tmp_path / "long.jsonl"), BPETokenizer.train("", 256))


# ---- batches and runs --------------------------------------------------------------------------------------


def test_every_epoch_shows_every_example_once(tmp_path):
    pairs, config = pairs_of(examples(tmp_path)), TrainConfig(seq_len=64, batch_size=3, val_fraction=0.1)
    learnt, held_out = pairs.split(config)
    assert (len(learnt), len(held_out)) == (36, 4)
    batches, seen = pairs.batches(config), []
    for step in range(1, 7):
        for ids, targets in batches.batch(step, 3, 2):
            assert ids.shape == targets.shape and ids.dtype == targets.dtype == np.int32 and ids.shape[1] % 16 == 0
            seen += [TOKENIZER.decode(row.tolist()).split(" ")[0] for row in ids]
    assert sorted(map(int, seen)) == list(range(36))
    again = pairs_of(tmp_path / "pairs.jsonl").batches(config)
    assert all(np.array_equal(a, b) for a, b in zip(again.batch(5, 6)[0], batches.batch(5, 6)[0], strict=True))
    few = pairs_of(write(tmp_path / "few.jsonl", pair("a", "b"), pair("c", "d"), pair("e", "f")))
    assert few.batches(config).batch(4, 8)[0][0].shape[0] == 8


def test_a_run_learns_answers_and_resumes_to_the_bit(tmp_path):
    path = examples(tmp_path)
    config = TrainConfig(num_steps=30, learning_rate=1e-2, seq_len=64, batch_size=2, accumulation=3, val_interval=5,
                         checkpoint_interval=10, sample_interval=15)
    models = []
    for resume_at in (None, 20):
        model = GPT2(SMALL, seed=1)
        run_dir = tmp_path / f"run{resume_at}"
        if resume_at is not None:
            resume = Checkpoint.load(tmp_path / "runNone" / f"checkpoint_step_{resume_at}.bin")
            result = train_gpt2(model, TOKENIZER, pairs_of(path), config=config, run_dir=run_dir, resume=resume)
        else:
            result = train_gpt2(model, TOKENIZER, pairs_of(path), config=config, run_dir=run_dir)
        models.append(model)
    assert result.best_val_loss < 4.0
    assert models[0].flat_params.tobytes() == models[1].flat_params.tobytes()


def test_the_command_line_fine_tunes_a_model_without_an_end_of_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = BPETokenizer.train("what is one and one and what is two " * 20, 270)
    Checkpoint.save("small.bin", GPT2(Config(270, 32, 1, 2, 64), seed=1), tokenizer)
    flags = ["--from", "small.bin", "--data", str(examples(tmp_path)), "--steps", "60", "--learning-rate", "1e-2",
             "--val-interval", "20", "--checkpoint-interval", "30", "--run-dir", "run"]
    assert main([*flags, "--dry-run"]) == 0
    assert "40 examples of" in capsys.readouterr().out
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "finetune:" in out and "from step 0 of" in out and "loss over the answers of all 4 held-out examples" in out
    tuned = Checkpoint.load(tmp_path / "run" / "checkpoint_best.bin")
    assert tuned.model.config.vocab_size == 271 and tuned.tokenizer.end_of_text == 270
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["train"]["seq_len"] == 64 and info["parent"]["checkpoint"] == str(tmp_path / "small.bin")
    assert main(["--resume", "run", "--steps", "70"]) == 0
    assert main(["--data", "pairs.jsonl", "--train-chars", "10"]) == 2
    assert "--train-chars is for texts" in capsys.readouterr().err


def test_a_model_from_nothing_and_a_file_that_is_no_pairs(tmp_path, capsys):
    path = examples(tmp_path)
    assert main(["--data", str(path), "--steps", "2", "--run-dir", str(tmp_path / "run"), "--vocab-size", "270"]) == 0
    assert Checkpoint.load(tmp_path / "run" / "checkpoint_final.bin").tokenizer.end_of_text is not None
    texts = write(tmp_path / "texts.jsonl", {"text": "a"}, {"text": "b"})
    assert not Source(str(texts)).is_pairs
    assert main(["--data", str(texts)]) == 2
    assert "feste prepare" in capsys.readouterr().err


# ---- vocabulary and generation -----------------------------------------------------------------------------


def test_more_tokens():
    tokenizer = TOKENIZER.with_special_tokens("<a>", END_OF_TEXT, "<b>")
    assert tokenizer.special_tokens == {END_OF_TEXT: 269, "<a>": 270, "<b>": 271}
    assert tokenizer.encode("what is <a>") == TOKENIZER.encode("what is <a>")
    assert tokenizer.encode("<a>", allow_special=True) == [270]
    assert BPETokenizer.from_json(tokenizer.to_json()).special_tokens == tokenizer.special_tokens


@pytest.mark.parametrize("tie_weights", [False, True])
def test_a_larger_vocabulary_leaves_the_other_logits_as_they_are(tie_weights):
    model = GPT2(Config(**(SMALL.to_dict() | {"tie_weights": tie_weights})))
    larger, ids = model.with_vocabulary(303), np.arange(20).reshape(1, 20)
    np.testing.assert_allclose(larger.forward(ids)[..., :300], model.forward(ids), atol=1e-5)
    np.testing.assert_allclose(larger.forward(ids)[..., 302], model.forward(ids).mean(axis=-1), atol=1e-4)
    with pytest.raises(FesteError, match="less than the 300"):
        model.with_vocabulary(299)
    AdamW(larger).step(1e-3)


def test_stop_tokens_end_each_sample_on_its_own():
    model = GPT2(SMALL, seed=2)
    free = model.generate_batch([1, 2], 4, 30, seed=5)
    stop = free[0][7]
    stopped = model.generate_batch([1, 2], 4, 30, seed=5, stop_tokens=[stop])
    for whole, cut in zip(free, stopped, strict=True):
        end = whole.index(stop, 2) if stop in whole[2:] else len(whole)
        assert cut == whole[:end]
    one = model.generate([1, 2], 30, temperature=0)
    assert model.generate([1, 2], 30, temperature=0, stop_tokens={one[5]}) == one[:one.index(one[5], 2)]


# ---- the example -------------------------------------------------------------------------------------------


def test_the_example_from_a_checkpoint_and_from_a_directory_of_transformers(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "09_finetune_gpt2.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "CONFIG", replace(example.CONFIG, num_steps=3))
    monkeypatch.setattr(example, "shakespeare_text", lambda: shakespeare_text()[20_000:60_000])
    assert example.guarded(lambda: example.start([])) == 2
    assert "make small" in capsys.readouterr().err
    tokenizer = BPETokenizer.train(shakespeare_text()[:50_000], 400)
    Checkpoint.save("small.bin", GPT2(Config(400, 32, 1, 2, 256), seed=1), tokenizer)
    assert example.start(["small.bin"]) == 0
    out = capsys.readouterr().out
    assert "who speaks next: 0.0% of the held-out" in out and "how a line ends" in out
    assert Checkpoint.load("data/shakespeare_questions.bin").tokenizer.end_of_text == 400
    assert export(["data/shakespeare_questions.bin", "-o", "hf"]) == 0
    assert example.start(["hf"]) == 0
