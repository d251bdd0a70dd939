"""Train any preset, with any of its dials turned, on any text: what `feste train` does.

    python examples/train.py --list-presets
    python examples/train.py --preset pocket-bard --data my.txt
    python examples/train.py --preset spider --n-heads 4 --steps 2000
    python examples/train.py --preset small --from data/.../checkpoint_best.bin --data my.txt

The last line fine-tunes: it starts a new run from the parameters and the tokenizer of a checkpoint.
"""

import sys

from feste.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="examples/train.py"))
