"""The one table of parameters: names, shapes, initialisation, and where each lies in the flat buffers.

Parameters, gradients and AdamW's two moments are four flat float32 buffers of the same layout, so zeroing,
clipping, updating, saving and loading are each one operation on one buffer. Parameters that decay come first,
so weight decay applies to one contiguous range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from feste.config import Config

INIT_STD = 0.02  # Radford et al. 2019 (GPT-2)


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    init: float        # standard deviation of the normal initialisation, 0 for a constant
    fill: float        # the constant: 0 for a bias, 1 for the weight of a norm
    decays: bool       # matrices and embeddings decay, biases and norms do not
    hidden: bool = False  # a matrix between two hidden states: neither embedding nor head
    offset: int = 0    # first element in a flat buffer

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _matrix(name: str, *shape: int, std: float = INIT_STD, hidden: bool = False) -> Parameter:
    return Parameter(name, shape, init=std, fill=0.0, decays=True, hidden=hidden)


def _vector(name: str, size: int, fill: float = 0.0) -> Parameter:
    return Parameter(name, (size,), init=0.0, fill=fill, decays=False)


def _parameters(config: Config) -> Iterator[Parameter]:
    """Hugging Face's names and shapes of GPT-2, in the order of the forward pass; other families lack some of them."""
    V, T, C, of = config.vocab_size, config.block_size, config.n_embd, config.architecture

    def norm(name: str) -> Iterator[Parameter]:
        yield _vector(f"{name}.weight", C, fill=1.0)
        if of.biases:
            yield _vector(f"{name}.bias", C)

    def linear(name: str, K: int, N: int, std: float = INIT_STD) -> Iterator[Parameter]:
        yield _matrix(f"{name}.weight", K, N, std=std, hidden=True)
        if of.biases:
            yield _vector(f"{name}.bias", N)

    # Small numbers keep the residual stream's variance at depth; with zeros, every block begins as the identity, and
    # all tokens as equally likely.
    residual_std = 0.0 if of.zero_outputs else INIT_STD / math.sqrt(2 * config.n_layers)
    yield _matrix("transformer.wte.weight", V, C)
    if not of.rotary:
        yield _matrix("transformer.wpe.weight", T, C)
    for i in range(config.n_layers):
        layer = f"transformer.h.{i}"
        yield from norm(f"{layer}.ln_1")
        yield from linear(f"{layer}.attn.c_attn", C, 3 * C)
        yield from linear(f"{layer}.attn.c_proj", C, C, residual_std)
        yield from norm(f"{layer}.ln_2")
        yield from linear(f"{layer}.mlp.c_fc", C, 4 * C)
        yield from linear(f"{layer}.mlp.c_proj", 4 * C, C, residual_std)
    yield from norm("transformer.ln_f")
    if not config.tie_weights:
        yield _matrix("lm_head.weight", V, C, std=0.0 if of.zero_outputs else INIT_STD)


class Views(Mapping):
    """Names of parameters and their views of a flat buffer. Assigning to a name writes into its view."""

    def __init__(self, views: dict[str, np.ndarray]) -> None:
        self._views = views

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        self._views[name][...] = value

    def __repr__(self) -> str:
        return "\n".join(f"{name} {view.shape}" for name, view in self._views.items())


class ParameterTable:
    """The parameters of a model. Iterates over `Parameter`s; `size` and `decayed_size` count float32 elements."""

    def __init__(self, config: Config) -> None:
        self._place(sorted(_parameters(config), key=lambda p: not p.decays))  # stable: keeps the order within each kind

    def _place(self, entries: list[Parameter]) -> None:
        self.entries: list[Parameter] = []
        self.size = self.decayed_size = 0
        for p in entries:
            self.entries.append(replace(p, offset=self.size))
            self.size += p.size
            self.decayed_size += p.size if p.decays else 0

    def without_hidden(self) -> ParameterTable:
        """The table of a buffer that leaves out the matrices between hidden states."""
        table = object.__new__(ParameterTable)
        table._place([p for p in self.entries if not p.hidden])
        return table

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.entries)

    def views(self, flat: np.ndarray) -> Views:
        """Name -> view of a flat buffer of `size` elements, in the parameter's shape."""
        if flat.shape != (self.size,):
            raise ValueError(f"the flat buffer must have shape ({self.size},), got {flat.shape}")
        return Views({p.name: flat[p.offset:p.offset + p.size].reshape(p.shape) for p in self.entries})

    def initialise(self, flat: np.ndarray, seed: int) -> None:
        """Fill a flat buffer with initial values; a pure function of the seed."""
        rng = np.random.default_rng(seed)
        for p in self.entries:
            view = flat[p.offset:p.offset + p.size]
            if p.init:
                rng.standard_normal(dtype=np.float32, out=view)
                view *= np.float32(p.init)
            else:
                view.fill(p.fill)
