"""GPT-2's vocab.json with its merges.txt, as OpenAI and Hugging Face's slow tokenizers write them."""

from __future__ import annotations

from feste.formats.vocabulary import Parts, TokenizerError, build, parse_object, split_merge


def read(vocab_text: str, merges_text: str, source: str) -> Parts:
    """A tokenizer from the texts of the two files.

    Tokens that no merge makes are special if they look so, like <|endoftext|> and [PAD]; of others the merges are
    missing, as from a file that was cut short, which is a TokenizerError.
    """
    vocab = parse_object(vocab_text, source)
    lines = [line for line in merges_text.split("\n") if line and not line.startswith("#version")]
    merges = [split_merge(line, source) for line in lines]
    made = {a + b for a, b in merges}
    special = {token: i for token, i in vocab.items() if len(token) > 1 and token not in made}
    for token in special:
        if token[0] + token[-1] not in ("<>", "[]") or len(token) < 3:
            raise TokenizerError(f"{source}: no merge makes the token {token!r:.80}; is the file of merges whole?")
    return build({token: i for token, i in vocab.items() if token not in special}, merges, special, source)
