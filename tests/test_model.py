"""The whole model: counts, gradients, accumulation, threads, dropout, generation, and its errors."""

import numpy as np
import pytest

from feste import GPT2, AdamW, Config, FesteError, ops, reference, train_gpt2
from feste.config import PRESETS
from feste.generation import Sampler
from feste.ops import CACHE_LINE, zeros
from feste.params import ParameterTable
from feste.transformer import Activations

RNG = np.random.default_rng(11)
SMALL = Config(vocab_size=37, n_embd=24, n_layers=2, n_heads=3, block_size=20)


@pytest.fixture(autouse=True)
def all_threads():
    yield
    ops.set_num_threads(0)


def batch_of(config: Config, B: int, T: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    both = RNG.integers(0, config.vocab_size, (B, (T or config.block_size) + 1)).astype(np.int32)
    return np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, 1:])


def variant(**changes) -> Config:
    return Config(**(SMALL.to_dict() | changes))


# ---- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("tiny", 169_728), ("small", 873_600), ("medium", 4_011_520),
                                             ("gpt2", 116_989_440)])
def test_parameter_counts(name, count):
    assert ParameterTable(PRESETS[name].model).size == count


def test_gpt2_small_as_published():
    assert ParameterTable(Config(50257, 768, 12, 12, 1024)).size == 163_037_184
    assert ParameterTable(Config(50257, 768, 12, 12, 1024, tie_weights=True)).size == 124_439_808


def test_views_cover_the_flat_buffer_once():
    model = GPT2(SMALL)
    model.flat_params[:] = np.arange(model.flat_params.size)
    seen = np.concatenate([view.reshape(-1) for view in model.params.values()])
    assert np.array_equal(np.sort(seen), np.arange(model.num_parameters()))
    assert list(model.params) == list(model.grads)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_everything_a_step_touches_begins_at_a_cache_line(name):
    config = PRESETS[name].model
    model = GPT2(config, seed=None)
    optimizer = AdamW(model)
    ids, targets = batch_of(config, 2)
    model.forward_backward(ids, targets)
    [act] = model._activations.values()
    activations = [value for part in (act, *act.blocks) for value in vars(part).values()]
    buffers = [model.flat_params, model.flat_grads, optimizer.m, optimizer.v, *model.params.values(),
               *(value for value in activations if isinstance(value, np.ndarray))]
    assert len(buffers) > 50
    assert all(buffer.ctypes.data % CACHE_LINE == 0 for buffer in buffers)


def test_zeros():
    array = zeros(3, 5, dtype=np.int32)
    assert array.shape == (3, 5) and array.dtype == np.int32 and array.flags.c_contiguous and not array.any()


def test_initialisation():
    model = GPT2(Config(512, 64, 8, 4, 64), seed=3)
    assert np.std(model.params["transformer.wte.weight"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(model.params["transformer.h.0.mlp.c_proj.weight"]) == pytest.approx(0.02 / 4, rel=0.05)
    assert (model.params["transformer.ln_f.weight"] == 1).all()
    assert (model.params["transformer.h.7.attn.c_attn.bias"] == 0).all()
    assert np.array_equal(model.flat_params, GPT2(model.config, seed=3).flat_params)
    assert not np.array_equal(model.flat_params, GPT2(model.config, seed=4).flat_params)


# ---- loss and gradient -------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_guessing():
    model = GPT2(Config(512, 64, 2, 1, 64))
    assert model.loss(*batch_of(model.config, 4)) == pytest.approx(np.log(512), abs=0.03)


@pytest.mark.parametrize("config", [SMALL, variant(tie_weights=True), variant(dropout=0.3), variant(n_heads=1),
                                    variant(n_layers=1, vocab_size=600, block_size=70)], ids=str)
def test_gradient_by_directional_differences(config):
    """The derivative along random directions of the parameter space, in float32: a wrong term is a gross error."""
    model = GPT2(config, seed=5)
    model.flat_params *= 3.0  # away from the flat start
    ids, targets = batch_of(config, 8)
    model.forward_backward(ids, targets, dropout_key=7)
    gradient, start = model.flat_grads.astype(np.float64), model.flat_params.copy()
    for name, view in model.grads.items():
        direction = np.zeros_like(model.flat_params)
        place = model.table.views(direction)[name]
        place[:] = np.sign(view) * (RNG.random(view.shape) < 0.5)
        slope = gradient @ direction
        step = 2e-2 / max(np.linalg.norm(direction), 1e-9)
        losses = []
        for sign in (1, -1):
            model.flat_params[:] = start + sign * step * direction
            model.zero_grad()
            losses.append(model.forward_backward(ids, targets, dropout_key=7))
        model.flat_params[:] = start
        if np.abs(slope * step) > 1e-5:  # a key's bias has no influence on the loss
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.03), name


def test_scale_and_accumulation_add_up():
    model = GPT2(SMALL)
    ids, targets = batch_of(SMALL, 8)
    model.forward_backward(ids, targets)
    whole = model.flat_grads.copy()
    model.zero_grad()
    losses = [model.forward_backward(ids[i:i + 1], targets[i:i + 1], 1 / 8) for i in range(8)]
    assert np.abs(model.flat_grads - whole).max() < 1e-6 * np.abs(whole).max() * 10
    assert np.mean(losses) == pytest.approx(model.loss(ids, targets), abs=1e-6)


def test_steps_of_8_by_1_and_1_by_8_agree():
    models = [GPT2(SMALL, seed=2) for _ in range(2)]
    optimizers = [AdamW(model) for model in models]
    for _ in range(5):
        ids, targets = batch_of(SMALL, 8)
        models[0].forward_backward(ids, targets)
        for i in range(8):
            models[1].forward_backward(ids[i:i + 1], targets[i:i + 1], 1 / 8)
        norms = [optimizer.step(1e-3, 1.0, zero_grad=True) for optimizer in optimizers]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    # AdamW divides by the gradient's size, so where that is rounding only, a step may differ by its full size.
    differences = np.abs(models[0].flat_params - models[1].flat_params)
    assert np.median(differences) < 1e-7 and np.quantile(differences, 0.99) < 2e-5


@pytest.mark.parametrize("isa", ops.available_isas)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_has_the_same_bits_for_any_number_of_threads(isa, precision, monkeypatch):
    kernels = ops.load(isa)
    for name in dir(kernels):
        if hasattr(ops, name) and callable(getattr(kernels, name)) and not name.startswith("_"):
            monkeypatch.setattr(ops, name, getattr(kernels, name))
    config = variant(dropout=0.1, vocab_size=700, n_embd=48)
    batch, results = batch_of(config, 5), []
    for threads in (1, 2, 3, 7):
        ops.set_num_threads(threads)
        model = GPT2(config, seed=1, precision=precision)
        optimizer = AdamW(model)
        for key in range(2):
            model.forward_backward(*batch, dropout_key=key)
            optimizer.step(1e-2, 1.0, zero_grad=True)
        results.append(model.flat_params)
    assert all(np.array_equal(results[0], other) for other in results[1:])
    ops.set_num_threads(0)


def test_dropout_is_a_function_of_its_key_and_off_outside_training():
    config = variant(dropout=0.5)
    model, plain = GPT2(config, seed=1), GPT2(variant(), seed=1)
    batch = batch_of(config, 4)
    first, again, other = (model.forward_backward(*batch, dropout_key=key) for key in (1, 1, 2))
    assert first == again != other
    assert model.loss(*batch) == plain.loss(*batch)
    assert np.array_equal(model.forward(batch[0]), plain.forward(batch[0]))


def test_tied_weights_are_one_array():
    model = GPT2(variant(tie_weights=True))
    assert "lm_head.weight" not in model.params and model.head is model.params["transformer.wte.weight"]


def test_a_model_can_learn_a_sentence_by_heart():
    model = GPT2(SMALL, seed=0)
    optimizer, (ids, targets) = AdamW(model), batch_of(SMALL, 2)
    for _ in range(150):
        loss = model.forward_backward(ids, targets)
        optimizer.step(1e-2, 1.0, zero_grad=True)
    assert loss < 0.1


# ---- the optimizer -----------------------------------------------------------------------------------------


def test_only_matrices_and_embeddings_decay():
    model = GPT2(SMALL, seed=1)
    for view in model.params.values():
        view += 1.0
    before = {name: view.copy() for name, view in model.params.items()}
    AdamW(model, weight_decay=0.5).step(0.1)  # no gradient: all that changes is decay
    for name, view in model.params.items():
        assert np.allclose(view, before[name] * (0.95 if view.ndim == 2 else 1.0), rtol=1e-6), name


def test_clipping_returns_the_norm_before_it():
    models = [GPT2(SMALL, seed=1) for _ in range(2)]
    for model in models:
        model.flat_grads[:] = RNG.standard_normal(model.num_parameters())
        np.copyto(model.flat_grads, models[0].flat_grads)
    norm = np.linalg.norm(models[0].flat_grads.astype(np.float64))
    optimizers = [AdamW(model) for model in models]
    assert optimizers[0].step(1e-3, clip_norm=1.0) == pytest.approx(norm, rel=1e-6)
    models[1].flat_grads /= norm
    optimizers[1].step(1e-3)
    assert np.allclose(optimizers[0].m, optimizers[1].m, rtol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = GPT2(SMALL)
    optimizer, before = AdamW(model), model.flat_params.copy()
    model.flat_grads[3] = np.inf
    assert optimizer.step(1e-3, 1.0) == np.inf
    assert np.array_equal(model.flat_params, before) and optimizer.t == 0 and not optimizer.m.any()


# ---- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n_prompt", [1, 7, 20, 33])
def test_the_cache_gives_what_whole_passes_give(precision, n_prompt):
    model = GPT2(SMALL, seed=4, precision=precision)
    model.flat_params *= 4.0
    prompt = np.random.default_rng(0).integers(0, 37, n_prompt).tolist()
    expected = list(prompt)
    for _ in range(30):  # beyond block_size: the window slides
        logits = model.forward(np.array([expected[-20:]], np.int32))[0, -1]
        best = np.partition(logits, -2)[-2:]
        assert best[1] - best[0] > 1e-3, "the test's model must not hesitate"
        expected.append(int(logits.argmax()))
    assert model.generate(prompt, 30, temperature=0) == expected


def test_samples_of_a_batch_start_alike_and_differ():
    model = GPT2(SMALL, seed=4)
    samples = model.generate_batch([1, 2, 3], 4, 25, seed=9)
    assert all(sample[:3] == [1, 2, 3] and len(sample) == 28 for sample in samples)
    assert len({tuple(sample) for sample in samples}) > 1
    assert samples == model.generate_batch([1, 2, 3], 4, 25, seed=9)


def test_generation_is_a_function_of_the_seed():
    model = GPT2(SMALL, seed=4)
    assert model.generate([1], 20, seed=5) == model.generate([1], 20, seed=5) != model.generate([1], 20, seed=6)
    assert list(model.generate_tokens([1], 20, seed=5)) == model.generate([1], 20, seed=5)[1:]
    assert model.generate([1], 0) == [1]


def frequencies(sampler: Sampler, logits: np.ndarray, n: int = 20_000) -> np.ndarray:
    return np.bincount([sampler(logits) for _ in range(n)], minlength=logits.size) / n


def test_sampling_follows_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert np.allclose(frequencies(Sampler(seed=1), logits), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    cold = np.array([0.5, 0.3, 0.15, 0.05])**2
    assert np.allclose(frequencies(Sampler(0.5, seed=1), logits), cold / cold.sum(), atol=0.02)
    assert np.allclose(frequencies(Sampler(top_k=2, seed=1), logits), [0.625, 0.375, 0, 0], atol=0.02)
    assert np.allclose(frequencies(Sampler(top_p=0.8, seed=1), logits), [0.625, 0.375, 0, 0], atol=0.02)
    assert np.allclose(frequencies(Sampler(top_p=0.81, seed=1), logits), np.array([10, 6, 3, 0]) / 19, atol=0.02)
    assert frequencies(Sampler(0.0), logits, 10)[0] == 1


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "message"), [
    (lambda m: m.forward(np.array([[37]])), "ids must lie in 0 .. 36, got 37"),
    (lambda m: m.forward(np.array([[-1]])), "got -1"),
    (lambda m: m.forward(np.array([[2**40]])), "got 1099511627776"),
    (lambda m: m.forward(np.array([[36, 37]], np.int32)), "must lie in 0 .. 36, got 37"),
    (lambda m: m.forward(np.zeros((1, 21), int)), "21 tokens is longer than block_size=20"),
    (lambda m: m.forward(np.zeros((1, 0), int)), "must be a .B, T. array of integers"),
    (lambda m: m.forward(np.zeros(3, int)), "must be a .B, T. array of integers"),
    (lambda m: m.forward(np.zeros((1, 2))), "must be a .B, T. array of integers, got float64"),
    (lambda m: m.loss(np.zeros((1, 2), int), np.zeros((2, 1), int)), "the same shape"),
    (lambda m: m.loss(np.zeros((1, 2), int), np.full((1, 2), 99)), "targets must lie in 0 .. 36, got 99"),
    (lambda m: m.generate([], 3), "at least one token"),
    (lambda m: m.generate([99], 3), "the prompt has 99"),
    (lambda m: m.generate([1], -1), "max_new_tokens must be 0 or more, got -1"),
    (lambda m: m.generate([1], 1, temperature=-1.0), "temperature must be 0 or more, got -1"),
    (lambda m: m.generate([1], 1, temperature=float("nan")), "temperature"),
    (lambda m: m.generate([1], 1, top_k=0), "top_k must be at least 1"),
    (lambda m: m.generate([1], 1, top_p=0.0), "top_p must lie in"),
    (lambda m: m.generate_batch([1], 0, 1), "num_samples must be at least 1"),
    (lambda m: GPT2(SMALL, precision="fp16"), "precision must be one of fp32, bf16, int8, got 'fp16'"),
    (lambda m: AdamW(m, betas=(1.0, 0.9)), "betas"),
    (lambda m: AdamW(m).step(float("nan")), "learning_rate"),
    (lambda m: AdamW(m).step(0.1, clip_norm=0.0), "clip_norm"),
    (lambda m: variant(n_heads=5), "n_embd must be divisible by n_heads, got n_embd=24 and n_heads=5"),
    (lambda m: variant(vocab_size=0), "vocab_size must be a positive integer, got 0"),
    (lambda m: variant(dropout=1.0), "dropout must be in"),
    (lambda m: Config.from_dict({"n_embed": 3}), "unknown Config fields: n_embed"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(GPT2(SMALL))


def test_an_error_leaves_the_gradients_alone():
    model = GPT2(SMALL)
    with pytest.raises(ValueError):
        model.forward_backward(np.array([[1, 2]], np.int32), np.array([[1, 99]], np.int32))
    assert not model.flat_grads.any()


# ---- what is counted, what is drawn ------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("config", [SMALL, variant(dropout=0.1), variant(tie_weights=True, n_layers=1, vocab_size=900)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 20), (40, 20)])
def test_the_memory_that_is_counted_is_the_memory_that_is_taken(config, B, T, keep):
    act = Activations(config, B, T, keep)
    taken = {id(array): array.nbytes for part in (act, *act.blocks) for array in vars(part).values()
             if isinstance(array, np.ndarray)}
    assert Activations.nbytes_of(config, B, T, keep) == sum(taken.values())
    model = GPT2(config)
    optimizer = AdamW(model)
    flats = sum(flat.nbytes for flat in (model.flat_params, model.flat_grads, optimizer.m, optimizer.v))
    assert model.memory_bytes(B, T) == flats + Activations.nbytes_of(config, B, T, keep=True)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 30}, {"top_p": 0.9}])
def test_tokens_beyond_the_tokenizers_are_never_drawn(settings):
    model = GPT2(SMALL)
    model.params["lm_head.weight"][10:] *= 50.0  # the model would say little else
    model.params["transformer.wpe.weight"] += 1.0
    assert max(model.generate([1], 60, seed=1, **settings)) >= 10
    assert max(model.generate([1], 60, seed=1, vocab_size=10, **settings)) < 10
    assert max(map(max, model.generate_batch([1], 3, 60, seed=1, vocab_size=10, **settings))) < 10
    assert model.generate([1], 60, seed=1, vocab_size=37, **settings) == model.generate([1], 60, seed=1, **settings)


def test_a_tokenizer_smaller_than_the_model_ends_no_run(tmp_path):
    from torture import tokenizer, tokens
    model = GPT2(Config(5000, 16, 1, 1, 16))
    result = train_gpt2(model, tokenizer(), tokens(), 10, 1e-3, 16, tmp_path / "run", sample_interval=1)
    assert result.state == "finished"


# ---- weights of 8 bits -------------------------------------------------------------------------------------


def with_quantized_weights(model: GPT2) -> GPT2:
    """A float32 model whose matrices have the values of those that int8 generates with."""
    other = GPT2(model.config)
    for name, weight in model.params.items():
        if (weight.ndim == 2 and ".h." in name) or name == "lm_head.weight":
            transposed = name == "lm_head.weight"
            K, N = weight.shape[::-1] if transposed else weight.shape
            quantized, values = np.empty(reference.quantized_size(K, N), np.uint8), np.empty((K, N))
            reference.quantize_weight(quantized, weight, K, N, transposed)
            reference.quantized_forward(values, np.eye(K), quantized, None, None, K, K, N)
            other.params[name] = values.T if transposed else values
        else:
            other.params[name] = weight
    return other


@pytest.mark.parametrize("n_embd", [64, 48])
def test_int8_generates_like_a_model_with_these_weights(n_embd):
    config = Config(vocab_size=130, n_embd=n_embd, n_layers=2, n_heads=2, block_size=40)
    model = GPT2(config, seed=3, precision="int8")
    model.flat_params *= 5.0  # far from uniform, so that the likeliest token is clear
    ours, theirs = model.decoder(), with_quantized_weights(model).decoder()
    ours.read(np.array([[5]], np.int32))  # by the weights themselves
    theirs.cache.k[...], theirs.cache.v[...], theirs.cache.length = ours.cache.k, ours.cache.v, ours.cache.length
    for token in (7, 100, 3, 64):
        ids = np.array([[token]], np.int32)
        assert np.allclose(ours.append(ids), theirs.append(ids), atol=2e-4)


def test_an_int8_decoder_answers_several_samples_and_prompts():
    model = GPT2(SMALL, precision="int8")
    one, many = model.decoder(), model.decoder(5)
    for prompt in ([1, 2, 3], [4]):
        alone = [ids[0] for ids in one.stream(prompt, 12, Sampler(0.0))]
        together = list(many.stream(prompt, 12, Sampler(0.0)))
        assert all(ids == [i] * 5 for ids, i in zip(together, alone, strict=True))
        assert model.generate(prompt, 12, temperature=0.0) == [*prompt, *alone]


def test_an_int8_model_is_for_generation():
    model, ids = GPT2(SMALL, precision="int8"), np.zeros((1, 4), np.int32)
    assert model.loss(ids, ids) == GPT2(SMALL).loss(ids, ids)
    with pytest.raises(FesteError, match="train one with fp32 or bf16"):
        model.forward_backward(ids, ids)
    with pytest.raises(FesteError, match="fp32, bf16, int8, got 'int4'"):
        GPT2(SMALL, precision="int4")
