"""Generation: a token at a time on a cache of keys and values, and the choice of the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from feste import ops
from feste.config import Config
from feste.memory import zeros


class Sampler:
    """Draws tokens from logits. Temperature 0 is argmax; top_k and top_p cut the tail of the distribution.

    top_p is nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751. The same seed draws the same tokens;
    None draws new ones each time.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 seed: int | None = None) -> None:
        if not (temperature >= 0.0 and np.isfinite(temperature)):
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1] or be None, got {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.rng = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """One token from logits (V)."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        scaled /= self.temperature
        if self.top_k is not None and self.top_k < scaled.size:
            kth = np.partition(scaled, -self.top_k)[-self.top_k]
            scaled[scaled < kth] = -np.inf
        weights = np.exp(scaled)
        if self.top_p is not None and self.top_p < 1.0:
            self._keep_nucleus(weights)
        total = weights.cumsum()
        return min(int(total.searchsorted(self.rng.random() * total[-1], side="right")), logits.size - 1)

    def _keep_nucleus(self, weights: np.ndarray) -> None:
        order = np.argsort(-weights, kind="stable")
        before = weights[order].cumsum() - weights[order]
        weights[order[before >= self.top_p * weights.sum()]] = 0.0


class Cache:
    """Keys and values of every block for B sequences, (B, H, block_size, D) each, and room for one token."""

    def __init__(self, c: Config, B: int) -> None:
        self.B, self.H, self.D, self.block_size = B, c.n_heads, c.head_size, c.block_size
        shape = (c.n_layers, B, c.n_heads, c.block_size, c.head_size)
        self.k, self.v = zeros(*shape), zeros(*shape)
        self.length = 0
        C = c.n_embd
        self.x, self.mid, self.ln, self.att = (zeros(B, C) for _ in range(4))
        self.qkv = zeros(B, 3 * C)
        self.fc, self.gelu = zeros(B, 4 * C), zeros(B, 4 * C)
        self.mean, self.rstd = zeros(B), zeros(B)
        self.logits = zeros(B, c.vocab_size)

    def store(self, layer: int, qkv: np.ndarray, T: int) -> None:
        """Take over the keys and values of a pass over T tokens; one sequence serves all, or each its own."""
        heads = np.moveaxis(qkv.reshape(-1, T, 3, self.H, self.D), (2, 3), (0, 2))
        self.k[layer, :, :, :T], self.v[layer, :, :, :T] = heads[1], heads[2]
        self.length = T


class Weights:
    """The matrices of a model as decoding reads them: in place, or in bf16 packed once, at half the bytes."""

    def __init__(self, head: np.ndarray, blocks: list, packed: bool) -> None:
        self.packed = packed
        self.head = self._prepare(head, transposed=True)
        names = ("c_attn", "attn_proj", "c_fc", "mlp_proj")
        self.blocks = [{name: (self._prepare(getattr(w, name)[0]), getattr(w, name)[1]) for name in names}
                       for w in blocks]

    def _prepare(self, weight: np.ndarray, transposed: bool = False) -> np.ndarray:
        if not self.packed:
            return weight
        K, N = weight.shape[::-1] if transposed else weight.shape
        packed = zeros(ops.packed_size(K, N), dtype=np.int32)
        ops.pack_weight(packed, weight, K, N, transposed)
        return packed

    def linear(self, out: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray,
               residual: np.ndarray | None) -> None:
        """out (B, N) = x (B, K) @ weight + bias + residual."""
        (B, K), N = x.shape, out.shape[1]
        if self.packed:
            ops.packed_forward(out, x, weight, bias, residual, B, K, N)
        else:
            ops.linear_forward(out, x, weight, bias, residual, B, K, N)

    def logits(self, out: np.ndarray, x: np.ndarray) -> None:
        (B, C), V = x.shape, out.shape[1]
        if self.packed:
            ops.packed_forward(out, x, self.head, None, None, B, C, V)
        else:
            ops.gemm(out, x, self.head, B, V, C, trans_b=True)


def check_request(prompt_ids, max_new_tokens: int, vocab_size: int) -> np.ndarray:
    """The prompt as an integer array, or ValueError."""
    prompt = np.asarray(list(prompt_ids))
    if prompt.ndim != 1 or prompt.size == 0 or prompt.dtype.kind not in "iu":
        raise ValueError("the prompt must be a sequence of at least one token id")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        bad = prompt.min() if prompt.min() < 0 else prompt.max()
        raise ValueError(f"token ids must lie in 0 .. {vocab_size - 1}, the prompt has {bad}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    return prompt.astype(np.int32)


def generate(prompt: np.ndarray, cache: Cache, max_new_tokens: int, sampler: Sampler,
             read: Callable[[np.ndarray], np.ndarray],
             decode: Callable[[np.ndarray], np.ndarray]) -> Iterator[list[int]]:
    """Yield the next tokens of cache.B sequences that start with one prompt, max_new_tokens times.

    read fills the cache from whole sequences (n, T), decode appends a token to each (B, 1); both return logits (n, V).
    The model sees the last block_size tokens. Positions are absolute, so once the context is full each token
    shifts all of them and the context is read again.
    """
    block_size = cache.block_size
    context = np.tile(prompt[-block_size:], (cache.B, 1))
    ids: list[int] = []
    for _ in range(max_new_tokens):
        if not ids:
            logits = read(context[:1])
        else:
            new = np.array(ids, np.int32).reshape(cache.B, 1)
            context = np.concatenate([context, new], axis=1)[:, -block_size:]
            logits = decode(new) if cache.length < block_size else read(context)
        ids = [sampler(logits[b % len(logits)]) for b in range(cache.B)]
        yield ids
