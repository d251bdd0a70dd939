"""GPT2: parameters and gradients in flat buffers, the head and its loss, and what users call.

The layers between the ids and the head are in `transformer`, decoding in `generation`. Logits are never whole in
memory: head and loss go through HEAD_ROWS rows at a time. Nothing is allocated from one training step to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import takewhile

import numpy as np

from feste import ops, transformer
from feste.config import GENERATION_PRECISIONS, IGNORED, Config
from feste.errors import FesteError
from feste.formats import huggingface
from feste.generation import Decoder, Sampler
from feste.params import ParameterTable
from feste.transformer import HEAD_ROWS, Activations, Arena, Dropout, Gradients, Hooks, Pass, Weights


class GPT2:
    """A GPT-2 style transformer (Radford et al. 2019) with hand-written gradients.

    `params` and `grads` map Hugging Face names to float32 views of the flat buffers `flat_params` and `flat_grads`;
    assigning to a name writes into its view. precision is "fp32", "bf16" to round the inputs of matrix products to
    bfloat16, or "int8" to generate from weights of 8 bits, and then it cannot be trained; parameters stay float32.
    seed=None leaves the parameters zero, for a loader to fill.

    A copy, also by pickle or in another process, is a model of its own with the same parameters and gradients.
    """

    def __init__(self, config: Config, seed: int | None = 1337, precision: str = "fp32") -> None:
        if precision not in GENERATION_PRECISIONS:
            raise FesteError(f"precision must be one of {', '.join(GENERATION_PRECISIONS)}, got {precision!r}",
                             "precision")
        self._make(config, precision, dropout_seed=0 if seed is None else seed)
        if seed is not None:
            self.table.initialise(self.flat_params, seed)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, precision: str = "fp32") -> GPT2:
        """A GPT-2 from a directory of Hugging Face's transformers: config.json and model.safetensors, or its shards.

        Reads the directory only. FesteError names what feste does not compute, or what is damaged.
        """
        config, files = huggingface.read_config(directory)
        model = cls(config, seed=None, precision=precision)
        huggingface.read_tensors(files, config, model.params)
        return model

    def _make(self, config: Config, precision: str, dropout_seed: int) -> None:
        """A model whose parameters are zero. The flat buffers and the views of them are made here and stay."""
        self.config, self.precision, self.dropout_seed = config, precision, dropout_seed
        self.table = ParameterTable(config)
        self._flat_params, self.gradients = ops.zeros(self.table.size), self.new_gradients()
        self._flat_grads, self.params, self.grads = (
            self.gradients.flat, self.table.views(self._flat_params), self.gradients.views)
        self._weights = Weights(self.params, config)
        self._activations: dict[bool, Activations] = {}
        self._arenas = {True: Arena(), False: Arena()}

    def __getstate__(self) -> dict:
        return {"config": self.config, "precision": self.precision, "dropout_seed": self.dropout_seed,
                "flat_params": self._flat_params, "flat_grads": self._flat_grads}

    def __setstate__(self, state: dict) -> None:
        """Views of a copied buffer would be copies of their own, so buffers and views are made anew."""
        self._make(state["config"], state["precision"], state["dropout_seed"])
        np.copyto(self._flat_params, state["flat_params"])
        np.copyto(self._flat_grads, state["flat_grads"])

    def with_vocabulary(self, vocab_size: int) -> GPT2:
        """This model with room for more tokens, whose embeddings begin as the mean of the others: as likely as any."""
        if vocab_size < self.config.vocab_size:
            raise FesteError(f"vocab_size={vocab_size} is less than the {self.config.vocab_size} tokens of the model",
                             "vocab_size")
        other = GPT2(replace(self.config, vocab_size=vocab_size), seed=None, precision=self.precision)
        other.dropout_seed = self.dropout_seed
        for name, values in self.params.items():
            if other.params[name].shape != values.shape:
                other.params[name] = values.mean(axis=0)
            other.params[name][:len(values)] = values
        return other

    def __repr__(self) -> str:
        c = self.config
        return (f"GPT2({self.num_parameters():,} parameters: vocab_size={c.vocab_size}, n_embd={c.n_embd}, "
                f"n_layers={c.n_layers}, n_heads={c.n_heads}, block_size={c.block_size}, dropout={c.dropout}, "
                f"tie_weights={c.tie_weights}, arch={c.arch}; {self.precision})")

    @property
    def flat_params(self) -> np.ndarray:
        """All parameters, float32. Assigning writes into the buffer, so that the views stay views of it."""
        return self._flat_params

    @flat_params.setter
    def flat_params(self, values: np.ndarray) -> None:
        self._flat_params[...] = values

    @property
    def flat_grads(self) -> np.ndarray:
        """All gradients, laid out like flat_params."""
        return self._flat_grads

    @flat_grads.setter
    def flat_grads(self, values: np.ndarray) -> None:
        self._flat_grads[...] = values

    @property
    def head(self) -> np.ndarray:
        """The output weight (V, C): the token embedding if the weights are tied."""
        return self._weights.head

    def new_gradients(self) -> Gradients:
        """Room for gradients beside `grads`, all of them zero."""
        return Gradients(self.table, self.config)

    def num_parameters(self) -> int:
        return self.table.size

    def memory_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of a training step on batch_size sequences: parameters, gradients, moments and activations."""
        return 4 * self._flat_params.nbytes + Activations.nbytes_of(self.config, batch_size, seq_len, keep=True)

    # ---- losses and gradients -------------------------------------------------------------------------------

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) float32 for ids (B, T). ValueError for ids outside the vocabulary or T > block_size."""
        ids = self._check_ids(ids, "ids")
        act = self._buffers(*ids.shape, keep=False)
        transformer.forward(self._pass(act), self._weights, ids)
        V, C = self.config.vocab_size, self.config.n_embd
        logits = ops.zeros(*ids.shape, V)
        ops.gemm(logits, act.ln_f, self._weights.head, ids.size, V, C, trans_b=True, bf16=self._bf16)
        return logits

    def loss(self, ids: np.ndarray, targets: np.ndarray) -> float:
        """Mean negative log-likelihood in nats of targets (B, T) given ids (B, T), without dropout.

        Targets of -100 are not counted.
        """
        act = self._given(*self._check_pair(ids, targets), keep=False)

        def kernels() -> None:
            transformer.forward(self._pass(act), self._weights, act.ids)
            counted = self._counted_rows(act)
            for rows in _head_chunks(act.n_counted):
                self._head_loss(act, counted, rows)

        act.perform((self.precision,), kernels)
        return float(act.losses[:act.n_counted].mean(dtype=np.float64))

    def zero_grad(self) -> None:
        self._flat_grads.fill(0.0)

    def forward_backward(self, ids: np.ndarray, targets: np.ndarray, scale: float = 1.0, dropout_key: int = 0,
                         into: Gradients | None = None, hooks: Hooks | None = None) -> float:
        """The mean loss in nats of targets (B, T) given ids (B, T); adds scale * its gradient to `grads`.

        Targets of -100 are not counted: mini-batches that are to weigh as their tokens need a scale of their share.
        Dropout masks are a pure function of (the model's seed, dropout_key). ValueError as in `forward`.

        into: where gradients are added instead. hooks: called on the way, before parameters are read and when gradients
        are whole (transformer.stage_of says which).
        """
        if self.precision == "int8":
            raise FesteError("a model with precision int8 only generates; train one with fp32 or bf16", "precision")
        act = self._given(*self._check_pair(ids, targets), keep=True)
        dropout, d = Dropout(self.config.dropout, self.dropout_seed, dropout_key), into or self.gradients

        def kernels() -> None:
            run = self._pass(act, dropout)
            transformer.forward(run, self._weights, act.ids)
            self._backward_head(act, d.weights, scale / act.n_counted)
            transformer.backward(run, self._weights, d.weights, act.ids)

        act.perform((self.precision, scale, dropout_key if dropout.p > 0.0 else None, d), kernels, hooks)
        return float(act.losses[:act.n_counted].mean(dtype=np.float64))

    def _pass(self, act: Activations, dropout: Dropout | None = None) -> Pass:
        return Pass(self.config, act, self._bf16, dropout or Dropout())

    def _given(self, ids: np.ndarray, targets: np.ndarray, keep: bool) -> Activations:
        """The buffers of a pass over ids (B, T), with ids and targets in them."""
        act = self._buffers(*ids.shape, keep)
        act.take(ids, targets)
        if act.n_counted == 0:
            raise ValueError(f"no target counts: all of them are {IGNORED}")
        return act

    def _buffers(self, B: int, T: int, keep: bool) -> Activations:
        act = self._activations.get(keep)
        if act is None or act.shape != (B, T):
            self._activations.pop(keep, None)  # let go of the old ones before taking the new
            act = self._activations[keep] = Activations(self.config, B, T, keep, self._arenas[keep])
        return act

    @property
    def _bf16(self) -> bool:
        return self.precision == "bf16"

    # ---- the head -------------------------------------------------------------------------------------------

    def _counted_rows(self, act: Activations) -> np.ndarray:
        """ln_f of the tokens that the loss counts, (n_counted, C). Others do not need the head, a third of the work."""
        n, (rows, C) = act.n_counted, act.ln_f.shape
        if n == rows:
            return act.ln_f
        counted = act.activated.reshape(-1)[:n * C].reshape(n, C)  # free between the blocks' two passes
        ops.gather_rows(counted, act.ln_f, act.counted[:n], n, rows, C)
        return counted

    def _head_loss(self, act: Activations, x: np.ndarray, rows: slice) -> np.ndarray:
        """Logits (n, V) of some rows of x, in a shared buffer, and their losses: logits = x @ head^T."""
        c, n = self.config, rows.stop - rows.start
        logits, targets = act.logits[:n], act.targets[rows]
        ops.gemm(logits, x[rows], self._weights.head, n, c.vocab_size, c.n_embd, trans_b=True, bf16=self._bf16)
        ops.cross_entropy_forward(act.losses[rows], act.lse[rows], logits, targets, n, c.vocab_size)
        return logits

    def _backward_head(self, act: Activations, d: Weights, scale: float) -> None:
        """Losses of every counted row, the head's gradient in d, and act.dln (rows, C), that of ln_f."""
        V, C, bf16, n_counted = self.config.vocab_size, self.config.n_embd, self._bf16, act.n_counted
        x = self._counted_rows(act)
        spare = act.activated.reshape(-1)[n_counted * C:2 * n_counted * C].reshape(n_counted, C)
        dx = act.dln if x is act.ln_f else spare
        for rows in _head_chunks(n_counted):
            n, targets = rows.stop - rows.start, act.targets
            dlogits = logits = self._head_loss(act, x, rows)
            # loss = cross_entropy(logits, targets); in place, for logits are the largest buffer
            ops.cross_entropy_backward(dlogits, logits, targets[rows], act.lse[rows], scale, n, V)
            # logits = x @ head^T
            ops.gemm(dx[rows], dlogits, self._weights.head, n, C, V, bf16=bf16)
            ops.gemm(d.head, dlogits, x[rows], V, C, n, trans_a=True, accumulate=True, bf16=bf16)
        if dx is not act.dln:  # x = ln_f[counted]
            ops.scatter_rows(act.dln, dx, act.counted[:n_counted], n_counted, len(act.dln), C)

    # ---- generation -----------------------------------------------------------------------------------------

    def generate(self, prompt_ids, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int | None = None, vocab_size: int | None = None,
                 stop_tokens: Iterable[int] = ()) -> list[int]:
        """The prompt and max_new_tokens sampled tokens. Temperature 0 takes the most likely token.

        top_k keeps the k most likely tokens, top_p the fewest whose probabilities reach p; vocab_size draws from the
        first so many tokens only, for a tokenizer that has fewer than the model. The first of stop_tokens that is drawn
        ends it and is left out. The model sees the last block_size tokens.
        """
        new = self.generate_tokens(prompt_ids, max_new_tokens, temperature, top_k, top_p, seed, vocab_size, stop_tokens)
        return [*map(int, prompt_ids), *new]

    def generate_tokens(self, prompt_ids, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                        top_p: float | None = None, seed: int | None = None, vocab_size: int | None = None,
                        stop_tokens: Iterable[int] = ()) -> Iterator[int]:
        """The new tokens of `generate`, one at a time."""
        sampler, stop_tokens = Sampler(temperature, top_k, top_p, seed, vocab_size), frozenset(stop_tokens)
        drawn = self.stream(prompt_ids, 1, max_new_tokens, sampler, stop_tokens)
        return takewhile(lambda i: i not in stop_tokens, (ids[0] for ids in drawn))

    def generate_batch(self, prompt_ids, num_samples: int, max_new_tokens: int, temperature: float = 1.0,
                       top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
                       vocab_size: int | None = None, stop_tokens: Iterable[int] = ()) -> list[list[int]]:
        """num_samples continuations of one prompt, made together; each starts with the prompt."""
        if num_samples < 1:
            raise FesteError(f"num_samples must be at least 1, got {num_samples}", "num_samples")
        sampler, stop_tokens = Sampler(temperature, top_k, top_p, seed, vocab_size), frozenset(stop_tokens)
        steps = list(self.stream(prompt_ids, num_samples, max_new_tokens, sampler, stop_tokens))
        return [[*map(int, prompt_ids), *takewhile(lambda i: i not in stop_tokens, (ids[b] for ids in steps))]
                for b in range(num_samples)]

    def stream(self, prompt_ids, num_samples: int, max_new_tokens: int, sampler: Sampler,
               stop_tokens: Iterable[int] = ()) -> Iterator[list[int]]:
        """The next token of each of num_samples continuations of one prompt, as `Decoder.stream` has them."""
        return self.decoder(num_samples).stream(prompt_ids, max_new_tokens, sampler, stop_tokens)

    def decoder(self, num_samples: int = 1) -> Decoder:
        """What answers prompt after prompt. In bf16 and int8 it packs the weights once, so they must not change."""
        return Decoder(self.config, self._weights, self.precision, num_samples)

    # ---- the door -------------------------------------------------------------------------------------------

    def _check_ids(self, ids: np.ndarray, name: str, also: int = 0) -> np.ndarray:
        """ids as a C-contiguous int32 array (B, T), or ValueError. `also` is allowed beside those of the vocabulary."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"{name} must be a (B, T) array of integers, got {ids.dtype} of shape {ids.shape}")
        if ids.shape[1] > self.config.block_size:
            raise ValueError(f"a sequence of {ids.shape[1]} tokens is longer than block_size={self.config.block_size}")
        low, high = ids.min(), ids.max()
        if low == also:
            low = ids.min(where=ids != also, initial=0)
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name} must lie in 0 .. {self.config.vocab_size - 1}, got {bad}")
        return np.ascontiguousarray(ids, np.int32)

    def _check_pair(self, ids: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, targets = self._check_ids(ids, "ids"), self._check_ids(targets, "targets", IGNORED)
        if ids.shape != targets.shape:
            raise ValueError(f"ids and targets must have the same shape, got {ids.shape} and {targets.shape}")
        return ids, targets


def _head_chunks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + HEAD_ROWS, rows)) for start in range(0, rows, HEAD_ROWS))
