"""What the training scripts share: flags made from the dataclasses, start-up lines, progress, and the ending.

Every error of a user is one line on standard error and exit code 2, before anything is written.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from feste import ops
from feste.checkpoint import Checkpoint, find_checkpoint
from feste.config import PRECISIONS, PRESETS, Config, Preset, TrainConfig
from feste.corpus import read_text, shakespeare_text
from feste.data import load_tokens, split_tokens, validation_windows
from feste.model import GPT2
from feste.optim import AdamW
from feste.params import ParameterTable
from feste.progress import Progress
from feste.runlog import RunLogError, read_info
from feste.tokenizer import BPETokenizer
from feste.trainer import CHANGEABLE, TrainingDiverged, TrainResult, train_gpt2

PROMPTS = ("To be, or not to be", "ROMEO:\n", "My lord, ")
TEMPERATURES = (0.5, 0.8, 1.0)
SAMPLE_TOKENS = 80
TIMED_STEPS = 3
FLAGS = {"num_steps": "--steps"}  # the other flags are the field names
CHOICES = {"precision": PRECISIONS, "on_nan": ("stop", "skip")}
MODEL_HELP = {
    "vocab_size": "tokens in the vocabulary", "n_embd": "channels of the residual stream",
    "n_layers": "transformer blocks", "n_heads": "attention heads", "block_size": "longest sequence in tokens",
    "dropout": "dropout probability", "tie_weights": "use the token embedding as output weight",
}


def run_preset(name: str, argv: Sequence[str] | None = None) -> int:
    """The whole of an example: train a preset with the flags of the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=f"Train the {name} model: {PRESETS[name].summary}.",
                                     allow_abbrev=False)
    add_flags(parser)
    return guarded(lambda: run_training(PRESETS[name], parser.parse_args(argv)))


def guarded(action) -> int:
    """Run an action; turn what a user can mend into one line on standard error."""
    try:
        return action()
    except (ValueError, RunLogError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"error: training diverged at {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


# ---- flags -------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help="a UTF-8 text file, or a directory of tools.prepare "
                        "(default: the complete works of Shakespeare)")
    parser.add_argument("--train-chars", type=int, metavar="N", help="train on the first N characters of the text")
    parser.add_argument("--tokenizer-chars", type=int, metavar="N", help="make the tokenizer from the first N")
    parser.add_argument("--run-dir", metavar="DIR", help="new directory of the run (default: data/NAME_TIME)")
    parser.add_argument("--resume", metavar="PATH", help="continue the run of a directory or checkpoint, to the bit")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, memory, disk and time, then exit")
    model, train = parser.add_argument_group("model"), parser.add_argument_group("training")
    for group, cls in ((model, Config), (train, TrainConfig)):
        for f in fields(cls):
            _add_flag(group, f.name, type(f.default), f.metadata.get("help") or MODEL_HELP[f.name])


def _add_flag(group, name: str, kind: type, help_text: str) -> None:
    flag = FLAGS.get(name, "--" + name.replace("_", "-"))
    if kind is bool:
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=help_text)
    else:
        group.add_argument(flag, dest=name, type=kind, choices=CHOICES.get(name), help=help_text,
                           metavar=None if name in CHOICES else kind.__name__.upper())


def _named(args: argparse.Namespace, cls: type) -> dict:
    """The fields of a configuration that the command line names."""
    return {f.name: getattr(args, f.name) for f in fields(cls) if getattr(args, f.name) is not None}


@dataclass
class Plan:
    """A run that is ready to start."""

    name: str
    model: GPT2
    tokenizer: BPETokenizer
    tokens: np.ndarray
    train: TrainConfig
    run_dir: Path
    resume: Checkpoint | None = None
    optimizer: AdamW | None = None
    info: dict | None = None


def run_training(preset: Preset, args: argparse.Namespace) -> int:
    plan = _resumed(args) if args.resume else _new(preset, args)
    announce(plan)
    if args.dry_run:
        print_estimate(plan)
        return 0
    _refuse_full_disk(plan)
    with Progress(plan.train, start=plan.resume.step if plan.resume else 0) as progress:
        result = train_gpt2(plan.model, plan.tokenizer, plan.tokens, run_dir=plan.run_dir, optimizer=plan.optimizer,
                            resume=plan.resume, on_step=progress, info=plan.info, **plan.train.to_dict_for_call())
    return finish(plan, result)


def _new(preset: Preset, args: argparse.Namespace) -> Plan:
    source, checkpoint = args.data or "the complete works of Shakespeare", None
    if getattr(args, "checkpoint", None):
        checkpoint = Checkpoint.load(find_checkpoint(args.checkpoint, prefer="best")[0], precision=args.precision)
        if checkpoint.tokenizer is None:
            raise ValueError(f"{args.checkpoint} holds no tokenizer, which fine-tuning needs")
        _refuse_other_model(checkpoint.model.config, _named(args, Config), args.checkpoint)
        config = checkpoint.model.config
    else:
        config = replace(preset.model, **_named(args, Config))
    train = _train_config(preset, config, args)
    tokens, tokenizer = _load_data(preset, args, config, checkpoint.tokenizer if checkpoint else None)
    if tokenizer.vocab_size < config.vocab_size and checkpoint is None:
        print(f"the text yields {tokenizer.vocab_size} tokens, so the model has a vocabulary of that size, "
              f"not {config.vocab_size}")
        config = replace(config, vocab_size=tokenizer.vocab_size)
    model = checkpoint.model if checkpoint else GPT2(config, train.seed, train.precision)
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    run_dir = Path(args.run_dir) if args.run_dir else Path("data", f"shakespeare_{preset.name}_{stamp}")
    if run_dir.exists():
        raise ValueError(f"{run_dir} exists; a run directory is never reused. Choose another --run-dir, or continue "
                         "that run with --resume")
    info = {"name": preset.name, "source": source, "data_flags": _data_flags(preset, args)}
    return Plan(preset.name, model, tokenizer, tokens, train, run_dir, info=info)


def _train_config(preset: Preset, config: Config, args: argparse.Namespace) -> TrainConfig:
    named = _named(args, TrainConfig)
    if preset.train.seq_len > config.block_size or args.block_size:
        named.setdefault("seq_len", config.block_size)
    train = replace(preset.train, **named)
    if train.seq_len > config.block_size:
        raise ValueError(f"seq_len={train.seq_len} is beyond the model's block_size={config.block_size}; "
                         "choose a smaller --seq-len or a larger --block-size")
    return train


def _refuse_other_model(config: Config, named: dict, path: str) -> None:
    differences = [f"{name}={getattr(config, name)}, not {value}" for name, value in named.items()
                   if getattr(config, name) != value]
    if differences:
        raise ValueError(f"the checkpoint {path} is a model with {'; '.join(differences)}; leave those flags out")


def _data_flags(preset: Preset, args: argparse.Namespace) -> dict:
    """Where the text came from, kept in run.json so that --resume finds it again."""
    return {"data": args.data, "train_chars": args.train_chars or preset.train_chars,
            "tokenizer_chars": args.tokenizer_chars or preset.tokenizer_chars}


def _load_data(preset: Preset, args: argparse.Namespace, config: Config,
               tokenizer: BPETokenizer | None) -> tuple[np.ndarray, BPETokenizer]:
    flags = _data_flags(preset, args)
    for name in ("train_chars", "tokenizer_chars"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.data and Path(args.data).is_dir():
        tokens, shard_tokenizer = load_tokens(args.data)
        return tokens, tokenizer or shard_tokenizer
    text = read_text(args.data) if args.data else shakespeare_text()
    if tokenizer is None:
        tokenizer = BPETokenizer.train(text[:flags["tokenizer_chars"]], config.vocab_size)
    return tokenizer.encode_to_numpy(text[:flags["train_chars"]]), tokenizer


def _resumed(args: argparse.Namespace) -> Plan:
    """The plan of a run that is in its directory already."""
    path, passed_over = find_checkpoint(args.resume)
    for line in passed_over:
        print(f"passed over: {line}")
    checkpoint = Checkpoint.load(path)
    if checkpoint.optimizer is None or checkpoint.tokenizer is None or checkpoint.train_config is None:
        raise ValueError(f"{path} serves inference only; training cannot continue from it")
    run_dir = path.parent
    info = read_info(run_dir)
    flags = info.get("data_flags", {})
    named = _named(args, TrainConfig) | _named(args, Config)
    refused = sorted(set(named) - CHANGEABLE)
    if refused:
        raise ValueError(f"{', '.join(refused)} cannot change when a run is resumed; only "
                         f"{', '.join(sorted(CHANGEABLE))} can")
    if args.run_dir and Path(args.run_dir) != run_dir:
        raise ValueError(f"a resumed run continues in its own directory, {run_dir}; leave out --run-dir")
    data = args.data or flags.get("data")
    tokens = _tokens_again(data, args.train_chars or flags.get("train_chars"), checkpoint.tokenizer)
    train = replace(TrainConfig.from_dict(checkpoint.train_config), **named)
    _say_what_changes(checkpoint, train)
    kept = {key: info[key] for key in ("name", "source", "data_flags") if key in info}
    return Plan(info.get("name", "resumed"), checkpoint.model, checkpoint.tokenizer, tokens, train, run_dir,
                resume=checkpoint, optimizer=checkpoint.optimizer, info=kept)


def _tokens_again(data: str | None, train_chars: int | None, tokenizer: BPETokenizer) -> np.ndarray:
    if data and Path(data).is_dir():
        return load_tokens(data)[0]
    text = read_text(data) if data else shakespeare_text()
    return tokenizer.encode_to_numpy(text[:train_chars])


def _say_what_changes(checkpoint: Checkpoint, train: TrainConfig) -> None:
    saved = TrainConfig.from_dict(checkpoint.train_config)
    if checkpoint.step >= train.num_steps:
        raise ValueError(f"the run has made all of its {checkpoint.step} steps; extend it with --steps N, N larger")
    if train.num_steps != saved.num_steps:
        print(f"steps {saved.num_steps} -> {train.num_steps}: the schedule is stretched, so the learning rate goes on "
              "at the new schedule's value for this step, not where the old one ended")
    if train.learning_rate != saved.learning_rate:
        print(f"learning rate {saved.learning_rate:g} -> {train.learning_rate:g} from step {checkpoint.step + 1} on")


# ---- start and end -----------------------------------------------------------------------------------------


def announce(plan: Plan) -> None:
    """The start-up lines."""
    ops.set_num_threads(plan.train.threads)
    c, t = plan.model.config, plan.train
    print(f"{plan.name}: {plan.model.num_parameters():,} parameters (vocabulary {c.vocab_size}, {c.n_embd} channels, "
          f"{c.n_layers} layers, {c.n_heads} heads, context {c.block_size}, "
          f"{'tied' if c.tie_weights else 'untied'} head)")
    print(f"kernels: {ops.isa} ({ops.isa_reason}), {ops.get_num_threads()} threads, {t.precision}")
    if t.precision == "bf16" and ops.isa != "avx512":
        print("this CPU has no bfloat16 instructions: the same numbers, slower than fp32")
    n_val = len(plan.tokens) - len(split_tokens(plan.tokens, t.val_fraction)[0])
    print(f"data: {len(plan.tokens):,} tokens, the last {n_val:,} held out; "
          f"{t.tokens_per_step:,} tokens a step ({t.batch_size} x {t.accumulation} sequences of {t.seq_len})")
    where = f"continues at step {plan.resume.step + 1} in" if plan.resume else "goes to"
    print(f"run: {t.num_steps:,} steps; {where} {plan.run_dir}", flush=True)


def disk_bytes(plan: Plan) -> int:
    """The checkpoints that are kept at once (periodic, best, final and the one being written), and the log."""
    one = 12 * plan.model.num_parameters() + len(plan.tokenizer.to_json())
    periodic = min(plan.train.keep_last, plan.train.num_steps // plan.train.checkpoint_interval)
    return one * (periodic + 3) + 200 * plan.train.num_steps


def _refuse_full_disk(plan: Plan) -> None:
    existing = next(p for p in [plan.run_dir.absolute(), *plan.run_dir.absolute().parents] if p.exists())
    free, needed = shutil.disk_usage(existing).free, disk_bytes(plan)
    if free < needed:
        raise ValueError(f"the run needs about {needed / 1e6:,.0f} MB of disk and {existing} has {free / 1e6:,.0f} MB; "
                         "free some, lower --keep-last, or choose another --run-dir")


def print_estimate(plan: Plan) -> None:
    """Sizes, and the time of a few timed steps, scaled."""
    t, model = plan.train, plan.model
    ids = np.resize(plan.tokens[:t.seq_len * t.batch_size].astype(np.int32), (t.batch_size, t.seq_len))
    optimizer = AdamW(model)
    seconds = []
    for _ in range(TIMED_STEPS + 1):  # the first one also takes the memory
        begun = time.perf_counter()
        for _ in range(t.accumulation):
            model.forward_backward(ids, ids, 1.0 / t.accumulation)
        optimizer.step(0.0, t.clip_norm, zero_grad=True)
        seconds.append(time.perf_counter() - begun)
    step = float(np.median(seconds[1:]))
    print(f"memory: about {model.memory_bytes(t.batch_size, t.seq_len) / 1e6:,.0f} MB to train, and "
          f"{12 * model.num_parameters() / 1e6:,.0f} MB for the snapshot that is being saved")
    print(f"disk: about {disk_bytes(plan) / 1e6:,.0f} MB")
    print(f"time: {1 / step:.3g} steps a second, so {_duration(step * t.num_steps)} for {t.num_steps:,} steps, "
          "without validation and samples")
    print("dry run: nothing was written")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def finish(plan: Plan, result: TrainResult) -> int:
    """The ending: how it went, and text from the model. Returns the exit code."""
    print(f"{result.state.replace('_', ' ')} at step {result.step} after {result.elapsed_seconds:.1f} s: "
          f"train loss {result.train_loss:.4f}, best validation loss {result.best_val_loss:.4f} "
          f"at step {result.best_step}")
    if result.skipped_steps:
        print(f"{result.skipped_steps} steps were skipped because their loss or gradient was not finite")
    if result.signal is not None and result.state == "interrupted":
        print(f"continue with: --resume {result.run_dir}")
        return 128 + result.signal
    loss = held_out_loss(plan)
    print(f"loss over the whole held-out part: {loss:.4f} nats (perplexity {math.exp(loss):.2f})")
    for prompt in PROMPTS:
        ids = plan.tokenizer.encode(prompt)
        for temperature in TEMPERATURES:
            text = plan.tokenizer.decode(plan.model.generate(ids, SAMPLE_TOKENS, temperature, seed=plan.train.seed))
            print(f"\n--- temperature {temperature} ---\n{text}")
    print(f"\nrun directory: {result.run_dir}")
    return 0


def held_out_loss(plan: Plan) -> float:
    """Mean loss in nats over every window of the held-out tokens."""
    t = plan.train
    ids, targets = validation_windows(split_tokens(plan.tokens, t.val_fraction)[1], t.seq_len)
    losses = [plan.model.loss(ids[i:i + t.batch_size], targets[i:i + t.batch_size]) * len(ids[i:i + t.batch_size])
              for i in range(0, len(ids), t.batch_size)]
    return sum(losses) / len(ids)


def list_presets() -> str:
    lines = []
    for p in PRESETS.values():
        c = p.model
        lines.append(f"{p.name:14} {ParameterTable(c).size:>12,} parameters  V{c.vocab_size} C{c.n_embd} L{c.n_layers} "
                     f"H{c.n_heads} T{c.block_size}  lr {p.train.learning_rate:g}  {p.train.num_steps:,} steps  "
                     f"{p.summary}")
    return "\n".join(lines)
