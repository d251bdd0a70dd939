"""GPT2: the order in which the kernels run, forward and backward.

One block, with the names of Hugging Face's GPT-2 (Radford et al. 2019), forward:

    ln_1 = layernorm(x)                 qkv = ln_1 @ c_attn          att = attention(qkv)
    mid = x + att @ attn.c_proj         ln_2 = layernorm(mid)        fc = ln_2 @ c_fc
    x' = mid + gelu(fc) @ mlp.c_proj

and backward the same lines from the last to the first. A training pass keeps per token and block: x', ln_1,
qkv (3C), att, mid, ln_2 and fc (4C), 12 C floats; gelu(fc) is made again. Logits are never whole in memory:
head and loss go through HEAD_ROWS rows at a time. Nothing is allocated from one step to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np

from feste import generation, ops
from feste.config import PRECISIONS, Config
from feste.memory import zeros
from feste.params import ParameterTable

HEAD_ROWS = 512


class Activations:
    """The buffers of one pass over B sequences of T tokens.

    With keep, every block has its own, as the backward pass needs them; without, all blocks share one set.
    """

    def __init__(self, config: Config, B: int, T: int, keep: bool) -> None:
        self.shape, self.keep = (B, T), keep
        rows, C = B * T, config.n_embd
        self.x = zeros(rows, C)          # the embedding's output, the first block's input
        self.gelu = zeros(rows, 4 * C)
        layers = [self._layer(config, B, T) for _ in range(config.n_layers if keep else 1)]
        self.layers = layers if keep else layers * config.n_layers
        self.ln_f, self.mean, self.rstd = zeros(rows, C), zeros(rows), zeros(rows)
        self.losses, self.lse = zeros(rows), zeros(rows)
        self.logits = zeros(min(rows, HEAD_ROWS), config.vocab_size)
        if keep:
            self.dx, self.dln, self.dproj = zeros(rows, C), zeros(rows, C), None
            self.dfc, self.dqkv = zeros(rows, 4 * C), zeros(rows, 3 * C)
        if config.dropout > 0.0:
            self.dproj = zeros(rows, C)  # a projection on its way through dropout, either way

    @staticmethod
    def _layer(config: Config, B: int, T: int) -> SimpleNamespace:
        rows, C = B * T, config.n_embd
        return SimpleNamespace(
            ln_1=zeros(rows, C), mean_1=zeros(rows), rstd_1=zeros(rows), qkv=zeros(rows, 3 * C),
            att=zeros(rows, C), lse=zeros(B, config.n_heads, T), mid=zeros(rows, C),
            ln_2=zeros(rows, C), mean_2=zeros(rows), rstd_2=zeros(rows), fc=zeros(rows, 4 * C), x=zeros(rows, C))


def _block_views(views: dict[str, np.ndarray], i: int) -> SimpleNamespace:
    """The twelve parameters (or gradients) of block i, without the long names."""
    prefix = f"transformer.h.{i}."
    short = {"ln_1": "ln_1", "c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "ln_2": "ln_2",
             "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
    return SimpleNamespace(**{key: (views[f"{prefix}{name}.weight"], views[f"{prefix}{name}.bias"])
                              for key, name in short.items()})


class GPT2:
    """A GPT-2 style transformer with hand-written gradients.

    `params` and `grads` map Hugging Face names to float32 views of the flat buffers `flat_params` and
    `flat_grads`. precision is "fp32", or "bf16" to round the inputs of matrix products to bfloat16; parameters
    stay float32. seed=None leaves the parameters zero, for a loader to fill.
    """

    def __init__(self, config: Config, seed: int | None = 1337, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.config, self.precision = config, precision
        self.dropout_seed = 0 if seed is None else seed
        self.table = ParameterTable(config)
        self.flat_params = zeros(self.table.size)
        self.flat_grads = zeros(self.table.size)
        self.params = self.table.views(self.flat_params)
        self.grads = self.table.views(self.flat_grads)
        if seed is not None:
            self.table.initialise(self.flat_params, seed)
        self._blocks = [_block_views(self.params, i) for i in range(config.n_layers)]
        self._dblocks = [_block_views(self.grads, i) for i in range(config.n_layers)]
        self._activations: dict[bool, Activations] = {}

    def num_parameters(self) -> int:
        return self.table.size

    def memory_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of a training step on batch_size sequences: parameters, gradients, moments and activations."""
        c, rows = self.config, batch_size * seq_len
        per_row = (12 * c.n_layers + 15 + (c.dropout > 0.0)) * c.n_embd + 4 * c.n_layers + 4
        activations = rows * per_row + rows * c.n_layers * c.n_heads + min(rows, HEAD_ROWS) * c.vocab_size
        return 4 * (4 * self.table.size + activations)

    @property
    def head(self) -> np.ndarray:
        """The output weight (V, C): the token embedding if the weights are tied."""
        return self.params["transformer.wte.weight" if self.config.tie_weights else "lm_head.weight"]

    @property
    def _dhead(self) -> np.ndarray:
        return self.grads["transformer.wte.weight" if self.config.tie_weights else "lm_head.weight"]

    # ---- what users call ------------------------------------------------------------------------------------

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) float32 for ids (B, T). ValueError for ids outside the vocabulary or T > block_size."""
        ids = self._check_ids(ids, "ids")
        act = self._buffers(*ids.shape, keep=False)
        self._forward(act, ids)
        c, rows = self.config, ids.size
        logits = zeros(*ids.shape, c.vocab_size)
        ops.gemm(logits, act.ln_f, self.head, rows, c.vocab_size, c.n_embd, trans_b=True, bf16=self._bf16)
        return logits

    def loss(self, ids: np.ndarray, targets: np.ndarray) -> float:
        """Mean negative log-likelihood in nats of targets (B, T) given ids (B, T), without dropout."""
        ids, targets = self._check_pair(ids, targets)
        act = self._buffers(*ids.shape, keep=False)
        self._forward(act, ids)
        for rows in self._head_chunks(ids.size):
            self._head_loss(act, targets.reshape(-1), rows)
        return float(act.losses.mean(dtype=np.float64))

    def zero_grad(self) -> None:
        self.flat_grads.fill(0.0)

    def forward_backward(self, ids: np.ndarray, targets: np.ndarray, scale: float = 1.0, dropout_key: int = 0) -> float:
        """The mean loss; adds scale * its gradient to `grads`.

        Dropout masks are a pure function of (the model's seed, dropout_key).
        """
        ids, targets = self._check_pair(ids, targets)
        act = self._buffers(*ids.shape, keep=True)
        self._forward(act, ids, dropout_key)
        self._backward_head(act, targets.reshape(-1), scale / ids.size)
        for i in reversed(range(self.config.n_layers)):
            self._backward_block(act, i, act.layers[i - 1].x if i else act.x, dropout_key)
        B, T = ids.shape
        C, p = self.config.n_embd, self.config.dropout
        if p > 0.0:  # x = dropout(wte[ids] + wpe)
            ops.dropout_backward(act.dx, act.dx, p, self._dropout_key(dropout_key, 0, 0), ids.size * C)
        ops.embedding_backward(self.grads["transformer.wte.weight"], self.grads["transformer.wpe.weight"],
                               act.dx, ids, B, T, C)
        return float(act.losses.mean(dtype=np.float64))

    def generate(self, prompt_ids, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int | None = None) -> list[int]:
        """The prompt and max_new_tokens sampled tokens. Temperature 0 takes the most likely token.

        top_k keeps the k most likely tokens, top_p the fewest whose probabilities reach p. The model sees the
        last block_size tokens.
        """
        new = self.generate_tokens(prompt_ids, max_new_tokens, temperature, top_k, top_p, seed)
        return [*map(int, prompt_ids), *new]

    def generate_tokens(self, prompt_ids, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                        top_p: float | None = None, seed: int | None = None) -> Iterator[int]:
        """The new tokens of `generate`, one at a time."""
        sampler = generation.Sampler(temperature, top_k, top_p, seed)
        return (ids[0] for ids in self.stream(prompt_ids, 1, max_new_tokens, sampler))

    def generate_batch(self, prompt_ids, num_samples: int, max_new_tokens: int, temperature: float = 1.0,
                       top_k: int | None = None, top_p: float | None = None,
                       seed: int | None = None) -> list[list[int]]:
        """num_samples continuations of one prompt, made together; each starts with the prompt."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        sampler = generation.Sampler(temperature, top_k, top_p, seed)
        steps = list(self.stream(prompt_ids, num_samples, max_new_tokens, sampler))
        return [[*map(int, prompt_ids), *(ids[b] for ids in steps)] for b in range(num_samples)]

    # ---- the door -------------------------------------------------------------------------------------------

    def _check_ids(self, ids: np.ndarray, name: str) -> np.ndarray:
        """ids as a C-contiguous int32 array (B, T), or ValueError."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"{name} must be a (B, T) array of integers, got {ids.dtype} of shape {ids.shape}")
        if ids.shape[1] > self.config.block_size:
            raise ValueError(f"a sequence of {ids.shape[1]} tokens is longer than block_size={self.config.block_size}")
        if ids.dtype != np.int32:
            low, high = ids.min(), ids.max()
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"{name} must lie in 0 .. {self.config.vocab_size - 1}, got {bad}")
        return np.ascontiguousarray(ids, np.int32)  # the kernels check the range of int32 ids

    def _check_pair(self, ids: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, targets = self._check_ids(ids, "ids"), self._check_ids(targets, "targets")
        if ids.shape != targets.shape:
            raise ValueError(f"ids and targets must have the same shape, got {ids.shape} and {targets.shape}")
        return ids, targets

    def _buffers(self, B: int, T: int, keep: bool) -> Activations:
        act = self._activations.get(keep)
        if act is None or act.shape != (B, T):
            self._activations.pop(keep, None)  # let go of the old ones before taking the new
            act = self._activations[keep] = Activations(self.config, B, T, keep)
        return act

    @property
    def _bf16(self) -> bool:
        return self.precision == "bf16"

    # ---- forward --------------------------------------------------------------------------------------------

    def _forward(self, act: Activations, ids: np.ndarray, dropout_key: int | None = None, cache=None) -> None:
        """Fill act up to ln_f. Dropout is on if dropout_key is given; keys and values go into cache if given."""
        B, T = ids.shape
        C = self.config.n_embd
        p = self.config.dropout if dropout_key is not None else 0.0
        ops.embedding_forward(act.x, ids, self.params["transformer.wte.weight"], self.params["transformer.wpe.weight"],
                              B, T, C)
        if p > 0.0:
            ops.dropout_forward(act.x, act.x, None, p, self._dropout_key(dropout_key, 0, 0), ids.size * C)
        x = act.x
        for i, layer in enumerate(act.layers):
            self._forward_block(act, i, x, p, dropout_key)
            if cache is not None:
                cache.store(i, layer.qkv, T)
            x = layer.x
        ops.layernorm_forward(act.ln_f, act.mean, act.rstd, x, self.params["transformer.ln_f.weight"],
                              self.params["transformer.ln_f.bias"], ids.size, C)

    def _forward_block(self, act: Activations, i: int, x: np.ndarray, p: float, dropout_key: int | None) -> None:
        a, w, bf16 = act.layers[i], self._blocks[i], self._bf16
        (B, T), C, H = act.shape, self.config.n_embd, self.config.n_heads
        rows = B * T
        ops.layernorm_forward(a.ln_1, a.mean_1, a.rstd_1, x, *w.ln_1, rows, C)
        ops.linear_forward(a.qkv, a.ln_1, *w.c_attn, None, rows, C, 3 * C, bf16)
        ops.attention_forward(a.att, a.lse, a.qkv, B, T, H, C // H, p, self._dropout_key(dropout_key, i, 1))
        self._project(act, a.mid, a.att, w.attn_proj, x, C, p, self._dropout_key(dropout_key, i, 2))
        ops.layernorm_forward(a.ln_2, a.mean_2, a.rstd_2, a.mid, *w.ln_2, rows, C)
        ops.linear_forward(a.fc, a.ln_2, *w.c_fc, None, rows, C, 4 * C, bf16)
        ops.gelu_forward(act.gelu, a.fc, rows * 4 * C)
        self._project(act, a.x, act.gelu, w.mlp_proj, a.mid, 4 * C, p, self._dropout_key(dropout_key, i, 3))

    def _project(self, act: Activations, out: np.ndarray, x: np.ndarray, weight_bias: tuple, residual: np.ndarray,
                 K: int, p: float, key: int) -> None:
        """out = residual + dropout(x @ weight + bias)."""
        rows, C = out.shape
        if p == 0.0:
            ops.linear_forward(out, x, *weight_bias, residual, rows, K, C, self._bf16)
        else:
            ops.linear_forward(act.dproj, x, *weight_bias, None, rows, K, C, self._bf16)
            ops.dropout_forward(out, act.dproj, residual, p, key, rows * C)

    def _dropout_key(self, dropout_key: int | None, layer: int, site: int) -> int:
        """64 bits from (seed, dropout_key, layer, site); the kernels hash them further."""
        mixed = (self.dropout_seed * 0xD1342543DE82EF95 + (dropout_key or 0) * 0xA24BAED4963EE407
                 + (layer * 4 + site + 1) * 0x9FB21C651E98DF25)
        return (mixed ^ (mixed >> 32)) & 0xFFFFFFFFFFFFFFFF

    def _head_chunks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + HEAD_ROWS, rows)) for start in range(0, rows, HEAD_ROWS))

    def _head_loss(self, act: Activations, targets: np.ndarray, rows: slice) -> np.ndarray:
        """Logits of some rows, in a shared buffer, and their losses."""
        c, n = self.config, rows.stop - rows.start
        logits = act.logits[:n]
        ops.gemm(logits, act.ln_f[rows], self.head, n, c.vocab_size, c.n_embd, trans_b=True, bf16=self._bf16)
        ops.cross_entropy_forward(act.losses[rows], act.lse[rows], logits, targets[rows], n, c.vocab_size)
        return logits

    # ---- backward -------------------------------------------------------------------------------------------

    def _backward_head(self, act: Activations, targets: np.ndarray, scale: float) -> None:
        """Losses of every row, and act.dx, the gradient of the last block's output."""
        c, bf16 = self.config, self._bf16
        for rows in self._head_chunks(targets.size):
            n = rows.stop - rows.start
            logits = self._head_loss(act, targets, rows)
            ops.cross_entropy_backward(logits, logits, targets[rows], act.lse[rows], scale, n, c.vocab_size)
            # logits = ln_f @ head^T
            ops.gemm(act.dln[rows], logits, self.head, n, c.n_embd, c.vocab_size, bf16=bf16)
            ops.gemm(self._dhead, logits, act.ln_f[rows], c.vocab_size, c.n_embd, n, trans_a=True, accumulate=True,
                     bf16=bf16)
        ops.layernorm_backward(act.dx, self.grads["transformer.ln_f.weight"], self.grads["transformer.ln_f.bias"],
                               act.dln, act.layers[-1].x, self.params["transformer.ln_f.weight"], act.mean, act.rstd,
                               None, targets.size, c.n_embd)

    def _backward_block(self, act: Activations, i: int, x: np.ndarray, dropout_key: int) -> None:
        """Turn act.dx from the gradient of block i's output into that of its input x."""
        a, w, d, bf16 = act.layers[i], self._blocks[i], self._dblocks[i], self._bf16
        (B, T), C, H, p = act.shape, self.config.n_embd, self.config.n_heads, self.config.dropout
        rows = B * T
        # x' = mid + dropout(gelu(fc) @ mlp.c_proj)
        dproj = self._through_dropout(act, p, self._dropout_key(dropout_key, i, 3))
        ops.linear_backward_input(act.dfc, dproj, w.mlp_proj[0], rows, 4 * C, C, bf16)
        ops.gelu_backward(act.dfc, act.gelu, act.dfc, a.fc, rows * 4 * C)
        ops.linear_backward_weight(*d.mlp_proj, dproj, act.gelu, rows, 4 * C, C, bf16)
        # fc = layernorm(mid) @ c_fc
        ops.linear_backward_input(act.dln, act.dfc, w.c_fc[0], rows, C, 4 * C, bf16)
        ops.linear_backward_weight(*d.c_fc, act.dfc, a.ln_2, rows, C, 4 * C, bf16)
        ops.layernorm_backward(act.dx, *d.ln_2, act.dln, a.mid, w.ln_2[0], a.mean_2, a.rstd_2, act.dx, rows, C)
        # mid = x + dropout(attention(qkv) @ attn.c_proj)
        dproj = self._through_dropout(act, p, self._dropout_key(dropout_key, i, 2))
        ops.linear_backward_input(act.dln, dproj, w.attn_proj[0], rows, C, C, bf16)
        ops.linear_backward_weight(*d.attn_proj, dproj, a.att, rows, C, C, bf16)
        ops.attention_backward(act.dqkv, act.dln, a.qkv, a.att, a.lse, B, T, H, C // H, p,
                               self._dropout_key(dropout_key, i, 1))
        # qkv = layernorm(x) @ c_attn
        ops.linear_backward_input(act.dln, act.dqkv, w.c_attn[0], rows, C, 3 * C, bf16)
        ops.linear_backward_weight(*d.c_attn, act.dqkv, a.ln_1, rows, C, 3 * C, bf16)
        ops.layernorm_backward(act.dx, *d.ln_1, act.dln, x, w.ln_1[0], a.mean_1, a.rstd_1, act.dx, rows, C)

    def _through_dropout(self, act: Activations, p: float, key: int) -> np.ndarray:
        """The gradient of a projection whose dropout was added to the residual stream."""
        if p == 0.0:
            return act.dx
        ops.dropout_backward(act.dproj, act.dx, p, key, act.dx.size)
        return act.dproj

    # ---- generation -----------------------------------------------------------------------------------------

    def stream(self, prompt_ids, num_samples: int, max_new_tokens: int,
               sampler: generation.Sampler) -> Iterator[list[int]]:
        """The next token of each of num_samples continuations of one prompt, max_new_tokens times."""
        prompt = generation.check_request(prompt_ids, max_new_tokens, self.config.vocab_size)
        cache = generation.Cache(self.config, num_samples)
        weights = generation.Weights(self.head, self._blocks, packed=self._bf16)
        return generation.generate(prompt, cache, max_new_tokens, sampler, partial(self._read, cache),
                                   partial(self._decode, weights, cache))

    def _read(self, cache: generation.Cache, ids: np.ndarray) -> np.ndarray:
        """Fill the cache from whole sequences (n, T); returns the logits of their last tokens (n, V)."""
        n, T = ids.shape
        c = self.config
        act = self._buffers(n, T, keep=False)
        self._forward(act, np.ascontiguousarray(ids), cache=cache)
        last = np.ascontiguousarray(act.ln_f.reshape(n, T, c.n_embd)[:, -1])
        ops.gemm(cache.logits[:n], last, self.head, n, c.vocab_size, c.n_embd, trans_b=True, bf16=self._bf16)
        return cache.logits[:n]

    def _decode(self, weights: generation.Weights, cache: generation.Cache, ids: np.ndarray) -> np.ndarray:
        """Append one token (B, 1) to each cached sequence; returns the logits (B, V)."""
        params, linear = self.params, weights.linear
        B, C, H, D = cache.B, self.config.n_embd, cache.H, cache.D
        x, ln, stats = cache.x, cache.ln, (cache.mean, cache.rstd)
        ops.embedding_forward(x, ids, params["transformer.wte.weight"], params["transformer.wpe.weight"], B, 1, C,
                              cache.length)
        for i, (block, w) in enumerate(zip(self._blocks, weights.blocks, strict=True)):
            ops.layernorm_forward(ln, *stats, x, *block.ln_1, B, C)
            linear(cache.qkv, ln, *w["c_attn"], None)
            ops.attention_decode(cache.att, cache.k[i], cache.v[i], cache.qkv, B, H, D, cache.length, cache.block_size)
            linear(cache.mid, cache.att, *w["attn_proj"], x)
            ops.layernorm_forward(ln, *stats, cache.mid, *block.ln_2, B, C)
            linear(cache.fc, ln, *w["c_fc"], None)
            ops.gelu_forward(cache.gelu, cache.fc, B * 4 * C)
            linear(x, cache.gelu, *w["mlp_proj"], cache.mid)
        ops.layernorm_forward(ln, *stats, x, params["transformer.ln_f.weight"], params["transformer.ln_f.bias"], B, C)
        weights.logits(cache.logits, ln)
        cache.length += 1
        return cache.logits
