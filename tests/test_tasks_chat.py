"""Masks of conversations, case by case: what is learned, cut, left out, and why."""

from __future__ import annotations

from typing import Any

import pytest
from families import CHATML, FAMILIES, HERMES, LLAMA31, QWEN3, ZEPHYR, byte_level
from prepared import spans

from lora_kit.base.templates import prompt_text
from lora_kit.data.formats import Example, Message
from lora_kit.errors import NotUsable, UserError
from lora_kit.tasks.chat import ChatEncoder, Encoded

ANY = "{% for m in messages %}<t>{{ m.content }}<eos>{% endfor %}"
REWRITES = "whose turns the chat template rewrites"
NO_END = "for which the chat template writes no end-of-turn token"
LEFT_OUT = "with a turn that the chat template drops"
TOOLS = ({"type": "function", "function": {"name": "find_fox", "parameters": {"type": "object"}}},)
CALL = {"name": "find_fox", "arguments": '{"where": "ä \\"den\\""}'}  # OpenAI's way: as text
CALLED = '{"name": "find_fox", "arguments": {"where": "ä \\"den\\""}}'
ASKED = {"role": "user", "content": "Where?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RETURNED = {"role": "tool", "content": '{"at": "the \\"den\\""}'}
TOLD = {"role": "assistant", "content": " In the den. \n"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {markers: byte_level(folder, markers=markers) for markers in (True, False)}


@pytest.fixture(params=[True, False], ids=["markers", "no markers"])
def tokenizer(request: Any, tokenizers: dict[bool, Any]) -> Any:
    """With and without tokens of their own for the templates' markers."""
    return tokenizers[request.param]


def chat(*contents: str, system: str | None = None) -> list[Message]:
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return turns + [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]


def encode(
    tokenizer: Any,
    messages: list[Message],
    *,
    supervise: str = "assistant",
    most: int = 10_000,
    tools: tuple[Any, ...] = (),
    joiner: str = "",
) -> Encoded | NotUsable:
    row = Example("f:1", messages=tuple(messages), tools=tools, joiner=joiner)
    (found,) = ChatEncoder(tokenizer, supervise, most)([row])
    return found


def learned(tokenizer: Any, messages: list[Message], **settings: Any) -> list[str]:
    found = encode(tokenizer, messages, **settings)
    assert isinstance(found, Encoded), (found.reason, found.detail)
    return [tokenizer.decode(found.ids[a:b]) for a, b in found.supervised]


def left_out(tokenizer: Any, messages: list[Message], **settings: Any) -> tuple[str, str]:
    found = encode(tokenizer, messages, **settings)
    assert isinstance(found, NotUsable), found
    assert "\n" not in found.reason + found.detail
    return found.reason, found.detail


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_learned_tokens_are_the_text_trained_on(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = FAMILIES[name].source
    found = encode(tokenizer, chat("Who?", "the fox"))
    assert isinstance(found, Encoded)
    (until,) = [end for _, end in found.supervised]
    prompt = prompt_text(tokenizer, chat("Who?"))
    text = tokenizer.decode(found.ids[:until])
    space = " " if FAMILIES[name].space else ""
    assert text == f"{prompt}{space}the fox{FAMILIES[name].end}"


def test_the_end_marker_is_learned_where_it_pads_as_well(tokenizer: Any) -> None:
    from lora_kit.tasks.batches import IGNORED, collator

    tokenizer.chat_template, pad = ZEPHYR, tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    encoded = [encode(tokenizer, chat("q", answer)) for answer in ("the fox", "a")]
    assert all(isinstance(found, Encoded) for found in encoded)
    batch = collator(tokenizer.pad_token_id)(
        list(spans(*((found.ids, found.supervised) for found in encoded)))
    )
    tokenizer.pad_token = pad
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        kept = labels != IGNORED
        assert (labels[kept] == ids[kept]).all()
        # Not the one after the question, nor those that fill the shorter row.
        assert (labels == tokenizer.eos_token_id).sum() == 1
        assert labels[kept][-1] == tokenizer.eos_token_id


def test_thinking_that_a_template_takes_out_is_refused_not_mislabelled(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN3
    thinking = "<think>\nhm\n</think>\n\nthe fox"
    assert learned(tokenizer, chat("q", thinking)) == [f"{thinking}<|im_end|>"]
    unlike = "<think>hm</think>the fox"  # but for white space what the template writes
    assert learned(tokenizer, chat("q", unlike)) == [f"{thinking}<|im_end|>"]
    assert left_out(tokenizer, chat("q", thinking, "q", "dog")) == (REWRITES, "turn 2")
    assert learned(tokenizer, chat("q", thinking, "q", "dog"), supervise="last") == [
        "dog<|im_end|>"
    ]
    tokenizer.chat_template = FAMILIES["deepseek"].source
    assert left_out(tokenizer, chat("q", thinking)) == (REWRITES, "turn 2")


def test_thoughts_are_learned_where_the_template_writes_them(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN3
    one, two = ({**TOLD, "reasoning_content": thought} for thought in ("Hm.", "So."))
    second = "<think>\nSo.\n</think>\n\n In the den. \n<|im_end|>"
    assert learned(tokenizer, [ASKED, two]) == [second]
    assert left_out(tokenizer, [ASKED, one, ASKED, two])[0].startswith("whose thinking")
    assert learned(tokenizer, [ASKED, one, ASKED, two], supervise="last") == [second]
    called = {**CALLS, "reasoning_content": "Hm."}
    first, last = learned(tokenizer, [ASKED, called, RETURNED, two], tools=TOOLS)
    assert first.startswith("<think>\nHm.\n</think>") and last == second
    tokenizer.chat_template = CHATML
    reason, detail = left_out(tokenizer, [ASKED, one])
    assert (reason, detail) == ("whose thinking the chat template drops", "turn 2")


@pytest.mark.parametrize("tools", [TOOLS, ()], ids=["tools", "no tools"])
@pytest.mark.parametrize("as_text", [True, False])
def test_calls_are_learned_and_what_tools_return_is_not(
    tokenizer: Any, tools: tuple[Any, ...], as_text: bool
) -> None:
    calls = CALLS
    if not as_text:
        function = {"name": "find_fox", "arguments": {"where": 'ä "den"'}}
        calls = {**CALLS, "tool_calls": [{"type": "function", "function": function}]}
    both = [{**calls, "content": "Let me see."}, RETURNED, RETURNED, TOLD]
    rows = [ASKED, calls, RETURNED, TOLD, ASKED, *both]
    tokenizer.chat_template = HERMES
    call, told = f"<tool_call>\n{CALLED}\n</tool_call><|im_end|>", " In the den. \n<|im_end|>"
    assert learned(tokenizer, rows, tools=tools) == [call, told, f"Let me see.\n{call}", told]
    assert learned(tokenizer, [ASKED, calls], tools=tools) == [call]
    tokenizer.chat_template = QWEN3
    call = f"\n{call}"
    assert learned(tokenizer, rows, tools=tools) == [call, told, f"Let me see.{call}", told]
    assert learned(tokenizer, [ASKED, calls], tools=tools) == [call]  # no empty thoughts


def test_a_call_may_have_an_end_marker_of_its_own(tokenizers: dict[bool, Any]) -> None:
    tokenizer = tokenizers[True]
    tokenizer.chat_template = LLAMA31
    rows = [ASKED, CALLS, RETURNED, TOLD]
    call = CALLED.replace("arguments", "parameters") + "<|eom_id|>"
    assert learned(tokenizer, rows, tools=TOOLS) == [call, "In the den.<|eot_id|>"]
    assert learned(tokenizer, rows[:2]) == [call]
    trap = {"name": "find_fox", "arguments": '{"where": "<|eot_id|> x"}'}
    trapped = {**CALLS, "tool_calls": [{"function": trap}]}
    (text,) = learned(tokenizer, [ASKED, trapped])
    assert text.endswith('<|eot_id|> x"}}<|eom_id|>')
    # It writes a call instead of what is said.
    rows[1] = {**CALLS, "content": "Let me see."}
    assert left_out(tokenizer, rows) == (REWRITES, "turn 2")


def test_calls_and_tools_that_a_template_does_not_write_are_not_lost_in_silence(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = CHATML
    rows = [ASKED, CALLS, RETURNED, TOLD]
    for supervise in ("assistant", "last", "all"):
        assert left_out(tokenizer, rows, supervise=supervise) == (
            *("whose tool calls the chat template drops", "turn 2"),
        )
    reason, _ = left_out(tokenizer, chat("q", "a"), tools=TOOLS)
    assert reason == "whose tools the chat template drops"
    tokenizer.chat_template = HERMES.replace("m.role == 'tool'", "m.role == 'x'").replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    assert left_out(tokenizer, rows, tools=TOOLS) == (REWRITES, "turn 3")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            FAMILIES["gemma"].source,
            ("rejected by the chat template", "system-user-assistant: The"),
        ),
        (ANY.replace(" %}", " if m.role != 'system' %}", 1), (LEFT_OUT, "system-user-assistant")),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", (NO_END, "")),
        (ANY.replace("m.content", "m.content | upper"), (LEFT_OUT, "system-user")),
        (ANY.replace("m.content", "m.content[:9]"), (LEFT_OUT, "system-user")),
        (ANY.replace("m.content", "m.content.replace('bread', 'x')"), (REWRITES, "turn 3")),
        (ANY.replace("m.content", "m.content.replace('quest', 'x')"), (REWRITES, "turn 2")),
        (ANY + "{% if 'bread' in messages[-1].content %}more{% endif %}", (NO_END, "")),
        (ANY + "{{ range(99999) | random }}", (REWRITES, "turn 3")),
        ("{{ messages[9].content }}", ("rejected by the chat template", "system-user")),
        ("{{ 1 + messages }}", ("rejected by the chat template", "system-user")),
        ("{% for %}", ("rejected by the chat template", "system-user")),
    ],
)
def test_a_template_that_hides_the_answers_is_found_out(
    tokenizer: Any, template: str, why: tuple[str, str]
) -> None:
    tokenizer.chat_template = template
    reason, detail = left_out(tokenizer, chat("a question", "some bread", system="be brief"))
    assert reason == why[0] and detail.startswith(why[1])


def test_no_word_of_an_answer_hides_in_a_token_of_the_template(tmp_path: Any) -> None:
    tokenizer = byte_level(tmp_path, markers=False)
    tokenizer.chat_template = "{% for m in messages %}fo{{ m.content }}<eos>\n{% endfor %}"
    reason, detail = left_out(tokenizer, chat("x", "x jumps"))  # `ox` is one token
    assert reason == "with a token across a completion's boundary"
    assert detail == "'ox'"
    assert learned(tokenizer, chat("x", " dog")) == [" dog<eos>"]
    more = "{% if not loop.last %}y morning{% endif %}"  # `every` is one token
    tokenizer.chat_template = "{% for m in messages %}|{{ m.content }} ever" + more + "{% endfor %}"
    assert left_out(tokenizer, chat("q", "a", "q", "a"))[1] == "' every'"
    assert learned(tokenizer, chat("q", "a")) == ["a ever"]
    tokenizer.chat_template = "{% for m in messages %}|{{ m.content }}»😀\n{% endfor %}"  # bytes
    assert learned(tokenizer, chat("q", "ä", "q", "a")) == ["ä»😀", "a»😀"]


def test_one_bad_row_leaves_the_others_of_its_batch(tokenizer: Any) -> None:
    tokenizer.chat_template = FAMILIES["gemma"].source
    contents = [chat("q", f"fox {n}", system="s" if n == 40 else None) for n in range(70)]
    rows = [Example(f"f:{n}", messages=tuple(m)) for n, m in enumerate(contents)]
    found = list(ChatEncoder(tokenizer, "assistant", 999)(rows))
    assert [n for n, row in enumerate(found) if isinstance(row, NotUsable)] == [40]
    assert isinstance(found[69], Encoded)
    assert tokenizer.decode(found[69].ids[slice(*found[69].supervised[0])]) == "fox 69<end_of_turn>"


def test_long_conversations_are_cut_after_an_answer_that_is_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    rows = chat("q", "a fox", "q", "the dog", "q", "bread " * 200)
    found = encode(tokenizer, rows, most=200)
    assert isinstance(found, Encoded) and found.cut_from and found.completions == 2
    assert found.ids == encode(tokenizer, rows[:4]).ids  # type: ignore[union-attr]
    rows[3]["weight"] = 0
    found = encode(tokenizer, rows, most=200)
    assert isinstance(found, Encoded) and found.cut_from
    assert found.ids == encode(tokenizer, rows[:2]).ids  # type: ignore[union-attr]
    too_long = ("longer than train.max_length (200 tokens)", "")
    for supervise in ("last", "all"):  # another answer would be the last
        assert left_out(tokenizer, rows, most=200, supervise=supervise) == too_long
    rows[1]["weight"] = 0
    assert left_out(tokenizer, rows, most=200) == too_long
    rows[5]["weight"] = 0
    assert learned(tokenizer, rows) == []


@pytest.mark.parametrize("as_prompt", ["q <s> x", "<s>q"])
def test_a_beginning_of_text_that_someone_wrote_is_counted(tokenizer: Any, as_prompt: str) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + ANY.replace("<t>", "")
    if as_prompt == "<s>q":
        reason, _ = left_out(tokenizer, chat(as_prompt, "a"))
        assert reason == "that begin with two beginning-of-text tokens"
    else:
        assert learned(tokenizer, chat(as_prompt, "a")) == ["a<eos>"]


def test_without_a_template_prompt_and_answer_stand_as_they_are(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    found = encode(tokenizer, chat("Who?", "The fox."), joiner="\n\n")
    assert isinstance(found, Encoded) and found.supervised_bytes == len("The fox.")
    assert tokenizer.decode(found.ids) == "<s>Who?\n\nThe fox.<eos>"
    assert learned(tokenizer, chat("Who?", "The fox.")) == ["The fox.<eos>"]
    every = learned(tokenizer, chat("Who?", "The fox."), supervise="all", joiner=" ")
    assert every == ["<s>Who? The fox.<eos>"]
    unlearned = chat("Who?", "The fox.")
    unlearned[1]["weight"] = 0
    assert learned(tokenizer, unlearned) == []
    assert learned(tokenizer, unlearned, supervise="all", joiner="\n") == ["<s>Who?\n"]
    assert left_out(tokenizer, chat("q", "the fox " * 9), most=9)[0].startswith("longer than")
    for rows, tools in (
        (chat("q", "a", "q", "a"), ()),
        (chat("q", "a", system="s"), ()),
        (chat("q", "a"), TOOLS),
        ([ASKED, CALLS], ()),
        ([ASKED, {**TOLD, "reasoning_content": "Hm."}], ()),
    ):
        with pytest.raises(
            UserError, match=r"^f:1: a conversation, .* data.chat_template: chatml$"
        ):
            encode(tokenizer, rows, tools=tools)
