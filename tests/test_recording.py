"""Recordings: kernels noted down and run by one team give the bits of kernels called one by one."""

import copy
import gc
import signal
import threading
import time

import numpy as np
import pytest

from feste import GPT2, AdamW, Config, ops
from feste.transformer import Activations

CONFIG = Config(vocab_size=300, n_embd=96, n_layers=2, n_heads=3, block_size=70)


def directly(self, settings, kernels, hooks=None):
    """Activations.perform without a recording."""
    kernels()


def trained(config: Config, precision: str) -> bytes:
    """Parameters, losses and text of a model after some steps of several shapes and scales."""
    rng, model = np.random.default_rng(0), GPT2(config, precision=precision)
    optimizer, numbers = AdamW(model), []
    for step, (B, T, scale) in enumerate([(3, 70, 1.0), (3, 70, 1.0), (3, 70, 0.5), (2, 9, 1.0), (3, 70, 1.0)]):
        ids, targets = rng.integers(0, config.vocab_size, (2, B, T))
        numbers.append(model.forward_backward(ids, targets, scale, dropout_key=step))
        numbers.append(optimizer.step(1e-3, 1.0, zero_grad=True))
        numbers += [model.loss(ids, targets), model.loss(ids[:1], targets[:1])]
    return (model.flat_params.tobytes() + np.array(numbers).tobytes()
            + bytes(str(model.generate([1, 2, 3], 80, temperature=0.8, seed=1)), "ascii"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_recorded_step_has_the_bits_of_kernels_called_one_by_one(precision, dropout, monkeypatch):
    config, seen, before = Config(**(CONFIG.to_dict() | {"dropout": dropout})), set(), ops.get_num_threads()
    try:
        for threads in (1, 2, 3):
            ops.set_num_threads(threads)
            seen.add(trained(config, precision))
            with monkeypatch.context() as patch:
                patch.setattr(Activations, "perform", directly)
                seen.add(trained(config, precision))
    finally:
        ops.set_num_threads(before)
    assert len(seen) == 1


def test_a_recording_is_run_as_often_as_one_likes_on_what_the_arrays_hold():
    x, out = ops.zeros(5), ops.zeros(5)
    with ops.Recording() as recording:
        ops.gelu_forward(out, x, 5)
    assert len(recording) == 1
    x[:] = 1.0
    assert not out.any()
    recording.run()
    once = out.copy()
    assert once.all()
    recording.run()
    assert (out == once).all()


def test_a_recording_keeps_its_arrays():
    x = np.ones(100_000, np.float32)
    out = np.zeros_like(x)
    with ops.Recording() as recording:
        ops.gelu_forward(out, x, x.size)
    del x
    gc.collect()
    recording.run()
    assert np.allclose(out, 0.841192)


def test_threads_set_later_leave_a_recording_as_it_is():
    before, x = ops.get_num_threads(), np.ones((64, 512), np.float32)
    out, weight, bias = np.zeros((64, 512), np.float32), np.ones((512, 512), np.float32), np.zeros(512, np.float32)
    try:
        ops.set_num_threads(1)
        with ops.Recording() as recording:
            ops.linear_forward(out, x, weight, bias, None, 64, 512, 512)
        ops.set_num_threads(4)
        recording.run()
    finally:
        ops.set_num_threads(before)
    assert recording.threads == 1 and (out == 512).all()


def test_kernels_that_cannot_be_recorded_say_so_and_a_bad_call_is_not_noted():
    x = np.ones(5, np.float32)
    recording = ops.Recording()
    with recording, pytest.raises(RuntimeError, match="cannot be recorded"):
        ops.sum_of_squares(x, 5)
    with recording, pytest.raises(ValueError, match="out must be"):
        ops.gelu_forward(np.zeros(4, np.float32), x, 5)
    with recording, pytest.raises(RuntimeError, match="records already"), ops.Recording():
        pass
    assert len(recording) == 0
    assert ops.sum_of_squares(x, 5) == 5.0  # this thread does not record any more


def test_a_run_is_timed_call_by_call():
    x, out, few = ops.zeros(300, 300), ops.zeros(300, 300), ops.zeros(5)
    with ops.Recording() as recording:
        ops.gelu_forward(few, few.copy(), 5)
        ops.gemm(out, x, x, 300, 300, 300)
        ops.gelu_forward(few, few.copy(), 5)
    seconds = np.zeros(3)
    begun = time.perf_counter()
    for _ in range(20):
        recording.run(seconds=seconds)
    assert (seconds > 0.0).all() and seconds.sum() <= time.perf_counter() - begun
    assert seconds.argmax() == 1
    before = seconds.copy()
    recording.run(0, 1, seconds)
    assert (seconds > before).tolist() == [True, False, False]
    for wrong in (np.zeros(2), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match="seconds must be"):
            recording.run(seconds=wrong)


@pytest.mark.parametrize("shape", [(300, 40, 70), (40, 300, 70)])
def test_every_task_is_taken_once_by_teams_of_any_size(shape):
    """70 members are more than there are tasks, and more than have a share of their own."""
    (M, N, K), rng, before, seen = shape, np.random.default_rng(0), ops.get_num_threads(), set()
    a, b = (rng.standard_normal(side, np.float32) for side in ((M, K), (K, N)))
    try:
        for threads in (1, 2, 3, 70):
            ops.set_num_threads(threads)
            for _ in range(5):
                c = np.zeros((M, N), np.float32)
                ops.gemm(c, a, b, M, N, K, accumulate=True)
                seen.add(c.tobytes())
    finally:
        ops.set_num_threads(before)
    assert len(seen) == 1


def test_another_thread_calls_its_kernels_at_once_meanwhile():
    x, out = np.ones(5, np.float32), np.zeros(5, np.float32)
    with ops.Recording() as recording:
        other = threading.Thread(target=ops.gelu_forward, args=(out, x, 5))
        other.start()
        other.join()
    assert out.all() and len(recording) == 0


def test_ids_outside_the_vocabulary_are_refused_at_every_step():
    model, ids = GPT2(CONFIG), np.zeros((1, 8), np.int32)
    model.forward_backward(ids, ids)
    with pytest.raises(ValueError, match="targets must lie in"):
        model.forward_backward(ids, ids + 300)
    with pytest.raises(ValueError, match="ids must lie in"):
        model.loss(ids - 1, ids)


def test_a_copied_model_steps_on_buffers_of_its_own():
    model, ids = GPT2(CONFIG), np.ones((2, 8), np.int32)
    model.forward_backward(ids, ids)
    other = copy.deepcopy(model)
    other.zero_grad()
    other.forward_backward(ids, ids)
    assert other.flat_grads.tobytes() == model.flat_grads.tobytes()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_long_recording_lets_signal_handlers_in():
    n, rung = 4_000_000, []
    x, out = np.ones(n, np.float32), np.zeros(n, np.float32)
    with ops.Recording() as recording:
        for _ in range(300):
            ops.gelu_forward(out, x, n)
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.perf_counter()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        recording.run()
        ended = time.perf_counter()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert rung and rung[0] < ended
