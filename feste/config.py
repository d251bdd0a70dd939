"""The two configurations, `Config` (the model) and `TrainConfig` (the run), and the named presets.

Both are frozen dataclasses that check themselves when they are made, so a configuration that exists is a
valid one. `TrainConfig` carries a help sentence with each field: the command line is generated from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace

from feste.errors import FesteError


def _require(condition: bool, message: str, *names: str) -> None:
    """FesteError about some fields unless the condition holds."""
    if not condition:
        raise FesteError(message, *names)


def _dial(default, help: str):
    return field(default=default, metadata={"help": help})


def dials(cls: type) -> str:
    """The dials of a configuration with their defaults and meanings, as the end of a docstring."""
    lines = [f"    - {f.name}={f.default!r}: {f.metadata['help']}" for f in fields(cls)]
    return f"\n\n    The dials of {cls.__name__}:\n\n" + "\n".join(lines) + "\n    "


@dataclass(frozen=True)
class Architecture:
    """What the layers of a family of transformers are made of: kernels, by the beginning of their names in `ops`."""

    norm: str                   # {norm}_forward and {norm}_backward
    statistics: int             # numbers that the norm keeps of each row for its way back
    activation: str             # of the feed-forward layer
    rotary: bool                # queries and keys are rotated by their positions, which have no learned embeddings
    biases: bool                # of linear layers and norms
    zero_outputs: bool          # the head and the projections back to the residual stream begin as zero


ARCHITECTURES = {
    # Radford et al. 2019
    "gpt2": Architecture("layernorm", 2, "gelu", rotary=False, biases=True, zero_outputs=False),
    # RoPE, RMSNorm, ReLU squared, no biases: transformers' ArceeForCausalLM, llama.cpp's arcee
    "modern": Architecture("rmsnorm", 1, "relu2", rotary=True, biases=False, zero_outputs=True),
}


@dataclass(frozen=True)
class Config:
    """The shape of a GPT-2 style transformer. Every value is checked; a bad one raises ValueError."""

    vocab_size: int = 512
    n_embd: int = 64
    n_layers: int = 2
    n_heads: int = 1
    block_size: int = 64
    dropout: float = 0.0
    tie_weights: bool = False
    arch: str = "gpt2"

    def __post_init__(self) -> None:
        _require(self.arch in ARCHITECTURES, f"arch must be one of {', '.join(ARCHITECTURES)}, got {self.arch!r}",
                 "arch")
        for name in ("vocab_size", "n_embd", "n_layers", "n_heads", "block_size"):
            value = getattr(self, name)
            _require(isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                     f"{name} must be a positive integer, got {value!r}", name)
        _require(self.n_embd % self.n_heads == 0,
                 f"n_embd must be divisible by n_heads, got n_embd={self.n_embd} and n_heads={self.n_heads}; "
                 f"choose n_heads among the divisors of n_embd", "n_heads", "n_embd")
        _require(not self.architecture.rotary or self.head_size % 2 == 0,
                 f"arch={self.arch!r} rotates pairs of channels, so n_embd / n_heads must be even, got "
                 f"{self.n_embd} / {self.n_heads}", "n_heads", "n_embd")
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout!r}",
                 "dropout")
        _require(isinstance(self.tie_weights, bool), f"tie_weights must be a bool, got {self.tie_weights!r}",
                 "tie_weights")

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_heads

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        return _from_dict(cls, values)


IGNORED = -100                                    # a target that the loss does not count, as in PyTorch
PRECISIONS = ("fp32", "bf16")                     # of training
GENERATION_PRECISIONS = (*PRECISIONS, "int8")     # of a model that is only asked
CHOICES = {"precision": PRECISIONS, "on_nan": ("stop", "skip"), "schedule": ("cosine", "linear", "wsd"),
           "optimizer": ("adamw", "muon"), "wire": ("fp32", "bf16")}


@dataclass(frozen=True)
class TrainConfig:
    """One training run: how long, how fast, on how much, and what is kept of it."""

    num_steps: int = _dial(500, "optimizer steps of the whole run")
    learning_rate: float = _dial(3e-3, "peak learning rate, reached after the warm-up")
    seq_len: int = _dial(64, "tokens per sequence, at most the model's block_size")
    batch_size: int = _dial(8, "sequences per mini-batch")
    accumulation: int = _dial(1, "mini-batches whose gradients are added up for one optimizer step, by all ranks")
    warmup_fraction: float = _dial(0.1, "share of the steps in which the learning rate rises linearly")
    warmup_steps: int = _dial(0, "steps of the warm-up, instead of a share of all; 0 for warmup_fraction")
    schedule: str = _dial("cosine", "how the learning rate falls after the warm-up: cosine, linear, or wsd, which "
                                    "stays at the peak until the last steps, so that a run can be prolonged")
    decay_fraction: float = _dial(0.2, "share of the steps in which the learning rate falls, with schedule wsd")
    min_lr_fraction: float = _dial(0.1, "share of the peak learning rate at which the decay ends")
    optimizer: str = _dial("adamw", "adamw, or muon for the matrices of the blocks and AdamW for the rest")
    matrix_rate: float = _dial(2.0, "Muon: learning rate of the matrices, as a multiple of the learning rate")
    momentum: float = _dial(0.95, "Muon: momentum, which rises to it from 0.85 in 300 steps")
    weight_decay: float = _dial(0.1, "AdamW decay of matrices and embeddings")
    matrix_decay: float = _dial(0.0, "Muon: decay of the matrices")
    cautious_decay: bool = _dial(False, "decay only what the update makes smaller, too")
    beta1: float = _dial(0.9, "AdamW decay rate of the first moment")
    beta2: float = _dial(0.95, "AdamW decay rate of the second moment")
    beta2_half_life: int = _dial(0, "tokens after which the second moment has forgotten half; 0 for beta2 as it is")
    eps: float = _dial(1e-8, "AdamW epsilon")
    clip_norm: float = _dial(1.0, "global gradient norm above which gradients are scaled down")
    token_splits: float = _dial(0.0, "probability that a token of the training text is spelt as two shorter ones, anew "
                                     "in each pass, which falls with the learning rate; for a text that is read often")
    patience: int = _dial(5000, "steps without a better validation loss after which the run stops early")
    val_fraction: float = _dial(0.1, "share of the tokens, at the end, held out for validation")
    val_interval: int = _dial(50, "steps between validations")
    val_windows: int = _dial(64, "held-out windows in a validation, the same ones each time")
    sample_interval: int = _dial(200, "steps between generated samples")
    sample_tokens: int = _dial(100, "tokens per generated sample")
    sample_prompt: str = _dial("To be, or not to be", "text that the samples continue")
    checkpoint_interval: int = _dial(250, "steps between periodic checkpoints")
    keep_last: int = _dial(3, "periodic checkpoints kept (best and final always are)")
    seed: int = _dial(1337, "seed of the batches, dropout and the samples, and of a new model's initial weights")
    precision: str = _dial("fp32", "fp32, or bf16 to round matrix-product inputs to bfloat16")
    threads: int = _dial(0, "threads of the kernels, 0 for one per available core")
    wire: str = _dial("fp32", "numbers on the wire between ranks: fp32, or bf16 for half the bytes and other bits")
    sync_every: int = _dial(0, "steps that ranks train apart before they average, for slow networks; 0 for in step")
    outer_rate: float = _dial(0.7, "sync_every: learning rate of the average")
    outer_momentum: float = _dial(0.9, "sync_every: Nesterov momentum of the average")
    on_nan: str = _dial("stop", "at a NaN or Inf: stop, or skip the step (stops after 10 in a row)")

    def __post_init__(self) -> None:
        def check(name: str, fits: Callable[[object], bool], what: str) -> None:
            value = getattr(self, name)
            _require(fits(value), f"{name} must be {what}, got {value!r}", name)

        def whole(least: int) -> Callable[[object], bool]:
            return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least

        for name in ("num_steps", "seq_len", "batch_size", "accumulation", "patience", "val_interval",
                     "val_windows", "sample_interval", "sample_tokens", "checkpoint_interval", "keep_last"):
            check(name, whole(1), "a positive integer")
        for name in ("learning_rate", "clip_norm", "eps", "matrix_rate", "outer_rate"):
            check(name, lambda value: 0.0 < value < float("inf"), "a positive number")
        for name in ("warmup_fraction", "min_lr_fraction", "decay_fraction"):
            check(name, lambda value: 0.0 <= value <= 1.0, "in [0, 1]")
        for name in ("beta1", "beta2", "momentum", "outer_momentum"):
            check(name, lambda value: 0.0 <= value < 1.0, "in [0, 1)")
        for name in ("weight_decay", "matrix_decay"):
            check(name, lambda value: 0.0 <= value < float("inf"), "a finite number, not negative")
        check("token_splits", lambda value: 0.0 <= value < 1.0, "in [0, 1)")
        check("val_fraction", lambda value: 0.0 < value < 1.0, "in (0, 1)")
        for name in ("seed", "threads", "warmup_steps", "beta2_half_life", "sync_every"):
            check(name, whole(0), "a non-negative integer")
        check("threads", lambda value: value <= 1024, "at most 1024")
        check("cautious_decay", lambda value: isinstance(value, bool), "a bool")
        for name, choices in CHOICES.items():
            check(name, lambda value, choices=choices: value in choices, f"one of {', '.join(choices)}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.seq_len

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        return _from_dict(cls, values)


def _from_dict(cls, values: dict):
    unknown = set(values) - {f.name for f in fields(cls)}
    _require(not unknown, f"unknown {cls.__name__} fields: {', '.join(sorted(unknown))}")
    return cls(**values)


@dataclass(frozen=True)
class Preset:
    """A named model with the run that suits it. Character limits of None mean the whole text."""

    name: str
    summary: str
    model: Config
    train: TrainConfig
    tokenizer_chars: int | None = None
    train_chars: int | None = None


def _seed_presets() -> list[Preset]:
    return [
        Preset("tiny", "the fastest way to see a model learn",
               Config(512, 64, 2, 1, 64), TrainConfig(500, 3e-3, 64, patience=5000), 200_000, 200_000),
        Preset("small", "a balance of training speed and capacity",
               Config(1024, 128, 3, 1, 128), TrainConfig(2000, 2e-3, 128, patience=5000), 500_000, 500_000),
        Preset("medium", "multi-head attention and a longer context",
               Config(1536, 256, 4, 4, 256), TrainConfig(8000, 3e-4, 256, patience=3000), 2_000_000, 2_000_000),
        Preset("gpt2", "the GPT-2 small architecture on the whole corpus", Config(20534, 768, 12, 12, 512),
               TrainConfig(5000, 3e-4, 512, batch_size=2, accumulation=4, patience=2000)),
    ]


# What docs/LEARNING.md found to learn most from a step: beside the shape, what a run does otherwise than the seed's.
MODERN = {"learning_rate": 1.5e-2, "optimizer": "muon", "matrix_rate": 0.7, "beta1": 0.8, "beta2": 0.99,
          "schedule": "linear", "min_lr_fraction": 0.0, "warmup_fraction": 0.05}
# For a text that is read many times, beside dropout; the decay is that of embeddings and head. A small model has no
# room to learn it by heart, and gains nothing by other spellings.
REPEATED = {"weight_decay": 0.5}
SPELT = REPEATED | {"token_splits": 0.1}


def _modern_presets() -> list[Preset]:
    """The seed's models in the modern family, with the modern recipe."""
    def modern(seed: Preset, dropout: float, **train) -> Preset:
        return Preset(f"{seed.name}-modern", f"{seed.name}, in today's layers and with today's recipe",
                      replace(seed.model, arch="modern", dropout=dropout), replace(seed.train, **MODERN | train),
                      seed.tokenizer_chars, seed.train_chars)

    tiny, small, medium, gpt2 = _seed_presets()
    return [modern(tiny, 0.0, learning_rate=1e-2, matrix_rate=2.0), modern(small, 0.1, **REPEATED),
            modern(medium, 0.1, num_steps=3000, **SPELT, learning_rate=1e-2, matrix_rate=1.4),
            modern(gpt2, 0.1, **SPELT, learning_rate=5e-3)]


def _study_presets() -> list[Preset]:
    """Models that differ in one respect each, to compare what a shape is worth."""
    def preset(name, summary, n_embd, n_layers, n_heads, block_size, learning_rate, num_steps):
        return Preset(name, summary, Config(8192, n_embd, n_layers, n_heads, block_size),
                      TrainConfig(num_steps, learning_rate, block_size))

    return [
        preset("pocket-bard", "a capable model that still fits in a pocket", 256, 6, 8, 448, 3e-4, 50_000),
        preset("cyclops", "one attention head", 64, 2, 1, 64, 1e-3, 30_000),
        preset("spider", "the cyclops with eight heads", 64, 2, 8, 64, 1e-3, 30_000),
        preset("wide", "few wide layers, long context", 256, 4, 4, 1024, 3e-4, 30_000),
        preset("long-context", "1,024 tokens of context", 256, 4, 4, 1024, 3e-4, 30_000),
        preset("narrow", "many narrow layers with one head", 128, 6, 1, 1024, 3e-4, 30_000),
        preset("short-context", "the long-context model with 128 tokens of context", 256, 4, 4, 128, 3e-4, 30_000),
    ]


# What a run takes that begins with a trained model: a small rate, so that it does not forget; its shape is the model's.
FINETUNE = Preset("finetune", "from a model that was trained", Config(),
                  TrainConfig(200, 1e-4, 256, batch_size=4, val_interval=20, sample_interval=50,
                              checkpoint_interval=100))

PRESETS: dict[str, Preset] = {preset.name: preset
                              for preset in (*_seed_presets(), *_modern_presets(), *_study_presets())}
