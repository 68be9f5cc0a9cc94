"""Text -> labelled tokens: running text for training, documents for judging."""

from __future__ import annotations

from typing import Any

from lora_kit.data.formats import Example
from lora_kit.data.labelled import IGNORED, Labelled
from lora_kit.errors import UserError


def running_text(examples: list[Example], tokenizer: Any, max_length: int) -> Labelled:
    """All documents one after the other, each closed by the end-of-text token, cut into chunks.

    Every token is learned from. Only the last chunk may be shorter than `max_length` tokens.
    Blocks of one text that follow each other are joined before they are tokenized.
    """
    texts: list[str] = []
    for example in examples:
        if example.joins and texts:
            texts[-1] += example.text or ""
        else:
            texts.append(example.text or "")
    stream: list[int] = []
    for ids in _encode(tokenizer, texts, special=True):
        stream += ids
        # Some tokenizers close a text themselves.
        if tokenizer.eos_token_id is not None and stream[-1:] != [tokenizer.eos_token_id]:
            stream.append(tokenizer.eos_token_id)
    labelled = Labelled(unit_bytes=[])
    for start in range(0, len(stream), max_length):
        chunk = stream[start : start + max_length]
        if len(chunk) > 1:  # one token alone predicts nothing
            labelled.add(chunk, list(chunk), len(labelled.unit_bytes))
            labelled.unit_bytes.append(0)
    if not labelled:
        raise UserError("data.train: less than two tokens of text: there is nothing to learn from")
    return labelled


def documents(examples: list[Example], tokenizer: Any, max_length: int) -> Labelled:
    """Each document for itself, in windows of `max_length` tokens, every token scored once.

    The first window begins with the beginning-of-text token where the tokenizer has one, else with
    the end-of-text token; each later one with the last token of the window before it, as context.
    """
    prefix = context_token(tokenizer)
    labelled = Labelled()
    for example, ids in zip(
        examples, _encode(tokenizer, [e.text or "" for e in examples], special=False), strict=True
    ):
        unit = len(labelled.unit_bytes)
        labelled.unit_bytes.append(len((example.text or "").encode()))
        stream = [*prefix, *ids]
        for start in range(0, max(1, len(stream) - 1), max_length - 1):
            window = stream[start : start + max_length]
            labelled.add(window, [IGNORED, *window[1:]], unit)
    return labelled


def context_token(tokenizer: Any) -> list[int]:
    """The token that stands before a text: beginning-of-text if the tokenizer adds it, else end."""
    added = tokenizer("a").input_ids
    if tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    # `verbose=False`: texts longer than the model's context are cut into chunks afterwards.
    return tokenizer(texts, add_special_tokens=special, verbose=False).input_ids if texts else []
