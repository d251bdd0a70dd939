"""Fine-tune a model on questions and answers, the whole loop in the open: under two minutes from the small model.

    python examples/09_finetune_gpt2.py              from the newest run of example 06
    python examples/09_finetune_gpt2.py DIRECTORY    from GPT-2 as transformers keeps it, or any run or checkpoint

The questions are cut out of Shakespeare: who speaks next, and how a line ends. The loss counts the answers only, and
the <|endoftext|> behind each, by which the model learns to stop. What to look for: before, the model goes on with
the play and answers nothing; after, it answers in form, and often right where the answer can be found in the question.

The questions stay in data/shakespeare_questions.jsonl; `feste train --from MODEL --data FILE.jsonl` does the same with
a log, checkpoints and all dials, and `feste repl` talks to the result.
"""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from feste import GPT2, AdamW, BPETokenizer, Checkpoint, find_checkpoint, learning_rate_at
from feste.cli import guarded
from feste.config import TrainConfig
from feste.corpus import shakespeare_text
from feste.errors import FesteError
from feste.formats import huggingface
from feste.pairs import Pairs, read_pairs
from feste.tokenizer import END_OF_TEXT

QUESTIONS = Path("data", "shakespeare_questions.jsonl")
SPEECH = re.compile(r"^([A-Z][A-Z ]+)\.\n(.+)$", re.MULTILINE)  # a name on a line of its own, and the first line spoken
CONFIG = TrainConfig(num_steps=3000, learning_rate=1e-3, batch_size=16, warmup_fraction=0.05)


def questions(text):
    """Pairs of a question and its answer, the two kinds in turn."""
    speeches = [(found.start(), *found.groups()) for found in SPEECH.finditer(text)]
    for first in range(0, len(speeches) - 3, 2):
        scene = speeches[first:first + 4]
        close = all(b[0] - a[0] < 1500 for a, b in pairwise(scene))  # nobody came or went in between
        if close and scene[3][1] in {name for _, name, _ in scene[:3]}:  # who has spoken already
            lines = "".join(f"{name}: {line[:40]}\n" for _, name, line in scene[:3])
            yield {"prompt": f"{lines}Who speaks next?", "completion": f" {scene[3][1]}"}
        words = scene[0][2].split()
        if len(words) >= 6:
            yield {"prompt": f"Complete the line: {' '.join(words[:-2])}", "completion": f" {' '.join(words[-2:])}"}


def load(path):
    """Model and tokenizer of a directory of transformers, a run or a checkpoint."""
    if huggingface.is_model(path):
        return GPT2.from_pretrained(path), BPETokenizer.from_pretrained(path)
    checkpoint = Checkpoint.load(find_checkpoint(path, prefer="best")[0])
    return checkpoint.model, checkpoint.tokenizer


def right(model, tokenizer, pairs, held_out):
    """Shares of held-out questions that are answered to the letter: who speaks next, and how a line ends."""
    answered = {True: [], False: []}
    for i in held_out:
        prompt, example = tokenizer.encode(pairs.prompts[i]), pairs.ids[pairs.ends[i]:pairs.ends[i + 1]].tolist()
        answer = example[len(prompt):-1]  # without <|endoftext|>
        made = model.generate(prompt, len(answer) + 1, temperature=0, stop_tokens=[tokenizer.end_of_text])
        answered["Who" in pairs.prompts[i]].append(made[len(prompt):] == answer)
    return [float(np.mean(answered[kind])) for kind in (True, False)]


def main(path):
    model, tokenizer = load(path)
    if tokenizer.end_of_text is None:  # one more token, and a row of the embedding for it
        tokenizer = tokenizer.with_special_tokens(END_OF_TEXT)
        model = model.with_vocabulary(tokenizer.vocab_size)
    QUESTIONS.parent.mkdir(exist_ok=True)
    QUESTIONS.write_text("".join(json.dumps(pair) + "\n" for pair in questions(shakespeare_text())))
    pairs = Pairs(read_pairs(QUESTIONS), tokenizer)
    held_out = pairs.split(CONFIG)[1][:400]
    print(f"{len(pairs.lines):,} questions; the last ones are held out")
    before = right(model, tokenizer, pairs, held_out)

    optimizer, batches = AdamW(model), pairs.batches(CONFIG)
    for step in range(1, CONFIG.num_steps + 1):
        # ids (B, T): questions with their answers, padded; targets (B, T): the next token where it is of an answer,
        # and -100, which is not counted, everywhere else.
        [(ids, targets)] = batches.batch(step, CONFIG.batch_size)
        loss = model.forward_backward(ids, targets)
        optimizer.step(learning_rate_at(step, CONFIG), CONFIG.clip_norm, zero_grad=True)
        if step % 500 == 0:
            print(f"step {step:4}: loss of the answers {loss:.3f}", flush=True)

    after = right(model, tokenizer, pairs, held_out)
    for kind, was, now in zip(("who speaks next", "how a line ends"), before, after, strict=True):
        print(f"{kind}: {was:.1%} of the held-out questions answered to the letter before, {now:.1%} after")
    for prompt in pairs.sample_prompts(CONFIG, tokenizer, 4):
        ids = tokenizer.encode(prompt)
        made = model.generate(ids, 20, temperature=0, stop_tokens=[tokenizer.end_of_text])
        print(f"\n{prompt}\n   {tokenizer.decode(made[len(ids):])}")
    result = QUESTIONS.with_suffix(".bin")
    Checkpoint.save(result, model, tokenizer)
    print(f"\nthe model is in {result}; ask it more with: feste repl {result}")
    return 0


def start(argv):
    runs = argv or sorted(map(str, Path("data").glob("shakespeare_small_*")))[-1:]
    if not runs:
        raise FesteError("there is no run of the small model under data/; make one with `make small`, or name a model")
    return main(Path(runs[0]))


if __name__ == "__main__":
    sys.exit(guarded(lambda: start(sys.argv[1:])))
