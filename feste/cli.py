"""What the training scripts share: flags made from the dataclasses, start-up lines, progress, and the ending.

Every error of a user is one line on standard error and exit code 2, before anything is written. Below this module
errors name fields and arguments; what the flags for them are called is known here alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from feste import launcher

try:
    from feste import ops
except ImportError as error:  # the kernels are not compiled, or not for this CPU, or FESTE_ISA names none
    launcher.give_up(f"error: {error}", 2)
from feste import best, parallel, plan
from feste.arguments import Parser
from feste.config import ARCHITECTURES, FINETUNE, PRESETS, Config, Preset, TrainConfig
from feste.config import CHOICES as TRAIN_CHOICES
from feste.corpus import Source
from feste.errors import FesteError
from feste.evaluation import bytes_per_token, in_bits_per_byte, mean_loss, perplexity
from feste.events import MODULES, Listeners, require_loggers
from feste.formats import huggingface
from feste.machine import useful_threads
from feste.model import GPT2
from feste.pairs import Pairs
from feste.params import ParameterTable
from feste.plan import Plan
from feste.progress import Progress, discard_output
from feste.run.checkpoint import Checkpoint
from feste.run.directory import find_checkpoint
from feste.run.follow import read_info
from feste.run.journal import overheard
from feste.terminal import clean, duration
from feste.text import ERRORS
from feste.tokenizer import BPETokenizer
from feste.trainer import Run, TrainingDiverged, TrainResult, train

PROMPTS = ("To be, or not to be", "ROMEO:\n", "My lord, ")
TEMPERATURES = (0.5, 0.8, 1.0)
SAMPLE_TOKENS = 80
HELD_OUT_TOKENS = 1_000_000  # of the held-out part that are scored at the end of a run
TIMED_STEPS = 3
MANY_PASSES = 8
BEST = "best"  # the preset that is made and not listed
FLAGS = {"num_steps": "--steps"}  # the other flags are the field names
HINTS = {"run_dir": "choose another directory with --run-dir", "resume": "continue a run with --resume DIR",
         "data": "name a text file with --data FILE", "isa": "set a common one with --isa NAME",
         "tokenizer_file": "name it with --tokenizer PATH (tokenizer.json, or a directory with vocab.json and "
                           "merges.txt), or begin with the model it was made for, --from MODEL",
         "prepare": "make a directory of tokens with `feste prepare FILE... -o DIR`, for --data DIR"}
CHOICES = {"errors": ERRORS, "arch": tuple(ARCHITECTURES), **TRAIN_CHOICES}
MODEL_HELP = {
    "vocab_size": "tokens in the vocabulary", "n_embd": "channels of the residual stream",
    "n_layers": "transformer blocks", "n_heads": "attention heads", "block_size": "longest sequence in tokens",
    "dropout": "dropout probability", "tie_weights": "use the token embedding as output weight",
    "arch": "gpt2, or modern: rotary positions, RMSNorm, ReLU squared, no biases",
}


EXAMPLES = """
examples:
  {0}                                        the tiny model on Shakespeare, some seconds
  {0} --preset small --data my.txt           another preset, a text of yours
  {0} --preset spider --n-heads 4 --steps 2000
  {0} --from data/RUN --data my.txt          fine-tune: a new run from a model that was trained
  {0} --resume data/RUN                      go on with a run that was stopped
  {0} --preset gpt2 --dry-run                what it would take
"""


def make_parser(prog: str = "feste train") -> argparse.ArgumentParser:
    """The flags of `feste train`: any preset, with any of its dials turned, on any text."""
    parser = Parser(prog=prog, description="Train a model.", epilog=EXAMPLES.format(prog))
    parser.add_argument("--preset", choices=[*PRESETS, BEST], help="the model and run to start from (default: tiny; "
                        "with --from, the model's own shape and a small learning rate); best: what learns most in "
                        "--minutes")
    parser.add_argument("--minutes", type=float, metavar="N", help="the time that --preset best has")
    parser.add_argument("--list-presets", action="store_true", help="print the presets and exit")
    parser.add_argument("--from", "--checkpoint", dest="checkpoint", metavar="PATH", help="fine-tune: begin with the "
                        "model of a checkpoint, of a run (its best), or of a directory of transformers")
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "feste train") -> int:
    """`feste train`. Returns the exit code."""
    with launcher.only_first_speaks():
        args = make_parser(prog).parse_args(argv)
        if args.list_presets:
            print(list_presets())
            return 0
    return guarded(lambda: _begun(args) or run_training(_preset(args), args))


def _begun(args: argparse.Namespace) -> None:
    """The ranks come together, and all but the first are silent from here on; the kernels are those asked for."""
    if not parallel.world().first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if args.isa is not None and args.isa != ops.isa:
        try:
            ops.use(args.isa)
        except ImportError as error:
            raise FesteError(str(error).replace("FESTE_ISA=", "--isa ")) from None


def _preset(args: argparse.Namespace) -> Preset:
    """The preset that the flags name; `best` is made for the text and this machine, and says why."""
    if (args.preset == BEST) != (args.minutes is not None):
        raise FesteError(f"--preset {BEST} needs --minutes, and --minutes is for it alone", "minutes")
    if args.preset == BEST and (args.resume or args.checkpoint):
        raise FesteError(f"--preset {BEST} is for new models; leave {'--resume' if args.resume else '--from'} out")
    if args.preset == BEST and parallel.world().size > 1:
        raise FesteError(f"--preset {BEST} measures and plans for one process; choose another preset for several ranks")
    if args.preset == BEST:
        source = Source(**_named(args, Source))
        preset, reasons = best.choose(source.characters(), args.minutes, args.precision, args.threads or 0)
        print("\n".join(reasons), flush=True)
        return preset
    return PRESETS[args.preset or "tiny"] if args.preset or not args.checkpoint else FINETUNE


def run_preset(name: str, argv: Sequence[str] | None = None, loop: Callable[[Run], None] | None = None) -> int:
    """The whole of an example: train a preset with the flags of the command line. Returns the exit code.

    loop: what happens in the steps, if not trainer.training_loop.
    """
    parser = Parser(description=f"Train the {name} model: {PRESETS[name].summary}.")
    add_flags(parser, PRESETS[name])
    with launcher.only_first_speaks():
        args = parser.parse_args(argv)
    return guarded(lambda: _begun(args) or run_training(PRESETS[name], args, loop))


# ---- errors ------------------------------------------------------------------------------------------------


def guarded(action: Callable[[], int], hints: Mapping[str, str] = HINTS) -> int:
    """Run an action; turn what a user can mend into one line on standard error, and warnings into a line each.

    hints: what to say about the parameters that an error names, for programs with other flags than those of training.
    Of several ranks with the same trouble the first one says it, and one that is alone with it ends the job.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: print(f"note: {message}")
        code, line = _outcome(action, hints)
    team = parallel.current()
    if line is not None:
        team.give_up(line.removeprefix("error: "))
    if line is None or team.all_here(parallel.LAST_WORDS_SECONDS):
        _say(line if team.first else None)
        team.leave()
    else:
        _say(line.replace(": ", f": {team.me}: ", 1))
        team.abort(code)
    return code


def _say(line: str | None) -> None:
    if line is not None:
        print(line, file=sys.stderr, flush=True)


def _outcome(action: Callable[[], int], hints: Mapping[str, str]) -> tuple[int, str | None]:
    """The exit code of an action, and the line about what went wrong, if something did."""
    try:
        return action(), None
    except BrokenPipeError:
        discard_output()
        return 1, None
    except (ValueError, OSError) as error:
        return 2, f"error: {explain(error, hints)}"
    except MemoryError as error:
        return 2, f"error: not enough memory ({error}); choose a smaller model, --batch-size or --seq-len"
    except TrainingDiverged as error:
        return 1, f"error: training diverged at {error}"
    except parallel.RankLost as error:
        return 1, f"error: {error}"
    except KeyboardInterrupt:
        return 130, "interrupted"
    except Exception as error:
        if parallel.current().size == 1:
            raise
        traceback.print_exc()  # a defect: the others must not wait for this rank
        return 1, f"error: {type(error).__name__}: {error}"


def explain(error: Exception, hints: Mapping[str, str] = HINTS) -> str:
    """An error with the parameters that it names as they are typed, and what to type for the others."""
    names, text = dict.fromkeys(getattr(error, "names", ())), str(error)
    known = [hints[name] for name in names if name in hints]
    others = []
    for name in [name for name in names if name not in hints and name in FIELDS] if hints is HINTS else []:
        end = r"\b" if "_" in name else r"(?==| must )"  # a common word is not always the field of that name
        text, said = re.subn(rf"\b{name}{end}", flag(name), text)
        others += [] if said else [flag(name)]
    said = known + ([f"see {', '.join(others)}"] if others else [])
    return f"{text}; {' or '.join(said)}" if said else text


# ---- flags -------------------------------------------------------------------------------------------------

FIELDS = {f.name for cls in (Config, TrainConfig, Source) for f in fields(cls)}


def add_flags(parser: argparse.ArgumentParser, preset: Preset | None = None) -> None:
    """A flag for every dial; with a preset, the help tells its values."""
    run, text = parser.add_argument_group("run"), parser.add_argument_group("text")
    run.add_argument("--run-dir", metavar="DIR", type=Path, help="new directory of the run (default: "
                     "data/TEXT_PRESET_TIME, or the one that is resumed)")
    run.add_argument("--resume", metavar="PATH", type=Path,
                     help="continue the run of a directory or checkpoint, to the bit")
    run.add_argument("--log-to", metavar="NAME", nargs="+", choices=list(MODULES), default=(),
                     help=f"give the figures to others, too: {', '.join(MODULES)} (offline)")
    run.add_argument("--on-event", metavar="CMD", help="a shell command for the end of the run, failure, NaN and a "
                     "stall: it finds FESTE_EVENT, FESTE_RUN, FESTE_STEP, FESTE_MESSAGE in its environment")
    run.add_argument("--isa", choices=ops.ISAS, help="the instruction set of the kernels (default: the best that this "
                     "CPU supports); ranks on different CPUs need a common one, for bits differ")
    run.add_argument("--dry-run", action="store_true", help="print sizes, memory, disk and time, then exit")
    text.add_argument("--data", metavar="FILE", help="a text file, used whole; a directory of `feste prepare`, of "
                      "nanoGPT's or llm.c's tokens; or a .jsonl of questions and answers (default: Shakespeare, as "
                      "much of it as the preset says)")
    text.add_argument("--val-data", metavar="FILE", help="a text file that is held out for validation (default: the "
                      "end of the text, see --val-fraction)")
    text.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json, or a directory with it or with vocab.json "
                      "and merges.txt (default: one is made from the text)")
    text.add_argument("--encoding", metavar="NAME", help="of the text (default: as its mark says, else utf-8)")
    text.add_argument("--errors", choices=ERRORS, help="what cannot be decoded stops the start, or becomes U+FFFD "
                      "(default: strict)")
    text.add_argument("--train-chars", type=int, metavar="N", help="train on the first N characters of the text")
    text.add_argument("--tokenizer-chars", type=int, metavar="N", help="make the tokenizer from the first N")
    model, training = parser.add_argument_group("model"), parser.add_argument_group("training")
    for group, cls, values in ((model, Config, preset and preset.model),
                               (training, TrainConfig, preset and preset.train)):
        for f in fields(cls):
            value = f" (default: {getattr(values, f.name)})" if values else ""
            _add_flag(group, f.name, type(f.default), (f.metadata.get("help") or MODEL_HELP[f.name]) + value)


def flag(name: str) -> str:
    """What a field is called on the command line."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def _add_flag(group, name: str, kind: type, help_text: str) -> None:
    if kind is bool:
        group.add_argument(flag(name), dest=name, action=argparse.BooleanOptionalAction, help=help_text)
    else:
        group.add_argument(flag(name), dest=name, type=kind, choices=CHOICES.get(name), help=help_text,
                           metavar=None if name in CHOICES else kind.__name__.upper())


def _named(args: argparse.Namespace, cls: type) -> dict:
    """The fields of a dataclass that the command line names."""
    return {f.name: getattr(args, f.name) for f in fields(cls) if getattr(args, f.name) is not None}


# ---- from flags to a plan ----------------------------------------------------------------------------------


def run_training(preset: Preset, args: argparse.Namespace, loop: Callable[[Run], None] | None = None) -> int:
    """Plan the run that the flags describe, say what it is, and carry it out. Returns the exit code."""
    team = parallel.world()
    require_loggers(args.log_to)
    warned: list[str] = []
    with overheard(warned.append):
        the_plan = _plan(preset, args)
    the_plan.warned = warned
    announce(the_plan)
    team.on_first(lambda: _refuse_full_disk(the_plan))
    if args.dry_run:
        print_estimate(the_plan)
        return 0
    if not team.first:
        return _exit_code(train(the_plan, loop=loop))
    listeners = Listeners(Progress(the_plan.config, start=the_plan.state.step), the_plan.run_dir,
                          the_plan.model.config.to_dict() | the_plan.config.to_dict(), args.log_to, args.on_event)
    with listeners:
        result = train(the_plan, listeners, loop)
        listeners.state = result.state
    return finish(the_plan, result)


def _plan(preset: Preset, args: argparse.Namespace) -> Plan:
    team = parallel.world()
    if args.resume is not None:
        return _resumed(args)
    source = _source(preset, args)
    info = {"name": preset.name, "source": args.data or str(source), "data_flags": source.to_dict()}
    if getattr(args, "checkpoint", None) is not None:
        model, tokenizer, data, config = _of_checkpoint(preset, args, source, info)
    else:
        model, tokenizer, data, config = _fresh(preset, args, source)
    data = plan.data_of(model.config, tokenizer, data)
    if source.data is not None and args.sample_prompt is None:  # the default is Shakespeare's
        prompts = data.sample_prompts(config, tokenizer, 1)
        config = replace(config, sample_prompt=prompts[0]) if prompts and prompts[0] else config
    parallel.require_shares(config, team.size)
    the_plan = plan.new(model, tokenizer, data, config, info=info)
    if args.run_dir is None:
        the_plan.run_dir = team.on_first(lambda: _new_directory(preset, source, args.dry_run))
    else:
        team.on_first(lambda: plan.require_new(args.run_dir))
        the_plan.run_dir = args.run_dir
    return the_plan


def _fresh(preset: Preset, args: argparse.Namespace, source: Source):
    """Model, tokenizer, tokens or pairs, and configuration of a run from nothing."""
    if args.run_dir is not None:
        parallel.world().on_first(lambda: plan.require_new(args.run_dir))  # before the tokenizer takes its time
    model_config = replace(preset.model, **_named(args, Config))
    config = _train_config(preset, model_config, args, source)
    data, tokenizer = source.load(model_config.vocab_size)
    if args.vocab_size is not None and args.vocab_size < tokenizer.vocab_size:
        raise FesteError(f"vocab_size={args.vocab_size} is less than the {tokenizer.vocab_size} tokens of {source}; "
                         "leave it out", "vocab_size")
    # The tokenizer decides: a text may yield fewer tokens, and a directory of tokens has its own.
    model = GPT2(replace(model_config, vocab_size=tokenizer.vocab_size), config.seed, config.precision)
    return model, tokenizer, data, config


def _of_checkpoint(preset: Preset, args: argparse.Namespace, source: Source, info: dict):
    """Model, tokenizer, tokens or pairs, and configuration of a run that begins with a checkpoint's parameters."""
    checkpoint = _starting_point(Path(args.checkpoint), args.precision)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if tokenizer is None:
        raise FesteError(f"{checkpoint.path} holds no tokenizer, which fine-tuning needs")
    for name in ("tokenizer", "tokenizer_chars"):
        if getattr(args, name) is not None:
            raise FesteError(f"a checkpoint brings its own tokenizer; leave {name} out", name)
    plan.require_same_model(model.config, _named(args, Config), str(checkpoint.path))
    config = replace(_train_config(preset, model.config, args, source), precision=model.precision)
    data, tokenizer = source.load(tokenizer.vocab_size, tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:  # it got an <|endoftext|>
        model = model.with_vocabulary(tokenizer.vocab_size)
    info["parent"] = {"checkpoint": str(checkpoint.path.absolute()), "step": checkpoint.step}
    return model, tokenizer, data, config


def _starting_point(path: Path, precision: str | None) -> Checkpoint:
    """A checkpoint, of a run its best one, or the model of a directory of transformers."""
    if huggingface.is_model(path):
        return Checkpoint(GPT2.from_pretrained(path, precision or "fp32"), BPETokenizer.from_pretrained(path), None,
                          path=path)
    return Checkpoint.load(find_checkpoint(path, prefer="best")[0], precision=precision)


def _train_config(preset: Preset, model: Config, args: argparse.Namespace, source: Source) -> TrainConfig:
    named = _named(args, TrainConfig)
    if preset.train.seq_len > model.block_size or args.block_size or source.is_pairs:  # which are as long as they are
        named.setdefault("seq_len", model.block_size)
    return replace(preset.train, **named)


def _source(preset: Preset, args: argparse.Namespace) -> Source:
    """Which text. A preset takes the beginning of Shakespeare only; a text of the user's own is meant as a whole."""
    named = _named(args, Source)
    if "val_data" in named and args.val_fraction is not None:
        raise FesteError(f"val_fraction={args.val_fraction} holds out the end of the text, and val_data another text; "
                         "leave one of them out", "val_fraction", "val_data")
    named |= {name: str(Path(named[name]).absolute()) for name in ("data", "tokenizer", "val_data") if name in named}
    if args.data is None:
        return replace(Source(None, preset.train_chars, preset.tokenizer_chars), **named)
    return Source(**named)


def _new_directory(preset: Preset, source: Source, dry_run: bool) -> Path:
    """data/TEXT_PRESET_TIME, made here so that runs started in the same second get directories of their own."""
    text = "shakespeare" if source.data is None else Path(source.data).stem
    name = Path("data", f"{text}_{preset.name}_{datetime.now():%Y%m%d_%H%M%S}")
    for path in (name, *(name.with_name(f"{name.name}_{n}") for n in range(2, 1000))):
        if dry_run and not path.exists():
            return path
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise FesteError(f"{name} exists, and so do 998 more of that name", "run_dir")


def _resumed(args: argparse.Namespace) -> Plan:
    """The plan of a run that is in its directory already."""
    for name in ("checkpoint", "tokenizer", "tokenizer_chars"):
        if getattr(args, name, None) is not None:
            raise FesteError(f"{flag(name)} is for new runs, and --resume continues one; leave one of them out")
    team = parallel.world()
    checkpoint = parallel.shared_checkpoint(team, lambda: plan.checkpoint_to_resume(args.resume, args.run_dir))
    saved = plan.require_resumable(checkpoint)
    named = _named(args, TrainConfig)
    plan.require_same_run(saved, checkpoint.model.config, named, _named(args, Config))
    info = team.on_first(lambda: read_info(checkpoint.path.parent))
    source = Source.of_run(info)
    if args.data is not None:
        source = replace(source or Source(), data=str(Path(args.data).absolute()))
    if source is None:
        raise FesteError("run.json does not name the text of the run; name it, and with --train-chars how much of it, "
                         "if only its beginning was used", "data")
    named_of_text = {name: value for name, value in _named(args, Source).items() if name != "data"}
    source = replace(source, **named_of_text)
    data, _ = source.load(checkpoint.tokenizer.vocab_size, checkpoint.tokenizer)
    kept = {"name": info.get("name", "resumed"), "source": args.data or info.get("source", str(source)),
            "data_flags": source.to_dict()}
    kept |= {"parent": info["parent"]} if "parent" in info else {}
    config = replace(saved, **named)
    parallel.require_shares(config, team.size)
    return plan.resumed(checkpoint, data, config, args.run_dir or checkpoint.path.parent, kept)


# ---- start and end -----------------------------------------------------------------------------------------


def announce(the_plan: Plan) -> None:
    """The start-up lines."""
    c, t, team = the_plan.model.config, the_plan.config, parallel.world()
    ops.set_num_threads(t.threads or team.threads())
    for note in the_plan.notes:
        print(note)
    parent = the_plan.info.get("parent")
    print(f"{the_plan.info['name']}: {the_plan.model.num_parameters():,} parameters (vocabulary {c.vocab_size}, "
          f"{c.n_embd} channels, {c.n_layers} layers, {c.n_heads} heads, context {c.block_size}, "
          f"{'tied' if c.tie_weights else 'untied'} head{', modern layers' if c.arch == 'modern' else ''})"
          + (f", from step {parent['step']} of {parent['checkpoint']}" if parent else ""))
    print(f"kernels: {ops.isa} ({ops.isa_reason}), {ops.get_num_threads()} threads, {t.precision}")
    if team.size > 1:
        print(f"ranks: {describe_ranks(team, t)}")
    if ops.get_num_threads() > useful_threads():
        _note(the_plan, f"{ops.get_num_threads()} threads have the time of {useful_threads()} cores, so they wait for "
                        "each other; leave --threads out")
    if t.precision == "bf16" and ops.isa != "avx512":
        _note(the_plan, "this CPU has no bfloat16 instructions: the same numbers, slower than fp32")
    chars = the_plan.info["data_flags"]["train_chars"]
    limit = f"at most {chars:,} characters of " if chars else ""
    print(f"data: {limit}{the_plan.info['source']}: {the_plan.data.describe(t)}")
    where = f"continues at step {the_plan.state.step + 1} in" if the_plan.resumed else "goes to"
    passes = the_plan.data.passes(t)
    print(f"run: {t.num_steps:,} steps, which read the training part {passes:.3g} times; {where} {the_plan.run_dir}, "
          f"which takes up to {disk_bytes(the_plan) / 1e6:,.0f} MB of disk")
    if advice := repetition_advice(the_plan, passes):
        _note(the_plan, advice)
    sys.stdout.flush()


def _note(the_plan: Plan, words: str) -> None:
    """Say it here, and in the journal of the run."""
    print(f"note: {words}")
    the_plan.warned.append(words)


def describe_ranks(team: parallel.Team, config: TrainConfig) -> str:
    """How many processes there are, where, and what each does."""
    hosts = Counter(peer.host for peer in team.peers)
    where = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    each = config.accumulation // team.size
    how = f"apart for {config.sync_every} steps at a time" if config.sync_every else "in step"
    return f"{team.size} ({where}), each with {each} of the {config.accumulation} mini-batches of a step, {how}"


def repetition_advice(the_plan: Plan, passes: float) -> str | None:
    """What many passes over a text suggest: docs/LEARNING.md has the figures. None where the run does it already."""
    config = the_plan.config
    if passes < MANY_PASSES or isinstance(the_plan.data, Pairs):
        return None
    missing = ["--dropout 0.1"] * (the_plan.model.config.dropout == 0.0)
    missing += ["--token-splits 0.1"] * (config.token_splits == 0.0 and the_plan.tokenizer.vocab_size > 256)
    if not missing:
        return None
    return (f"a text that is read {passes:.0f} times is learned by heart: {' and '.join(missing)} "
            f"often end{'s' * (len(missing) == 1)} lower, more text always does; the best checkpoint is kept")


def disk_bytes(the_plan: Plan) -> int:
    """The checkpoints that are kept at once (periodic, named and the one being written), and the log."""
    config = the_plan.config
    one = 12 * the_plan.model.num_parameters() + len(the_plan.tokenizer.to_json())
    periodic = min(config.keep_last, config.num_steps // config.checkpoint_interval)
    named = 4 if config.schedule == "wsd" else 3
    return one * (periodic + named) + 200 * config.num_steps


def _refuse_full_disk(the_plan: Plan) -> None:
    run_dir = the_plan.run_dir.absolute()
    existing = next(p for p in [run_dir, *run_dir.parents] if p.exists())
    free, needed = shutil.disk_usage(existing).free, disk_bytes(the_plan)
    # A run that is resumed has part of it already; names may be links to one file.
    needed -= sum({file.stat().st_ino: file.stat().st_size for file in run_dir.glob("*.bin")}.values())
    if free < needed:
        with suppress(OSError):
            run_dir.rmdir()  # if it was made for this run, it is empty
        raise FesteError(f"the run needs about {needed / 1e6:,.0f} MB of disk and {existing} has {free / 1e6:,.0f} MB; "
                         "free some, or keep fewer checkpoints", "keep_last", "run_dir")


class _Enough(Exception):
    pass


def print_estimate(the_plan: Plan) -> None:
    """Memory, and the time of the first steps of the run itself, scaled. It has no directory, so it writes nothing."""
    t, model, speeds, first = the_plan.config, the_plan.model, [], the_plan.state.step
    tokens, team, waited = the_plan.data.tokens_per_step(t), parallel.world(), []

    def stop_soon(record: dict) -> None:
        speeds.append(record["tokens_per_second"])
        waited.append(team.waited)
        if len(speeds) > TIMED_STEPS:
            raise _Enough

    the_plan.run_dir = None
    with suppress(_Enough):
        train(the_plan, stop_soon)
    per_second = float(np.median(speeds[1:] or speeds)) / tokens  # the first one also takes the memory
    steps = t.num_steps - first
    needed = model.memory_bytes(t.batch_size, t.seq_len) + parallel.more_bytes(team, model, t)
    print(f"memory: about {needed / 1e6:,.0f} MB to train, and "
          f"{12 * model.num_parameters() / 1e6:,.0f} MB for the snapshot that is being saved")
    speed = f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"
    print(f"time: {speed} steps a second, so {duration(steps / per_second)} for {steps:,} steps, "
          "without validation and samples")
    if team.size > 1:
        print(_of_the_wire(team, the_plan, float(np.median(np.diff(waited))), 1.0 / per_second))
    print("dry run: no run directory was made")


def _of_the_wire(team: parallel.Alone, the_plan: Plan, waited: float, step: float) -> str:
    """What the ranks send each other, and what it costs: from steps and a link that were measured just now."""
    config, link = the_plan.config, team.link()
    sent = parallel.sent_bytes(team, the_plan.model, config)
    now_and_then = f", on average of {config.sync_every} steps" if config.sync_every else ""
    if config.sync_every:
        waited = sent / link
        step += waited
    return (f"ranks: each sends {sent / 1e6:,.1f} MB a step{now_and_then}, which takes {1e3 * sent / link:,.3g} ms at "
            f"the {link / 1e6:,.0f} MB a second measured here; {waited / step:.0%} of a step is spent waiting, "
            f"so {team.size} ranks do the work of {team.size * (1.0 - waited / step):.1f}")


def finish(the_plan: Plan, result: TrainResult) -> int:
    """The ending: how it went, and text from the model. Returns the exit code."""
    print(f"{result.state.replace('_', ' ')} at step {result.step} after {result.elapsed_seconds:.1f} s: "
          f"train loss {result.train_loss:.4f}, best validation loss {result.best_val_loss:.4f} "
          f"at step {result.best_step}")
    if result.skipped_steps:
        print(f"{result.skipped_steps} steps were skipped because their loss or gradient was not finite")
    if result.signal is not None and result.state == "interrupted":
        print(f"continue with: {training_command()} --resume {shlex.quote(str(result.run_dir))}")
        return _exit_code(result)
    print(_held_out(the_plan))
    show_samples(the_plan)
    print(f"\nrun directory: {result.run_dir} ({result.saves} saves held the training up for "
          f"{result.held_up_seconds:.2f} s)")
    run_dir = shlex.quote(str(result.run_dir))
    print(f"talk to it:    {program()} repl {run_dir}\nits curves:    {program()} plot {run_dir} -o loss.png")
    return 0


def _exit_code(result: TrainResult) -> int:
    return 128 + result.signal if result.signal is not None and result.state == "interrupted" else 0


def program() -> str:
    """How feste is called here: by its name, or as a module of this Python."""
    if shutil.which("feste"):
        return "feste"
    python = Path(sys.executable)
    with suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m feste"


def training_command() -> str:
    """What was called: a script of one's own, or `feste train`."""
    script, ranks = Path(sys.argv[0]), parallel.current().size
    mpiexec = f"mpiexec -n {ranks} " if ranks > 1 else ""
    if script.suffix == ".py" and script.name != "__main__.py":
        return f"{mpiexec}python {shlex.quote(sys.argv[0])}"
    return f"{mpiexec}{program()} train"


def _held_out(the_plan: Plan) -> str:
    """The loss over the held-out part, in a line that says of how much of it."""
    batches, of = the_plan.data.scored(the_plan.config, HELD_OUT_TOKENS)
    batches = list(batches)
    loss, size = mean_loss(the_plan.model, batches), bytes_per_token(batches, the_plan.tokenizer)
    bits = f", {in_bits_per_byte(loss, size):.3f} bits per byte" if size else ""
    return f"loss over {of}: {loss:.4f} nats (perplexity {perplexity(loss):.2f}){bits}"


def show_samples(the_plan: Plan) -> None:
    """Continuations of a few prompts at a few temperatures, of a text of one's own from its held-out part; or answers.

    A model's words cannot steer the terminal.
    """
    tokenizer, asked = the_plan.tokenizer, isinstance(the_plan.data, Pairs)
    own = the_plan.info["data_flags"]["data"] is not None
    for prompt in the_plan.data.sample_prompts(the_plan.config, tokenizer, len(PROMPTS)) if own else PROMPTS:
        ids = tokenizer.encode(prompt)
        for temperature in (0.0,) if asked else TEMPERATURES:
            new = the_plan.model.generate(ids, SAMPLE_TOKENS, temperature, seed=the_plan.config.seed,
                                          vocab_size=tokenizer.vocab_size, stop_tokens=tokenizer.stop_tokens)
            print(f"\n--- temperature {temperature} ---\n{clean(the_plan.tokenizer.decode(new))}")


def list_presets() -> str:
    lines = []
    for p in PRESETS.values():
        c = p.model
        lines.append(f"{p.name:14} {ParameterTable(c).size:>12,} parameters  V{c.vocab_size} C{c.n_embd} L{c.n_layers} "
                     f"H{c.n_heads} T{c.block_size}  lr {p.train.learning_rate:g}  {p.train.num_steps:,} steps  "
                     f"{p.summary}")
    return "\n".join(lines)
