"""Copies work: of models, optimizers and configurations, by copy, deepcopy, pickle, and in other processes."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

from feste import GPT2, AdamW, Config, TrainConfig, ops, train_gpt2
from feste.config import PRESETS
from feste.ops import CACHE_LINE

CONFIG = Config(vocab_size=300, n_embd=16, n_layers=1, n_heads=2, block_size=16, dropout=0.1)
WAYS = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
        "old pickle": lambda thing: pickle.loads(pickle.dumps(thing, protocol=2))}
RNG = np.random.default_rng(5)
IDS, TARGETS = (RNG.integers(0, 300, (4, 16)).astype(np.int32) for _ in range(2))


def trained(precision: str = "fp32") -> tuple[GPT2, AdamW]:
    model = GPT2(CONFIG, 3, precision)
    optimizer = AdamW(model, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.2)
    update(model, optimizer)
    return model, optimizer


def update(model: GPT2, optimizer: AdamW) -> float:
    loss = model.forward_backward(IDS, TARGETS, dropout_key=7)
    optimizer.step(1e-2, clip_norm=1.0, zero_grad=True)
    return loss


def loss_in_another_process(model: GPT2, optimizer: AdamW, results) -> None:
    results.put((update(model, optimizer), model.flat_params.tobytes()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copied_model_is_a_model(way, precision):
    model, _ = trained(precision)
    model.forward_backward(IDS, TARGETS)  # gradients that are there must come along
    twin = WAYS[way](model)
    assert (twin.precision, twin.config, twin.dropout_seed) == (model.precision, model.config, model.dropout_seed)
    assert np.array_equal(twin.flat_params, model.flat_params) and np.array_equal(twin.flat_grads, model.flat_grads)
    for one, flat in ((twin.params, twin.flat_params), (twin.grads, twin.flat_grads)):
        assert all(np.shares_memory(view, flat) for view in one.values())
    assert not np.shares_memory(twin.flat_params, model.flat_params)
    assert twin.flat_params.ctypes.data % CACHE_LINE == twin.flat_grads.ctypes.data % CACHE_LINE == 0
    before = model.loss(IDS, TARGETS)
    twin.flat_params.fill(0.0)
    assert twin.loss(IDS, TARGETS) == pytest.approx(np.log(300), rel=1e-6) and model.loss(IDS, TARGETS) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_model_trains(way, tmp_path):
    from torture import tokenizer, tokens
    settings = {"num_steps": 15, "learning_rate": 1e-2, "seq_len": 16, "batch_size": 4}
    original = GPT2(CONFIG)
    twin = WAYS[way](original)
    results = [train_gpt2(model, tokenizer(), tokens(), **settings) for model in (original, twin)]
    assert results[0].train_loss == results[1].train_loss < 5.5
    assert np.array_equal(original.flat_params, twin.flat_params)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_model_and_its_optimizer_are_copied_together(way):
    pair = trained()
    model, optimizer = WAYS[way](pair)
    assert optimizer.model is model and optimizer.t == 1
    assert optimizer.m.ctypes.data % CACHE_LINE == optimizer.v.ctypes.data % CACHE_LINE == 0
    for _ in range(3):
        assert update(model, optimizer) == update(*pair)
    assert np.array_equal(model.flat_params, pair[0].flat_params)
    assert np.array_equal(optimizer.v, pair[1].v) and optimizer.t == pair[1].t == 4


def test_a_shallow_copy_of_an_optimizer_updates_the_same_model():
    model, optimizer = trained()
    twin = copy.copy(optimizer)
    before = optimizer.m.copy()
    update(model, twin)
    assert twin.model is model and np.array_equal(optimizer.m, before) and not np.array_equal(twin.m, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:feste runs with one thread")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_model_works_in_another_process(method):
    model, optimizer = trained()
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=loss_in_another_process, args=(model, optimizer, results))
    process.start()
    loss, params = results.get()
    process.join(60)
    assert process.exitcode == 0
    assert loss == update(model, optimizer) and params == model.flat_params.tobytes()


def test_joblib_takes_models_along():
    joblib = pytest.importorskip("joblib")
    model, _ = trained()
    expected = model.loss(IDS, TARGETS)
    results = joblib.Parallel(n_jobs=2)(joblib.delayed(model.loss)(IDS, TARGETS) for _ in range(2))
    assert results == [expected, expected]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", [CONFIG, TrainConfig(10, 1e-3, 16), PRESETS["tiny"]],
                         ids=lambda config: type(config).__name__)
def test_configurations_are_copied(way, config):
    assert WAYS[way](config) == config


def test_assigning_writes_into_the_flat_buffers():
    """Under every name a parameter has, there is one memory."""
    model = GPT2(CONFIG)
    name = "transformer.h.0.mlp.c_fc.weight"
    model.params[name] = np.full((16, 64), 2.0)
    model.params["transformer.ln_f.bias"] += 3.0
    assert np.count_nonzero(model.flat_params == 2.0) == 16 * 64 and np.count_nonzero(model.flat_params == 3.0) == 16
    with pytest.raises(ValueError, match="broadcast"):
        model.params[name] = np.zeros((64, 16))
    with pytest.raises(KeyError):
        model.params["wte"] = np.zeros((300, 16))
    model.flat_params = np.arange(model.num_parameters())
    assert model.params[name].base is not None and model.params[name][0, 1] - model.params[name][0, 0] == 1.0
    model.flat_params *= 0.0
    assert model.loss(IDS, TARGETS) == pytest.approx(np.log(300))


def test_what_they_show_of_themselves():
    model, optimizer = trained()
    assert repr(model).startswith(f"GPT2({model.num_parameters():,} parameters: vocab_size=300, n_embd=16")
    assert repr(optimizer) == (f"AdamW({model.num_parameters():,} parameters, betas=(0.8, 0.9), eps=1e-07, "
                               "weight_decay=0.2, 1 updates)")
    assert "transformer.wte.weight (300, 16)" in repr(model.params)


def teardown_module():
    ops.set_num_threads(0)
