"""Other spellings of a text: the same bytes in other tokens, a function of (seed, step)."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from feste import GPT2, BPETokenizer, Config, TrainConfig, train_gpt2
from feste.data import Text
from feste.errors import FesteError
from feste.splits import TokenSplits

TEXT = "Was ever woman in this humour woo'd? Was ever woman in this humour won? I'll have her; but not keep her. " * 40


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 300, ["<|endoftext|>"])


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.99])
def test_a_spelling_has_the_same_bytes(tokenizer, rate):
    rng = np.random.default_rng(0)
    ids = np.array(tokenizer.encode(TEXT))[:960].reshape(8, 120)
    spelt = TokenSplits(tokenizer).split(ids, rate, rng)
    assert spelt.shape == ids.shape and not (spelt == ids).all()
    for before, after in zip(ids, spelt, strict=True):
        assert tokenizer.decode_bytes(before).startswith(tokenizer.decode_bytes(after))


def test_all_pairs_are_found_and_are_as_likely():
    """Against a search through all pairs of tokens."""
    letters = np.random.default_rng(0).choice(list("ab "), 4000, p=[0.4, 0.4, 0.2])
    tokenizer = BPETokenizer.train("".join(letters), 320)
    words = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    pairs = {i: {(a, b) for a, left in enumerate(words) for b, right in enumerate(words) if left + right == word}
             for i, word in enumerate(words) if 1 < len(word) < 5}
    token, expected = max(pairs.items(), key=lambda found: len(found[1]))
    assert len(expected) == 3
    splits = TokenSplits(tokenizer)
    splits._counts = np.where(np.arange(len(splits._counts)) == token, splits._counts, 0)  # halves stay whole
    found = Counter(map(tuple, splits.split(np.full((6000, 2), token), 0.9999, np.random.default_rng(1)).tolist()))
    assert set(found) - {(token, token)} <= expected | {(token, pair[0]) for pair in expected}
    assert set(found) >= expected
    counts = [found[pair] for pair in expected]
    assert min(counts) > 0.8 * 6000 / len(expected)


def test_bytes_and_special_tokens_stay(tokenizer):
    end = tokenizer.special_tokens["<|endoftext|>"]
    ids = np.array([[end, *range(256), end]])
    assert (TokenSplits(tokenizer).split(ids, 0.9999, np.random.default_rng(0)) == ids).all()
    with pytest.raises(FesteError, match="single bytes"):
        TokenSplits(BPETokenizer.train("", 256))


def test_a_step_is_a_function_of_its_number(tokenizer):
    text = Text(np.array(tokenizer.encode(TEXT)))
    config = TrainConfig(50, seq_len=16, batch_size=4, accumulation=2, token_splits=0.2)
    batches, again = text.batches(config, tokenizer), text.batches(config, tokenizer)
    later = [again.batch(step, 4, 2) for step in (9, 3, 1)][::-1]
    for step, expected in zip((1, 3, 9), later, strict=True):
        for (ids, targets), (x, y) in zip(batches.batch(step, 4, 2), expected, strict=True):
            assert (ids == x).all() and (targets == y).all() and (ids[:, 1:] == targets[:, :-1]).all()
    [(whole, _)] = batches.batch(3, 8)
    assert (np.vstack([ids for ids, _ in batches.batch(3, 4, 2)]) == whole).all()
    last = TrainConfig(50, seq_len=16, token_splits=0.2, schedule="linear", min_lr_fraction=0.0)
    as_it_is = text.batches(replace(last, token_splits=0.0)).batch(50, 8)[0][0]
    assert (text.batches(last, tokenizer).batch(50, 8)[0][0] == as_it_is).all()  # the rate has fallen to zero
    plain = text.batches(TrainConfig(50, seq_len=16), tokenizer).batch(3, 8)[0][0]
    assert not (plain == whole).all() and (plain[:, 0] != whole[:, 0]).sum() < 8


def test_a_run_with_splits_goes_on_to_the_bit(tokenizer, tmp_path):
    def trained(steps: int, **more) -> np.ndarray:
        model = GPT2(Config(tokenizer.vocab_size, 16, 1, 1, 16), seed=3)
        train_gpt2(model, tokenizer, TEXT, steps, 1e-2, 16, token_splits=0.2, schedule="wsd", checkpoint_interval=5,
                   **more)
        return model.flat_params.copy()

    whole = trained(12, run_dir=tmp_path / "whole")
    assert (trained(12, resume=tmp_path / "whole" / "checkpoint_step_5.bin", run_dir=tmp_path / "again") == whole).all()


def test_questions_and_answers_are_not_split(tmp_path, capsys):
    from feste.cli import main
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a b", "completion": " c d"}\n' * 20)
    assert main(["--data", str(path), "--token-splits", "0.1", "--run-dir", str(tmp_path / "run")]) == 2
    assert "--token-splits=0.1 is for texts" in capsys.readouterr().err and not (tmp_path / "run").exists()
