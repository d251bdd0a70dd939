"""Make a checkpoint of somebody else's GPT-2: `feste import DIR -o CHECKPOINT`, DIR being one of transformers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from feste.arguments import Parser
from feste.cli import guarded
from feste.config import PRECISIONS
from feste.errors import FesteError
from feste.model import GPT2
from feste.run.checkpoint import Checkpoint
from feste.tokenizer import BPETokenizer

HINTS = {"output": "choose another file with -o"}
PROG = "python -m tools.import_model"
EXAMPLES = """
DIR holds config.json, model.safetensors (or its shards) and tokenizer.json (or vocab.json and merges.txt). It is read
from the disk; nothing is downloaded.

examples:
  {0} gpt2 -o gpt2.bin
then:
  feste repl gpt2.bin
  feste train --from gpt2.bin --data my.txt
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Make a checkpoint of a GPT-2 from Hugging Face.",
                    epilog=EXAMPLES.format(prog))
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory of transformers")
    parser.add_argument("-o", "--output", required=True, metavar="CHECKPOINT", type=Path, help="a new file")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="to compute with (default: fp32)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)

    def run() -> int:
        if args.output.exists():
            raise FesteError(f"{args.output} exists", "output")
        tokenizer = BPETokenizer.from_pretrained(args.directory)
        model = GPT2.from_pretrained(args.directory, args.precision)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise FesteError(f"{args.directory}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model "
                             f"{model.config.vocab_size:,}")
        Checkpoint.save(args.output, model, tokenizer)
        print(f"{args.output}: {model}")
        return 0

    return guarded(run, HINTS)


if __name__ == "__main__":
    sys.exit(main())
