"""Train the small model: 873,600 parameters, 2,000 steps, under a minute.

Twice the channels, twice the context and twice the vocabulary of the tiny model, on 500,000 characters. What to
look for: a larger vocabulary makes each token harder to guess but each token covers more text, so the losses of
example 05 and this one cannot be compared; bits per byte can (`feste compare`). Towards the end the
training loss leaves the validation loss behind: with 500,000 characters the model begins to memorise.
"""

import sys

from feste.cli import run_preset

if __name__ == "__main__":
    sys.exit(run_preset("small"))
