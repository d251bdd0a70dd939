"""Write a model for other programs: a directory for Hugging Face's transformers, or a GGUF file for llama.cpp and
ollama. `feste export RUN -o DIR`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from feste.arguments import Parser
from feste.cli import guarded
from feste.errors import FesteError
from feste.formats import gguf_file, huggingface
from feste.run.checkpoint import Checkpoint
from feste.run.directory import find_checkpoint
from feste.run.follow import read_info
from feste.run.names import is_run
from feste.terminal import clean_line
from feste.tokenizer import END_OF_TEXT

HINTS = {"output": "choose another directory with -o", "quantize": "use --quantize f16",
         "format": "or use --format hf"}
MODELFILE = """FROM ./{name}
TEMPLATE "{{{{ .Prompt }}}}"
PARAMETER temperature 0.8
PARAMETER num_ctx {context}
"""


def export(path: Path, output: Path, form: str, quantization: str) -> list[Path]:
    """Write the model of a checkpoint, or of a run its best one, into a new or empty directory; the files in it."""
    checkpoint = Checkpoint.load(find_checkpoint(path, prefer="best")[0])
    if checkpoint.tokenizer is None:
        raise FesteError(f"{checkpoint.path} holds no tokenizer, which the other program needs")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FesteError(f"{output} exists and is not an empty directory", "output")
    if form == "gguf":
        gguf_file.require(checkpoint.model.config, quantization)
    output.mkdir(parents=True, exist_ok=True)
    run = checkpoint.path.parent
    name = run.name if is_run(run) else checkpoint.path.stem
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    end = tokenizer.end_of_text
    if form == "gguf":
        file = output / f"{name}-{quantization}.gguf"
        gguf_file.write(file, name, model.config, model.params, tokenizer.parts, end, quantization)
        (output / "Modelfile").write_text(MODELFILE.format(name=file.name, context=model.config.block_size))
    else:
        huggingface.write(output, model.config, model.params, tokenizer.to_json(), end,
                          None if end is None else END_OF_TEXT, card(checkpoint, name))
    return sorted(output.iterdir())


def card(checkpoint: Checkpoint, name: str) -> str:
    """The model card: what it is, what it learned from, how well."""
    info = read_info(checkpoint.path.parent) if is_run(checkpoint.path.parent) else {}
    c, train = checkpoint.model.config, checkpoint.train_config or {}
    facts = {"parameters": f"{checkpoint.model.num_parameters():,}", "layers": c.n_layers, "heads": c.n_heads,
             "channels": c.n_embd, "context": c.block_size, "vocabulary": f"{c.vocab_size:,}, byte-level BPE",
             "text": clean_line(info.get("source", "not known")), "tokens of it": info.get("tokens"),
             "steps": f"{checkpoint.step:,}", "tokens a step": info.get("tokens_per_step"),
             "learning rate": train.get("learning_rate"), "seed": train.get("seed"),
             "validation loss": f"{checkpoint.best_val_loss:.4f} nats a token, at step {checkpoint.best_step:,}"}
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items() if value is not None)
    return (f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [{c.arch}, feste]\n---\n\n"
            f"# {name}\n\n"
            f"A small language model, trained from scratch with feste on a CPU.\n\n| | |\n|---|---|\n{rows}\n\n"
            "It continues text like that which it was trained on, and knows nothing else.\n")


PROG = "python -m tools.export"
EXAMPLES = """
examples:
  {0} data/RUN -o bard                                    for transformers: from_pretrained("bard")
  {0} data/RUN -o bard-gguf --format gguf                 for llama.cpp and ollama
  {0} data/RUN -o bard-q8 --format gguf --quantize q8_0   a quarter of the size
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Write a model for other programs.",
                    epilog=EXAMPLES.format(prog))
    parser.add_argument("path", metavar="RUN", type=Path, help="a run, whose best checkpoint is taken, or a checkpoint")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="a new or empty directory")
    parser.add_argument("--format", choices=("hf", "gguf"), default="hf", help="transformers or GGUF (default: hf)")
    parser.add_argument("--quantize", choices=gguf_file.QUANTIZATIONS, default="f32",
                        help="the matrices of a GGUF file (default: f32)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)

    def run() -> int:
        if args.format == "hf" and args.quantize != "f32":
            raise FesteError("--quantize is for --format gguf")
        for file in export(args.path, args.output, args.format, args.quantize):
            print(f"{file}  {file.stat().st_size:,} bytes")
        return 0

    return guarded(run, HINTS)


if __name__ == "__main__":
    sys.exit(main())
