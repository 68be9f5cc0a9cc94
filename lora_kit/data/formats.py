"""Rows -> examples: which columns are text, a prompt and its completion, or a conversation.

A file's format is detected from the columns of its first row. Columns that fit no format, or
several, are an error that lists the columns and the candidates. A later row that does not fit is
dropped and counted, with its place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kit.data import marks
from lora_kit.data.json_rows import short_repr
from lora_kit.data.readers import RawRow
from lora_kit.errors import NotUsable, UserError
from lora_kit.schema import Json

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# Role names: OpenAI's (`developer` is its newer `system`) and ShareGPT's.
_OPENAI = {"developer": "system", **{role: role for role in ROLES}}
_SHAREGPT = _OPENAI | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_PUNCTUATION = ".,;:!?\"'`“”‘’„«»…"  # of prose, not of formulas and code
REJECTED = "with a rejected completion (`label` is false)"
_TAG = re.compile(r"O|([BIESLU])-(\S+)")
_NUMBER = re.compile("[0-9]{1,9}")
WITHOUT_PROMPT = ("text", "text-label", "sentence-pair", "tokens-tags")
_DEEPEST = 64  # nesting levels of a tool definition or tool call


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        needed: required columns. optional: further columns that it reads.
        joiner: text between prompt and completion for a base without a chat template.
        recipe: a shipped recipe that reads it, for messages; "" if there is none.
        other_names: {column: an accepted alias}.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    joiner: str = "\n\n"
    recipe: str = "sft"
    other_names: dict[str, str] = field(default_factory=dict)


FORMATS = {
    "text": Format(("text",), joiner="", recipe="cpt"),
    "text-label": Format(("text", "label"), ("system",), other_names={"label": "category"}),
    "sentence-pair": Format(
        ("sentence1", "sentence2", "score"), recipe="", other_names={"score": "label"}
    ),
    "messages": Format(("messages",), ("tools", "system"), joiner=""),
    "sharegpt": Format(("conversations",), ("tools", "system"), joiner=""),
    "prompt-completion": Format(("prompt", "completion"), ("system", "tools"), joiner=""),
    "instruction-output": Format(("instruction", "output"), ("input", "context", "system")),
    "instruction-response": Format(("instruction", "response"), ("input", "context", "system")),
    "question-answer": Format(("question", "answer"), ("context", "system")),
    "tokens-tags": Format(("tokens", "tags"), ("system",)),
    "preference": Format(("chosen", "rejected"), ("prompt", "system"), joiner=""),
    "unpaired-preference": Format(("prompt", "completion", "label"), ("system",), joiner=""),
}


@dataclass(frozen=True)
class Example:
    """A checked row: a text, a conversation, or both for a text with a label.

    Attributes:
        place: file:line of the row.
        text: a text, with or without a label; for a sentence pair the first sentence.
        messages: a conversation that ends with an assistant turn. For a preference the one with
            the chosen completion; for a labelled text, the text and its label; for a sentence pair,
            both sentences.
        rejected: for a preference, the conversation with the rejected completion.
        joiner: text between prompt and completion for a base without a chat template.
        label: the class of a text; the score of a sentence pair, as digits.
        group: examples of one group stay in one split: the value of data.group's column.
        joins: the text continues that of the example before it; both are blocks of one document.
    """

    place: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    joiner: str = ""
    tools: tuple[Any, ...] = ()
    group: str | None = None
    label: str | None = None
    joins: bool = False

    @property
    def key(self) -> str:
        """The text that duplicates share: without case, punctuation and repeated white space."""
        return normalised(_conversation_text(self.messages) if self.messages else self.text or "")

    @property
    def question(self) -> str:
        """The conversation before the last completion; "" for a text."""
        return _conversation_text(self.messages[:-1])


def _conversation_text(messages: Sequence[Message]) -> str:
    """The turns concatenated, without the system prompt, which is often the same for all rows or
    differs for the same question."""
    return "\0".join(message_text(m) for m in messages if m["role"] != "system")


def message_text(message: Message) -> str:
    """A message as text: its content and its tool calls."""
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (str(calls) if calls else "")


def normalised(text: str) -> str:
    """Case-folded text without punctuation of prose, with single spaces.

    >>> normalised("What's  NEW?\\n") == normalised("what s new")
    True
    """
    words = text.casefold()
    # Seven times as fast as str.translate, whose fast path ends at a NUL byte.
    for mark in _PUNCTUATION:
        words = words.replace(mark, " ")
    words = words.replace("\0", " \0 ")  # a NUL byte separates turns
    return " ".join(words.split()) or text.strip()  # a text of only punctuation is kept


@dataclass(frozen=True)
class Columns:
    """`data.columns`, `data.labels`, `data.group` and `data.ignore`.

    renames: {our name: the row's name}. labels: known label names; empty: any. group: a column.
    ignored: columns that are not read.
    """

    renames: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    group: str | None = None
    ignored: tuple[str, ...] = ()

    def without_ignored(self, row: RawRow) -> RawRow:
        if not self.ignored:
            return row
        kept = {name: v for name, v in row.columns.items() if name not in self.ignored}
        return RawRow(row.place, kept)

    def rename(self, columns: Json) -> Json:
        # Text files and embedded texts have no columns to rename.
        if not self.renames or columns.keys() == {"text"}:
            return columns
        moved = {*self.renames, *self.renames.values()}
        kept = {name: v for name, v in columns.items() if name not in moved}
        return kept | {o: columns[t] for o, t in self.renames.items() if t in columns}


def format_of(row: RawRow, columns: Columns, formats: Sequence[str]) -> str:
    """Detect the format of a file from the columns of its first row.

    Args:
        formats: the formats that the task reads.

    Raises:
        UserError: the columns fit none of these formats, or several; or `data.columns` or
            `data.group` name a column that does not exist.
    """
    row = columns.without_ignored(row)
    have = _listed(row.columns)
    if row.columns.keys() != {"text"}:  # text files have no columns to rename
        named = [("columns", name) for name in columns.renames.values()]
        named += [("group", columns.group)] if columns.group else []
        for key, name in named:
            if name not in row.columns:
                raise UserError(f"{row.place}: data.{key} names `{name}`; the columns are: {have}")
    values = columns.rename(row.columns)
    fitting = _fitting(values, columns, FORMATS)
    mine = [name for name in fitting if name in formats]
    if not mine:  # try column aliases
        mine = _fitting(_with_other_names(values, formats), columns, formats)
    if len(mine) == 1:
        return mine[0]
    if mine:
        # Suggest a column that only one of them has.
        needed = [name for format_name in mine for name in FORMATS[format_name].needed]
        example = next(name for name in reversed(needed) if needed.count(name) == 1)
        raise UserError(
            f"{row.place}: the columns ({have}) fit more than one format ({', '.join(mine)}): "
            f"name one, for example data.columns: {{{example}: {example}}}"
        )
    if values.keys() != row.columns.keys():
        have += f"; by data.columns: {_listed(values)}"
    wanted = "; ".join("+".join(FORMATS[name].needed) for name in formats)
    rename = f"rename them, for example data.columns: {{{_suggested(values, formats)}}}"
    if fitting:
        other = FORMATS[fitting[0]]
        such = f", such as `recipe: {other.recipe}`" if other.recipe else ""
        raise UserError(
            f"{row.place}: these columns ({have}) are {'+'.join(other.needed)}, and this recipe "
            f"reads {wanted}: use a recipe that reads them{such}, or {rename}"
        )
    raise UserError(f"{row.place}: the columns ({have}) fit no format ({wanted}): {rename}")


def _fitting(values: dict[str, Any], columns: Columns, formats: Iterable[str]) -> list[str]:
    """The formats whose columns are present. A format that needs a superset of another's columns
    wins: text + label before text alone."""
    found = [name for name in formats if all(n in values for n in FORMATS[name].needed)]
    fitting = [
        name
        for name in found
        if not any(set(FORMATS[name].needed) < set(FORMATS[other].needed) for other in found)
    ]
    if len(fitting) > 1:  # prefer formats with a column that data.columns names
        named = set(columns.renames)
        fitting = [n for n in fitting if named & set(FORMATS[n].needed)] or fitting
    return fitting


def _with_other_names(values: dict[str, Any], formats: Iterable[str]) -> dict[str, Any]:
    """Columns with aliases renamed to what these formats call them."""
    renamed = dict(values)
    for name in formats:
        for ours, theirs in FORMATS[name].other_names.items():
            if ours not in renamed and theirs in renamed:
                renamed[ours] = renamed.pop(theirs)
    return renamed


def unread(row: RawRow, format_name: str, columns: Columns) -> list[str]:
    """The columns of a row that its format does not read."""
    known = FORMATS[format_name]
    wanted = (*known.needed, *known.optional)
    used = {columns.renames.get(name, name) for name in wanted} | {columns.group}
    used |= {other for ours, other in known.other_names.items() if ours not in row.columns}
    return [name for name in row.columns if name not in used and name not in columns.ignored]


def _listed(names: Iterable[str]) -> str:
    """Column names in one line; without a header, a name can be any text."""
    listed = [" ".join(f"{name:.40}".split()) for name in names]
    more = [f"{len(listed) - 20} more"] if len(listed) > 20 else []
    return ", ".join(listed[:20] + more) or "none"


def _suggested(values: dict[str, Any], formats: Sequence[str]) -> str:
    """Suggested renames: columns that differ only by case, and the missing columns of the format
    that fits best."""
    mine = [FORMATS[name] for name in formats]
    known = {name for f in mine for name in (*f.needed, *f.optional)}
    found = {name.lower(): name for name in values if name.lower() in known - {name}}
    have = {*values, *found}

    def lacking(f: Format) -> list[str]:
        return [name for name in f.needed if name not in have]

    best = min(mine, key=lambda f: len(lacking(f)) / len(f.needed))
    if len(lacking(best)) == len(best.needed) and "prompt-completion" in formats:
        best = FORMATS["prompt-completion"]
    found |= {name: "YOURS" for name in lacking(best)}
    return ", ".join(f"{ours}: {theirs}" for ours, theirs in found.items())


def to_example(row: RawRow, format_name: str, columns: Columns, use: str = "train") -> Example:
    """Read a row in its file's format.

    Args:
        use: `train`, `eval` or `general`.

    Raises:
        NotUsable: a column is missing, empty or of the wrong type, or the turns are invalid; or a
            column that the format does not read excludes the row (see `marks`).
        marks.Unseen: the row has images, audio or video.
    """
    row = columns.without_ignored(row)
    known = FORMATS[format_name]
    renamed = _with_other_names(columns.rename(row.columns), [format_name])
    values = {n: renamed[n] for n in (*known.needed, *known.optional) if n in renamed}
    for name in known.needed:
        if name not in values:
            raise NotUsable(f"without `{name}`")
        if values[name] is None:
            raise NotUsable(f"with a null `{name}`")
    others: Json = {}
    if len(row.columns) > len(known.needed) and use != "general":
        others = {name: row.columns[name] for name in unread(row, format_name, columns)}
        marks.check(others, format_name not in WITHOUT_PROMPT, train=use == "train")
    group = None
    if columns.group and row.columns.keys() != {"text"}:
        if row.columns.get(columns.group) is None:
            raise NotUsable(f"without the group `{columns.group}`")
        group = str(row.columns[columns.group])
    if format_name == "text":
        document = _text(values, "text")
        if not document.strip():
            raise NotUsable("empty")
        if use != "general":
            marks.check_seen(document, document=True)
        return Example(row.place, text=document, group=group)
    tools = _tools(values.get("tools"))
    text: str | None = None
    label: str | None = None
    rejected: list[Message] = []
    if format_name == "preference":
        messages, rejected = _preference(values)
    elif format_name == "text-label":
        label, text = _label(values["label"], columns.labels), _text(values, "text")
        messages = _pair(text, label)
    elif format_name == "sentence-pair":
        label, text = _score(values["score"]), _text(values, "sentence1")
        messages = _pair(text, _text(values, "sentence2"))
    else:
        messages = _conversation(values, format_name, columns.labels)
    if tools:
        _drop_null_arguments([*messages, *rejected], tools)
    for message in messages:
        if message["role"] != "assistant":
            marks.check_seen(message["content"], document=False)
    system = _optional(values, "system")
    if others and format_name not in WITHOUT_PROMPT:
        marks.check_prompt(others, (system, *map(message_text, messages)))
    return Example(
        place=row.place,
        text=text,
        messages=_checked(messages, system),
        rejected=_checked(rejected, system) if rejected else (),
        joiner=known.joiner,
        tools=tools,
        group=group,
        label=label,
    )


def _conversation(values: Json, format_name: str, labels: tuple[str, ...]) -> list[Message]:
    """The turns of a row in a format other than text, text-label, sentence-pair or preference.

    `labels` are `data.labels`, for tags that are numbers.
    """
    needed = FORMATS[format_name].needed
    match format_name:
        case "messages" | "sharegpt":
            return _turns(values[needed[0]])
        case "tokens-tags":
            return _entities(values, labels)
        case "prompt-completion":
            return _prompted(values, "completion")
        case "unpaired-preference":
            return _preferred(values)
    ask, answer = needed
    parts = [_optional(values, "context"), _text(values, ask), _optional(values, "input")]
    return _pair("\n\n".join(filter(None, parts)), _text(values, answer))


def _checked(messages: list[Message], system: str) -> tuple[Message, ...]:
    """The turns with the text of a `system` column. Raises NotUsable if they are invalid."""
    messages = _with_system(messages, system)
    _check_turns(messages)
    return tuple(messages)


def _with_system(messages: list[Message], system: str) -> list[Message]:
    """The turns with this system prompt first; "": as they are."""
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise NotUsable("with a `system` that is not the system's turn")
    return messages


def _text(values: dict[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise NotUsable(f"whose `{name}` is not text", f"it is {short_repr(value)}")
    return _clean(value, f"`{name}`")


def _optional(values: dict[str, Any], name: str) -> str:
    """A text, or a list of its paragraphs; "" if missing."""
    value = values.get(name)
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    text = _text({name: value}, name)
    return text if text.strip() else ""


def _clean(text: str, where: str) -> str:
    """The text itself; tokenizers reject NUL bytes and lone surrogates (`\\ud83d`), which JSON can
    contain."""
    if "\0" in text:
        raise NotUsable("with a NUL byte", f"in {where}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotUsable("with a lone surrogate", f"{text[error.start]!a} in {where}") from None
    return text


def _nested(value: Any, where: str, depth: int = 0) -> Any:
    """The value itself; every text inside it, keys included, is checked with `_clean`."""
    if depth > _DEEPEST:
        raise NotUsable("with nesting too deep", f"in {where}")
    if isinstance(value, str):
        _clean(value, where)
    elif isinstance(value, (list, dict)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _nested(part, where, depth + 1)
    return value


def _pair(prompt: str, answer: str) -> list[Message]:
    if not prompt.strip():
        raise NotUsable("with an empty prompt")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _turns_of(role: str, values: dict[str, Any], name: str) -> list[Message]:
    """A column with one turn's text, or with a list of turns."""
    if isinstance(values[name], list):
        return _turns(values[name])
    return [{"role": role, "content": _text(values, name)}]


def _prompted(values: dict[str, Any], answer: str) -> list[Message]:
    return [*_turns_of("user", values, "prompt"), *_turns_of("assistant", values, answer)]


def _preference(values: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """The conversations with the chosen and with the rejected completion.

    If `chosen` and `rejected` are whole conversations, a `prompt` column must occur in their turns
    before the completion: some data sets store the first question there, others the last.
    """
    found = []
    for side in ("chosen", "rejected"):
        completion = values[side]
        repeats_prompt = isinstance(completion, list) and len(completion) > 1
        if not repeats_prompt and values.get("prompt") is None:
            raise NotUsable(
                "with a preference without a prompt", "name data.columns: {prompt: ...}"
            )
        turns = _turns(completion) if repeats_prompt else _prompted(values, side)
        if repeats_prompt and values.get("prompt") is not None:
            asked = normalised(_conversation_text(_turns_of("user", values, "prompt")))
            if asked not in normalised(_conversation_text(turns[:-1])):
                raise NotUsable(
                    f"whose `prompt` is not in the turns of `{side}`", short_repr(asked)
                )
        found.append(turns)
    return found[0], found[1]


def _preferred(values: dict[str, Any]) -> list[Message]:
    """An unpaired preference row with a good completion."""
    good = marks.as_flag(values["label"])
    if good is None:
        raise NotUsable(
            "whose `label` is not true or false", f"it is {short_repr(values['label'])}"
        )
    if not good:
        raise NotUsable(REJECTED)
    return _prompted(values, "completion")


def _label(value: Any, labels: tuple[str, ...]) -> str:
    """The class of a row: its name, or the name in `data.labels` of its number."""
    found = f"it is {short_repr(value)}"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise NotUsable("whose `label` is neither text nor a whole number", found)
    if isinstance(value, int) and not labels:
        raise NotUsable("whose `label` is a number without a name", f"{found}: name data.labels")
    if value not in labels and _NUMBER.fullmatch(str(value)) and int(value) < len(labels):
        value = labels[int(value)]
    if isinstance(value, int) or (labels and value not in labels):
        raise NotUsable("whose `label` is not in data.labels", found)
    if not value.strip():
        raise NotUsable("with an empty `label`")
    return _clean(value, "`label`")


def _score(value: Any) -> str:
    number = not isinstance(value, bool) and isinstance(value, (int, float, str))
    try:
        if number and math.isfinite(float(value)):
            return str(value)
    except ValueError:
        pass
    raise NotUsable("whose `score` is not a number", f"it is {short_repr(value)}")


def _entities(values: dict[str, Any], labels: tuple[str, ...]) -> list[Message]:
    """A sentence, and the entities that its tags mark, one a line: `Disease: colon cancer`."""
    tokens, tags = values["tokens"], values["tags"]
    if not isinstance(tokens, list) or not all(isinstance(t, str) and t for t in tokens):
        raise NotUsable("whose `tokens` are not a list of texts")
    if not isinstance(tags, list) or len(tags) != len(tokens):
        raise NotUsable("without one tag a token")
    tags = [labels[t] if type(t) is int and 0 <= t < len(labels) else t for t in tags]
    entities: list[tuple[str, list[str]]] = []
    inside: str | None = None
    for number, (token, tag) in enumerate(zip(tokens, tags, strict=True), 1):
        match = _TAG.fullmatch(tag) if isinstance(tag, str) else None
        if match is None:
            known = "" if isinstance(tag, str) else ": name data.labels"
            raise NotUsable(
                "with a tag that is not IOB", f"token {number} has {short_repr(tag)}{known}"
            )
        if labels and match[2] and tag not in labels and match[2] not in labels:
            raise NotUsable(
                "whose tag is not in data.labels", f"token {number} has {short_repr(tag)}"
            )
        begins, kind = match[1] or "O", match[2]
        if begins == "O":
            inside = None
        elif begins in "BSU":
            entities.append((kind, [token]))
            inside = kind if begins == "B" else None
        elif inside != kind:
            before = short_repr(inside) if inside else "no entity"
            raise NotUsable(
                "with an invalid IOB sequence",
                f"token {number} has {short_repr(tag)} after {before}",
            )
        else:
            entities[-1][1].append(token)
            inside = kind if begins == "I" else None
    answer = "\n".join(f"{kind}: {' '.join(words)}" for kind, words in entities) or "none"
    return _pair(_clean(" ".join(tokens), "`tokens`"), answer)


def _tools(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):  # some data sets store JSON text
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise NotUsable("whose `tools` are not JSON") from None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise NotUsable("whose `tools` are not a list of objects")
    return tuple(_nested(value, "`tools`"))


def _drop_null_arguments(messages: Sequence[Message], tools: Iterable[Any]) -> None:
    """Remove null arguments that the row's tool does not have: `datasets` and pandas write those of
    all rows' calls to each row, also in JSON."""
    properties: dict[str, Json] = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, dict) else None
        known = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(known, dict):
            properties[str(function.get("name"))] = known
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, dict) and str(function.get("name")) in properties:
            known = properties[str(function.get("name"))]
            function["arguments"] = {
                name: v
                for name, v in arguments.items()
                if v is not None or known.get(name) is not None
            }


def _turns(value: Any) -> list[Message]:
    """Check OpenAI turns ({role, content}) or ShareGPT turns ({from, value}), under either column
    name; keeps what templates read: role, content, tool calls, thinking.

    An assistant turn with `weight: 0` (OpenAI's), `train: false` or another flag of `marks.FLAGS`
    is not trained on.
    """
    if not isinstance(value, list) or not value:
        raise NotUsable("whose turns are not a list", f"they are {short_repr(value)}")
    who, what, roles = "role", "content", _OPENAI
    if isinstance(value[0], dict) and "from" in value[0]:
        who, what, roles = "from", "value", _SHAREGPT
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise NotUsable("with a turn that is not an object", f"turn {number}")
        role = roles.get(str(turn.get(who)))
        if role is None:
            raise NotUsable(
                "with an unknown role", f"turn {number} has {short_repr(turn.get(who))}"
            )
        content, calls = turn.get(what), turn.get("tool_calls")
        _check_seen(turn, content, f"turn {number}")
        if isinstance(content, list) and all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
            for p in content
        ):
            content = "".join(part["text"] for part in content)
        if calls and role != "assistant":
            raise NotUsable("with a tool call outside an assistant turn", f"turn {number}")
        if calls and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
            raise NotUsable("whose `tool_calls` are not a list of objects", f"turn {number}")
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise NotUsable(
                f"with a turn whose `{what}` is not text",
                f"turn {number} has {short_repr(content)}",
            )
        message: Message = {"role": role, "content": _clean(content, f"turn {number}")}
        for name in ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking"):
            if turn.get(name):
                message[name] = _nested(turn[name], f"turn {number}")
        if marks.excluding(turn, turn, f"turn {number}"):
            message["weight"] = 0
        messages.append(message)
    return messages


def _check_seen(turn: Json, content: object, where: str) -> None:
    """Raises marks.Unseen if a turn has images, audio or video; NotUsable for a call in OpenAI's
    old form, or for a key that says which words of the turn are trained on."""
    if turn.get("function_call"):
        raise NotUsable("with a `function_call`", f"{where}: use `tool_calls`")
    for name in marks.PARTS_OF_TURNS & turn.keys():
        if turn[name] not in (None, "", []):
            whole = "a turn is excluded as a whole, by `train: false`"
            raise NotUsable(f"with a turn that has a `{name}`", f"{where}: {whole}")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video")):
            raise marks.Unseen(f"a content part of type `{kind:.20}` in {where}")
    for name in marks.MEDIA & turn.keys():
        if marks.is_media(name, turn[name]):
            raise marks.Unseen(f"`{name}` in {where}")


def _check_turns(messages: list[Message]) -> None:
    """Raises NotUsable unless a system turn, if any, is first, no assistant turn is empty or
    follows another, and the last turn is the assistant's."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise NotUsable("without an assistant turn")
    for number in range(1, len(roles)):
        if roles[number] == "assistant" == roles[number - 1]:
            raise NotUsable("with two assistant turns in a row", f"turn {number + 1}")
        if roles[number] == "system":
            raise NotUsable("with a system turn after the first", f"turn {number + 1}")
    if roles[-1] != "assistant":
        raise NotUsable("whose last turn is not the assistant's", f"it is the {roles[-1]}'s")
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message_text(message).strip():
            raise NotUsable("with an empty completion", f"turn {number}")
