"""Conversations -> labelled tokens: only the assistant's words and their end marker are learned.

How a mask is found without `{% generation %}` markers: the template is rendered once more with each
turn's content replaced by a sentinel, which shows what the template writes between the contents.
Those pieces and the real contents must join to exactly what the template renders for the real
conversation; then the place of each answer is known, not searched for.

>>> pieces_and_contents = ["<user>", "Hi", "<end><bot>", "Hello", "<end>"]  # what is found
>>> # text:        <user>Hi<end><bot>Hello<end>
>>> # learned from:               ^^^^^^^^^^^^^

Where a turn is more than its content (a tool call, a thought), or the template writes the turns
otherwise, an answer is what follows the template's own prompt for it, up to the end marker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np

from lora_kit.base.templates import context_token, render, render_many
from lora_kit.data.formats import Example, Message
from lora_kit.errors import NotUsable, UserError
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.words import WordEncoder

T = TypeVar("T")
Span = tuple[int, int]
# Few at once: their tokens stay in the processor's caches (10% faster than 500).
_ENCODED_AT_ONCE = 32
_NO_END = "after whose answers the chat template writes no end marker"
_REWRITTEN = "whose turns the chat template rewrites"


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens. `learned` are spans of them; `answers` whole answers among them,
    each with its end marker; `learned_bytes` the UTF-8 bytes they spell."""

    ids: list[int]
    learned: list[Span]
    answers: int
    learned_bytes: int
    cut: bool = False

    def ids_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Both int32 (tokens,); a label of -100 outside of what is learned."""
        ids = np.array(self.ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORED)
        for first, last in self.learned:
            labels[first:last] = ids[first:last]
        return ids, labels


class ChatEncoder:
    """Tokenizes and labels conversations with a tokenizer's own template.

    Args:
        supervise: `assistant`: every answer; `last`: the last one; `all`: every token.
        max_length: tokens of a row at most.
    """

    def __init__(self, tokenizer: Any, supervise: str, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.supervise = supervise
        self.max_length = max_length
        self.renderer = _Renderer(tokenizer) if tokenizer.chat_template else None
        self.begin = context_token(tokenizer)
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.encode = WordEncoder(backend)

    def __call__(self, examples: list[Example]) -> Iterator[Encoded | NotUsable]:
        """For each example its tokens, or why it is left out.

        A conversation over `max_length` tokens is cut after the last whole answer that fits; one
        without such an answer is left out.

        Raises:
            UserError: there is no template, and an example is not one prompt and one answer.
        """
        for start in range(0, len(examples), _ENCODED_AT_ONCE):
            some = examples[start : start + _ENCODED_AT_ONCE]
            if self.renderer:
                yield from self._templated(some)
            else:
                yield from (_tried(self._plain, example) for example in some)

    def _templated(self, examples: list[Example]) -> Iterator[Encoded | NotUsable]:
        written = self._written(examples)
        rendered = [_tried(self._render, *pair) for pair in zip(examples, written, strict=True)]
        texts = [r[0] for r in rendered if not isinstance(r, NotUsable)]
        # Templates write the beginning-of-text token themselves.
        encodings = iter(self.encode(texts))
        for example, result in zip(examples, rendered, strict=True):
            if isinstance(result, NotUsable):
                yield result
            elif len(encoding := next(encodings)) <= self.max_length:
                yield _tried(self._label, *result, encoding)
            else:
                yield _tried(self._shortened, example, result[1], encoding)

    def _written(self, examples: list[Example]) -> list[str | None]:
        """What the template writes for each; None where that has to be asked one by one."""
        if any(example.tools for example in examples):
            return [None] * len(examples)
        try:
            return list(render_many(self.tokenizer, [e.messages for e in examples]))
        except NotUsable:  # one of them
            return [None] * len(examples)

    def _render(self, example: Example, text: str | None = None) -> tuple[str, list[Span], int]:
        """The text, the spans of its characters to learn from, and how many answers they hold."""
        assert self.renderer is not None
        answers = [n for n, m in enumerate(example.messages) if m["role"] == "assistant"]
        wanted = [n for n in answers if example.messages[n].get("weight") != 0]
        if self.supervise == "last":
            wanted = wanted[-1:] if wanted[-1:] == answers[-1:] else []
        if self.supervise != "all":
            text, spans = self.renderer(example, wanted, text)
            return text, spans, len(spans)
        unlearned = [n for n in answers if n not in wanted]
        text, spans = self.renderer(example, unlearned, text)
        return text, _between(spans, len(text)), len(wanted)

    def _label(
        self, text: str, spans: list[Span], answers: int, encoding: Any, cut: bool = False
    ) -> Encoded:
        ids = encoding.ids
        self._check_beginning(ids)
        if spans == [(0, len(text))]:
            learned = [(0, len(ids))]
        else:
            learned = [found for a, b in spans if (found := _tokens(text, encoding, a, b))]
        if len(learned) < len(spans) and self.supervise != "all":
            raise NotUsable("whose answer is of no token that the tokenizer knows")
        size = sum(len(text[a:b].encode()) for a, b in spans)
        return Encoded(ids, learned, answers, size, cut)

    def _check_beginning(self, ids: list[int]) -> None:
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            raise NotUsable("that begin with two beginning-of-text tokens")

    def _shortened(self, example: Example, spans: list[Span], encoding: Any) -> Encoded:
        too_long = NotUsable(f"longer than train.max_length ({self.max_length} tokens)")
        if self.supervise != "assistant":
            raise too_long
        ends = [n for n, m in enumerate(example.messages, 1) if m["role"] == "assistant"]
        learned = [end for end in ends if example.messages[end - 1].get("weight") != 0]
        for end, span in reversed(list(zip(learned, spans, strict=True))):
            final = encoding.char_to_token(span[1] - 1)
            if end == ends[-1] or final is None or final >= self.max_length:
                continue
            shorter = Example(example.place, messages=example.messages[:end], tools=example.tools)
            result = _tried(self._render, shorter)
            if isinstance(result, NotUsable):
                continue
            (found,) = self.encode([result[0]])
            if len(found) <= self.max_length:
                return self._label(*result, found, cut=True)
        raise too_long

    def _plain(self, example: Example) -> Encoded:
        """Prompt, joiner, answer and the end-of-text token, for a base without a template."""
        turns = example.messages
        simple = len(turns) == 2 and turns[0]["role"] == "user" and all(map(_is_plain, turns))
        if not simple or example.tools:
            raise UserError(
                f"{example.place}: a conversation, but this base has no chat template: "
                "set data.chat_template: chatml"
            )
        prompt, answer = (message["content"] for message in turns)
        asked, answered = self.encode([prompt + example.joiner, answer])
        before = [*self.begin, *asked.ids]
        ids = [*before, *answered.ids, self.tokenizer.eos_token_id]
        if len(ids) > self.max_length:
            raise NotUsable(f"longer than train.max_length ({self.max_length} tokens)")
        self._check_beginning(ids)
        learned = turns[1].get("weight") != 0
        first, last = len(before), len(ids) if learned else len(before)
        size = len(answer.encode()) * learned
        if self.supervise == "all":
            first, size = 0, size + len((prompt + example.joiner).encode())
        return Encoded(ids, [(first, last)] if first < last else [], int(learned), size)


def _tried(make: Callable[..., T], *args: Any) -> T | NotUsable:
    """What is made of a row, or why the row is left out."""
    try:
        return make(*args)
    except NotUsable as error:
        return error


def _is_plain(message: Message) -> bool:
    """Whether a turn is a role and what it says: no calls, no thoughts, no name."""
    return len(message) == 2 + ("weight" in message)


def _between(spans: list[Span], length: int) -> list[Span]:
    """What lies outside the spans.

    >>> _between([(2, 4)], 9)
    [(0, 2), (4, 9)]
    """
    starts, ends = [0, *(b for _, b in spans)], [*(a for a, _ in spans), length]
    return [(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def _tokens(text: str, encoding: Any, start: int, end: int) -> Span | None:
    """The tokens whose characters lie in text[start:end]; None where it has none of its own.

    White space of the template may be part of the first: after `[/INST] ` the first token of an
    answer is often ` Hello`, and it is this token that the model has to choose. Likewise the last.

    Raises:
        NotUsable: a token is of words both inside and outside, or what stands last has no token.
    """
    # A tokenizer may leave out characters.
    tokens = map(encoding.char_to_token, range(start, end))
    first = next((token for token in tokens if token is not None), None)
    if first is None:
        return None
    said = text[start:end].rstrip() or text[start:end]
    last = encoding.char_to_token(start + len(said) - 1)
    if last is None:
        raise NotUsable("of whose end marker the tokenizer leaves out characters")
    count = len(encoding)
    # A character of several bytes can be several tokens.
    while last + 1 < count and (chars := encoding.token_to_chars(last + 1)) and chars[0] < end:
        if chars[1] <= chars[0]:
            break
        last += 1
    first = _with_blanks(encoding, first, start)
    while first <= last and not _belongs(text, encoding.token_to_chars(first), start, end):
        first += 1
    while first <= last and not _belongs(text, encoding.token_to_chars(last), start, end):
        last -= 1
    return (first, last + 1) if first <= last else None


def _with_blanks(encoding: Any, first: int, start: int) -> int:
    """Back over tokens of white space alone, which some tokenizers say are of no character."""
    while first > 0:
        a, b = encoding.token_to_chars(first - 1)
        begins = encoding.token_to_chars(first - 2)[1] if first > 1 else 0
        if a < b or b <= start or begins < start:
            break
        first -= 1
    return first


def _belongs(text: str, chars: Span, start: int, end: int) -> bool:
    a, b = chars
    inside, outside = text[max(a, start) : min(b, end)], text[a : max(a, start)] + text[end:b]
    if outside.strip() and inside.strip():
        raise NotUsable("whose answer shares a token with what stands beside it", repr(text[a:b]))
    return not outside or (not outside.strip() and bool(inside.strip()))


class _Renderer:
    """Renders conversations and finds the spans of their answers.

    What a template writes around the contents depends on the roles alone, so the pieces are kept by
    the sequence of roles; every single text is still compared with what the template renders.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, ...], list[str] | NotUsable] = {}
        self.marker: str | None = None
        self.after = ""  # what is written after the last answer

    def __call__(
        self, example: Example, wanted: list[int], text: str | None = None
    ) -> tuple[str, list[Span]]:
        """The text, and where the answers of the wanted turns stand in it, end marker included."""
        if text is None:
            text = render(self.tokenizer, example.messages, example.tools)
        if example.tools or not all(map(_is_plain, example.messages)):
            return text, self._by_prompts(example, wanted, text)
        roles = tuple(message["role"] for message in example.messages)
        if roles not in self.known:
            self.known[roles] = _tried(self._pieces, roles)
        pieces = self.known[roles]
        if isinstance(pieces, NotUsable):
            raise pieces
        contents = _as_written(text, pieces, [message["content"] for message in example.messages])
        if contents is None:
            return text, self._by_prompts(example, wanted, text)
        return text, _spans(pieces, contents, wanted, len(self._end_marker()))

    def _pieces(self, roles: tuple[str, ...]) -> list[str]:
        """What is written before, between and after the contents."""
        marks = [f"sentinel{number}x" for number in range(len(roles))]
        turns = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        rest = render(self.tokenizer, turns)
        pieces = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                raise NotUsable("of which the chat template leaves out a turn", "-".join(roles))
            pieces.append(piece)
        pieces.append(rest)
        for role, piece in zip(roles, pieces[1:], strict=True):
            if role == "assistant" and not piece.startswith(self._end_marker()):
                raise NotUsable(_NO_END)
        return pieces

    def _end_marker(self) -> str:
        """What the template writes after every answer, whether another turn follows or not: Phi-3
        closes a conversation with one token more."""
        if self.marker is None:
            ask, mark = {"role": "user", "content": "sentinel0x"}, "sentinel1x"
            turns = [ask, {"role": "assistant", "content": mark}]
            after = self.after = render(self.tokenizer, turns).rpartition(mark)[2].rstrip()
            try:
                goes_on = render(self.tokenizer, [*turns, ask]).rpartition(mark)[2]
            except NotUsable:  # it takes one question alone
                goes_on = after
            self.marker = after if goes_on.startswith(after) else self._shared(after, goes_on)
        if not self.marker:
            raise NotUsable(_NO_END)
        return self.marker

    def _shared(self, after: str, goes_on: str) -> str:
        """What both begin with, up to where a token of the vocabulary's own or a line ends."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(after, goes_on, strict=False))
        shared = after[: len(list(same))]
        tokens = tuple(self.tokenizer.get_added_vocab())
        for end in range(len(shared), 0, -1):
            if shared[end : end + 1].isspace() or shared.endswith(tokens, 0, end):
                return shared[:end].rstrip()
        return ""

    def _by_prompts(self, example: Example, wanted: list[int], text: str) -> list[Span]:
        """Each answer is what follows the template's prompt for the turns before it."""
        for number, message in enumerate(example.messages, 1):
            said = message["content"].strip()
            if message["role"] == "assistant":
                _check_calls(message, text, number)
            elif said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
                raise NotUsable(_REWRITTEN, f"turn {number}")
        if not all(name in text for name in _names(example.tools)):
            raise NotUsable("whose tools the chat template leaves out")
        return [self._answer(example, number, text) for number in wanted]

    def _answer(self, example: Example, number: int, text: str) -> Span:
        turns, message = list(example.messages[:number]), example.messages[number]
        prompt = render(self.tokenizer, turns, example.tools, add_generation_prompt=True)
        start, end = len(prompt), self._end(example, number, text)
        if not text.startswith(prompt) or end is None:
            raise NotUsable(_REWRITTEN, f"turn {number + 1}")
        marker = self._end_marker()
        until = render(self.tokenizer, example.messages[: number + 1], example.tools).rstrip()
        marked = until.endswith(self.after)
        if marked:
            stop = text.rfind(marker, start, end)
            end = stop + len(marker)
        else:  # after a call some write another, such as Llama's <|eom_id|>
            stop = end = len(until) if text.startswith(until) else -1
            if not until.endswith(tuple(self.tokenizer.get_added_vocab())):
                raise NotUsable(_NO_END)
        if stop < start:
            raise NotUsable(_REWRITTEN, f"turn {number + 1}")
        written, content = text[start:stop], message["content"]
        thoughts = message.get("reasoning_content") or message.get("thinking") or ""
        if not (thoughts or message.get("tool_calls")):
            # What stands between prompt and content, such as empty thoughts, is the template's.
            for variant in _variants(content):
                if marked and written.endswith(variant):
                    return stop - len(variant), end
            if _squeezed(written) != _squeezed(content):
                raise NotUsable(_REWRITTEN, f"turn {number + 1}")
            return start, end
        _check_calls(message, written, number + 1)
        if _squeezed(content) not in _squeezed(written):
            raise NotUsable(_REWRITTEN, f"turn {number + 1}")
        if _squeezed(str(thoughts)) not in _squeezed(written):
            raise NotUsable("whose thoughts the chat template leaves out", f"turn {number + 1}")
        if not thoughts:
            turns.append({"role": "assistant", "content": "sentinelx"})
            shown = render(self.tokenizer, turns, example.tools).rpartition("sentinelx")[0]
            if text.startswith(shown, 0, stop):
                start = max(start, len(shown))
        return start, end

    def _end(self, example: Example, number: int, text: str) -> int | None:
        """Where the words of the turn after an answer begin, or the text ends; None if the text
        does not go on as the template does."""
        if number + 1 == len(example.messages):
            return len(text)
        following = {**example.messages[number + 1], "content": "sentinelx"}
        turns = [*example.messages[: number + 1], following]
        shown, found, _ = render(self.tokenizer, turns, example.tools).rpartition("sentinelx")
        return len(shown) if found and text.startswith(shown) else None


def _check_calls(message: Message, text: str, turn: int) -> None:
    if not all(name in text for name in _names(message.get("tool_calls") or ())):
        raise NotUsable("whose tool calls the chat template leaves out", f"turn {turn}")


def _names(calls: Iterable[Any]) -> list[str]:
    """Of tools, or of calls to them."""
    inner = (call.get("function", call) for call in calls)
    names = (each.get("name") for each in inner if isinstance(each, dict))
    return [name for name in names if isinstance(name, str)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _variants(content: str) -> tuple[str, ...]:
    """A content as it is, and without the white space around it."""
    return content, content.strip(), content.lstrip(), content.rstrip()


def _as_written(text: str, pieces: list[str], contents: list[str]) -> list[str] | None:
    """The contents as the template wrote them, each as it is or without the white space around it;
    None if pieces and contents don't join to the text."""
    written, position = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    for content, piece in zip(contents, pieces[1:], strict=True):
        for variant in _variants(content):
            if text.startswith(variant + piece, position):
                written.append(variant)
                position += len(variant) + len(piece)
                break
        else:
            return None
    return written if position == len(text) else None


def _spans(
    pieces: list[str], contents: list[str], wanted: list[int], marker_length: int
) -> list[Span]:
    spans, position = [], 0
    for number, content in enumerate(contents):
        position += len(pieces[number])
        if number in wanted:
            spans.append((position, position + len(content) + marker_length))
        position += len(content)
    return spans
