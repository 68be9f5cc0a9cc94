"""Rows -> examples: which columns are text, a prompt and its answer, or a conversation.

The format of a row is found by the names of its columns. Where the names fit none, or more than
one, that is an error which lists the columns and the candidates: nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_kit.data.sources import Row
from lora_kit.errors import UserError

Message = dict[str, str]
ROLES = ("system", "user", "assistant")

# format -> the columns it needs
FORMATS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction-output": ("instruction", "output"),
    "instruction-response": ("instruction", "response"),
    "question-answer": ("question", "answer"),
}


@dataclass(frozen=True)
class Example:
    """Either a text, or messages that end with an assistant's.

    `joiner` stands between prompt and answer where a base has no chat template.
    """

    place: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    joiner: str = ""
    joins: bool = False

    @property
    def key(self) -> str:
        """What makes two examples the same: their text, whatever the white space."""
        parts = [self.text] if self.text is not None else [m["content"] for m in self.messages]
        return "\0".join(" ".join(part.split()) for part in parts)


@dataclass
class Dropped:
    """Rows left out: reason -> how many, and where the first one stood."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def __str__(self) -> str:
        return "; ".join(f"{n} {why} (first: {self.first[why]})" for why, n in self.counts.items())


def to_examples(rows: list[Row], columns: dict[str, str], dropped: Dropped) -> list[Example]:
    """Read rows as examples; what is empty is dropped, counted and placed.

    Args:
        columns: renames, {our name: the row's name}, as in `data.columns`.

    Raises:
        UserError: the columns fit no format or several, or a value has the wrong type.
    """
    examples = []
    for row in rows:
        values = _rename(row, columns)
        name = _format_of(values, row.place)
        if name == "text":
            text = _text(values, "text", row.place)
            if not text.strip():
                dropped.add("empty", row.place)
            else:
                examples.append(Example(row.place, text=text, joins=row.joins))
            continue
        messages, joiner = _messages(name, values, row.place)
        if not messages[-1]["content"].strip():
            dropped.add("with an empty answer", row.place)
        else:
            examples.append(Example(row.place, messages=tuple(messages), joiner=joiner))
    return examples


def _rename(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    for theirs in columns.values():
        if theirs not in row.columns:
            have = ", ".join(row.columns)
            raise UserError(f"{row.place}: data.columns names `{theirs}`; the columns are: {have}")
    kept = {name: v for name, v in row.columns.items() if name not in columns.values()}
    return kept | {ours: row.columns[theirs] for ours, theirs in columns.items()}


def _format_of(values: dict[str, Any], place: str) -> str:
    fitting = [name for name, needed in FORMATS.items() if all(n in values for n in needed)]
    if len(fitting) == 1:
        return fitting[0]
    have = ", ".join(values) or "none"
    if fitting:
        raise UserError(
            f"{place}: the columns ({have}) fit more than one format ({', '.join(fitting)}): "
            "remove the columns that are not meant"
        )
    candidates = "; ".join("+".join(needed) for needed in FORMATS.values())
    raise UserError(
        f"{place}: the columns ({have}) fit no format ({candidates}): "
        "rename them, for example data.columns: {prompt: YOURS, completion: YOURS}"
    )


def _text(values: dict[str, Any], name: str, place: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise UserError(f"{place}: `{name}` is {value!r:.40}, not text: mend or remove the row")
    return _encodable(value, f"{place}: `{name}`")


def _encodable(text: str, where: str) -> str:
    """JSON can spell half of a character (`\\ud83d` alone), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(
            f"{where} holds half a character ({half}): mend or remove the row"
        ) from None
    return text


def _messages(name: str, values: dict[str, Any], place: str) -> tuple[list[Message], str]:
    if name == "messages":
        return _conversation(values["messages"], place), ""
    ask, answer = FORMATS[name]
    prompt, completion = _text(values, ask, place), _text(values, answer, place)
    joiner = "" if name == "prompt-completion" else "\n\n"
    if name.startswith("instruction") and values.get("input"):
        prompt = f"{prompt}\n\n{_text(values, 'input', place)}"
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ], joiner


def _conversation(value: Any, place: str) -> list[Message]:
    """OpenAI's messages, of text alone, checked turn by turn."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: `messages` is {value!r:.40}, not a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or not isinstance(content, str):
            raise UserError(f"{place}: turn {number} has no `role` and text `content`")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise UserError(
                f"{place}: turn {number} calls a tool: only text turns are learned from"
            )
        if turn.get("role") not in ROLES:
            role = turn.get("role")
            raise UserError(
                f"{place}: turn {number} has the role {role!r:.40}; known: {', '.join(ROLES)}"
            )
        content = _encodable(content, f"{place}: turn {number}")
        messages.append({"role": turn["role"], "content": content})
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{place}: the last turn is the {messages[-1]['role']}'s, not an answer")
    return messages
