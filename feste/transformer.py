"""The transformer between token ids and its last norm, forward and backward: the order in which the kernels run.

One block, with the names of Hugging Face's GPT-2 (Radford et al. 2019), forward:

    ln_1 = norm(x)                      qkv = rotated(ln_1 @ c_attn)          att = attention(qkv)
    mid = x + att @ attn.c_proj         ln_2 = norm(mid)                      fc = ln_2 @ c_fc
    x' = mid + activation(fc) @ mlp.c_proj

and backward the same lines from the last to the first. What norm and activation are, and whether there are biases and
rotations, is the family's: config.ARCHITECTURES. Training, evaluation and decoding run the one description of it,
`forward`; how they differ (dropout, a cache, packed weights) is in the `Pass` they hand to it.

A training pass keeps per token and block: x', ln_1, qkv (3C), att, mid, ln_2 and fc (4C), 12 C floats; activation(fc)
is made again on the way back. Shapes: B sequences of T tokens, rows = B T, C channels, H heads, V tokens in the
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from feste import ops
from feste.config import IGNORED, Config

if TYPE_CHECKING:
    from feste.params import Parameter, ParameterTable

HEAD_ROWS = 512  # rows whose logits are in memory at once: V = 50,257 makes 100 MB of them, and 8,192 rows 1.6 GB
MOST_RECORDINGS = 8  # of one set of buffers: a step of several mini-batches has one for each buffer of gradients
ROPE_BASE = 10_000.0  # Su et al. 2021: the slowest rotation takes 2 pi times so many tokens
EMBEDDING, ATTENTION, ATTN_PROJ, MLP_PROJ = range(4)  # the places of a block that have dropout


# ---- parameters by their roles -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """The parameters of one block, or their gradients: (weight, bias) each, or (weight, None) and (weight,)."""

    ln_1: tuple      # (C), (C)
    c_attn: tuple    # (C, 3C), (3C)
    attn_proj: tuple # (C, C), (C)
    ln_2: tuple      # (C), (C)
    c_fc: tuple      # (C, 4C), (4C)
    mlp_proj: tuple  # (4C, C), (C)


class Weights:
    """The parameters of a model, or their gradients, without the long names.

    wte (V, C) and head (V, C), which are one array if the weights are tied; wpe (block_size, C) or None; blocks; ln_f.
    """

    def __init__(self, views: Mapping[str, np.ndarray], config: Config) -> None:
        def norm(name: str) -> tuple:
            weight, bias = linear(name)
            return (weight,) if bias is None else (weight, bias)

        def linear(name: str) -> tuple:
            return views[f"transformer.{name}.weight"], views.get(f"transformer.{name}.bias")

        self.wte, self.wpe = views["transformer.wte.weight"], views.get("transformer.wpe.weight")
        self.head = self.wte if config.tie_weights else views["lm_head.weight"]
        self.ln_f = norm("ln_f")
        self.blocks = [Block(norm(f"h.{i}.ln_1"), linear(f"h.{i}.attn.c_attn"), linear(f"h.{i}.attn.c_proj"),
                             norm(f"h.{i}.ln_2"), linear(f"h.{i}.mlp.c_fc"), linear(f"h.{i}.mlp.c_proj"))
                       for i in range(config.n_layers)]


class Gradients:
    """Gradients of all parameters: a flat buffer, and the views of it by name and by role."""

    def __init__(self, table: ParameterTable, config: Config) -> None:
        self.flat = ops.zeros(table.size)
        self.views = table.views(self.flat)
        self.weights = Weights(self.views, config)


@cache
def rotations(block_size: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (block_size, head_size / 2) of the angles position * ROPE_BASE^(-2 j / head_size)."""
    frequencies = ROPE_BASE ** (-np.arange(0, head_size, 2) / head_size)
    angles = np.arange(block_size)[:, None] * frequencies
    tables = ops.zeros(*angles.shape), ops.zeros(*angles.shape)
    tables[0][...], tables[1][...] = np.cos(angles), np.sin(angles)
    return tables


# ---- buffers -----------------------------------------------------------------------------------------------


class Arena:
    """Memory that arrays are cut from, so that passes of other shapes need no new memory. The latest ones count."""

    def __init__(self) -> None:
        self._memory, self._used = ops.zeros(0), 0

    def clear(self, floats: int, arrays: int) -> None:
        """Make room for so many arrays of so many floats together; what was cut before is no more."""
        needed, self._used = floats + arrays * (ops.CACHE_LINE // 4), 0
        if self._memory.size < needed:
            self._memory = ops.zeros(0)  # let go of the old memory before taking the new
            self._memory = ops.zeros(needed)

    def zeros(self, *shape: int) -> np.ndarray:
        """An array like that of ops.zeros, but holding anything."""
        size, begin = math.prod(shape), self._used
        self._used += -(-size // (ops.CACHE_LINE // 4)) * (ops.CACHE_LINE // 4)
        return self._memory[begin:begin + size].reshape(shape)


class Hooks(Protocol):
    """What is called on the way through a training pass, for each stage of `stage_of`."""

    def before(self, stage: int) -> None:
        """Parameters of this stage are about to be read for the first time."""

    def after(self, stage: int) -> None:
        """Gradients of this stage are whole."""


class Mark(NamedTuple):
    """Where a hook is called: behind so many kernels."""

    calls: int
    hook: str
    stage: int


class Activations:
    """The buffers of one pass over B sequences of T tokens, as the tables below say.

    With keep, every block has a set of its own, as the backward pass needs them, and there are gradients; without, all
    blocks share one set. `nbytes_of` counts what would be taken.

    ids (B, T) int32 are the pass's input; the loss is the mean over n_counted tokens, whose targets and whose rows,
    `counted`, are the first so many of those buffers.
    """

    @staticmethod
    def shared_shapes(config: Config, B: int, T: int) -> dict[str, tuple[int, ...]]:
        """Buffers that a pass has once. The last three are the head's; logits hold HEAD_ROWS rows at a time."""
        rows, C = B * T, config.n_embd
        return {"x": (rows, C),  # the embedding's output, the first block's input
                "activated": (rows, 4 * C), "ln_f": (rows, C), "statistics": (config.architecture.statistics, rows),
                # a projection, or its gradient, on its way through dropout
                **({"dropped": (rows, C)} if config.dropout > 0.0 else {}),
                "losses": (rows,), "lse": (rows,), "logits": (min(rows, HEAD_ROWS), config.vocab_size)}

    @staticmethod
    def block_shapes(config: Config, B: int, T: int) -> dict[str, tuple[int, ...]]:
        """Buffers of a block. statistics of the norms and lse (log of the sum of exponentials) are for the way back."""
        rows, C, statistics = B * T, config.n_embd, config.architecture.statistics
        return {"ln_1": (rows, C), "statistics_1": (statistics, rows), "qkv": (rows, 3 * C), "att": (rows, C),
                "lse": (B, config.n_heads, T), "mid": (rows, C), "ln_2": (rows, C), "statistics_2": (statistics, rows),
                "fc": (rows, 4 * C), "x": (rows, C)}

    @staticmethod
    def gradient_shapes(config: Config, B: int, T: int) -> dict[str, tuple[int, ...]]:
        """Gradients of activations, which pass from block to block in the same buffers."""
        rows, C = B * T, config.n_embd
        return {"dx": (rows, C), "dln": (rows, C), "dfc": (rows, 4 * C), "dqkv": (rows, 3 * C)}

    def __init__(self, config: Config, B: int, T: int, keep: bool, arena: Arena | None = None) -> None:
        self.shape = (B, T)
        self.ids = ops.zeros(B, T, dtype=np.int32)
        self.targets, self.counted = ops.zeros(B * T, dtype=np.int32), ops.zeros(B * T, dtype=np.int32)
        self.n_counted = 0
        self._recordings: dict[tuple, tuple[ops.Recording, list[Mark]]] = {}
        self._marks: list[Mark] | None = None  # of the pass that is being recorded
        shared, block, gradients = self._tables(config, B, T, keep)
        zeros = ops.zeros
        if arena is not None:
            arrays = len(shared) + len(gradients) + len(block) * (config.n_layers if keep else 1)
            arena.clear(self.nbytes_of(config, B, T, keep) // 4, arrays)
            zeros = arena.zeros
        for name, shape in {**shared, **gradients}.items():
            setattr(self, name, zeros(*shape))
        sets = [SimpleNamespace(**{name: zeros(*shape) for name, shape in block.items()})
                for _ in range(config.n_layers if keep else 1)]
        self.blocks = sets if keep else sets * config.n_layers

    def take(self, ids: np.ndarray, targets: np.ndarray) -> None:
        """The input of the next pass: ids and targets (B, T), of which those that are IGNORED do not count."""
        self.ids[...], targets = ids, targets.reshape(-1)
        counts = targets != IGNORED
        self.n_counted = int(np.count_nonzero(counts))
        if self.n_counted == len(targets):
            self.targets[...] = targets
        else:
            self.counted[:self.n_counted], self.targets[:self.n_counted] = np.flatnonzero(counts), targets[counts]

    def perform(self, settings: tuple, kernels: Callable[[], None], hooks: Hooks | None = None) -> None:
        """Run the kernels that `kernels` calls on these buffers, all of them by one team of threads.

        The buffers and their order are always the same, so they are noted down once, and again only if one of the
        settings has changed: whatever numbers or other buffers the kernels are called with. hooks, if given, are called
        on the way.
        """
        settings = (*settings, self.n_counted, ops.get_num_threads())
        if settings not in self._recordings:
            if len(self._recordings) == MOST_RECORDINGS:
                self._recordings.pop(next(iter(self._recordings)))  # the oldest
            self._recording, self._marks = ops.Recording(), []
            with self._recording:
                kernels()
            self._recordings[settings], self._marks = (self._recording, self._marks), None
        recording, marks = self._recordings[settings]
        begin = 0
        for mark in marks if hooks else ():
            recording.run(begin, mark.calls)
            begin = mark.calls
            getattr(hooks, mark.hook)(mark.stage)
        recording.run(begin)

    def mark(self, hook: str, stage: int) -> None:
        """Here a hook is to be called, `before` or `after` a stage; if the pass is being recorded."""
        if self._marks is not None:
            self._marks.append(Mark(len(self._recording), hook, stage))

    @classmethod
    def nbytes_of(cls, config: Config, B: int, T: int, keep: bool) -> int:
        """Bytes of the buffers for these arguments, without taking them."""
        shared, block, gradients = ({name: math.prod(shape) for name, shape in table.items()}
                                    for table in cls._tables(config, B, T, keep))
        floats = sum(shared.values()) + sum(gradients.values()) + sum(block.values()) * (config.n_layers if keep else 1)
        return floats * np.dtype(np.float32).itemsize + 3 * B * T * np.dtype(np.int32).itemsize

    @classmethod
    def _tables(cls, config: Config, B: int, T: int, keep: bool) -> tuple[dict, dict, dict]:
        return (cls.shared_shapes(config, B, T), cls.block_shapes(config, B, T),
                cls.gradient_shapes(config, B, T) if keep else {})


# ---- what differs from pass to pass ------------------------------------------------------------------------


class Dropout:
    """The masks of one pass: a pure function of (seed, key, layer, site). With p = 0 nothing is dropped."""

    def __init__(self, p: float = 0.0, seed: int = 0, key: int = 0) -> None:
        self.p, self._mixed = p, seed * 0xD1342543DE82EF95 + key * 0xA24BAED4963EE407

    def key(self, layer: int, site: int) -> int:
        """64 bits for one place; the kernels hash them further, with the number of the element."""
        mixed = self._mixed + (layer * 4 + site + 1) * 0x9FB21C651E98DF25
        return (mixed ^ (mixed >> 32)) & 0xFFFFFFFFFFFFFFFF

    def forward(self, out: np.ndarray, x: np.ndarray, residual: np.ndarray | None, layer: int, site: int) -> None:
        """out = residual + dropout(x)."""
        ops.dropout_forward(out, x, residual, self.p, self.key(layer, site), x.size)

    def backward(self, dx: np.ndarray, dy: np.ndarray, layer: int, site: int) -> None:
        """dx of y = dropout(x)."""
        ops.dropout_backward(dx, dy, self.p, self.key(layer, site), dy.size)


class Pass:
    """A pass over whole sequences: every token attends to itself and those before it in its sequence.

    position: where in its sequence the first token stands.
    """

    position = 0

    def __init__(self, config: Config, act: Activations, bf16: bool, dropout: Dropout) -> None:
        self.act, self.bf16, self.dropout = act, bf16, dropout
        self.heads, self.head_size, self.of = config.n_heads, config.head_size, config.architecture
        self.rotations = rotations(config.block_size, config.head_size) if self.of.rotary else None

    def norm(self, out: np.ndarray, statistics: np.ndarray, x: np.ndarray, parameters: tuple) -> None:
        """out (rows, C) = norm(x (rows, C)), and its statistics for the way back."""
        kernel(self.of.norm, "forward")(out, *statistics, x, *parameters, *x.shape)

    def norm_backward(self, dparameters: tuple, x: np.ndarray, parameters: tuple, statistics: np.ndarray,
                      dresidual: np.ndarray | None) -> None:
        """act.dx (rows, C) = the gradient of a norm's x, from act.dln, that of its output, + dresidual (rows, C)."""
        kernel(self.of.norm, "backward")(self.act.dx, *dparameters, self.act.dln, x, parameters[0], *statistics,
                                         dresidual, *x.shape)

    def linear(self, out: np.ndarray, x: np.ndarray, parameters: tuple, residual: np.ndarray | None = None) -> None:
        """out (rows, N) = x (rows, K) @ weight (K, N) + bias (N) + residual (rows, N)."""
        rows, K = x.shape
        ops.linear_forward(out, x, *parameters, residual, rows, K, out.shape[1], self.bf16)

    def linear_backward(self, dx: np.ndarray, dparameters: tuple, dout: np.ndarray, x: np.ndarray,
                        parameters: tuple) -> None:
        """dx (rows, K), and what is added to the gradients of the parameters, from dout (rows, N) and x (rows, K)."""
        (rows, K), N = x.shape, dout.shape[1]
        ops.linear_backward_input(dx, dout, parameters[0], rows, K, N, self.bf16)
        ops.linear_backward_weight(*dparameters, dout, x, rows, K, N, self.bf16)

    def project(self, out: np.ndarray, x: np.ndarray, parameters: tuple, residual: np.ndarray, layer: int,
                site: int) -> None:
        """out = residual + dropout(x @ weight + bias): a branch comes back to the residual stream."""
        if self.dropout.p == 0.0:
            self.linear(out, x, parameters, residual)
        else:
            self.linear(self.act.dropped, x, parameters)
            self.dropout.forward(out, self.act.dropped, residual, layer, site)

    def rotate(self, qkv: np.ndarray) -> None:
        """Turn queries and keys in qkv (rows, 3C) by their positions, if the family does."""
        if self.of.rotary:
            ops.rope_forward(qkv, *self.rotations, *self.act.shape, self.heads, self.head_size, self.position)

    def rotate_backward(self, dqkv: np.ndarray) -> None:
        """The gradient dqkv (rows, 3C) of what was rotated, turned back."""
        if self.of.rotary:
            ops.rope_backward(dqkv, *self.rotations, *self.act.shape, self.heads, self.head_size)

    def attend(self, a: SimpleNamespace, layer: int) -> None:
        """a.att (rows, C) = attention(a.qkv (rows, 3C)), and a.lse for the way back."""
        B, T = self.act.shape
        ops.attention_forward(a.att, a.lse, a.qkv, B, T, self.heads, self.head_size, self.dropout.p,
                              self.dropout.key(layer, ATTENTION))


def kernel(name: str, direction: str) -> Callable[..., None]:
    """A kernel that a family names."""
    return getattr(ops, f"{name}_{direction}")


# ---- forward -----------------------------------------------------------------------------------------------


def forward(run: Pass, w: Weights, ids: np.ndarray) -> None:
    """Fill run.act up to ln_f (rows, C) for ids (B, T)."""
    act = run.act
    act.mark("before", len(w.blocks) + 1)
    # x = dropout(wte[ids] + wpe)
    ops.embedding_forward(act.x, ids, w.wte, w.wpe, *ids.shape, act.x.shape[1], run.position)
    if run.dropout.p > 0.0:
        run.dropout.forward(act.x, act.x, None, 0, EMBEDDING)
    x = act.x
    for layer, (a, block) in enumerate(zip(act.blocks, w.blocks, strict=True)):
        act.mark("before", len(w.blocks) - layer)
        _forward_block(run, block, a, x, layer)
        x = a.x
    run.norm(act.ln_f, act.statistics, x, w.ln_f)
    act.mark("before", 0)


def _forward_block(run: Pass, w: Block, a: SimpleNamespace, x: np.ndarray, layer: int) -> None:
    """a.x (rows, C) = block(x (rows, C)); a holds what is made on the way."""
    activated = run.act.activated
    run.norm(a.ln_1, a.statistics_1, x, w.ln_1)
    run.linear(a.qkv, a.ln_1, w.c_attn)
    run.rotate(a.qkv)
    run.attend(a, layer)
    run.project(a.mid, a.att, w.attn_proj, x, layer, ATTN_PROJ)
    run.norm(a.ln_2, a.statistics_2, a.mid, w.ln_2)
    run.linear(a.fc, a.ln_2, w.c_fc)
    kernel(run.of.activation, "forward")(activated, a.fc, a.fc.size)
    run.project(a.x, activated, w.mlp_proj, a.mid, layer, MLP_PROJ)


# ---- backward ----------------------------------------------------------------------------------------------


def backward(run: Pass, w: Weights, d: Weights, ids: np.ndarray) -> None:
    """Add to d the gradients of all parameters but the head's; act.dln holds that of ln_f (rows, C).

    A stage ends where gradients are whole: `stage_of` says of which parameters.
    """
    act = run.act
    act.mark("after", 0)
    # ln_f = norm(x of the last block)
    run.norm_backward(d.ln_f, act.blocks[-1].x, w.ln_f, act.statistics, None)
    for layer in reversed(range(len(w.blocks))):
        x = act.blocks[layer - 1].x if layer else act.x
        _backward_block(run, w.blocks[layer], d.blocks[layer], act.blocks[layer], x, layer)
        act.mark("after", len(w.blocks) - layer)
    # x = dropout(wte[ids] + wpe)
    if run.dropout.p > 0.0:
        run.dropout.backward(act.dx, act.dx, 0, EMBEDDING)
    ops.embedding_backward(d.wte, d.wpe, act.dx, ids, *ids.shape, act.x.shape[1])
    act.mark("after", len(w.blocks) + 1)


def stage_of(p: Parameter, config: Config) -> int:
    """The stage of the backward pass at whose end a parameter's gradient is whole; forward, stages come from the last.

    0: the head, if it is its own. 1 .. n_layers: the matrices of a block, from the last one. n_layers + 1: all others.
    """
    if p.name == "lm_head.weight":
        return 0
    return config.n_layers - int(p.name.split(".")[2]) if p.hidden else config.n_layers + 1


def _backward_block(run: Pass, w: Block, d: Block, a: SimpleNamespace, x: np.ndarray, layer: int) -> None:
    """Turn act.dx (rows, C) from the gradient of a block's output into that of its input x (rows, C)."""
    act, bf16 = run.act, run.bf16
    rows, C = x.shape
    # x' = mid + dropout(activation(fc) @ mlp.c_proj)
    dprojected = _through_dropout(run, layer, MLP_PROJ)
    ops.linear_backward_input(act.dfc, dprojected, w.mlp_proj[0], rows, 4 * C, C, bf16)
    kernel(run.of.activation, "backward")(act.dfc, act.activated, act.dfc, a.fc, a.fc.size)  # makes activation(fc), too
    ops.linear_backward_weight(*d.mlp_proj, dprojected, act.activated, rows, 4 * C, C, bf16)
    # fc = norm(mid) @ c_fc
    run.linear_backward(act.dln, d.c_fc, act.dfc, a.ln_2, w.c_fc)
    run.norm_backward(d.ln_2, a.mid, w.ln_2, a.statistics_2, act.dx)
    # mid = x + dropout(attention(qkv) @ attn.c_proj)
    run.linear_backward(act.dln, d.attn_proj, _through_dropout(run, layer, ATTN_PROJ), a.att, w.attn_proj)
    ops.attention_backward(act.dqkv, act.dln, a.qkv, a.att, a.lse, *act.shape, run.heads, run.head_size, run.dropout.p,
                           run.dropout.key(layer, ATTENTION))
    # qkv = rotated(norm(x) @ c_attn)
    run.rotate_backward(act.dqkv)
    run.linear_backward(act.dln, d.c_attn, act.dqkv, a.ln_1, w.c_attn)
    run.norm_backward(d.ln_1, x, w.ln_1, a.statistics_1, act.dx)


def _through_dropout(run: Pass, layer: int, site: int) -> np.ndarray:
    """The gradient of a projection (rows, C) whose dropout was added to the residual stream."""
    if run.dropout.p == 0.0:
        return run.act.dx
    run.dropout.backward(run.act.dropped, run.act.dx, layer, site)
    return run.act.dropped
