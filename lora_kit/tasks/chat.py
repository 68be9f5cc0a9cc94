"""Conversations -> supervised tokens: loss on assistant turns and their end-of-turn tokens only.

The loss mask is found without `{% generation %}` markers: the template is rendered again with each
turn's content replaced by a sentinel, which yields the pieces that the template writes between the
contents. Pieces and real contents must concatenate to exactly the rendered conversation; then the
position of each completion is known.

    template pieces: <user>  <end><bot>     <end>
    contents:              Hi          Hello
    text:            <user>Hi<end><bot>Hello<end>
    supervised:                        ^^^^^^^^^^

If a turn has more than its content (a tool call, thinking), or the template changes the contents, a
completion is the text after the template's generation prompt, up to the end-of-turn token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lora_kit.base.templates import context_token, render, render_many
from lora_kit.data.formats import Example, Message
from lora_kit.errors import NotUsable, UserError
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.words import WordEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Span = tuple[int, int]
# Small batches stay in the CPU caches (10% faster than 500).
_ENCODED_AT_ONCE = 32
_NO_END = "for which the chat template writes no end-of-turn token"
_REWRITTEN = "whose turns the chat template rewrites"


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation. `supervised`: spans of supervised tokens; `completions`: number of
    completions in them, each with its end-of-turn token; `supervised_bytes`: UTF-8 bytes of the
    supervised text; `cut_from`: tokens before turns after the last completion that fits were
    removed, 0 if none were."""

    ids: list[int]
    supervised: list[Span]
    completions: int
    supervised_bytes: int
    cut_from: int = 0

    def ids_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Both int32 (tokens,); a label of -100 where no loss is computed."""
        ids = np.array(self.ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORED)
        for first, last in self.supervised:
            labels[first:last] = ids[first:last]
        return ids, labels


class ChatEncoder:
    """Tokenizes and labels conversations with a tokenizer's own template.

    Args:
        supervise: `assistant`: every completion; `last`: the last one; `all`: every token.
        max_length: tokens of a row at most.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, supervise: str, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.supervise = supervise
        self.max_length = max_length
        self.renderer = _Renderer(tokenizer) if tokenizer.chat_template else None
        self.begin = context_token(tokenizer)
        self.encode = word_encoder(tokenizer)

    def __call__(self, examples: list[Example]) -> Iterator[Encoded | NotUsable]:
        """For each example its tokens, or why it is dropped.

        A conversation over `max_length` tokens is cut after the last completion that fits; if none
        fits, it is dropped.

        Raises:
            UserError: there is no template, and an example is not one prompt and one completion.
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
                continue
            encoding = next(encodings)
            if len(encoding) <= self.max_length:
                yield _tried(self._label, *result, encoding)
            else:
                yield _tried(self._shortened, example, result[1], encoding)

    def _written(self, examples: list[Example]) -> list[str | None]:
        """The rendered texts, from one call of the template; None for all if they must be rendered
        one by one: because of tools, or since the template rejects one of them."""
        if any(example.tools for example in examples):
            return [None] * len(examples)
        try:
            return list(render_many(self.tokenizer, [e.messages for e in examples]))
        except NotUsable:
            return [None] * len(examples)

    def _render(self, example: Example, text: str | None = None) -> tuple[str, list[Span], int]:
        """The text, its supervised spans of characters, and the number of completions in them. A
        turn with `weight: 0` is not trained on. `text`: the rendered conversation, if known."""
        assert self.renderer is not None
        turns = [n for n, turn in enumerate(example.messages) if turn["role"] == "assistant"]
        supervised = [n for n in turns if example.messages[n].get("weight") != 0]
        if self.supervise == "all":
            others = [n for n in turns if n not in supervised]
            text, spans = self.renderer(example, others, text)
            return text, _between(spans, len(text)), len(supervised)
        if self.supervise == "last":
            supervised = [n for n in supervised if n == turns[-1]]
        text, spans = self.renderer(example, supervised, text)
        return text, spans, len(spans)

    def _label(
        self, text: str, spans: list[Span], completions: int, encoding: Any, cut_from: int = 0
    ) -> Encoded:
        ids = encoding.ids
        self._check_beginning(ids)
        if spans == [(0, len(text))]:
            supervised = [(0, len(ids))]
        else:
            found = [_tokens(text, encoding, start, end) for start, end in spans]
            supervised = [tokens for tokens in found if tokens is not None]
        if len(supervised) < len(spans) and self.supervise != "all":
            raise NotUsable("with a completion without any token")
        size = sum(len(text[a:b].encode()) for a, b in spans)
        return Encoded(ids, supervised, completions, size, cut_from)

    def _check_beginning(self, ids: list[int]) -> None:
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            raise NotUsable("that begin with two beginning-of-text tokens")

    def _shortened(self, example: Example, spans: list[Span], encoding: Any) -> Encoded:
        """A conversation over `max_length`, cut after the last completion that fits."""
        too_long = self._too_long(len(encoding))
        if self.supervise != "assistant":
            raise too_long
        ends = [n for n, turn in enumerate(example.messages, 1) if turn["role"] == "assistant"]
        supervised = [end for end in ends if example.messages[end - 1].get("weight") != 0]
        for end, span in reversed(list(zip(supervised, spans, strict=True))):
            last = encoding.char_to_token(span[1] - 1)
            if end == ends[-1] or last is None or last >= self.max_length:
                continue
            shorter = Example(example.place, messages=example.messages[:end], tools=example.tools)
            result = _tried(self._render, shorter)
            if isinstance(result, NotUsable):
                continue
            (found,) = self.encode([result[0]])
            if len(found) <= self.max_length:
                return self._label(*result, found, cut_from=len(encoding))
        raise too_long

    def _too_long(self, length: int) -> NotUsable:
        reason = f"longer than train.max_length ({self.max_length} tokens)"
        return NotUsable(reason, length=length)

    def _plain(self, example: Example) -> Encoded:
        """Prompt, joiner, completion and end-of-text token, for a base without a template."""
        turns = example.messages
        simple = len(turns) == 2 and turns[0]["role"] == "user" and all(map(_is_plain, turns))
        if not simple or example.tools:
            raise UserError(
                f"{example.place}: a conversation, but the base has no chat template: "
                "set data.chat_template: chatml"
            )
        prompt, completion = turns[0]["content"] + example.joiner, turns[1]["content"]
        of_prompt, of_completion = self.encode([prompt, completion])
        before = [*self.begin, *of_prompt.ids]
        ids = [*before, *of_completion.ids, self.tokenizer.eos_token_id]
        if len(ids) > self.max_length:
            raise self._too_long(len(ids))
        self._check_beginning(ids)
        supervised = turns[1].get("weight") != 0
        first, last, size = len(before), len(before), 0
        if supervised:
            last = len(ids)
            size += len(completion.encode())
        if self.supervise == "all":
            first = 0
            size += len(prompt.encode())
        return Encoded(ids, [(first, last)] if first < last else [], int(supervised), size)


def word_encoder(tokenizer: PreTrainedTokenizerBase) -> WordEncoder:
    """An encoder with a cache of words (see `words.py`); it adds no special tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return WordEncoder(backend)


def template_pieces(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str]:
    """What the chat template writes before, between and after the contents of turns.

    Raises:
        NotUsable: the template rejects such turns, or drops one.
    """
    marks = [f"sentinel{number}x" for number in range(len(roles))]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest = render(tokenizer, turns)
    pieces = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            raise NotUsable("with a turn that the chat template drops", "-".join(roles))
        pieces.append(piece)
    return [*pieces, rest]


def _tried(make: Callable[..., T], *args: Any) -> T | NotUsable:
    """The result of `make`, or the reason why the row is dropped."""
    try:
        return make(*args)
    except NotUsable as error:
        return error


def _is_plain(message: Message) -> bool:
    """Whether a turn has only role and content: no tool calls, thinking or name."""
    return len(message) == 2 + ("weight" in message)


def _between(spans: list[Span], length: int) -> list[Span]:
    """The complement of the spans.

    >>> _between([(2, 4)], 9)
    [(0, 2), (4, 9)]
    """
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), length]
    return [(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def _tokens(text: str, encoding: Any, start: int, end: int) -> Span | None:
    """The tokens of the characters text[start:end]; None if there are none.

    The first token may include white space of the template: after `[/INST] ` the first token of a
    completion is often ` Hello`, which is the token that the model must predict. Likewise the last.

    Raises:
        NotUsable: a token has text both inside and outside, or the end has no token.
    """
    # A tokenizer may drop characters.
    tokens = map(encoding.char_to_token, range(start, end))
    first = next((token for token in tokens if token is not None), None)
    if first is None:
        return None
    inner = text[start:end].rstrip() or text[start:end]
    last = encoding.char_to_token(start + len(inner) - 1)
    if last is None:
        raise NotUsable("whose end-of-turn token is incomplete in the tokenizer")
    count = len(encoding)
    # A character of several bytes can be several tokens.
    while last + 1 < count:
        begins, ends = encoding.token_to_chars(last + 1) or (end, end)
        if begins >= end or ends <= begins:
            break
        last += 1
    first = _with_blanks(encoding, first, start)
    while first <= last and not _belongs(text, encoding.token_to_chars(first), start, end):
        first += 1
    while first <= last and not _belongs(text, encoding.token_to_chars(last), start, end):
        last -= 1
    return (first, last + 1) if first <= last else None


def _with_blanks(encoding: Any, first: int, start: int) -> int:
    """Extend back over tokens without characters: some tokenizers assign none to white space."""
    while first > 0:
        a, b = encoding.token_to_chars(first - 1)
        begins = encoding.token_to_chars(first - 2)[1] if first > 1 else 0
        if a < b or b <= start or begins < start:
            break
        first -= 1
    return first


def _belongs(text: str, chars: Span, start: int, end: int) -> bool:
    """Whether a token of these characters belongs to text[start:end]: it may have only white space
    outside.

    Raises:
        NotUsable: it has text both inside and outside.
    """
    a, b = chars
    inside = text[max(a, start) : min(b, end)]
    outside = text[a : max(a, start)] + text[end:b]
    if outside.strip() and inside.strip():
        raise NotUsable("with a token across a completion's boundary", repr(text[a:b]))
    return not outside or (not outside.strip() and bool(inside.strip()))


class _Renderer:
    """Renders conversations and finds the spans of their completions.

    The pieces around the contents depend only on the roles, so they are cached by the sequence of
    roles; every text is still compared with the real rendering.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pieces: dict[tuple[str, ...], list[str] | NotUsable] = {}
        self.marker: str | None = None  # see `_end_of_turn`; None: not yet known
        self.after = ""  # text after the last completion of a conversation

    def __call__(
        self, example: Example, wanted: list[int], text: str | None = None
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of the wanted turns' completions with their end-of-turn token."""
        if text is None:
            text = render(self.tokenizer, example.messages, example.tools)
        if example.tools or not all(map(_is_plain, example.messages)):
            return text, self._by_prompts(example, wanted, text)
        roles = tuple(message["role"] for message in example.messages)
        if roles not in self.pieces:
            self.pieces[roles] = _tried(self._pieces, roles)
        pieces = self.pieces[roles]
        if isinstance(pieces, NotUsable):
            raise pieces
        contents = _as_written(text, pieces, [message["content"] for message in example.messages])
        if contents is None:
            return text, self._by_prompts(example, wanted, text)
        return text, _spans(pieces, contents, wanted, len(self._end_of_turn()))

    def _pieces(self, roles: tuple[str, ...]) -> list[str]:
        pieces = template_pieces(self.tokenizer, roles)
        for role, piece in zip(roles, pieces[1:], strict=True):
            if role == "assistant" and not piece.startswith(self._end_of_turn()):
                raise NotUsable(_NO_END)
        return pieces

    def _end_of_turn(self) -> str:
        """The end-of-turn marker: the text after every completion, whether or not another turn
        follows. (After the last one Phi-3 writes an additional token.)"""
        if self.marker is None:
            ask, mark = {"role": "user", "content": "sentinel0x"}, "sentinel1x"
            turns = [ask, {"role": "assistant", "content": mark}]
            after = self.after = render(self.tokenizer, turns).rpartition(mark)[2].rstrip()
            try:
                goes_on = render(self.tokenizer, [*turns, ask]).rpartition(mark)[2]
            except NotUsable:  # the template supports a single exchange only
                goes_on = after
            self.marker = after if goes_on.startswith(after) else self._shared(after, goes_on)
        if not self.marker:
            raise NotUsable(_NO_END)
        return self.marker

    def _shared(self, after: str, goes_on: str) -> str:
        """The common prefix, up to the end of an added token or the last white space."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(after, goes_on, strict=False))
        shared = after[: len(list(same))]
        tokens = tuple(self.tokenizer.get_added_vocab())
        for end in range(len(shared), 0, -1):
            if shared[end : end + 1].isspace() or shared.endswith(tokens, 0, end):
                return shared[:end].rstrip()
        return ""

    def _by_prompts(self, example: Example, wanted: list[int], text: str) -> list[Span]:
        """Spans of completions, each after the generation prompt of the turns before it."""
        for number, message in enumerate(example.messages, 1):
            content = message["content"].strip()
            if message["role"] == "assistant":
                _check_calls(message, text, number)
            elif content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
                raise NotUsable(_REWRITTEN, f"turn {number}")
        if not all(name in text for name in _names(example.tools)):
            raise NotUsable("whose tools the chat template drops")
        return [self._completion(example, number, text) for number in wanted]

    def _completion(self, example: Example, number: int, text: str) -> Span:
        """The span of a turn's completion, with its end-of-turn token.

        It begins after the generation prompt, and after text that the template adds before the
        content, such as an empty thinking block. It ends with the end-of-turn marker; some
        templates end a tool call with another token, such as Llama's <|eom_id|>.

        Raises:
            NotUsable: the template drops or rewrites part of the turn, or writes no end.
        """
        turns, message = list(example.messages[:number]), example.messages[number]
        prompt = render(self.tokenizer, turns, example.tools, add_generation_prompt=True)
        start, end = len(prompt), self._end(example, number, text)
        if not text.startswith(prompt) or end is None:
            raise NotUsable(_REWRITTEN, f"turn {number + 1}")
        marker = self._end_of_turn()
        until = render(self.tokenizer, example.messages[: number + 1], example.tools).rstrip()
        marked = until.endswith(self.after)
        if marked:
            stop = text.rfind(marker, start, end)
            end = stop + len(marker)
        else:
            stop = end = len(until) if text.startswith(until) else -1
            if not until.endswith(tuple(self.tokenizer.get_added_vocab())):
                raise NotUsable(_NO_END)
        if stop < start:
            raise NotUsable(_REWRITTEN, f"turn {number + 1}")
        written, content = text[start:stop], message["content"]
        thoughts = message.get("reasoning_content") or message.get("thinking") or ""
        if not (thoughts or message.get("tool_calls")):
            for variant in _variants(content):
                if marked and written.endswith(variant):
                    return stop - len(variant), end
            if _without_space(written) != _without_space(content):
                raise NotUsable(_REWRITTEN, f"turn {number + 1}")
            return start, end
        _check_calls(message, written, number + 1)
        if _without_space(content) not in _without_space(written):
            raise NotUsable(_REWRITTEN, f"turn {number + 1}")
        if _without_space(str(thoughts)) not in _without_space(written):
            raise NotUsable("whose thinking the chat template drops", f"turn {number + 1}")
        if not thoughts:  # tool calls
            turns.append({"role": "assistant", "content": "sentinelx"})
            shown = render(self.tokenizer, turns, example.tools).rpartition("sentinelx")[0]
            if text.startswith(shown, 0, stop):
                start = max(start, len(shown))
        return start, end

    def _end(self, example: Example, number: int, text: str) -> int | None:
        """The start of the content after a completion, or the end of the text; None if the text
        does not match the template."""
        if number + 1 == len(example.messages):
            return len(text)
        following = {**example.messages[number + 1], "content": "sentinelx"}
        turns = [*example.messages[: number + 1], following]
        shown, found, _ = render(self.tokenizer, turns, example.tools).rpartition("sentinelx")
        return len(shown) if found and text.startswith(shown) else None


def _check_calls(message: Message, text: str, turn: int) -> None:
    if not all(name in text for name in _names(message.get("tool_calls") or ())):
        raise NotUsable("whose tool calls the chat template drops", f"turn {turn}")


def _names(calls: Iterable[Any]) -> list[str]:
    """Names of tools or of tool calls."""
    inner = (call.get("function", call) for call in calls)
    names = (each.get("name") for each in inner if isinstance(each, dict))
    return [name for name in names if isinstance(name, str)]


def _without_space(text: str) -> str:
    """Without any white space, which templates change."""
    return "".join(text.split())


def _variants(content: str) -> tuple[str, ...]:
    """A content with and without surrounding white space."""
    return content, content.strip(), content.lstrip(), content.rstrip()


def _as_written(text: str, pieces: list[str], contents: list[str]) -> list[str] | None:
    """The contents as the template wrote them, with or without surrounding white space; None if
    pieces and contents do not concatenate to the text."""
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
