"""Generation: a token at a time on a cache of keys and values, and the choice of the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from feste import ops, transformer
from feste.config import Config
from feste.errors import FesteError
from feste.transformer import Activations, Block, Dropout, Pass, Weights


class Sampler:
    """Draws tokens from logits. Temperature 0 is argmax; top_k and top_p cut the tail of the distribution.

    top_p is nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751. vocab_size draws from the first so many tokens
    only. The same seed draws the same tokens; None draws new ones each time. FesteError for a setting out of range.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 seed: int | None = None, vocab_size: int | None = None) -> None:
        if not (temperature >= 0.0 and np.isfinite(temperature)):
            raise FesteError(f"temperature must be 0 or more, got {temperature}", "temperature")
        if top_k is not None and top_k < 1:
            raise FesteError(f"top_k must be at least 1 or None, got {top_k}", "top_k")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise FesteError(f"top_p must lie in (0, 1] or be None, got {top_p}", "top_p")
        if vocab_size is not None and vocab_size < 1:
            raise FesteError(f"vocab_size must be at least 1 or None, got {vocab_size}", "vocab_size")
        self.temperature, self.top_k, self.top_p, self.vocab_size = temperature, top_k, top_p, vocab_size
        self.rng = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """One token from logits (V)."""
        logits = logits[:self.vocab_size]
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
        """Zero all but the fewest largest weights (V) that make up top_p of their sum."""
        order = np.argsort(-weights, kind="stable")
        before = weights[order].cumsum() - weights[order]
        weights[order[before >= self.top_p * weights.sum()]] = 0.0


class Cache:
    """Keys and values of every block for B sequences, (n_layers, B, H, block_size, D) each, of `length` tokens."""

    def __init__(self, c: Config, B: int) -> None:
        self.heads, self.head_size, self.block_size = c.n_heads, c.head_size, c.block_size
        shape = (c.n_layers, B, c.n_heads, c.block_size, c.head_size)
        self.k, self.v = ops.zeros(*shape), ops.zeros(*shape)
        self.length = 0

    def store(self, layer: int, qkv: np.ndarray, T: int) -> None:
        """Keys and values of a pass over T tokens, qkv (n T, 3C); one sequence serves all, or each its own."""
        heads = np.moveaxis(qkv.reshape(-1, T, 3, self.heads, self.head_size), (2, 3), (0, 2))
        self.k[layer, :, :, :T], self.v[layer, :, :, :T] = heads[1], heads[2]


@dataclass(frozen=True)
class Packing:
    """How the matrices are kept that every token reads: copies of fewer bytes, and the product with one."""

    dtype: type
    size: Callable[[int, int], int]       # elements of a packed weight (K, N)
    pack: Callable[..., None]             # (packed, weight, K, N, transposed)
    forward: Callable[..., None]          # (out, x, packed, bias, residual, rows, K, N)

    def __call__(self, weight: np.ndarray, transposed: bool = False) -> np.ndarray:
        """A packed copy of a weight (K, N), or of the transpose of (N, K)."""
        K, N = weight.shape[::-1] if transposed else weight.shape
        packed = ops.zeros(self.size(K, N), dtype=self.dtype)
        self.pack(packed, weight, K, N, transposed)
        return packed

    def weights(self, w: Weights) -> SimpleNamespace:
        """All weights, matrices packed; embeddings, biases and layer norms stay as they are."""
        blocks = [Block(b.ln_1, *((self(weight), bias) for weight, bias in (b.c_attn, b.attn_proj)), b.ln_2,
                        *((self(weight), bias) for weight, bias in (b.c_fc, b.mlp_proj))) for b in w.blocks]
        return SimpleNamespace(wte=w.wte, wpe=w.wpe, ln_f=w.ln_f, blocks=blocks, head=self(w.head, transposed=True))

    def linear(self, out: np.ndarray, x: np.ndarray, parameters: tuple, residual: np.ndarray | None = None) -> None:
        """out (B, N) = x (B, K) @ weight + bias (N) + residual (B, N), of a packed weight."""
        B, K = x.shape
        self.forward(out, x, *parameters, residual, B, K, out.shape[1])


PACKINGS = {"bf16": Packing(np.int32, ops.packed_size, ops.pack_weight, ops.packed_forward),
            "int8": Packing(np.uint8, ops.quantized_size, ops.quantize_weight, ops.quantized_forward)}


class _Reading(Pass):
    """A pass over whole sequences that leaves their keys and values in a cache."""

    def __init__(self, config: Config, act: Activations, bf16: bool, cache: Cache) -> None:
        super().__init__(config, act, bf16, Dropout())
        self.cache = cache

    def attend(self, a: SimpleNamespace, layer: int) -> None:
        super().attend(a, layer)
        self.cache.store(layer, a.qkv, self.act.shape[1])


class _Appending(Pass):
    """A pass over one token of each sequence, which attends to those in the cache and to itself."""

    def __init__(self, config: Config, act: Activations, packing: Packing | None, cache: Cache) -> None:
        super().__init__(config, act, False, Dropout())
        self.cache = cache
        if packing is not None:
            self.linear = packing.linear

    @property
    def position(self) -> int:
        return self.cache.length

    def attend(self, a: SimpleNamespace, layer: int) -> None:
        cache = self.cache
        ops.attention_decode(a.att, cache.k[layer], cache.v[layer], a.qkv, self.act.shape[0], self.heads,
                             self.head_size, self.position, cache.block_size)

    def project(self, out: np.ndarray, x: np.ndarray, parameters: tuple, residual: np.ndarray, layer: int,
                site: int) -> None:
        self.linear(out, x, parameters, residual)


class Decoder:
    """Continues `num_samples` sequences that begin alike, a token at a time.

    A token reads every matrix once, so with bf16 and int8 they are packed first, in two bytes or one for each weight;
    prompts are read with the weights themselves. A decoder may be asked again and again, as long as they stay the same.
    """

    def __init__(self, config: Config, weights: Weights, precision: str, num_samples: int) -> None:
        self.config, self.weights, self.bf16, self.num_samples = config, weights, precision == "bf16", num_samples
        self.cache, self.packing = Cache(config, num_samples), PACKINGS.get(precision)
        self._reading: Activations | None = None
        tokens = Activations(config, num_samples, 1, keep=False)
        self._appending = _Appending(config, tokens, self.packing, self.cache)
        self._logits = ops.zeros(num_samples, config.vocab_size)
        self._decoding = weights if self.packing is None else self.packing.weights(weights)

    def stream(self, prompt_ids, max_new_tokens: int, sampler: Sampler,
               stop_tokens: Iterable[int] = ()) -> Iterator[list[int]]:
        """The next token of each sequence, max_new_tokens times. FesteError, at once, for a prompt that is not one.

        Ends early when every sequence has drawn one of stop_tokens; what one draws behind its own is of no meaning.

        The model sees the last block_size tokens. Positions are absolute, so once the context is full each token
        shifts all of them and the context is read again.
        """
        return self._stream(self._check(prompt_ids, max_new_tokens), max_new_tokens, sampler, frozenset(stop_tokens))

    def _stream(self, prompt: np.ndarray, max_new_tokens: int, sampler: Sampler,
                stop_tokens: frozenset[int]) -> Iterator[list[int]]:
        B, block_size = self.num_samples, self.config.block_size
        context = np.tile(prompt[-block_size:], (B, 1))
        ids: list[int] = []
        ended = [False] * B
        for _ in range(max_new_tokens):
            if not ids:
                logits = self.read(context[:1])
            else:
                new = np.array(ids, np.int32).reshape(B, 1)
                context = np.concatenate([context, new], axis=1)[:, -block_size:]
                logits = self.append(new) if self.cache.length < block_size else self.read(context)
            ids = [sampler(logits[b % len(logits)]) for b in range(B)]
            yield ids
            ended = [over or i in stop_tokens for over, i in zip(ended, ids, strict=True)]
            if all(ended):
                return

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Fill the cache from whole sequences (n, T), n = 1 or num_samples; the logits (n, V) of their last tokens."""
        n, T = ids.shape
        V, C = self.config.vocab_size, self.config.n_embd
        if self._reading is None or self._reading.shape != (n, T):
            self._reading = Activations(self.config, n, T, keep=False)
        transformer.forward(_Reading(self.config, self._reading, self.bf16, self.cache), self.weights,
                            np.ascontiguousarray(ids))
        self.cache.length = T
        last = np.ascontiguousarray(self._reading.ln_f.reshape(n, T, C)[:, -1])
        ops.gemm(self._logits[:n], last, self.weights.head, n, V, C, trans_b=True, bf16=self.bf16)
        return self._logits[:n]

    def append(self, ids: np.ndarray) -> np.ndarray:
        """Append one token (num_samples, 1) to each cached sequence; the logits (num_samples, V)."""
        run, w, logits = self._appending, self._decoding, self._logits
        (B, V), C = logits.shape, self.config.n_embd
        with ops.Recording() as token:
            transformer.forward(run, w, ids)
            if self.packing is not None:
                self.packing.forward(logits, run.act.ln_f, w.head, None, None, B, C, V)
            else:
                ops.gemm(logits, run.act.ln_f, w.head, B, V, C, trans_b=True)
        token.run()
        self.cache.length += 1
        return logits

    def _check(self, prompt_ids, max_new_tokens: int) -> np.ndarray:
        """The prompt as an int32 array, or FesteError."""
        prompt, vocab_size = np.asarray(list(prompt_ids)), self.config.vocab_size
        if prompt.ndim != 1 or prompt.size == 0 or prompt.dtype.kind not in "iu":
            raise FesteError("the prompt must be a sequence of at least one token id", "prompt_ids")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            bad = prompt.min() if prompt.min() < 0 else prompt.max()
            raise FesteError(f"token ids must lie in 0 .. {vocab_size - 1}, the prompt has {bad}", "prompt_ids")
        if max_new_tokens < 0:
            raise FesteError(f"max_new_tokens must be 0 or more, got {max_new_tokens}", "max_new_tokens")
        return prompt.astype(np.int32)

