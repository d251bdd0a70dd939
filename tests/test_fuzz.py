"""Hostile arguments to the public API: a plain exception or a result, never a crash or memory written elsewhere."""

import os
import subprocess
import sys
import warnings
from dataclasses import fields
from functools import cache

import numpy as np
import pytest
import torture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_cases import all_cases

from feste import GPT2, AdamW, BPETokenizer, Config, TrainConfig, ops, train_gpt2
from feste.trainer import TrainingDiverged

REFUSALS = (ValueError, TypeError, OverflowError)
CONFIG = Config(300, 8, 1, 2, 16)

SMALL = st.integers(-3, 5)
HUGE = st.sampled_from([2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, -2**63, 2**64, 10**30])
TEXT = st.one_of(st.text(max_size=12), st.text(st.characters(codec=None), max_size=5),
                 st.sampled_from(["", "\0", "\ud800", "é" * 9]))
ODD = st.one_of(st.none(), st.booleans(), st.floats(), TEXT, st.binary(max_size=4), st.complex_numbers(),
                st.lists(SMALL, max_size=4), st.dictionaries(TEXT, SMALL, max_size=2), st.just(object()),
                st.sampled_from([np.int64(3), np.float32("nan"), np.bool_(True), 1e-320, 1e308, -0.0]))
SCALAR = SMALL | HUGE | ODD
ARRAY = hnp.arrays(
    st.sampled_from([np.int8, np.int32, np.int64, np.uint8, np.uint16, np.uint64, np.float32, np.float64]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=18), elements=st.integers(0, 120),
) | hnp.arrays(np.int64, (2, 4), elements=st.sampled_from([0, 5, 299, 300, -1, 2**31, 2**32 + 5, -2**63]))
SHAPED = st.builds(lambda x, turn: turn(x) if x.ndim else x, ARRAY, st.sampled_from(
    [lambda x: x, lambda x: x.T, lambda x: x[::2], lambda x: x[::-1], lambda x: x.astype(">i4"), lambda x: x.tolist(),
     lambda x: x.astype(bool), lambda x: x.astype(object), lambda x: x.astype(str)]))
IDS = SHAPED | ODD | hnp.arrays(np.int32, (2, 4), elements=st.integers(-1, 300))


@cache
def model() -> GPT2:
    return GPT2(CONFIG, seed=1)


def some(cls: type, **limits):
    """Keyword arguments for a few fields of a dataclass; limits replaces the values tried for a field."""
    return st.fixed_dictionaries({}, optional={f.name: limits.get(f.name, SCALAR) for f in fields(cls)})


# ---- what is attacked --------------------------------------------------------------------------------------


def attack_config(values):
    config = Config(**values)
    assert Config.from_dict(config.to_dict()) == config


def attack_train_config(values):
    TrainConfig.from_dict(TrainConfig(**values).to_dict())


def attack_model(method, ids, targets, scale):
    before = model().flat_params.tobytes()
    try:
        if method == "forward":
            assert np.isfinite(model().forward(ids)).all()
        elif method == "loss":
            assert np.isfinite(model().loss(ids, targets))
        else:
            model().forward_backward(ids, targets, scale)
    finally:
        assert model().flat_params.tobytes() == before


def attack_generate(prompt, count, temperature, top_k, top_p, seed):
    ids = model().generate(prompt, count, temperature, top_k, top_p, seed)
    assert len(ids) == len(prompt) + count and all(0 <= i < CONFIG.vocab_size for i in ids)


def attack_adamw(arguments, learning_rate, clip_norm):
    small = GPT2(Config(4, 4, 1, 1, 4), seed=1)
    small.flat_grads.fill(0.5)
    AdamW(small, **arguments).step(learning_rate, clip_norm)


def attack_tokenizer_training(text, vocab_size, special):
    tokenizer = BPETokenizer.train(text, vocab_size, special)
    if isinstance(text, str):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def attack_tokenizer(method, argument):
    result = getattr(torture.tokenizer(), method)(argument)
    if method == "encode":
        assert torture.tokenizer().decode(result) == argument


def attack_tokenizer_file(edit):
    start, length, new = edit
    json = torture.tokenizer().to_json()
    start %= len(json)
    BPETokenizer.from_json(json[:start] + new + json[start + length:])


def attack_training(text, values):
    values = {"num_steps": 2, "learning_rate": 1e-3, "seq_len": 8, "batch_size": 1, "val_windows": 2,
              "sample_tokens": 2, "sample_interval": 1, "threads": 1} | values
    values.pop("precision", None)
    try:
        train_gpt2(GPT2(CONFIG, seed=1), torture.tokenizer(), text, **values)
    except TrainingDiverged:
        assert values["learning_rate"] > 0.01


FEW = st.integers(-2, 4) | ODD
TRAINING = some(TrainConfig, num_steps=FEW, seq_len=st.integers(-2, 20) | ODD, batch_size=FEW, accumulation=FEW,
                sample_tokens=FEW, threads=FEW)
TARGETS = {
    "Config": (attack_config, st.tuples(some(Config))),
    "TrainConfig": (attack_train_config, st.tuples(some(TrainConfig))),
    "GPT2": (attack_model, st.tuples(st.sampled_from(["forward", "loss", "forward_backward"]), IDS, IDS, SCALAR)),
    "generate": (attack_generate, st.tuples(st.lists(st.integers(-1, 301), max_size=30) | IDS,
                                            st.integers(-2, 30) | ODD, SCALAR, SCALAR, SCALAR, SCALAR)),
    "AdamW": (attack_adamw, st.tuples(st.fixed_dictionaries({}, optional={
        "betas": st.tuples(st.floats() | ODD, st.floats()) | ODD, "eps": SCALAR, "weight_decay": SCALAR}),
        SCALAR, SCALAR)),
    "BPETokenizer.train": (attack_tokenizer_training, st.tuples(
        TEXT | ODD | st.lists(TEXT | SMALL, max_size=3), st.integers(200, 400) | ODD,
        st.lists(TEXT, max_size=3) | st.none() | st.floats())),
    "BPETokenizer": (attack_tokenizer, st.one_of(st.tuples(st.just("encode"), TEXT | ODD),
                                                 st.tuples(st.sampled_from(["decode", "decode_bytes"]), IDS | TEXT))),
    "BPETokenizer.from_json": (attack_tokenizer_file,
                               st.tuples(st.tuples(st.integers(0, 10**6), st.integers(0, 9), TEXT))),
    "train_gpt2": (attack_training,
                   st.tuples(st.none().map(lambda _: torture.text()) | ARRAY | TEXT | ODD, TRAINING)),
}


def hammer(attack, strategy, count: int) -> None:
    @settings(max_examples=count, deadline=None, derandomize=count < 1000, database=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(arguments):
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                attack(*arguments)
        except REFUSALS as error:
            assert str(error), "a refusal says why"
    run()


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_arguments(name):
    hammer(*TARGETS[name], 150)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_hostile_arguments_for_minutes(name):
    hammer(*TARGETS[name], 10_000)


# ---- the kernels -------------------------------------------------------------------------------------------


@cache
def small_cases() -> dict:
    """The smallest case of each kernel that has more than a few elements."""
    cases = {}
    for case in all_cases():
        size = sum(value.size for value in case.args.values() if isinstance(value, np.ndarray))
        best = cases.get(case.kernel)
        if size > 40 and (best is None or size < best[0]):
            cases[case.kernel] = (size, case)
    return {kernel: case for kernel, (_, case) in cases.items()}


def guarded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of x with room on both sides that must stay as it is."""
    room = np.full(x.nbytes + 256, 0xA5, np.uint8)
    inner = room[128:128 + x.nbytes].view(x.dtype).reshape(x.shape)
    inner[...] = x
    return inner, room


ARRAY_MUTATIONS = [
    lambda x, other: x.tolist(), lambda x, other: x.astype(np.float64),
    lambda x, other: x.astype(np.int32), lambda x, other: x.astype(np.int64), lambda x, other: x.astype(object),
    lambda x, other: x.reshape(-1)[:-1], lambda x, other: x[:0], lambda x, other: np.float32(1.0),
    lambda x, other: other, lambda x, other: np.repeat(x, 2, axis=-1)[..., ::2],
    lambda x, other: np.asfortranarray(x), lambda x, other: x[::-1],
    lambda x, other: x.astype(x.dtype.newbyteorder()), lambda x, other: np.broadcast_to(x.reshape(-1)[0], x.shape),
    lambda x, other: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
    lambda x, other: x.reshape(1, *x.shape), lambda x, other: np.concatenate([x, x]),
    lambda x, other: np.full_like(x, -1),
    lambda x, other: np.full_like(x, 2**31 - 1 if x.dtype.kind == "i" else np.nan),
]
# Sizes of 0, and those whose product is cut to 64 bits and then fits, have a test of their own.
SIZES = (st.integers(-3, 600) | ODD | st.sampled_from([2**31, 2**33 + 7, 2**63, -2**63, 10**30])).filter(
    lambda x: not (isinstance(x, int | float | complex | np.number | np.bool_) and x == 0))


@st.composite
def kernel_calls(draw):
    case = small_cases()[draw(st.sampled_from(sorted(small_cases())))]
    names = draw(st.lists(st.sampled_from(sorted(case.args)), min_size=1, max_size=2, unique=True))
    return case, {name: (draw(st.sampled_from(ARRAY_MUTATIONS)), draw(st.sampled_from(sorted(case.args))))
                  if isinstance(case.args[name], np.ndarray) else draw(SIZES) for name in names}


def attack_kernel(case, changes):
    args, rooms = {}, []
    for name, value in case.args.items():
        args[name] = value
        if isinstance(value, np.ndarray):
            args[name], room = guarded(value)
            rooms.append(room)
    for name, change in changes.items():
        if isinstance(case.args[name], np.ndarray):
            mutate, other = change
            if isinstance(args[name], np.ndarray) and args[other] is not None:
                args[name] = mutate(args[name], args[other])
        else:
            args[name] = change
    try:
        getattr(ops, case.kernel)(**args)
    finally:
        for room in rooms:
            assert (room[:128] == 0xA5).all() and (room[-128:] == 0xA5).all(), f"{case} wrote outside an array"


def test_hostile_arguments_to_the_kernels():
    assert len(small_cases()) > 15
    hammer(attack_kernel, kernel_calls(), 600)


@pytest.mark.long
def test_hostile_arguments_to_the_kernels_for_minutes():
    hammer(attack_kernel, kernel_calls(), 100_000)


ABSURD = {
    "a product of sizes that wraps around": "a = np.zeros((1, 4), 'f')\n"
                                            "ops.gemm(a.copy(), a, np.zeros((4, 4), 'f'), 2**62 + 1, 4, 4)",
    "more threads than any machine runs": "ops.set_num_threads(10**6)\n"
                                          "ops.sum_of_squares(np.ones(1 << 20, 'f'), 1 << 20)",
    "no channels": "ops.embedding_forward(np.zeros((2, 3), 'f'), np.zeros(2, 'i'), np.zeros((4, 3), 'f'), "
                   "np.zeros((4, 3), 'f'), 1, 2, 0)",
    "no channels, backward": "ops.embedding_backward(np.zeros((4, 3), 'f'), np.zeros((4, 3), 'f'), "
                             "np.zeros((2, 3), 'f'), np.zeros(2, 'i'), 1, 2, 0)",
    "None for an array": "ops.sum_of_squares(None, 3)",
    "special tokens that are no text": "feste.BPETokenizer.train('some text', 300, [1, 2])",
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_arguments_are_refused(name):
    """What would end the process if it came through, hence in a process of its own."""
    code = f"""import numpy as np, feste
from feste import ops
try:
    {ABSURD[name].replace(chr(10), chr(10) + "    ")}
    print("accepted")
except (ValueError, TypeError, OverflowError):
    print("refused")"""
    environment = os.environ | {"PYTHONPATH": str(torture.ROOT)}
    for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS"):  # a report belongs to this test and not among the others
        environment[name] = environment.get(name, "") + ":log_path=stderr"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5, env=environment)
    except subprocess.TimeoutExpired:
        pytest.fail("it did not come back")
    assert done.stdout.strip() == "refused", done.stderr[-500:]
