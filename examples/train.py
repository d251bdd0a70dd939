"""Train any preset, with any of its dials turned, on any text.

    python examples/train.py --list-presets
    python examples/train.py --preset pocket-bard --data my.txt
    python examples/train.py --preset spider --n-heads 4 --steps 2000
    python examples/train.py --preset small --checkpoint data/.../checkpoint_best.bin --data my.txt

The last line fine-tunes: it starts a new run from the parameters and the tokenizer of a checkpoint.
"""

import argparse
import sys

from feste.cli import add_flags, guarded, list_presets, run_training
from feste.config import PRESETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="the model and run to start from")
    parser.add_argument("--list-presets", action="store_true", help="print the presets and exit")
    parser.add_argument("--checkpoint", metavar="PATH", help="fine-tune from a checkpoint or a run's best one")
    add_flags(parser)
    args = parser.parse_args()
    if args.list_presets:
        print(list_presets())
        return 0
    return guarded(lambda: run_training(PRESETS[args.preset], args))


if __name__ == "__main__":
    sys.exit(main())
