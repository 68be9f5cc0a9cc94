"""Conversations -> labelled tokens: only the assistant's words and their end marker are learned.

How a mask is found without `{% generation %}` markers: the template is rendered once more with each
turn's content replaced by a sentinel, which shows what the template writes between the contents.
Those pieces and the real contents must join to exactly what the template renders for the real
conversation; then the place of each answer is known, not searched for.

>>> pieces_and_contents = ["<user>", "Hi", "<end><bot>", "Hello", "<end>"]  # what is found
>>> # text:        <user>Hi<end><bot>Hello<end>
>>> # learned from:               ^^^^^^^^^^^^^
"""

from __future__ import annotations

from typing import Any

from lora_kit.data.formats import Dropped, Example, Message
from lora_kit.data.labelled import IGNORED, Labelled
from lora_kit.data.text import context_token
from lora_kit.errors import UserError

Span = tuple[int, int]

# ChatML, for a base without a template. Where the tokenizer has no <|im_end|>, a turn ends with its
# end-of-text token, so that generation stops in every engine without new embeddings.
_CHATML = (
    "{{% if {bos} %}}{{{{ bos_token }}}}{{% endif %}}"
    "{{% for message in messages %}}"
    "<|im_start|>{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{end}\n"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def set_template(tokenizer: Any, name: str | None) -> None:
    """Give a tokenizer the shipped template of this name; None leaves it as it is.

    Raises:
        UserError: the tokenizer has a template of its own.
    """
    if name is None:
        return
    if tokenizer.chat_template:
        raise UserError(
            "data.chat_template: this base has a template of its own; leave the key out"
        )
    has_end = "<|im_end|>" in tokenizer.get_vocab()
    end = "<|im_end|>" if has_end else tokenizer.eos_token
    begins = tokenizer.bos_token is not None and context_token(tokenizer) == [
        tokenizer.bos_token_id
    ]
    tokenizer.chat_template = _CHATML.format(bos=str(begins).lower(), end=end)


def conversations(
    examples: list[Example], tokenizer: Any, max_length: int, dropped: Dropped
) -> Labelled:
    """Tokenize and label each conversation; those over `max_length` tokens are dropped and counted.

    A base without a template gets prompt, joiner, answer and the end-of-text token, if every
    example is one prompt and one answer.

    Raises:
        UserError: the base has no template and an example has several turns, or the template
            writes something else than the contents, so that no mask can be trusted.
    """
    labelled = Labelled()
    if not examples:
        raise UserError(f"no rows left: {dropped}" if dropped.counts else "no rows to learn from")
    if tokenizer.chat_template:
        rendered = _Renderer(tokenizer)
        texts, spans = zip(*(rendered(example) for example in examples), strict=True)
        # Templates write the beginning-of-text token themselves.
        encoded = tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        rows = [
            (ids, _label(text, ids, offsets, marked))
            for text, ids, offsets, marked in zip(
                texts, encoded.input_ids, encoded.offset_mapping, spans, strict=True
            )
        ]
        sizes = [
            sum(len(text[a:b].encode()) for a, b in marked)
            for text, marked in zip(texts, spans, strict=True)
        ]
    else:
        rows = [_plain(example, tokenizer) for example in examples]
        sizes = [len(example.messages[-1]["content"].encode()) for example in examples]
    for example, (ids, labels), size in zip(examples, rows, sizes, strict=True):
        if len(ids) > max_length:
            dropped.add(f"longer than train.max_length ({max_length} tokens)", example.place)
        elif all(label == IGNORED for label in labels[1:]):
            dropped.add("without a token to learn from", example.place)
        else:
            labelled.add(ids, labels, len(labelled.unit_bytes))
            labelled.unit_bytes.append(size)
    if not labelled:
        raise UserError(f"no rows left: {dropped}")
    return labelled


def prompt_text(tokenizer: Any, messages: list[Message]) -> str:
    """What a model is given so that it answers: the template's prompt, or the bare content.

    Some templates write more before an answer than their own prompt holds, such as Qwen3's empty
    thoughts. Answers were learned after that, so it belongs to the prompt.
    """
    if not tokenizer.chat_template:
        return messages[-1]["content"]
    prompt = _render(tokenizer, messages, add_generation_prompt=True)
    answered = _render(tokenizer, [*messages, {"role": "assistant", "content": "sentinelx"}])
    learned_after, _, _ = answered.rpartition("sentinelx")
    more = learned_after.removeprefix(prompt)
    return learned_after if learned_after.startswith(prompt) and more.strip() else prompt


def _plain(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    if len(example.messages) != 2 or example.messages[0]["role"] != "user":
        raise UserError(
            f"{example.place}: a conversation, but this base has no chat template: "
            "set data.chat_template: chatml"
        )
    prompt, answer = (message["content"] for message in example.messages)
    begin = context_token(tokenizer)
    ids = [*begin, *_ids(tokenizer, prompt + example.joiner)]
    answer_ids = [*_ids(tokenizer, answer), tokenizer.eos_token_id]
    return ids + answer_ids, [IGNORED] * len(ids) + answer_ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _label(text: str, ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """A token is learned from if its characters lie in one of the spans.

    White space of the template may be part of it: after `[/INST] ` the first token of an answer is
    often ` Hello`, and it is this token that the model has to choose.
    """
    labels = [IGNORED] * len(ids)
    position = 0
    for start, end in spans:
        while position < len(ids) and offsets[position][1] <= start:
            position += 1
        while position < len(ids) and offsets[position][0] < end:
            first, last = offsets[position]
            outside = text[first:start] + text[end:last]
            inside = text[max(first, start) : min(last, end)]
            if not outside or (outside.isspace() and inside.strip()):
                labels[position] = ids[position]
            position += 1
    return labels


class _Renderer:
    """Renders conversations and finds the spans of their answers.

    What a template writes around the contents depends on the roles alone, so the pieces are kept by
    the sequence of roles; every single text is still compared with what the template renders.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}

    def __call__(self, example: Example) -> tuple[str, list[Span]]:
        roles = tuple(message["role"] for message in example.messages)
        if roles not in self.known:
            self.known[roles] = self._pieces(roles, example.place)
        pieces, ends = self.known[roles]
        text = _render(self.tokenizer, list(example.messages), place=example.place)
        contents = _as_written(text, pieces, [message["content"] for message in example.messages])
        if contents is None:
            raise UserError(
                f"{example.place}: the chat template changes what the turns say, so the answers "
                "cannot be marked; use another template or remove the row"
            )
        return text, _spans(pieces, ends, contents, roles)

    def _pieces(self, roles: tuple[str, ...], place: str) -> tuple[list[str], list[str]]:
        """What is written before, between and after the contents; the end marker of each answer."""
        marks = [f"sentinel{number}x" for number in range(len(roles))]
        turns = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        rest = _render(self.tokenizer, turns, place=place)
        pieces = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                raise UserError(
                    f"{place}: the chat template leaves out a turn of {'-'.join(roles)}"
                )
            pieces.append(piece)
        pieces.append(rest)
        ends = []
        for number, role in enumerate(roles):
            if role != "assistant":
                ends.append("")
                continue
            # Rendered up to this answer, its content is followed by the end marker and white space.
            begun = _render(self.tokenizer, turns[: number + 1], place=place)
            _, _, after = begun.rpartition(marks[number])
            marker = after.rstrip()
            if not pieces[number + 1].startswith(marker) or not marker:
                raise UserError(f"{place}: the chat template writes no end marker after an answer")
            ends.append(marker)
        return pieces, ends


def _as_written(text: str, pieces: list[str], contents: list[str]) -> list[str] | None:
    """The contents as the template wrote them, each as it is or without the white space around it;
    None if pieces and contents don't join to the text."""
    written, position = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    for content, piece in zip(contents, pieces[1:], strict=True):
        for variant in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(variant + piece, position):
                written.append(variant)
                position += len(variant) + len(piece)
                break
        else:
            return None
    return written if position == len(text) else None


def _spans(
    pieces: list[str], ends: list[str], contents: list[str], roles: tuple[str, ...]
) -> list[Span]:
    spans, position = [], 0
    for number, content in enumerate(contents):
        position += len(pieces[number])
        if roles[number] == "assistant":
            spans.append((position, position + len(content) + len(ends[number])))
        position += len(content)
    return spans


def _render(
    tokenizer: Any, turns: list[Message], add_generation_prompt: bool = False, place: str = ""
) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        roles = "-".join(turn["role"] for turn in turns)
        reason = " ".join(str(error).split())
        where = f"{place}: " if place else ""
        raise UserError(
            f"{where}the chat template refuses a conversation of {roles}: {reason}"
        ) from None
