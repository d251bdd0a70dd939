"""Train tokenizers of five sizes on the complete works of Shakespeare, and look at what they learned.

    python examples/01_train_tokenizers.py

Byte-level byte-pair encoding starts with the 256 bytes and merges, again and again, the pair of neighbours that
is most frequent in the text into a new token. A larger vocabulary makes the text shorter, so that a model sees
further back in as many tokens, and makes embedding and head of the model larger.
"""

import re
import time
from pathlib import Path

import numpy as np

from feste import BPETokenizer
from feste.corpus import CorpusError, shakespeare_text

SIZES = (256, 512, 1024, 1536, 20534)
FOLDER = Path("data/tokenizers")
FAMOUS = ("To be, or not to be, that is the question:", "Shall I compare thee to a summer's day?",
          "Romeo, Romeo, wherefore art thou Romeo?", "All the world's a stage,", "Et tu, Brute? Then fall, Caesar!")


def shown(token: bytes) -> str:
    """A token as a reader can see it: a space as ␣, many as ␣xN, a line end as ⏎."""
    text = token.decode("utf-8", errors="backslashreplace").replace("\n", "⏎").replace("\r", "␍")
    return re.sub(" {4,}", lambda run: f"␣x{len(run.group())}", text).replace(" ", "␣")


def train_and_measure(text: str, size: int) -> BPETokenizer:
    """Train one tokenizer, print its line of the table, and keep it."""
    begun = time.perf_counter()
    tokenizer = BPETokenizer.train(text, size)
    trained = time.perf_counter()
    ids = tokenizer.encode_to_numpy(text)
    encoded = time.perf_counter()
    same = tokenizer.decode(ids) == text
    n_bytes = len(text.encode())
    print(f"{size:>10,} {trained - begun:>9.2f} s {n_bytes / 1e6 / (encoded - trained):>9.0f} MB/s {len(ids):>12,} "
          f"{n_bytes / len(ids):>12.2f} {n_bytes / ids.nbytes:>11.2f}x  {'exact' if same else 'WRONG'}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer.save(FOLDER / f"shakespeare_{size}.json")
    return tokenizer


def analyse(text: str, tokenizer: BPETokenizer) -> None:
    """What one tokenizer learned, in words."""
    counts = np.bincount(tokenizer.encode_to_numpy(text), minlength=tokenizer.vocab_size)
    learned = range(256, tokenizer.vocab_size)
    print(f"\n--- {tokenizer.vocab_size:,} tokens, {len(learned):,} of them learned ---")
    print("first merges    ", "  ".join(shown(tokenizer.tokens[i]) for i in learned[:16]))
    by_length = sorted((tokenizer.tokens[i] for i in learned), key=len, reverse=True)
    print("longest         ", "  ".join(map(shown, by_length[:3])))
    print("longest words   ", "  ".join([shown(token) for token in by_length if token.strip().isalpha()][:6]))
    most_used = np.argsort(-counts, kind="stable")[:12]
    shares = [f"{shown(tokenizer.tokens[i])} {counts[i] / counts.sum():.1%}" for i in most_used]
    print("most used       ", "  ".join(shares))
    words = sum(tokenizer.tokens[i][:1] == b" " and tokenizer.tokens[i][1:].isalpha() for i in learned)
    print(f"{words / len(learned):.0%} of the learned tokens begin a word; {int((counts[256:] == 0).sum()):,} are not "
          "used in the end, they were steps on the way to longer ones")


def split_famous_lines(tokenizers: list[BPETokenizer]) -> None:
    print("\n--- how famous lines split ---")
    for line in FAMOUS:
        print(line)
        for tokenizer in tokenizers:
            ids = tokenizer.encode(line)
            pieces = "|".join(shown(tokenizer.tokens[i]) for i in ids)
            print(f"{tokenizer.vocab_size:>8,} {len(ids):>3} tokens  {pieces}")
        print()


def main() -> int:
    try:
        text = shakespeare_text()
    except CorpusError as error:
        print(f"error: {error}")
        return 2
    print(f"The complete works: {len(text):,} characters, {len(text.encode()):,} bytes\n")
    print("vocabulary   training      encoding       tokens  bytes/token  compression  round trip")
    tokenizers = [train_and_measure(text, size) for size in SIZES]
    print("\nCompression is the size of the text to that of its ids, two bytes each.")
    for tokenizer in tokenizers[1:]:
        analyse(text, tokenizer)
    split_famous_lines(tokenizers[1:])
    print(f"kept as {FOLDER}/shakespeare_N.json, in the format of Hugging Face's tokenizers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
