"""The loop that reads prompts and commands and writes answers; where the lines come from is not its business."""

from __future__ import annotations

import difflib
import secrets
import sys
from collections.abc import Callable
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

from feste.terminal import clean, shorten

from . import teach
from .answers import DIALS, Answer, Conversation, LoadedModel, Settings

NARROWEST = 26  # characters of a column, so that three fit into 80; more answers than fit side by side go below
FRAMES_PER_SECOND = 12


class Repl:
    """Reads prompts and commands, writes answers. Messages go where they cannot mix with a script's answers."""

    def __init__(self, models: list[LoadedModel], settings: Settings, interactive: bool, end: str = "\n") -> None:
        self.models, self.settings, self.interactive, self.end = models, settings, interactive, end
        self.names = telling_names([loaded.name for loaded in models])
        self.console = Console(stderr=not interactive, highlight=False)
        self.prompt: str | None = None
        self.conversations: list[Conversation] = []  # with each model, while /chat is on
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
        self.console.print(Text(clean(text), style), soft_wrap=not self.interactive)

    # ---- answering ------------------------------------------------------------------------------------------

    def answer(self, prompt: str) -> None:
        seed = secrets.randbelow(1 << 32) if self.settings.seed is None else self.settings.seed
        if self.conversations and self.settings.samples > 1:
            raise ValueError("a conversation goes on with one answer; /samples 1, or /chat off")
        asked = [chat.ask(prompt, self.settings.tokens) for chat in self.conversations] or [None] * len(self.models)
        answers = [Answer(loaded, prompt, self.settings, seed, ids)
                   for loaded, ids in zip(self.models, asked, strict=True)]
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
        for chat, answer in zip(self.conversations, answers, strict=False):
            chat.answered(answer.drawn[0])
        self._record(prompt, answers, seed)
        if self.interactive:
            self.say(f"[{stopped}{'; '.join(map(self._speed, self.names, answers))}; seed {seed}]")

    def _say_if_cut(self, answer: Answer) -> None:
        context = answer.loaded.model.config.block_size
        if len(answer.ids) > context:
            self.say(f"the prompt has {len(answer.ids)} tokens; {answer.loaded.name} sees the last {context}")

    def _speed(self, name: str, answer: Answer) -> str:
        name = f"{name}: " if len(self.models) > 1 else ""
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
        self.console.print(Text(clean(prompt), "bold"), end="", soft_wrap=True)
        for [piece] in answers[0]:
            sys.stdout.write(clean(piece))
            sys.stdout.flush()
        self.console.print()

    def _side_by_side(self, prompt: str, answers: list[Answer]) -> None:
        self.console.print(Text(clean(prompt), "bold"), soft_wrap=True)
        # The display asks for the columns when it draws, so drawing does not slow the tokens down.
        with Live(console=self.console, get_renderable=partial(self._columns, answers),
                  refresh_per_second=FRAMES_PER_SECOND):
            for _ in zip_longest(*answers):
                pass

    def _columns(self, answers: list[Answer]) -> Columns:
        titled = [(name * (len(answers) > 1), f" {i}" * (len(answer.texts) > 1), text)
                  for name, answer in zip(self.names, answers, strict=True) for i, text in enumerate(answer.texts, 1)]
        width = self.console.width // max(1, min(len(titled), self.console.width // NARROWEST))
        panels = [Panel(Text(clean(text)), title=Text((shorten(name, width - len(number) - 6) + number).strip()))
                  for name, number, text in titled]
        return Columns(panels, width=width, padding=0)

    def _record(self, prompt: str, answers: list[Answer], seed: int) -> None:
        for answer in answers:
            for i, text in enumerate(answer.texts, 1):
                self.transcript.append(f"=== {answer.loaded.name}, step {answer.loaded.step}, sample {i}; "
                                       f"{replace(self.settings, seed=seed)}\n{prompt}{text}\n")


def telling_names(names: list[str]) -> list[str]:
    """Names of the form RUN/FILE without the part that all of them share."""
    parts = list(zip(*(name.split("/") for name in names), strict=True))
    telling = [part for part in parts if len(set(part)) > 1] or parts
    return ["/".join(name) for name in zip(*telling, strict=True)]


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


def _chat(repl: Repl, argument: str) -> None:
    if argument.strip() not in ("", "off"):
        raise ValueError(f"/chat begins a conversation, /chat off ends it; got {argument.strip()!r}")
    repl.conversations = [] if argument.strip() else [Conversation(loaded) for loaded in repl.models]
    repl.say("a new conversation; what was said is part of each prompt" if repl.conversations else "no conversation")


def _tokens_of(repl: Repl, argument: str) -> None:
    if not argument:
        raise ValueError("name a text, for example /tokens-of To be, or not to be")
    for loaded in repl.models:
        ids = loaded.tokenizer.encode(argument)
        n_bytes = len(argument.encode())
        repl.say(f"{loaded.name}: {len(ids)} tokens for {n_bytes} bytes, {n_bytes / len(ids):.2f} bytes a token")
        pieces = (Text.assemble((str(i), "dim"), (f" {token_text(loaded.tokenizer.tokens[i])}", "bold")) for i in ids)
        repl.console.print(Text(" │ ").join(pieces))


def _text_or_last(repl: Repl, argument: str, command: str) -> str:
    """The argument, or without one the last prompt."""
    text = argument or repl.prompt
    if not text:
        raise ValueError(f"name a text, for example /{command} To be, or not to")
    return text


def _probs(repl: Repl, argument: str) -> None:
    text = _text_or_last(repl, argument, "probs")
    for name, loaded in zip(repl.names, repl.models, strict=True):
        repl.say(f"{name}, after {text!r}:" if len(repl.models) > 1 else f"after {text!r}:")
        repl.console.print(teach.bars(teach.expected(loaded, text), token_text))


def _surprise(repl: Repl, argument: str) -> None:
    text = _text_or_last(repl, argument, "surprise")
    for name, loaded in zip(repl.names, repl.models, strict=True):
        tokens = teach.surprises(loaded, text)
        known = b"".join(token.text for token in tokens)
        first = text.encode()[:len(text.encode()) - len(known)].decode("utf-8", "replace")
        repl.console.print(teach.coloured(clean(first), tokens), soft_wrap=True)
        bits = sum(token.bits for token in tokens)
        repl.say(f"{name}: {bits:.1f} bits for {len(known)} bytes, {bits / len(known):.2f} bits per byte")
    repl.console.print(teach.legend())


def _load(repl: Repl, argument: str) -> None:
    if not argument.strip():
        raise ValueError("name a checkpoint or a run, for example /load data/RUN")
    loaded = LoadedModel(Path(argument.strip()).expanduser())
    repl.models, repl.names, repl.conversations = [loaded], [loaded.name], []
    repl.say(f"{loaded.name}: {loaded.model.num_parameters():,} parameters, step {loaded.step:,}", "bold")


def token_text(token: bytes) -> str:
    """A token in quotes; bytes that are no character by themselves as \\xNN."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)[1:]


def _info(repl: Repl, argument: str) -> None:
    for loaded in repl.models:
        _print_pairs(repl, loaded.facts().items())
    _print_pairs(repl, [("settings", str(repl.settings))])


def _print_pairs(repl: Repl, pairs) -> None:
    table = Table.grid(padding=(0, 2))
    for left, right in pairs:
        table.add_row(Text(left, "bold"), Text(clean(right)))
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
    "chat": Command("[off]", "begin a conversation, in the words that fine-tuned models know; or end it", _chat),
    "tokens-of": Command("TEXT", "show how the tokenizer splits a text", _tokens_of),
    "probs": Command("[TEXT]", "show which tokens the model expects after a text, or after the last prompt", _probs),
    "surprise": Command("[TEXT]", "colour a text by how much each token of it surprises the model", _surprise),
    "load": Command("PATH", "go on with the model of another checkpoint or run", _load),
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
