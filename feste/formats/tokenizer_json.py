"""tokenizer.json, the format of Hugging Face's `tokenizers`: feste's own, too."""

from __future__ import annotations

import json

from feste.formats.vocabulary import Parts, TokenizerError, build, parse_object, split_merge, visible

PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write(parts: Parts) -> str:
    """The text of the file."""
    names = [visible(token) for token in parts.tokens]
    special = {i: text for text, i in parts.special_tokens.items()}
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, text in sorted(special.items())]
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZER, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(names) if i not in special},
            "merges": [[names[a], names[b]] for a, b in parts.merges.tolist()],
        },
    }, ensure_ascii=False)


def read(text: str, source: str) -> Parts:
    """A tokenizer from the text of the file. TokenizerError names the source and what feste does not support."""
    data = parse_object(text, source)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise TokenizerError(f"{source} holds a {kind!r} model; feste reads byte-level BPE")
    _refuse_unsupported(data, model, source)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{source}: model.merges is not a list")
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) and isinstance(token.get("content"), str)
                                              and isinstance(token.get("id"), int) for token in added):
        raise TokenizerError(f"{source}: added_tokens is not a list of tokens")
    for option in ("lstrip", "rstrip", "single_word"):
        if any(token.get(option) for token in added):
            raise TokenizerError(f"{source}: an added token sets {option}, which feste does not support")
    return build(model.get("vocab"), [split_merge(merge, source) for merge in merges],
                  {token["content"]: token["id"] for token in added}, source)


def _refuse_unsupported(data: dict, model: dict, source: str) -> None:
    pre = data.get("pre_tokenizer")
    if not isinstance(pre, dict) or pre.get("type") != "ByteLevel" \
            or pre.get("add_prefix_space") is not False or not pre.get("use_regex", True):
        raise TokenizerError(f"{source} splits words by {pre!r:.80}; feste reads ByteLevel with GPT-2's pattern "
                             "and no prefix space")
    for part in ("normalizer", "truncation", "padding"):
        if data.get(part) is not None:
            raise TokenizerError(f"{source} has a {part}, which feste does not apply")
    for part in ("decoder", "post_processor"):
        kind = data.get(part)
        if kind is not None and not (isinstance(kind, dict) and kind.get("type") == "ByteLevel") \
                and not (part == "post_processor" and _adds_nothing(kind)):
            raise TokenizerError(f"{source} has the {part} {kind!r:.80}; feste reads ByteLevel")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                   "ignore_merges"):
        if model.get(option):
            raise TokenizerError(f"{source} sets model.{option}, which feste does not support")


def _adds_nothing(template) -> bool:
    """Whether a post-processor is a template that hands a text on as it is; transformers writes one."""
    return (isinstance(template, dict) and template.get("type") == "TemplateProcessing"
            and template.get("special_tokens") == {} and template.get("single") in (
                [{"Sequence": {"id": "A", "type_id": 0}}], ["A"]))
