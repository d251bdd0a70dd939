"""The modern family and its recipe: what holds of GPT-2 and AdamW holds of them, and what is their own."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from torture import CONFIG, differences, train

from feste import (
    GPT2,
    AdamW,
    Checkpoint,
    Config,
    FesteError,
    Muon,
    TrainConfig,
    best,
    cli,
    ops,
    optim,
    plan,
    reference,
    train_gpt2,
)
from feste.config import PRESETS
from feste.optim import matrices_of
from feste.run.directory import find_checkpoint
from feste.schedule import decay_begin, learning_rate_at

MODERN = Config(vocab_size=61, n_embd=24, n_layers=2, n_heads=3, block_size=20, arch="modern")


def batch(seed: int = 0, B: int = 3, T: int = 20) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 61, (B, T + 1))
    return ids[:, :-1], ids[:, 1:]


def stirred(config: Config = MODERN, precision: str = "fp32") -> GPT2:
    """A model of which no parameter is zero or one."""
    model = GPT2(config, seed=2, precision=precision)
    model.flat_params += np.random.default_rng(3).normal(0, 0.3, model.num_parameters())
    return model


# ---- the family --------------------------------------------------------------------------------------------


def test_gradients_of_the_whole_model_against_central_differences():
    """Along random directions, in each of which every parameter moves."""
    model, (ids, targets) = stirred(), batch()
    model.forward_backward(ids, targets)
    start, rng = model.flat_params.copy(), np.random.default_rng(4)
    for _ in range(8):
        direction = rng.normal(0, 1, start.size) / np.sqrt(start.size)
        step, losses = 2e-2, []
        for sign in (1, -1):
            model.flat_params = start + sign * step * direction
            losses.append(model.loss(ids, targets))
        slope = float(model.flat_grads.astype(np.float64) @ direction)
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=2e-3, abs=1e-4)


def test_a_new_model_says_that_all_tokens_are_equally_likely():
    model = GPT2(MODERN)
    assert model.loss(*batch()) == pytest.approx(np.log(61), rel=1e-6)
    assert not any(name.endswith("bias") or "wpe" in name for name in model.params)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n_prompt", [1, 7, 20, 33])
def test_the_cache_gives_what_whole_passes_give(precision, n_prompt):
    model, prompt = stirred(precision=precision), np.random.default_rng(0).integers(0, 61, n_prompt).tolist()
    expected = list(prompt)
    for _ in range(30):  # beyond block_size: the window slides
        expected.append(int(model.forward(np.array([expected[-20:]], np.int32))[0, -1].argmax()))
    assert model.generate(prompt, 30, temperature=0) == expected


def test_int8_is_close_to_float32():
    config = replace(MODERN, n_embd=64, n_heads=2)
    whole, packed = stirred(config), stirred(config, "int8")
    prompt = np.arange(9, dtype=np.int32)[None]
    logits = [model.decoder().read(prompt).copy() for model in (whole, packed)]
    assert np.array_equal(*logits)  # prompts are read with the weights themselves
    after = [model.decoder() for model in (whole, packed)]
    for decoder in after:
        decoder.read(prompt)
    a, b = (decoder.append(np.array([[5]], np.int32)).copy() for decoder in after)
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_bits_do_not_depend_on_the_threads(dropout):
    config, seen, before = replace(MODERN, n_embd=96, n_heads=3, dropout=dropout), set(), ops.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            ops.set_num_threads(threads)
            model = GPT2(config)
            optimizer = Muon(model, matrix_decay=0.1)
            for step in range(4):
                model.forward_backward(*batch(step), dropout_key=step)
                optimizer.step(1e-2, 1.0, zero_grad=True)
            seen.add(model.flat_params.tobytes())
    finally:
        ops.set_num_threads(before)
    assert len(seen) == 1


def test_heads_without_halves_are_refused():
    with pytest.raises(FesteError, match="n_embd / n_heads must be even, got 9 / 3"):
        Config(n_embd=9, n_heads=3, arch="modern")
    with pytest.raises(FesteError, match="arch must be one of gpt2, modern, got 'newest'"):
        Config(arch="newest")


# ---- Muon --------------------------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, other = GPT2(MODERN), GPT2(MODERN)
    muon, adamw = Muon(model, weight_decay=0.3), AdamW(other, weight_decay=0.3)
    for optimizer in (muon, adamw):
        for step in range(3):
            optimizer.model.flat_params, optimizer.model.flat_grads = other.flat_params, 0.0
            optimizer.model.forward_backward(*batch(step))
            optimizer.step(1e-3, 1.0)
    hidden = {p.name for p in model.table if p.hidden}
    assert len(hidden) == 4 * MODERN.n_layers
    assert muon.v.size == sum(p.size for p in model.table if not p.hidden)
    assert sum(K * N for _, K, N, _ in matrices_of(model.table)) == sum(p.size for p in model.table if p.hidden)


def test_a_step_of_muon_is_that_of_the_reference():
    model = stirred()
    params, optimizer = model.flat_params.astype(np.float64), Muon(model, matrix_decay=0.1, weight_decay=0.2)
    model.forward_backward(*batch())
    grads, m = model.flat_grads.astype(np.float64), np.zeros(params.size)
    norm = optimizer.step(1e-2, clip_norm=0.5)
    scale, momentum = 0.5 / norm, 0.85 + (0.95 - 0.85) / 300
    matrices = np.array([[*matrix, matrix[0]] for matrix in matrices_of(model.table)])
    reference.muon_update(params, m, grads, matrices, 2e-2, momentum, 0.1, False, scale, False, len(matrices),
                          params.size, params.size)
    for part, *_, decays in optimizer.parts:
        reference.adamw_update(params[part], np.zeros(part.stop - part.start), np.zeros(part.stop - part.start),
                               grads[part], 1e-2, 0.9, 0.95, 1e-8, 0.2 * decays, False, scale, 1, False, None)
    assert np.abs(params - model.flat_params).max() < 2e-6
    assert np.abs(m - optimizer.m)[[p.offset for p in model.table if p.hidden]].max() < 1e-6


def test_queries_keys_and_values_are_matrices_of_their_own():
    table = GPT2(MODERN).table
    [first, *_] = [p for p in table if p.name.endswith("c_attn.weight")]
    parts = [matrix for matrix in matrices_of(table) if first.offset <= matrix[0] < first.offset + first.size]
    assert parts == [(first.offset + part * 24, 24, 24, 72) for part in range(3)]


@pytest.mark.parametrize("settings", [{"momentum": 1.0}, {"matrix_rate": 0.0}, {"matrix_decay": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    [name] = settings
    with pytest.raises(FesteError, match=name):
        Muon(GPT2(MODERN), **settings)
    with pytest.raises(FesteError, match=name):
        TrainConfig(**settings)


def test_a_copy_of_muon_goes_on_alike():
    model = GPT2(MODERN)
    optimizer = Muon(model)
    model.forward_backward(*batch())
    optimizer.step(1e-2)
    both = model, optimizer
    others = copy.deepcopy(both)
    for a_model, an_optimizer in (both, others):
        a_model.forward_backward(*batch(1))
        an_optimizer.step(1e-2)
    assert np.array_equal(model.flat_params, others[0].flat_params)


# ---- runs --------------------------------------------------------------------------------------------------

RECIPE = {"optimizer": "muon", "schedule": "linear", "matrix_decay": 0.1, "cautious_decay": True,
          "beta2_half_life": 5_000, "min_lr_fraction": 0.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, precision):
    settings = RECIPE | {"config": replace(CONFIG, arch="modern"), "num_steps": 14, "checkpoint_interval": 7,
                         "keep_last": 9, "precision": precision}
    train(tmp_path / "whole", **settings)
    train(tmp_path / "half", resume=tmp_path / "whole" / "checkpoint_step_7.bin", **settings)
    assert differences(tmp_path / "whole" / "checkpoint_final.bin", tmp_path / "half" / "checkpoint_final.bin") == []


def test_a_checkpoint_holds_the_optimizer_and_no_more_second_moments_than_there_are(tmp_path):
    train(tmp_path / "run", **RECIPE, num_steps=3)
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint_final.bin")
    assert type(checkpoint.optimizer) is Muon and checkpoint.optimizer.t == 3
    assert checkpoint.optimizer.settings()["matrix_decay"] == 0.1 and checkpoint.optimizer.cautious_decay
    assert checkpoint.optimizer.betas[1] == pytest.approx(0.5 ** (checkpoint.train_config["batch_size"]
                                                                  * checkpoint.train_config["seq_len"] / 5_000))
    assert checkpoint.optimizer.v.size < checkpoint.optimizer.m.size


def test_another_optimizer_is_another_run(tmp_path):
    train(tmp_path / "run", num_steps=10)
    with pytest.raises(FesteError, match="optimizer was 'adamw' and is 'muon'"):
        train(tmp_path / "run", resume=tmp_path / "run", num_steps=20, optimizer="muon")


def test_schedules():
    linear = TrainConfig(num_steps=100, learning_rate=1.0, schedule="linear", warmup_fraction=0.1, min_lr_fraction=0.0)
    assert [learning_rate_at(step, linear) for step in (5, 10, 55, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    wsd = replace(linear, schedule="wsd", warmup_steps=4, decay_fraction=0.3, min_lr_fraction=0.1)
    assert decay_begin(wsd) == 70
    assert [learning_rate_at(step, wsd) for step in (2, 4, 70, 85, 100)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    with pytest.raises(FesteError, match="schedule must be one of cosine, linear, wsd, got 'step'"):
        TrainConfig(schedule="step")


def test_a_wsd_run_is_prolonged_as_if_it_had_been_planned_so(tmp_path, recwarn):
    settings = {"schedule": "wsd", "keep_last": 1, "checkpoint_interval": 100}
    train(tmp_path / "long", num_steps=30, warmup_steps=2, **settings)
    train(tmp_path / "short", num_steps=20, **settings)  # warms up in a tenth: two steps
    stable = tmp_path / "short" / "checkpoint_stable.bin"
    assert Checkpoint.load(stable).step == 16
    train(tmp_path / "prolonged", resume=stable, num_steps=30, **settings)
    found = [Checkpoint.load(tmp_path / name / "checkpoint_final.bin") for name in ("long", "prolonged")]
    assert np.array_equal(found[0].model.flat_params, found[1].model.flat_params)
    assert find_checkpoint(tmp_path / "short")[0].name == "checkpoint_final.bin"


def test_what_is_said_when_a_run_is_prolonged(tmp_path):
    train(tmp_path / "run", num_steps=20, schedule="wsd")
    saved = TrainConfig.from_dict(Checkpoint.load(tmp_path / "run" / "checkpoint_final.bin").train_config)
    longer = replace(saved, num_steps=40, warmup_steps=2)
    assert "as if it had been planned so" in plan._what_changes(saved, longer, 16)[0]
    assert "resume checkpoint_stable.bin" in plan._what_changes(saved, longer, 20)[0]
    cosine = [replace(config, schedule="cosine") for config in (saved, longer)]
    assert "stretched" in plan._what_changes(*cosine, 20)[0]


def test_run_json_knows_how_long_the_tokens_are(tmp_path):
    train(tmp_path / "run", num_steps=3)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 1.0 <= info["val_bytes_per_token"] < 10.0


# ---- presets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "small", "medium", "gpt2"])
def test_every_seed_preset_has_a_modern_one_of_its_shape(name):
    seed, modern = PRESETS[name], PRESETS[f"{name}-modern"]
    assert seed.model.arch == "gpt2" and seed.train.optimizer == "adamw" and seed.train.schedule == "cosine"
    assert replace(modern.model, arch="gpt2", dropout=0.0) == seed.model
    assert (modern.train.batch_size, modern.train.seq_len) == (seed.train.batch_size, seed.train.seq_len)


def test_best_takes_a_larger_model_for_more_time(monkeypatch):
    speed = 1e11  # multiplications a second

    def seconds(config, batch_size, precision):
        return 6.0 * GPT2(config, seed=None).num_parameters() * batch_size * config.block_size / speed

    monkeypatch.setattr(best, "seconds_per_step", seconds)
    sizes, steps = [], []
    for minutes in (0.2, 3.0, 60.0):
        preset, lines = best.choose(9_000_000, minutes)
        sizes.append(preset.model.n_embd)
        steps.append(preset.train.num_steps * seconds(preset.model, preset.train.batch_size, "fp32"))
        assert len(lines) == 3 and preset.train.optimizer == "muon" and preset.model.arch == "modern"
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert all(0.5 < taken / (60 * minutes) < 1.0 for taken, minutes in zip(steps[1:], (3.0, 60.0), strict=True))


def test_best_does_not_learn_a_short_text_by_heart(monkeypatch):
    monkeypatch.setattr(best, "seconds_per_step", lambda *_: 0.001)
    preset, lines = best.choose(1_000_000, 600.0)
    tokens = 1_000_000 / 1.9
    assert GPT2(preset.model, seed=None).num_parameters() <= best.MOST_PARAMETERS * tokens
    assert preset.train.num_steps * preset.train.tokens_per_step <= best.MOST_PASSES * tokens
    assert "by heart" in lines[1]


def test_best_gives_dropout_to_a_text_that_is_read_often(monkeypatch):
    monkeypatch.setattr(best, "seconds_per_step", lambda *_: 0.01)
    once, some, often = (best.choose(characters, 2.0)[0] for characters in (100_000_000, 8_000_000, 100_000))
    assert once.model.dropout == 0.0 < some.model.dropout == often.model.dropout
    assert once.train.token_splits == some.train.token_splits == 0.0 < often.train.token_splits
    assert once.train.weight_decay < some.train.weight_decay == often.train.weight_decay


def test_best_needs_a_time_and_a_text():
    with pytest.raises(FesteError, match="minutes must be a positive number"):
        best.choose(1_000_000, 0.0)
    with pytest.raises(FesteError, match="the text has only 50 characters"):
        best.choose(50, 1.0)


def test_the_half_life_of_the_second_moment():
    config = TrainConfig(batch_size=8, seq_len=64, beta2_half_life=512)
    assert optim.make(GPT2(MODERN), config).betas[1] == pytest.approx(0.5)


def test_an_optimizer_that_is_handed_over_has_its_own_beta2():
    model = GPT2(MODERN)
    with pytest.raises(FesteError, match="beta2_half_life=512, but the optimizer"):
        train_gpt2(model, None, "", 1, 1e-3, 8, optimizer=Muon(model), beta2_half_life=512)


def test_best_from_the_command_line(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question. " * 400)
    monkeypatch.setattr(best, "seconds_per_step", lambda *_: 0.5)
    monkeypatch.setattr(best, "FEWEST_STEPS", 4)
    flags = ["--data", str(text), "--run-dir", str(tmp_path / "run"), "--preset", "best"]
    assert cli.main([*flags, "--minutes", "0.05"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("best for 0.05 min: a step of ") and "there is time for 5 steps" in said
    assert "which read the training part" in said and "bits per byte" in said
    assert cli.main(flags) == 2
    assert "--preset best needs --minutes" in capsys.readouterr().err


def test_a_text_that_is_read_often_is_noted(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question. " * 200)
    flags = ["--data", str(text), "--steps", "60", "--vocab-size", "300"]
    assert cli.main([*flags, "--run-dir", str(tmp_path / "run")]) == 0
    assert "times is learned by heart: --dropout 0.1 and --token-splits 0.1 often end lower" in capsys.readouterr().out
    flags += ["--dropout", "0.1"]
    assert cli.main([*flags, "--run-dir", str(tmp_path / "dropout")]) == 0
    assert "times is learned by heart: --token-splits 0.1 often ends lower" in capsys.readouterr().out
    assert cli.main([*flags, "--run-dir", str(tmp_path / "both"), "--token-splits", "0.1"]) == 0
    assert "learned by heart" not in capsys.readouterr().out
