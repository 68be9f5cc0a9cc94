"""Chat templates: the shipped ones, what is refused of others, and prompts."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from families import CHATML, DEEPSEEK, FAMILIES, HERMES, QWEN3, byte_level

from lora_kit.base import templates
from lora_kit.base.templates import check_template, context_token, prompt_text, render, set_template
from lora_kit.data.formats import Example, Message
from lora_kit.errors import NotUsable, UserError
from lora_kit.tasks.chat import ChatEncoder, Encoded

TURNS: list[Message] = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "The fox."},
]
SAID = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer(shared: Any) -> Any:
    shared.chat_template = None
    return shared


def refused(tokenizer: Any, template: Any) -> str:
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        check_template(tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("name", ["chatml", "alpaca"])
@pytest.mark.parametrize("has_end", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_a_shipped_template_ends_a_turn_with_a_token_that_is_there(
    tmp_path: Path, name: str, has_end: bool, bos: bool
) -> None:
    tokenizer = make_tokenizer(tmp_path, bos=bos)
    if not has_end:
        known = tokenizer.get_vocab()
        tokenizer.get_vocab = lambda: {k: v for k, v in known.items() if k != "<|im_end|>"}
    set_template(tokenizer, None)
    assert tokenizer.chat_template is None
    set_template(tokenizer, name)
    check_template(tokenizer)
    end = "<|im_end|>" if has_end and name == "chatml" else "<eos>"
    begin = "<s>" if bos else ""
    contents = [("system", "s"), ("user", "q {{ x }}"), ("assistant", "a"), ("user", "q")]
    rows = [{"role": r, "content": c} for r, c in [*contents, ("assistant", "{% b %}")]]
    (found,) = ChatEncoder(tokenizer, "assistant", 999)([Example("f:1", messages=tuple(rows))])
    assert isinstance(found, Encoded)
    texts = [tokenizer.decode(found.ids[a:b]) for a, b in found.supervised]
    assert texts == [f"a{end}", f"{{% b %}}{end}"]
    text = tokenizer.decode(found.ids)
    prompt = prompt_text(tokenizer, rows[:-1])
    assert text.startswith(f"{prompt}{{% b %}}{end}")
    if name == "chatml":
        assert prompt.startswith(f"{begin}<|im_start|>system\ns{end}\n<|im_start|>user\nq {{{{ x")
        assert prompt.endswith(f"<|im_start|>user\nq{end}\n<|im_start|>assistant\n")
    else:
        assert prompt.startswith(f"{begin}s\n\n### Instruction:\nq {{{{ x }}}}\n\n### Response:\na")
        assert prompt.endswith("### Instruction:\nq\n\n### Response:\n")
    with pytest.raises(UserError, match=r"^data\.chat_template: .* its own chat template"):
        set_template(tokenizer, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_accepted_marked_or_not(tokenizer: Any, name: str) -> None:
    for template in (FAMILIES[name].source, FAMILIES[name].marked):
        tokenizer.chat_template = template
        set_template(tokenizer, None)
        assert "The fox." in render(tokenizer, TURNS)


@pytest.mark.parametrize(
    "body",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
        "{{ lipsum(n=99999999) }}",
        "{% set s = namespace(x=3) %}{% for n in range(40) %}{% set s.x = s.x * s.x %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_come_to_an_end_is_stopped(
    tokenizer: Any, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that only loops for some rows is stopped at the first of them.
    late = SAID + "{% if messages[1].content != 'b' %}" + body + "{% endif %}"
    tokenizer.chat_template = late
    check_template(tokenizer)
    monkeypatch.setattr(templates, "SECONDS_TO_RENDER", 0.05)
    assert "did not finish in 0.05 s" in refused(tokenizer, SAID + body)
    tokenizer.chat_template = late
    with pytest.raises(UserError, match="did not finish"):
        list(ChatEncoder(tokenizer, "assistant", 99)([Example("f:1", messages=tuple(TURNS))]))


def test_the_time_limit_leaves_the_alarm_as_it_was(tokenizer: Any) -> None:
    import signal

    tokenizer.chat_template = CHATML
    before = signal.getsignal(signal.SIGALRM)
    expected = render(tokenizer, TURNS)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(render(tokenizer, TURNS)))
    thread.start()
    thread.join()
    assert found == [expected]  # where no alarm can be set


@pytest.mark.parametrize(
    "body",
    [
        "{{ 10 ** 10 ** 10 }}",
        "{% generation %}{% endgeneration %}{{ 9 ** 9 }}",
        "{%- generation -%}{%- endgeneration -%}{% set x = 9 ** messages | length %}",
        "{% if false %}{{ 1.5 | round(99999999, 'ceil') }}{% endif %}",
    ],
)
def test_powers_cannot_be_interrupted_and_are_refused(tokenizer: Any, body: str) -> None:
    assert refused(tokenizer, SAID + body).startswith("base: the chat template uses a power")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[0].update({'a': 1}) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "access to attribute '__init__'"),
        ("{{ namespace.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ self.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ raise_exception.__globals__.os }}", "access to attribute"),
        ("{{ (''|attr('__class__')).mro() }}", "unsafe"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ raise_exception('only\n\nfor me') }}", "user-assistant: only for me"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "nested blocks"),
        ("{{ range(10000000) }}", "too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ 'x' + 1 }}", "user-assistant: "),
        ("{% for %}", "Expected an expression"),
        ("{{ x|nothing }}", "No filter named 'nothing'"),
        ("{% endif %}", "unknown tag 'endif'"),
    ],
)
def test_what_a_template_must_not_do_is_refused_in_one_line(
    tokenizer: Any, body: str, words: str
) -> None:
    found = refused(tokenizer, SAID + body)
    assert found.startswith("base: the chat template is not usable: ") and words in found
    # Where it does so for some rows alone, they are left out.
    tokenizer.chat_template = "{% if messages[0].content == 'Who?' %}" + body + "{% endif %}" + SAID
    with pytest.raises(NotUsable, match=r"^rejected by the chat template$"):
        render(tokenizer, TURNS)


@pytest.mark.parametrize("reach", ["__class__", "__init__", "__globals__", "_x"])
def test_attributes_that_are_not_there_are_nothing(tokenizer: Any, reach: str) -> None:
    for body in (f"{{{{ ''|attr('{reach}') }}}}", f"{{{{ messages[0].{reach} }}}}"):
        tokenizer.chat_template = SAID + body
        assert render(tokenizer, TURNS) == "Who?<eos>The fox.<eos>"


def test_a_template_sees_copies_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[0].weight }}{{ tools }}<eos>"
    turns = [{**TURNS[0], "weight": 0}]
    assert render(tokenizer, turns) == "Who?None<eos>"
    assert turns == [{**TURNS[0], "weight": 0}]


def test_several_templates_are_too_many(tokenizer: Any) -> None:
    several = {"default": CHATML, "tool_use": CHATML}
    assert "several chat templates (default, tool_use)" in refused(tokenizer, several)
    tokenizer.chat_template = several
    with pytest.raises(UserError, match="keep only one"):
        set_template(tokenizer, None)


def test_one_beginning_of_text_is_enough(tokenizer: Any) -> None:
    found = refused(tokenizer, "{{ bos_token }}<s>" + SAID)
    assert found.startswith("base: the chat template writes the beginning-of-text token twice")


def test_arguments_of_calls_are_objects_unless_the_template_wants_text(tokenizer: Any) -> None:
    def calling(arguments: Any, **more: Any) -> list[Message]:
        call = {"name": "f", "arguments": arguments, **more}
        made = {"role": "assistant", "content": "", "tool_calls": [{"function": call}, call]}
        return [TURNS[0], made]

    name = "{% for c in messages[1].tool_calls %}{% set f = c.function or c %}"
    as_json = name + "{{ f.arguments | tojson }}{% endfor %}"
    as_text = name + "{{ 'json ' + f.arguments }}{% endfor %}"
    tokenizer.chat_template = as_json
    assert render(tokenizer, calling('{"a":1}')) == '{"a": 1}{"a": 1}'
    assert render(tokenizer, calling({"a": 1})) == '{"a": 1}{"a": 1}'
    for other in ("not json", "[1]", "[" * 100_000):
        (quoted,) = {render(tokenizer, calling(other))}
        assert quoted == f'"{other}""{other}"'
    tokenizer.chat_template = as_text
    turns = calling('{"a":1}')
    assert render(tokenizer, turns) == 'json {"a":1}json {"a":1}'
    assert turns == calling('{"a":1}')
    with pytest.raises(NotUsable, match="rejected"):
        render(tokenizer, calling({"a": 1}))


def test_prompts_are_what_answers_were_learned_after(tokenizer: Any) -> None:
    asked = TURNS[:1]
    assert prompt_text(tokenizer, asked) == "Who?"  # no template
    tokenizer.chat_template = QWEN3
    thoughts = "<think>\n\n</think>\n\n"
    prompt = prompt_text(tokenizer, asked)
    assert prompt == f"<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n{thoughts}"
    tokenizer.chat_template = DEEPSEEK
    assert prompt_text(tokenizer, asked) == "<s><｜User｜>Who?<｜Assistant｜>"
    tokenizer.chat_template = FAMILIES["mistral"].source  # its space is the answer's
    assert prompt_text(tokenizer, asked) == "<s>[INST] Who? [/INST]"
    tokenizer.chat_template = HERMES
    tools = ({"type": "function", "function": {"name": "find_fox"}},)
    assert "find_fox" in prompt_text(tokenizer, asked, tools)
    assert "find_fox" not in prompt_text(tokenizer, asked)


def test_before_a_text_stands_its_beginning_or_the_end_of_another(tmp_path: Path) -> None:
    assert context_token(make_tokenizer(tmp_path, bos=True)) == [2]
    without = make_tokenizer(tmp_path)
    assert context_token(without) == [0]
    without.bos_token = "<s>"  # it has one, and does not write it
    assert context_token(without) == [0]
    without.eos_token = None
    assert context_token(without) == []
    assert os.listdir(tmp_path)  # both were saved here
