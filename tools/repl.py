"""Talk to a model: `python -m tools.repl CHECKPOINT_OR_RUN`, or two of them with `--compare A B`.

A line is a prompt that the model continues; a line that ends in a backslash goes on in the next one. A line that
starts with a slash is a command (`/help`), with two slashes a prompt that starts with one. If standard input or
output is no terminal, the same lines are read, only answers go to standard output, and an error ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from feste import generation, ops
from feste.checkpoint import Checkpoint, find_checkpoint
from feste.cli import guarded
from feste.config import PRECISIONS
from feste.runlog import perplexity
from feste.tokenizer import BPETokenizer

HISTORY_LINES = 1000
NARROWEST = 30  # characters of a column; more answers than fit side by side go below
FRAMES_PER_SECOND = 12
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def visible(text: str) -> str:
    """A text that cannot steer the terminal: control characters but newline and tab become visible signs."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else
                   chr(0x2400 + ord(c)) if ord(c) < 0x20 else UNKNOWN for c in text)


# ---- settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dial:
    """A setting that a flag and a command of the same name turn. unset is the word for None."""

    field: str
    kind: type
    help: str
    unset: str | None = None

    def parse(self, word: str) -> float | int | None:
        if word == self.unset:
            return None
        try:
            return self.kind(word)
        except ValueError:
            kind = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"{word!r} is not {kind}{f' or {self.unset!r}' if self.unset else ''}") from None

    def word(self, value: float | int | None) -> str:
        """What `parse` reads as this value, every digit of it: a seed that is rounded draws another answer."""
        return self.unset if value is None else str(value)


DIALS = {
    "temp": Dial("temperature", float, "temperature: 0 takes the most likely token, higher is more varied"),
    "top-k": Dial("top_k", int, "draw from the K most likely tokens only", "off"),
    "top-p": Dial("top_p", float, "draw from the fewest tokens whose probabilities reach P", "off"),
    "tokens": Dial("tokens", int, "new tokens in an answer"),
    "samples": Dial("samples", int, "answers to each prompt, side by side"),
    "seed": Dial("seed", int, "the same seed draws the same answer", "random"),
}


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. A bad value raises ValueError."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    tokens: int = 200
    samples: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        self.sampler(0)

    def sampler(self, seed: int) -> generation.Sampler:
        return generation.Sampler(self.temperature, self.top_k, self.top_p, seed)

    def __str__(self) -> str:
        return ", ".join(f"{name} {dial.word(getattr(self, dial.field))}" for name, dial in DIALS.items())


# ---- models and their answers ------------------------------------------------------------------------------


class Voice:
    """The model and tokenizer of a checkpoint; of a run directory, those of its best checkpoint."""

    def __init__(self, path: str | os.PathLike, precision: str | None = None) -> None:
        self.path, self.passed_over = find_checkpoint(path, prefer="best")
        checkpoint = Checkpoint.load(self.path, precision=precision)
        self.model, self.step, self.best_val_loss = checkpoint.model, checkpoint.step, checkpoint.best_val_loss
        self.train_config = checkpoint.train_config or {}
        beside = self.path.parent / "tokenizer.json"
        if checkpoint.tokenizer is None and not beside.exists():
            raise ValueError(f"{self.path} holds no tokenizer and there is no {beside}; save one there with "
                             "tokenizer.save")
        self.tokenizer = checkpoint.tokenizer or BPETokenizer.load(beside)
        self.name = f"{self.path.absolute().parent.name}/{self.path.name}"

    def facts(self) -> dict[str, str]:
        c = self.model.config
        best = "none" if math.isinf(self.best_val_loss) else (
            f"{self.best_val_loss:.4f} nats, perplexity {perplexity(self.best_val_loss):.2f}")
        return {
            "checkpoint": str(self.path), "step": f"{self.step:,}", "best validation loss": best,
            "model": f"{self.model.num_parameters():,} parameters: {c.n_layers} layers, {c.n_embd} channels, "
                     f"{c.n_heads} heads, context {c.block_size}",
            "tokenizer": f"{self.tokenizer.vocab_size:,} tokens",
            "kernels": f"{ops.isa}, {ops.get_num_threads()} threads, {self.model.precision}",
        }


class Answer:
    """Continuations of a prompt by one voice, as many as settings.samples, made together.

    Iterating makes a token of each and yields the pieces of text that are complete with it.
    """

    def __init__(self, voice: Voice, prompt: str, settings: Settings, seed: int) -> None:
        self.voice, self.settings, self.seed = voice, settings, seed
        self.ids = generation.check_request(voice.tokenizer.encode(prompt), settings.tokens,
                                            voice.model.config.vocab_size)
        self.texts = [""] * settings.samples
        self.tokens, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[list[str]]:
        decoders = [self.voice.tokenizer.stream_decoder() for _ in self.texts]
        begun = time.perf_counter()
        for ids in self.voice.model.stream(self.ids, self.settings.samples, self.settings.tokens,
                                           self.settings.sampler(self.seed)):
            pieces = [self._piece(decoder, i) for decoder, i in zip(decoders, ids, strict=True)]
            self.tokens += len(ids)
            self.seconds += time.perf_counter() - begun
            yield self._add(pieces)
            begun = time.perf_counter()
        yield self._add([decoder.flush() for decoder in decoders])

    def _piece(self, decoder, token_id: int) -> str:
        # A model may have room for more tokens than its tokenizer knows.
        return decoder.feed(token_id) if token_id < self.voice.tokenizer.vocab_size else UNKNOWN

    def _add(self, pieces: list[str]) -> list[str]:
        self.texts = [text + piece for text, piece in zip(self.texts, pieces, strict=True)]
        return pieces

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


# ---- the loop ----------------------------------------------------------------------------------------------


class Repl:
    """Reads prompts and commands, writes answers. Messages go where they cannot mix with a script's answers."""

    def __init__(self, voices: list[Voice], settings: Settings, interactive: bool, end: str = "\n") -> None:
        self.voices, self.settings, self.interactive, self.end = voices, settings, interactive, end
        self.console = Console(stderr=not interactive, highlight=False)
        self.prompt: str | None = None
        self.transcript: list[str] = []
        self.done = False

    def run(self, read_line: Callable[[str], str]) -> int:
        while not self.done:
            try:
                self.obey(read_prompt(read_line))
            except EOFError:
                if self.interactive:
                    self.console.print()
                break
            except KeyboardInterrupt:  # at the prompt: the line is given up
                if not self.interactive:
                    raise
                self.console.print()
            except ValueError as error:
                if not self.interactive:
                    raise
                self.say(f"error: {error}", "red")
        return 0

    def obey(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line[1:].partition(" ")
            find_command(name.strip()).run(self, argument)
        elif line:
            self.answer(line[1:] if line.startswith("//") else line)

    def say(self, text: str, style: str = "dim") -> None:
        self.console.print(Text(visible(text), style), soft_wrap=True)

    # ---- answering ------------------------------------------------------------------------------------------

    def answer(self, prompt: str) -> None:
        seed = secrets.randbelow(1 << 32) if self.settings.seed is None else self.settings.seed
        answers = [Answer(voice, prompt, self.settings, seed) for voice in self.voices]
        self.prompt = prompt
        for answer in answers:
            self._say_if_cut(answer)
        show = (self._plain if not self.interactive else
                self._stream if len(answers) * self.settings.samples == 1 else self._side_by_side)
        try:
            show(prompt, answers)
            stopped = ""
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stopped = "stopped, "
            self.console.print()
        self._record(prompt, answers, seed)
        if self.interactive:
            self.say(f"[{stopped}{'; '.join(map(self._speed, answers))}; seed {seed}]")

    def _say_if_cut(self, answer: Answer) -> None:
        context = answer.voice.model.config.block_size
        if len(answer.ids) > context:
            self.say(f"the prompt has {len(answer.ids)} tokens; {answer.voice.name} sees the last {context}")

    def _speed(self, answer: Answer) -> str:
        name = f"{answer.voice.name}: " if len(self.voices) > 1 else ""
        return f"{name}{answer.tokens:,} tokens in {answer.seconds:.2f} s, {answer.tokens_per_second:,.0f} tokens/s"

    def _plain(self, prompt: str, answers: list[Answer]) -> None:
        """Whole answers, character for character, each with the end mark behind it."""
        for answer in answers:
            if len(answer.texts) == 1:
                for [piece] in answer:
                    print(piece, end="", flush=True)
                print(end=self.end, flush=True)
            else:
                for _ in answer:
                    pass
                print(*answer.texts, sep=self.end, end=self.end, flush=True)

    def _stream(self, prompt: str, answers: list[Answer]) -> None:
        self.console.print(Text(visible(prompt), "bold"), end="", soft_wrap=True)
        for [piece] in answers[0]:
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
        self.console.print()

    def _side_by_side(self, prompt: str, answers: list[Answer]) -> None:
        self.console.print(Text(visible(prompt), "bold"), soft_wrap=True)
        # The display asks for the columns when it draws, so drawing does not slow the tokens down.
        with Live(console=self.console, get_renderable=partial(self._columns, answers),
                  refresh_per_second=FRAMES_PER_SECOND):
            for _ in zip_longest(*answers):
                pass

    def _columns(self, answers: list[Answer]) -> Columns:
        titled = [(f"{answer.voice.name} " * (len(answers) > 1) + f"{i}" * (len(answer.texts) > 1), text)
                  for answer in answers for i, text in enumerate(answer.texts, 1)]
        across = max(1, min(len(titled), self.console.width // NARROWEST))
        panels = [Panel(Text(visible(text)), title=Text(title.strip())) for title, text in titled]
        return Columns(panels, width=self.console.width // across, padding=0)

    def _record(self, prompt: str, answers: list[Answer], seed: int) -> None:
        for answer in answers:
            for i, text in enumerate(answer.texts, 1):
                self.transcript.append(f"=== {answer.voice.name}, step {answer.voice.step}, sample {i}; "
                                       f"{replace(self.settings, seed=seed)}\n{prompt}{text}\n")


def read_prompt(read_line: Callable[[str], str]) -> str:
    """The next prompt: lines that end in a backslash go on in the next. EOFError at the end of input."""
    lines = [read_line("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read_line(". "))
        except EOFError:
            break
    return "\n".join(lines)


# ---- commands ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    argument: str
    help: str
    run: Callable[[Repl, str], None]


def _turn(name: str, repl: Repl, argument: str) -> None:
    """Set a dial, or without an argument show it."""
    dial, word = DIALS[name], argument.strip()
    if word:
        try:
            repl.settings = replace(repl.settings, **{dial.field: dial.parse(word)})
        except ValueError as error:
            raise ValueError(f"/{name}: {error}") from None
    repl.say(f"{name} {dial.word(getattr(repl.settings, dial.field))}")


def _again(repl: Repl, argument: str) -> None:
    if repl.prompt is None:
        raise ValueError("there is no prompt yet to answer again")
    repl.answer(repl.prompt)


def _tokens_of(repl: Repl, argument: str) -> None:
    if not argument:
        raise ValueError("name a text, for example /tokens-of To be, or not to be")
    for voice in repl.voices:
        ids = voice.tokenizer.encode(argument)
        n_bytes = len(argument.encode())
        repl.say(f"{voice.name}: {len(ids)} tokens for {n_bytes} bytes, {n_bytes / len(ids):.2f} bytes a token")
        pieces = (Text.assemble((str(i), "dim"), (f" {token_text(voice.tokenizer.tokens[i])}", "bold")) for i in ids)
        repl.console.print(Text(" │ ").join(pieces))


def token_text(token: bytes) -> str:
    """A token in quotes; bytes that are no character by themselves as \\xNN."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)[1:]


def _info(repl: Repl, argument: str) -> None:
    for voice in repl.voices:
        _print_pairs(repl, voice.facts().items())
    _print_pairs(repl, [("settings", str(repl.settings))])


def _print_pairs(repl: Repl, pairs) -> None:
    table = Table.grid(padding=(0, 2))
    for left, right in pairs:
        table.add_row(Text(left, "bold"), Text(visible(right)))
    repl.console.print(table)


def _save(repl: Repl, argument: str) -> None:
    if not argument.strip():
        raise ValueError("name a file, for example /save answers.txt")
    path = Path(argument.strip()).expanduser()
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write("\n".join(repl.transcript))
    except FileExistsError:
        raise ValueError(f"{path} exists and is not overwritten; choose another name") from None
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    repl.say(f"{len(repl.transcript)} answers with their prompts and settings are in {path}")


def _help(repl: Repl, argument: str) -> None:
    _print_pairs(repl, [(f"/{name} {command.argument}", command.help) for name, command in COMMANDS.items()])
    repl.say("A line is a prompt; end it with \\ to go on in the next line; begin it with // for a prompt that starts "
             "with a slash.\nCtrl+C stops the answer, Ctrl+D at an empty line ends the program.")


def _quit(repl: Repl, argument: str) -> None:
    repl.done = True


COMMANDS = {name: Command(f"[NUMBER|{dial.unset}]" if dial.unset else "[NUMBER]", dial.help, partial(_turn, name))
            for name, dial in DIALS.items()} | {
    "again": Command("", "answer the last prompt again", _again),
    "tokens-of": Command("TEXT", "show how the tokenizer splits a text", _tokens_of),
    "info": Command("", "show the checkpoint, its model and the settings", _info),
    "save": Command("FILE", "write the answers so far, with prompts and settings, to a new file", _save),
    "help": Command("", "show this list", _help),
    "quit": Command("", "end the program", _quit),
}


def find_command(name: str) -> Command:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ValueError(f"there is no command /{name}; " + (f"did you mean /{close[0]}?" if close else
                                                             "/help lists them, // begins a prompt with a slash"))
    return COMMANDS[name]


# ---- terminal and script -----------------------------------------------------------------------------------


def history_path() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "feste" / "repl_history"


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Line editing, history and completion of command names, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_path()
    readline.set_completer_delims(" ")
    readline.set_completer(_complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):  # a history that cannot be read or kept is no reason not to talk
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def _complete(text: str, state: int) -> str | None:
    found = [f"/{name} " for name in COMMANDS if f"/{name}".startswith(text)] if text.startswith("/") else []
    return found[state] if state < len(found) else None


def _script_line(_: str) -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}; convert it first, for example with iconv") from None
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.repl", description="Talk to a model.",
                                     epilog="With a pipe for standard input, each line is a prompt (or a command), "
                                     "and only the answers go to standard output.")
    parser.add_argument("path", nargs="?", metavar="CHECKPOINT_OR_RUN", help="of a run directory: its best checkpoint")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="answer each prompt from two checkpoints")
    for name, dial in DIALS.items():
        default = getattr(Settings, dial.field)
        parser.add_argument(f"--{name}", metavar="N", dest=dial.field,
                            help=f"{dial.help} (default: {dial.unset if default is None else default})")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: that of the checkpoint")
    parser.add_argument("--null", action="store_true",
                        help="end each answer with a NUL byte, since it may have line ends in it (scripts only)")
    return parser


def start(args: argparse.Namespace) -> int:
    if (args.path is None) == (args.compare is None):
        raise ValueError("name one checkpoint or run directory, or two with --compare A B")
    settings = _settings(args)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    voices = [Voice(path, args.precision) for path in args.compare or [args.path]]
    for line in (line for voice in voices for line in voice.passed_over):
        print(f"passed over: {line}", file=sys.stderr)
    repl = Repl(voices, settings, interactive, "\0" if args.null else "\n")
    if not interactive:
        sys.stdin.reconfigure(encoding="utf-8")
        sys.stdout.reconfigure(encoding="utf-8")
        return repl.run(_script_line)
    sys.stdout.reconfigure(errors="replace")
    for voice in voices:
        repl.say(f"{voice.name}: {voice.model.num_parameters():,} parameters, step {voice.step:,}", "bold")
    repl.say("/help lists the commands, Ctrl+C stops an answer, Ctrl+D ends")
    with line_editing():
        return repl.run(input)


def _settings(args: argparse.Namespace) -> Settings:
    values = {}
    for name, dial in DIALS.items():
        word = getattr(args, dial.field)
        if word is not None:
            try:
                values[dial.field] = dial.parse(word)
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from None
    return Settings(**values)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return guarded(lambda: _quietly(args))
    except BrokenPipeError:  # whoever read the answers has enough; Python must not complain of it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _quietly(args: argparse.Namespace) -> int:
    """start, with the shell's code for Ctrl+C."""
    try:
        return start(args)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
