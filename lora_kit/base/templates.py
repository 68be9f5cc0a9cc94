"""Chat templates: the shipped ones, and rendering in transformers' sandbox with a time limit."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.errors import LoraKitError, NotUsable, UserError, reason_of
from lora_kit.trust import bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # role, content, and any other fields that a template reads
Tool = dict[str, Any]  # the JSON schema of a function
SECONDS_TO_RENDER = 4.0
_LONGEST_TEMPLATE = 2**18  # characters; those of models have 20,000
# A template writes at most as many characters, or so many times those of the conversation.
_LONGEST_TEXT, _LARGEST_RATIO = 2**18, 16
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


def set_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Set a shipped chat template; None keeps and checks the tokenizer's own.

    If the tokenizer has no <|im_end|>, chatml turns end with its end-of-text token, so that
    generation stops in every engine without new embeddings. alpaca is Stanford Alpaca's layout
    without its preamble.

    Raises:
        UserError: the tokenizer already has a template, or an unusable one.
    """
    if name is None:
        if tokenizer.chat_template:
            check_template(tokenizer)
        return
    if tokenizer.chat_template:
        raise UserError("data.chat_template: the base has its own chat template: remove the key")
    has_im_end = name == "chatml" and "<|im_end|>" in tokenizer.get_vocab()
    end = "<|im_end|>" if has_im_end else tokenizer.eos_token
    begins = bool(tokenizer.bos_token) and context_token(tokenizer) == [tokenizer.bos_token_id]
    shipped = Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    tokenizer.chat_template = shipped.replace("BEGINS", str(begins).lower()).replace("END", end)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the tokenizer has several templates, or its template uses a power, cannot
    render a prompt and a completion within SECONDS_TO_RENDER, or writes beginning-of-text twice."""
    import jinja2

    template = tokenizer.chat_template
    if not isinstance(template, str):
        names = ", ".join(template) if isinstance(template, dict) else type(template).__name__
        raise UserError(f"base: several chat templates ({names}): keep only one")
    if len(template) > _LONGEST_TEMPLATE:
        raise UserError(f"base: a chat template of {len(template):,} characters: use another base")
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            _GENERATION.sub("", template)
        )
        # A power can take forever and cannot be interrupted; `round` computes one.
        powers = any(parsed.find_all(jinja2.nodes.Pow)) or any(
            node.name == "round" for node in parsed.find_all(jinja2.nodes.Filter)
        )
    except (jinja2.TemplateSyntaxError, RecursionError):
        powers = False  # rendering reports the error
    if powers:
        raise UserError(
            "base: the chat template uses a power (**, round), which can hang: fix the template"
        )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = render(tokenizer, turns)
    except NotUsable as error:
        raise UserError(f"base: the chat template is not usable: {error.detail}") from None
    begin = tokenizer.bos_token_id
    first_two = tokenizer(text, add_special_tokens=False).input_ids[:2]
    if begin is not None and first_two == [begin, begin]:
        raise UserError(
            "base: the chat template writes the beginning-of-text token twice, unlike any serving "
            "engine: fix the base's template"
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message] | tuple[Message, ...],
    tools: tuple[Tool, ...] = (),
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation with the tokenizer's chat template.

    Raises:
        NotUsable: the template rejects these turns, or violates its sandbox.
        UserError: rendering takes longer than SECONDS_TO_RENDER.
    """
    return render_many(tokenizer, [messages], tools, add_generation_prompt)[0]


def render_many(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    tools: tuple[Tool, ...] = (),
    add_generation_prompt: bool = False,
) -> list[str]:
    """`render` for several conversations with the same tools; fails if one of them does."""
    plain = [[_without_weight(message) for message in messages] for messages in conversations]
    parsed = [[_with_parsed_calls(message) for message in messages] for messages in plain]
    if parsed == plain:
        return _rendered(tokenizer, plain, tools, add_generation_prompt)
    try:
        return _rendered(tokenizer, parsed, tools, add_generation_prompt)
    except NotUsable:  # the template expects arguments as text
        return _rendered(tokenizer, plain, tools, add_generation_prompt)


def _without_weight(message: Message) -> Message:
    """The message as templates know it: `weight` is ours, whether the turn is trained on."""
    if "weight" not in message:
        return message
    return {key: value for key, value in message.items() if key != "weight"}


def _with_parsed_calls(message: Message) -> Message:
    """The message with the arguments of tool calls as objects: OpenAI's format has them as JSON
    text, which most templates would quote again."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(function["arguments"])
                if isinstance(arguments, dict):
                    function = {**function, "arguments": arguments}
                    call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return {**message, "tool_calls": calls}


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    tools: tuple[Tool, ...],
    add_generation_prompt: bool,
) -> list[str]:
    late = (
        f"the chat template did not finish in {SECONDS_TO_RENDER:g} s and 256 MiB: use the "
        "template of a base you trust"
    )
    try:
        with bounded(SECONDS_TO_RENDER, late):
            texts = tokenizer.apply_chat_template(
                conversations,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
    except LoraKitError:  # the time limit, or an interruption
        raise
    except Exception as error:  # templates raise anything
        roles = "-".join(turn["role"] for turn in conversations[0])
        why = f"{roles:.60}: {reason_of(error)}"
        raise NotUsable("rejected by the chat template", why) from None
    for text, turns in zip(texts, conversations, strict=True):
        size = len(text)
        if size > _LONGEST_TEXT and size > _LARGEST_RATIO * len(str((turns, tools))):
            raise UserError(
                f"the chat template writes {size:,} characters for a short conversation: use the "
                "template of a base you trust"
            )
    return [str(text) for text in texts]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: tuple[Tool, ...] = ()
) -> str:
    """The prompt for generation, rendered with the template; without one, the last turn's content.

    Some templates write more before a completion than their generation prompt has, such as Qwen3's
    empty thinking block. Completions were trained after it, so it belongs to the prompt.
    """
    if not tokenizer.chat_template:
        return messages[-1]["content"]
    prompt = render(tokenizer, messages, tools, add_generation_prompt=True)
    completion = {"role": "assistant", "content": "sentinelx"}
    before, _, _ = render(tokenizer, [*messages, completion], tools).rpartition("sentinelx")
    more = before.removeprefix(prompt)
    return before if before.startswith(prompt) and more.strip() else prompt


def context_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[id] of the token before a text: beginning-of-text if the tokenizer adds it, else
    end-of-text; [] if there is neither."""
    added = tokenizer("a").input_ids
    if tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
