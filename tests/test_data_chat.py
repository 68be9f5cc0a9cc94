"""Masks of conversations: the assistant's words and their end marker, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer

from lora_kit.data.chat import conversations, prompt_text, set_template
from lora_kit.data.formats import Dropped, Example, Message
from lora_kit.data.labelled import IGNORED
from lora_kit.errors import UserError

# Small templates in the style of each family: (template, end marker).
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Takes the thinking out of earlier answers, and writes an empty one before the last.
QWEN3 = (
    "{% for m in messages %}{% set content = m.content %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama-3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "<eos>"),
    "zephyr": (ZEPHYR, "<eos>"),
    "qwen3": (QWEN3, "<|im_end|>"),
}
NO_SYSTEM = ("gemma", "mistral")
# Words that look like what the templates write, or like what finds the mask.
TRAPS = [
    *("assistant", "user", "model", "sentinel0x", "sentinel1x", "{{ messages }}", "{% if x %}"),
    *("<|im_start|>assistant\n", "[/INST]", "<|im_end|>", "<end_of_turn>", "<think>", "ä😀"),
    *("\n", "  ", "queen", "bread. "),
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=True)


@pytest.fixture
def tokenizer(bare: Any) -> Any:
    bare.chat_template = None
    return bare


def example(*contents: str, system: str | None = None, place: str = "f:1") -> Example:
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    turns += [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]
    return Example(place, messages=tuple(turns))


def learned(tokenizer: Any, *examples: Example) -> list[str]:
    """What each row is learned from, decoded."""
    labelled = conversations(list(examples), tokenizer, 10_000, Dropped())
    for ids, labels in zip(labelled.input_ids, labelled.labels, strict=True):
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return [tokenizer.decode([t for t in row if t != IGNORED]) for row in labelled.labels]


def refused(tokenizer: Any, *examples: Example) -> str:
    with pytest.raises(UserError) as caught:
        conversations(list(examples), tokenizer, 10_000, Dropped())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_and_their_end_markers_are_learned_and_nothing_else(
    tokenizer: Any, family: str
) -> None:
    tokenizer.chat_template, end = FAMILIES[family]
    system = None if family in NO_SYSTEM else "Be brief."
    one = example("Who are you?", "the fox.", system=system)
    many = example("the dog", "the fox", "the fox", "the dog", "a", "b", system=system)
    first, second = learned(tokenizer, one, many)
    # Mistral's template writes a space before an answer; the tokenizer makes one token of ` the`.
    space = " " if family == "mistral" else ""
    assert first == f"{space}the fox.{end}"
    assert second == f"{space}the fox{end}{space}the dog{end}{space}b{end}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_contents_that_look_like_the_template_are_only_contents(
    tokenizer: Any, family: str, seed: int
) -> None:
    tokenizer.chat_template, end = FAMILIES[family]
    chooser = random.Random(seed)
    contents = ["§" + "".join(chooser.choices(TRAPS, k=8)) + "z" for _ in range(4)]
    (text,) = learned(tokenizer, example(*contents))
    assert text == "".join(content + end for content in contents[1::2])


@pytest.mark.parametrize("family", ["llama-3", "gemma", "mistral"])
def test_a_template_may_trim_what_it_likes(tokenizer: Any, family: str) -> None:
    tokenizer.chat_template, end = FAMILIES[family]
    (text,) = learned(tokenizer, example(" who? ", "\n the fox \n"))
    assert text.strip() == f"the fox{end}"


def test_white_space_of_an_answer_that_is_not_trimmed_is_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    assert learned(tokenizer, example("q", "  the fox \n\n")) == ["  the fox \n\n<|im_end|>"]


@pytest.mark.parametrize("family", ["llama-3", "gemma", "mistral"])
def test_there_is_one_beginning_of_text(tokenizer: Any, family: str) -> None:
    tokenizer.chat_template, _ = FAMILIES[family]
    (ids,) = conversations([example("q", "a", "q", "a")], tokenizer, 999, Dropped()).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_where_the_answer_begins(tokenizer: Any, family: str) -> None:
    tokenizer.chat_template, _ = FAMILIES[family]
    turns = example("who?", "the fox").messages
    (ids,) = conversations([example("who?", "the fox")], tokenizer, 999, Dropped()).input_ids
    assert tokenizer.decode(ids).startswith(prompt_text(tokenizer, list(turns[:1])))


def test_thinking_that_a_template_takes_out_is_refused_not_mislabelled(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN3
    thinking = "<think>hm</think>\n\nthe fox"
    rows = [example("q", "a"), example("q", thinking, "q", "the dog", place="f:2")]
    assert refused(tokenizer, *rows).startswith("f:2: the chat template changes what the turns say")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (GEMMA, "f:7: the chat template refuses a conversation of system-user-assistant: System"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}<eos>{% endfor %}",
            "f:7: the chat template leaves out a turn of system-user-assistant",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "f:7: the chat template writes no end marker after an answer",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}<eos>{% endfor %}",
            "f:7: the chat template leaves out a turn",
        ),
        (
            "{% for m in messages %}{{ m.content[:9] }}{{ m.content[10:] }}<eos>{% endfor %}",
            "f:7: the chat template leaves out a turn",
        ),
        (
            "{% for m in messages %}{{ m.content.replace('bread', 'x') }}<eos>{% endfor %}",
            "f:7: the chat template changes what the turns say",
        ),
        (
            "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
            "{% if 'bread' in messages[-1].content %}more{% endif %}",
            "f:7: the chat template changes what the turns say",
        ),
        ("{{ messages[9].content }}", "f:7: the chat template refuses a conversation"),
        ("{{ 1 + messages }}", "f:7: the chat template refuses a conversation"),
        ("{% for %}", "f:7: the chat template refuses a conversation"),
    ],
)
def test_a_template_that_hides_the_answers_is_refused_in_one_line(
    tokenizer: Any, template: str, words: str
) -> None:
    tokenizer.chat_template = template
    row = example("a question", "some bread", system="be brief", place="f:7")
    assert refused(tokenizer, row).startswith(words)


@pytest.mark.parametrize("template", [CHATML, None])
def test_long_rows_are_dropped_counted_and_placed(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    rows = [
        example("q", "a", place="f:1"),
        example("q", "the fox " * 40, place="f:2"),
        example("q " * 90, "a", place="f:3"),
        example("q", "ä", place="f:4"),
    ]
    dropped = Dropped()
    labelled = conversations(rows, tokenizer, 80, dropped)
    assert len(labelled) == 2 and labelled.units == [0, 1]
    assert str(dropped) == "2 longer than train.max_length (80 tokens) (first: f:2)"
    end = "<|im_end|>" if template else ""
    assert labelled.unit_bytes == [len(f"a{end}"), len(f"ä{end}".encode())]
    with pytest.raises(UserError, match=r"no rows left: 1 longer than .* \(first: f:2\)"):
        conversations(rows[1:2], tokenizer, 80, Dropped())
    with pytest.raises(UserError, match="no rows"):
        conversations([], tokenizer, 40, Dropped())


def test_without_a_template_prompt_and_answer_stand_as_they_are(tokenizer: Any) -> None:
    row = Example("f:1", messages=example("Who?", "The fox.").messages, joiner="\n\n")
    labelled = conversations([row], tokenizer, 99, Dropped())
    assert tokenizer.decode(labelled.input_ids[0]) == "<s>Who?\n\nThe fox.<eos>"
    assert learned(tokenizer, row) == ["The fox.<eos>"]
    assert "set data.chat_template: chatml" in refused(tokenizer, example("q", "a", "q", "a"))
    assert "f:1: a conversation" in refused(tokenizer, example("q", "a", system="s"))


@pytest.mark.parametrize("has_end", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_the_shipped_template_ends_a_turn_with_a_token_that_is_there(
    tmp_path: Path, has_end: bool, bos: bool
) -> None:
    tokenizer = make_tokenizer(tmp_path, bos=bos)
    if not has_end:
        known = tokenizer.get_vocab()
        tokenizer.get_vocab = lambda: {k: v for k, v in known.items() if k != "<|im_end|>"}
    set_template(tokenizer, None)
    assert tokenizer.chat_template is None
    set_template(tokenizer, "chatml")
    row = example("q {{ x }}", "a", "q", "{% b %}", system="s")
    end = "<|im_end|>" if has_end else "<eos>"
    assert learned(tokenizer, row) == [f"a{end}{{% b %}}{end}"]
    (ids,) = conversations([row], tokenizer, 999, Dropped()).input_ids
    begin = "<s>" if bos else ""
    assert tokenizer.decode(ids).startswith(
        f"{begin}<|im_start|>system\ns{end}\n<|im_start|>user\n"
    )
    asked = prompt_text(tokenizer, [{"role": "user", "content": "q"}])
    assert asked == f"{begin}<|im_start|>user\nq{end}\n<|im_start|>assistant\n"
    with pytest.raises(UserError, match="a template of its own"):
        set_template(tokenizer, "chatml")


def test_the_prompt_is_what_answers_were_learned_after(tmp_path: Path) -> None:
    """Prompt and learned tokens together are the text that was trained on."""
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for template in (thinking, CHATML):
        tokenizer = make_tokenizer(tmp_path, template)
        turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox."}]
        rows = conversations([Example("x", messages=tuple(turns))], tokenizer, 256, Dropped())
        learned = tokenizer.decode([n for n in rows.labels[0] if n != -100])
        trained = tokenizer.decode(rows.input_ids[0]).rstrip()
        assert prompt_text(tokenizer, turns[:1]) + learned == trained
