"""Random conversations through ten families of templates: what is learned is what was answered."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from families import FAMILIES, HERMES, LLAMA31, Family, byte_level, sentence_piece
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lora_kit.data.formats import Example, Message
from lora_kit.errors import NotUsable
from lora_kit.tasks.chat import ChatEncoder, Encoded

# Words that look like what the templates write, or like what finds the mask.
TRAPS = [
    *("assistant", "user", "model", "sentinel0x", "sentinel1x", "sentinelx", "{{ messages }}"),
    *("{% if x %}", "<|im_start|>assistant\n", "<|im_end|>\n", "[/INST]", "[INST] ", "<</SYS>>"),
    *("<end_of_turn>", "<|eot_id|>", "<|end|>", "<eos>", "<｜Assistant｜>", "<|CHATBOT_TOKEN|>"),
    *(
        "<think>",
        "</think>",
        "\n",
        "  ",
        "\t",
        "\r\n",
        "ä",
        "😀",
        "👩‍👩‍👧",
        "e\u0301",
        "日本",
        "queen",
        " the",
    ),
    *("bread. ", "\\n", '"', "</s>", "\u2028", "\u00a0", "\ufeff", "▁"),
]
TEXTS = st.lists(
    st.sampled_from(TRAPS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    min_size=1,
    max_size=6,
).map(lambda parts: "".join(parts).replace("\0", "0"))
ANSWERS = TEXTS.filter(lambda text: bool(text.strip()))
TURNS = st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3)
EXAMPLES = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BYTES = ("bytes", "without bos", "without markers", "trimmed offsets")
PIECES = ("pieces", "pieces without markers")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {
        "bytes": byte_level(folder),
        "without bos": byte_level(folder, bos=False),
        "without markers": byte_level(folder, markers=False),
        "trimmed offsets": byte_level(folder, trims=True),
        "pieces": sentence_piece(),
        "pieces without markers": sentence_piece(markers=False),
    }
    made["bytes"].pad_token = made["bytes"].eos_token  # as many bases have it
    return made


def conversation(turns: list[tuple[str, str]], system: str | None) -> list[Message]:
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for asked, answered in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return messages


def encode(
    tokenizer: Any, messages: list[Message], supervise: str = "assistant", most: int = 100_000
) -> Encoded | NotUsable:
    (found,) = ChatEncoder(tokenizer, supervise, most)([Example("f:1", messages=tuple(messages))])
    return found


def learned(tokenizer: Any, found: Encoded) -> list[str]:
    assert all(0 <= a < b <= len(found.ids) for a, b in found.supervised)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(found.supervised))
    return [tokenizer.decode(found.ids[a:b]) for a, b in found.supervised]


def written(family: Family, answer: str) -> str:
    return (answer.strip() if family.trims else answer) + family.end


def usable(found: Encoded | NotUsable, family: Family, turns: list[tuple[str, str]]) -> Encoded:
    """Only thoughts that a template takes out or writes otherwise are a reason to leave out."""
    if isinstance(found, NotUsable):
        assert found.reason == "whose turns the chat template rewrites"
        assert family.thinks and any("</think>" in answer for _, answer in turns)
        assume(False)
    assert isinstance(found, Encoded)
    return found


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", FAMILIES)
@EXAMPLES
@given(turns=TURNS, system=st.none() | TEXTS)
def test_exactly_the_answers_and_their_end_markers_are_learned(
    tokenizers: dict[str, Any], name: str, kind: str, turns: list[tuple[str, str]], system: Any
) -> None:
    family, tokenizer = FAMILIES[name], tokenizers[kind]
    tokenizer.chat_template = family.source
    messages = conversation(turns, system if family.system else None)
    found = usable(encode(tokenizer, messages), family, turns)
    expected = [written(family, answer) for _, answer in turns]
    texts = learned(tokenizer, found)
    if family.space:  # the template's space may be part of the first token
        texts, expected = [t.lstrip() for t in texts], [t.lstrip() for t in expected]
    if not any("</think>" in answer for _, answer in turns):
        assert texts == expected
        sizes = [len(written(family, answer).encode()) for _, answer in turns]
        assert (found.completions, found.supervised_bytes) == (len(turns), sum(sizes))
    else:
        assert ["".join(t.split()) for t in texts] == ["".join(t.split()) for t in expected]
    # Each stands behind the template's own prompt, and nowhere else.
    for number, (start, _) in enumerate(found.supervised):
        asked = messages[: 2 * number + 1 + (messages[0]["role"] == "system")]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        before = tokenizer.decode(found.ids[:start])
        assert before.startswith(prompt.rstrip())
        added = "".join(before[len(prompt.rstrip()) :].split())
        assert added in (("", "<think></think>") if name == "qwen3" else ("",))
    bos = tokenizer.bos_token_id
    text = tokenizer.decode(found.ids)
    assert bos is None or found.ids.count(bos) == text.count("<s>")
    assert not text.startswith("<s><s>")


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("name", FAMILIES)
@EXAMPLES
@given(turns=TURNS, system=st.none() | TEXTS)
def test_so_they_are_with_tokens_that_begin_with_their_space(
    tokenizers: dict[str, Any], name: str, kind: str, turns: list[tuple[str, str]], system: Any
) -> None:
    """Decoding does not give every space back, so they are not compared."""
    family, tokenizer = FAMILIES[name], tokenizers[kind]
    tokenizer.chat_template = family.source
    messages = conversation(turns, system if family.system else None)
    found = usable(encode(tokenizer, messages), family, turns)
    texts = ["".join(t.replace("▁", " ").split()) for t in learned(tokenizer, found)]
    expected = [written(family, answer).replace("▁", " ") for _, answer in turns]
    assert texts == ["".join(t.split()) for t in expected]
    assert found.ids[:2] != [1, 1]


@pytest.mark.parametrize("kind", [*BYTES, *PIECES])
@pytest.mark.parametrize("name", FAMILIES)
@settings(EXAMPLES, max_examples=6)
@given(turns=TURNS)
def test_tokens_and_masks_are_those_of_transformers(
    tokenizers: dict[str, Any], name: str, kind: str, turns: list[tuple[str, str]]
) -> None:
    """Its masks need `{% generation %}` in the template; they begin behind leading blanks where
    the tokenizer says that these are of no character."""
    family, tokenizer = FAMILIES[name], tokenizers[kind]
    turns = [(q, a if kind in ("bytes", "without bos") else f"§{a}") for q, a in turns]
    messages = conversation(turns, None)
    tokenizer.chat_template = family.source
    found = usable(encode(tokenizer, messages), family, turns)
    assume("</think>" not in "".join(answer for _, answer in turns))
    tokenizer.chat_template = family.marked
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids == theirs["input_ids"]
    mask = [0] * len(found.ids)
    for start, end in found.supervised:
        mask[start:end] = [1] * (end - start)
    assert mask == theirs["assistant_masks"]
    assert encode(tokenizer, messages) == found  # the markers change nothing


@pytest.mark.parametrize("name", FAMILIES)
@EXAMPLES
@given(turns=TURNS, choice=st.sets(st.integers(0, 2)), supervise=st.sampled_from(["last", "all"]))
def test_what_is_left_out_is_left_out_and_the_rest_is_not(
    tokenizers: dict[str, Any],
    name: str,
    turns: list[tuple[str, str]],
    choice: set[int],
    supervise: str,
) -> None:
    family, tokenizer = FAMILIES[name], tokenizers["bytes"]
    tokenizer.chat_template = family.source
    turns = [(q, a.replace("</think>", "")) for q, a in turns]
    assume(all(answer.strip() for _, answer in turns))
    messages = conversation(turns, None)
    every = usable(encode(tokenizer, messages), family, turns)
    out = {number for number in choice if number < len(turns)}
    for number in out:
        messages[2 * number + 1]["weight"] = 0
    some = usable(encode(tokenizer, messages), family, turns)
    assert some.ids == every.ids
    assert some.supervised == [s for n, s in enumerate(every.supervised) if n not in out]
    other = usable(encode(tokenizer, messages, supervise), family, turns)
    assert other.ids == every.ids
    if supervise == "last":
        assert other.supervised == ([] if len(turns) - 1 in out else every.supervised[-1:])
    else:
        unlearned = {n for number in out for n in range(*every.supervised[number])}
        assert other.completions == len(turns) - len(out)
        shown = {n for span in other.supervised for n in range(*span)}
        assert not shown & unlearned
        rest = [n for n in range(len(every.ids)) if n not in shown | unlearned]
        assert not tokenizer.decode([every.ids[n] for n in rest]).strip()


@pytest.mark.parametrize("name", FAMILIES)
@EXAMPLES
@given(turns=TURNS, most=st.integers(1, 400))
def test_what_is_too_long_is_cut_after_the_last_whole_answer_that_fits(
    tokenizers: dict[str, Any], name: str, turns: list[tuple[str, str]], most: int
) -> None:
    family, tokenizer = FAMILIES[name], tokenizers["bytes"]
    tokenizer.chat_template = family.source
    assume(not any("</think>" in answer for _, answer in turns))
    whole = [
        usable(encode(tokenizer, conversation(turns[:n], None)), family, turns)
        for n in range(1, len(turns) + 1)
    ]
    found = encode(tokenizer, conversation(turns, None), most=most)
    fitting = [n for n, row in enumerate(whole) if len(row.ids) <= most]
    if not fitting:
        assert isinstance(found, NotUsable)
        assert found.reason == f"longer than train.max_length ({most} tokens)"
    else:
        assert isinstance(found, Encoded)
        expected = whole[fitting[-1]]
        assert (found.ids, found.supervised) == (expected.ids, expected.supervised)
        assert bool(found.cut_from) == (fitting[-1] != len(turns) - 1)


# Llama's marker after a call is known by its token.
@pytest.mark.parametrize(
    ("template", "kind"),
    [*itertools.product(["hermes", "qwen3"], BYTES), ("llama-3.1", "trimmed offsets")],
)
@EXAMPLES
@given(
    turns=TURNS, said=st.lists(TEXTS, min_size=3, max_size=3), returned=TEXTS, tools=st.booleans()
)
def test_calls_are_learned_whatever_they_say(
    tokenizers: dict[str, Any],
    template: str,
    kind: str,
    turns: list[tuple[str, str]],
    said: list[str],
    returned: str,
    tools: bool,
) -> None:
    tokenizer = tokenizers[kind]
    sources = {"hermes": HERMES, "qwen3": FAMILIES["qwen3"].source, "llama-3.1": LLAMA31}
    tokenizer.chat_template = sources[template]
    messages: list[Message] = []
    expected: list[str] = []
    for (asked, answer), words in zip(turns, said, strict=False):
        answer, words = (text.replace("</think>", "") for text in (answer, words))
        assume(answer.strip())
        as_json, name = json.dumps({"x": words}, ensure_ascii=False), "arguments"
        before, after, end = "\n<tool_call>\n", "\n</tool_call>", "<|im_end|>"
        if template == "llama-3.1":
            words, name, before, after, end = "", "parameters", "", "", "<|eom_id|>"
        elif template == "hermes" and not words:
            before = before.lstrip("\n")
        messages += [
            {"role": "user", "content": asked},
            {
                **{"role": "assistant", "content": words},
                "tool_calls": [{"function": {"name": "find", "arguments": as_json}}],
            },
            {"role": "tool", "content": returned},
            {"role": "assistant", "content": answer},
        ]
        expected.append(f'{words}{before}{{"name": "find", "{name}": {as_json}}}{after}{end}')
        expected.append(answer.strip() + "<|eot_id|>" if not before else answer + "<|im_end|>")
    functions = ({"name": "find", "parameters": {"type": "object"}},) if tools else ()
    (found,) = ChatEncoder(tokenizer, "assistant", 100_000)(
        [Example("f:1", messages=tuple(messages), tools=functions)]
    )
    assert isinstance(found, Encoded), (found.reason, found.detail)
    assert learned(tokenizer, found) == expected
