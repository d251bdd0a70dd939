"""What the training scripts share: flags made from the dataclasses, start-up lines, progress, and the ending.

Every error of a user is one line on standard error and exit code 2, before anything is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from feste import ops
from feste.checkpoint import Checkpoint, find_checkpoint
from feste.config import PRECISIONS, PRESETS, Config, Preset, TrainConfig
from feste.corpus import read_text, shakespeare_text
from feste.data import load_tokens, split_tokens, windows
from feste.model import GPT2
from feste.params import ParameterTable
from feste.progress import Progress, discard_output
from feste.runlog import perplexity, read_info
from feste.tokenizer import BPETokenizer
from feste.trainer import CHANGEABLE, TrainingDiverged, TrainResult, checkpoint_to_resume, train_gpt2

SHAKESPEARE = "the complete works of Shakespeare"
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
    add_flags(parser, PRESETS[name])
    return guarded(lambda: run_training(PRESETS[name], parser.parse_args(argv)))


def guarded(action) -> int:
    """Run an action; turn what a user can mend into one line on standard error, and warnings into a line each."""
    sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: print(f"note: {message}")
            return action()
    except BrokenPipeError:
        discard_output()
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: not enough memory ({error}); choose a smaller model, --batch-size or --seq-len", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"error: training diverged at {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


# ---- flags -------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, preset: Preset | None = None) -> None:
    """A flag for every dial; with a preset, the help tells its values."""
    parser.add_argument("--data", metavar="FILE", help="a UTF-8 text file, used whole, or a directory of "
                        "tools.prepare (default: Shakespeare, as much of it as the preset says)")
    parser.add_argument("--train-chars", type=int, metavar="N", help="train on the first N characters of the text")
    parser.add_argument("--tokenizer-chars", type=int, metavar="N", help="make the tokenizer from the first N")
    parser.add_argument("--run-dir", metavar="DIR", help="new directory of the run (default: data/TEXT_PRESET_TIME, "
                        "or the one that is resumed)")
    parser.add_argument("--resume", metavar="PATH", help="continue the run of a directory or checkpoint, to the bit")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, memory, disk and time, then exit")
    model, train = parser.add_argument_group("model"), parser.add_argument_group("training")
    for group, cls, values in ((model, Config, preset and preset.model), (train, TrainConfig, preset and preset.train)):
        for f in fields(cls):
            value = f" (default: {getattr(values, f.name)})" if values else ""
            _add_flag(group, f.name, type(f.default), (f.metadata.get("help") or MODEL_HELP[f.name]) + value)


def _flag(name: str) -> str:
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def _add_flag(group, name: str, kind: type, help_text: str) -> None:
    if kind is bool:
        group.add_argument(_flag(name), dest=name, action=argparse.BooleanOptionalAction, help=help_text)
    else:
        group.add_argument(_flag(name), dest=name, type=kind, choices=CHOICES.get(name), help=help_text,
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
    info: dict
    resume: Checkpoint | None = None


def run_training(preset: Preset, args: argparse.Namespace) -> int:
    plan = _resumed(args) if args.resume is not None else _new(preset, args)
    announce(plan)
    _refuse_full_disk(plan)
    if args.dry_run:
        print_estimate(plan)
        return 0
    with Progress(plan.train, start=plan.resume.step if plan.resume else 0) as progress:
        result = _train(plan, plan.run_dir, progress)
    return finish(plan, result)


def _train(plan: Plan, run_dir: Path | None, on_step: Callable[[dict], None]) -> TrainResult:
    return train_gpt2(plan.model, plan.tokenizer, plan.tokens, run_dir=run_dir, resume=plan.resume,
                      optimizer=plan.resume and plan.resume.optimizer, on_step=on_step, info=plan.info,
                      **plan.train.to_dict_for_call())


def _new(preset: Preset, args: argparse.Namespace) -> Plan:
    run_dir = _new_directory(preset, args.data) if args.run_dir is None else Path(args.run_dir)
    if run_dir.exists():
        raise ValueError(f"{run_dir} exists; a run directory is never reused. Choose another --run-dir, or continue "
                         "that run with --resume")
    data = _data_flags(preset, args)
    info = {"name": preset.name, "source": args.data or SHAKESPEARE, "data_flags": data}
    if getattr(args, "checkpoint", None) is not None:
        return _fine_tuning(preset, args, run_dir, info)
    config = replace(preset.model, **_named(args, Config))
    train = _train_config(preset, config, args)
    tokens, tokenizer = _load_data(data, config.vocab_size)
    if args.vocab_size is not None and args.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"--vocab-size {args.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
                         f"{args.data}; leave it out")
    # The tokenizer decides: a text may yield fewer tokens, and a directory of tokens has its own.
    model = GPT2(replace(config, vocab_size=tokenizer.vocab_size), train.seed, train.precision)
    return Plan(preset.name, model, tokenizer, tokens, train, run_dir, info)


def _new_directory(preset: Preset, data: str | None) -> Path:
    text = "shakespeare" if data is None else Path(data).absolute().stem
    return Path("data", f"{text}_{preset.name}_{datetime.now():%Y%m%d_%H%M%S}")


def _fine_tuning(preset: Preset, args: argparse.Namespace, run_dir: Path, info: dict) -> Plan:
    """The plan of a new run that begins with the parameters and the tokenizer of a checkpoint."""
    checkpoint = Checkpoint.load(find_checkpoint(args.checkpoint, prefer="best")[0], precision=args.precision)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} holds no tokenizer, which fine-tuning needs")
    if args.tokenizer_chars is not None:
        raise ValueError("--checkpoint brings its own tokenizer; leave out --tokenizer-chars")
    differences = [f"{name}={getattr(model.config, name)}, not {value}" for name, value in _named(args, Config).items()
                   if getattr(model.config, name) != value]
    if differences:
        raise ValueError(f"the checkpoint {args.checkpoint} is a model with {'; '.join(differences)}; leave those "
                         "flags out")
    train = replace(_train_config(preset, model.config, args), precision=model.precision)
    tokens, _ = _load_data(info["data_flags"], tokenizer.vocab_size, tokenizer)
    return Plan(preset.name, model, tokenizer, tokens, train, run_dir, info)


def _train_config(preset: Preset, config: Config, args: argparse.Namespace) -> TrainConfig:
    named = _named(args, TrainConfig)
    if preset.train.seq_len > config.block_size or args.block_size:
        named.setdefault("seq_len", config.block_size)
    train = replace(preset.train, **named)
    if train.seq_len > config.block_size:
        raise ValueError(f"seq_len={train.seq_len} is beyond the model's block_size={config.block_size}; "
                         "choose a smaller --seq-len or a larger --block-size")
    return train


def _data_flags(preset: Preset, args: argparse.Namespace) -> dict:
    """Which text, and how much of it; kept in run.json so that --resume finds it again from anywhere.

    A preset takes the beginning of Shakespeare only; a text of the user's own is meant as a whole.
    """
    limits = {"train_chars": args.train_chars, "tokenizer_chars": args.tokenizer_chars}
    named = {name: value for name, value in limits.items() if value is not None}
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{_flag(name)} must be at least 1, got {value}")
    if args.data is None:
        return {"data": None, "train_chars": preset.train_chars, "tokenizer_chars": preset.tokenizer_chars} | named
    path = Path(args.data).absolute()
    if not path.is_dir():
        return {"data": str(path)} | limits
    if named:
        raise ValueError(f"{_flag(min(named))} is for texts, and {args.data} is a directory; leave it out")
    return {"data": str(path)}


def _load_data(flags: dict, vocab_size: int, tokenizer: BPETokenizer | None = None) -> tuple[np.ndarray, BPETokenizer]:
    """The tokens of a text or of a directory, and the tokenizer: the given one, or one made for the text."""
    data = flags.get("data")
    if data is not None and Path(data).is_dir():
        tokens, made_with = load_tokens(data)
        if tokenizer is not None and tokenizer.to_json() != made_with.to_json():
            raise ValueError(f"the tokens in {data} were made with another tokenizer than that of the checkpoint; "
                             "make them again with its tokenizer.json, or name a text file")
        return tokens, made_with
    text = shakespeare_text() if data is None else read_text(data)
    if tokenizer is None:
        tokenizer = BPETokenizer.train(text[:flags["tokenizer_chars"]], vocab_size)
    return tokenizer.encode_to_numpy(text[:flags.get("train_chars")]), tokenizer


def _resumed(args: argparse.Namespace) -> Plan:
    """The plan of a run that is in its directory already."""
    for name in ("checkpoint", "tokenizer_chars"):
        if getattr(args, name, None) is not None:
            raise ValueError(f"{_flag(name)} is for new runs, and --resume continues one; leave one of them out")
    checkpoint = checkpoint_to_resume(args.resume, args.run_dir)
    if checkpoint.optimizer is None or checkpoint.tokenizer is None or checkpoint.train_config is None:
        raise ValueError(f"{checkpoint.path} serves inference only; training cannot continue from it")
    named = _named(args, TrainConfig) | _named(args, Config)
    _refuse_changes(checkpoint.train_config | checkpoint.model.config.to_dict(), named)
    info = read_info(checkpoint.path.parent)
    info["data_flags"] = flags = _text_again(info, args)
    train = replace(TrainConfig.from_dict(checkpoint.train_config), **_named(args, TrainConfig))
    _say_what_changes(checkpoint, train, info.get("state"))
    info["source"] = flags["data"] or SHAKESPEARE
    tokens, tokenizer = _load_data(flags, checkpoint.tokenizer.vocab_size, checkpoint.tokenizer)
    kept = {key: info[key] for key in ("name", "source", "data_flags") if key in info}
    run_dir = checkpoint.path.parent if args.run_dir is None else Path(args.run_dir)
    return Plan(info.get("name", "resumed"), checkpoint.model, tokenizer, tokens, train, run_dir, kept,
                resume=checkpoint)


def _text_again(info: dict, args: argparse.Namespace) -> dict:
    """Where a run's text is: what run.json says, and what the command line does. Its tokens tell if it is the same."""
    flags = info.get("data_flags")
    if not (isinstance(flags, dict) and isinstance(flags.get("data"), str | None)
            and isinstance(flags.get("train_chars"), int | None)):
        flags = {}
    if args.data is not None:
        flags["data"] = str(Path(args.data).absolute())
    if args.train_chars is not None:
        flags["train_chars"] = args.train_chars
    if "data" not in flags:
        raise ValueError("run.json does not name the text of the run; name it with --data, and with --train-chars if "
                         "only its beginning was used")
    return flags


def _refuse_changes(saved: dict, named: dict) -> None:
    refused = [f"{_flag(name)} was {saved.get(name)} and is {value}" for name, value in named.items()
               if value != saved.get(name) and name not in CHANGEABLE]
    if refused:
        allowed = ", ".join(sorted(_flag(name) for name in {*CHANGEABLE, "run_dir"}))
        raise ValueError(f"this is not the run of the checkpoint: {'; '.join(refused)}. Only {allowed} may change "
                         "when a run is resumed")


def _say_what_changes(checkpoint: Checkpoint, train: TrainConfig, state: str | None) -> None:
    saved = TrainConfig.from_dict(checkpoint.train_config)
    if checkpoint.step >= train.num_steps:
        raise ValueError(f"the run has made all of its {checkpoint.step} steps; extend it with --steps N, N larger")
    idle = checkpoint.step - checkpoint.best_step
    if state == "early_stopped" and idle >= train.patience:
        raise ValueError(f"the run stopped early, after {idle} steps without a better validation loss; extend it with "
                         "--patience N, N larger")
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
    chars = plan.info.get("data_flags", {}).get("train_chars")
    limit = f"at most {chars:,} characters of " if chars else ""
    print(f"data: {limit}{plan.info.get('source', SHAKESPEARE)}: {len(plan.tokens):,} tokens, the last {n_val:,} held "
          f"out; {t.tokens_per_step:,} tokens a step ({t.batch_size} x {t.accumulation} sequences of {t.seq_len})")
    where = f"continues at step {plan.resume.step + 1} in" if plan.resume else "goes to"
    print(f"run: {t.num_steps:,} steps; {where} {plan.run_dir}, which takes up to {disk_bytes(plan) / 1e6:,.0f} MB of "
          "disk", flush=True)


def disk_bytes(plan: Plan) -> int:
    """The checkpoints that are kept at once (periodic, best, final and the one being written), and the log."""
    one = 12 * plan.model.num_parameters() + len(plan.tokenizer.to_json())
    periodic = min(plan.train.keep_last, plan.train.num_steps // plan.train.checkpoint_interval)
    return one * (periodic + 3) + 200 * plan.train.num_steps


def _refuse_full_disk(plan: Plan) -> None:
    run_dir = plan.run_dir.absolute()
    existing = next(p for p in [run_dir, *run_dir.parents] if p.exists())
    free, needed = shutil.disk_usage(existing).free, disk_bytes(plan)
    if run_dir == existing:  # a run that is resumed has part of it already; names may be links to one file
        needed -= sum({file.stat().st_ino: file.stat().st_size for file in run_dir.glob("*.bin")}.values())
    if free < needed:
        raise ValueError(f"the run needs about {needed / 1e6:,.0f} MB of disk and {existing} has {free / 1e6:,.0f} MB; "
                         "free some, lower --keep-last, or choose another --run-dir")


class _Enough(Exception):
    pass


def print_estimate(plan: Plan) -> None:
    """Memory, and the time of the first steps of the run itself, scaled. It has no directory, so it writes nothing."""
    t, model, speeds = plan.train, plan.model, []

    def stop_soon(record: dict) -> None:
        speeds.append(record["tokens_per_second"])
        if len(speeds) > TIMED_STEPS:
            raise _Enough

    with suppress(_Enough):
        _train(plan, None, stop_soon)
    per_second = float(np.median(speeds[1:] or speeds)) / t.tokens_per_step  # the first one also takes the memory
    steps = t.num_steps - (plan.resume.step if plan.resume else 0)
    print(f"memory: about {model.memory_bytes(t.batch_size, t.seq_len) / 1e6:,.0f} MB to train, and "
          f"{12 * model.num_parameters() / 1e6:,.0f} MB for the snapshot that is being saved")
    speed = f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"
    print(f"time: {speed} steps a second, so {_duration(steps / per_second)} for {steps:,} steps, "
          "without validation and samples")
    print("dry run: no run directory was made")


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
    print(f"loss over the whole held-out part: {loss:.4f} nats (perplexity {perplexity(loss):.2f})")
    for prompt in PROMPTS:
        ids = plan.tokenizer.encode(prompt)
        for temperature in TEMPERATURES:
            text = plan.tokenizer.decode(plan.model.generate(ids, SAMPLE_TOKENS, temperature, seed=plan.train.seed))
            print(f"\n--- temperature {temperature} ---\n{text}")
    info = read_info(result.run_dir)
    print(f"\nrun directory: {result.run_dir} ({info['checkpoint_saves']} saves held the training up for "
          f"{info['checkpoint_held_up_seconds']:.2f} s)")
    return 0


def held_out_loss(plan: Plan) -> float:
    """Mean loss in nats over every window of the held-out tokens."""
    t, tokens = plan.train, split_tokens(plan.tokens, plan.train.val_fraction)[1]
    starts, total = np.arange((len(tokens) - 1) // t.seq_len) * t.seq_len, 0.0
    for i in range(0, len(starts), t.batch_size):  # cut as they are needed: the tokens may be larger than memory
        ids, targets = windows(tokens, starts[i:i + t.batch_size], t.seq_len)
        total += plan.model.loss(ids, targets) * len(ids)
    return total / len(starts)


def list_presets() -> str:
    lines = []
    for p in PRESETS.values():
        c = p.model
        lines.append(f"{p.name:14} {ParameterTable(c).size:>12,} parameters  V{c.vocab_size} C{c.n_embd} L{c.n_layers} "
                     f"H{c.n_heads} T{c.block_size}  lr {p.train.learning_rate:g}  {p.train.num_steps:,} steps  "
                     f"{p.summary}")
    return "\n".join(lines)
