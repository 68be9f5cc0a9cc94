"""Chat templates in the style of ten families, and tokenizers of two kinds to read them with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import make_tokenizer, sentences


@dataclass(frozen=True)
class Family:
    """A template, what it writes after an answer, and what it does with the turns.

    `system`: takes a system turn; `trims`: removes white space around what is said; `space`: what
    it writes before an answer is a space; `thinks`: removes what stands before `</think>`.
    """

    source: str
    end: str
    system: bool = True
    trims: bool = False
    space: bool = False
    thinks: bool = False

    @property
    def marked(self) -> str:
        """The template with `{% generation %}` around what the assistant says."""
        opened = self.source.replace("{#>#}", "{% generation %}")
        return opened.replace("{#<#}", "{% endgeneration %}")


CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>{{ '\n' }}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{#>#}{{ m.content }}<|im_end|>{#<#}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
    "{% if m.role == 'assistant' %}{#>#}{{ m.content | trim }}<|eot_id|>{#<#}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
    "{% endif %}"
)
LLAMA2 = (
    "{% set s = namespace(text='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set s.text = '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ (s.text ~ m.content) | trim }} [/INST]{% set s.text = '' %}"
    "{% else %} {#>#}{{ m.content | trim }} {{ eos_token }}{#<#}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After a question comes its answer') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {#>#}{{ m.content | trim }}{{ eos_token }}{#<#}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('There is no system turn') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns have to alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'assistant' %}{#>#}{{ m.content | trim }}<end_of_turn>{#<#}"
    "{% else %}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
)
# Closes a conversation with one token more.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{#>#}{{ m.content }}<|end|>{#<#}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{#>#}{{ m.content }}{{ eos_token }}{#<#}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
# Takes earlier thoughts out, writes those of the last answer, empty if there are none, and calls.
QWEN3 = (
    "{% macro calls(m) %}{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    '{{ \'\n<tool_call>\n{"name": "\' ~ f.name ~ \'", "arguments": \' }}'
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}{% endmacro %}"
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}{{ '\n' }}{{ t | tojson }}"
    "{% endfor %}<|im_end|>{{ '\n' }}{% endif %}"
    "{% set asked = namespace(at=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}"
    "{{ '\n</tool_response>' }}<|im_end|>{{ '\n' }}"
    "{% elif m.role == 'assistant' %}"
    "{% set said = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > asked.at and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}{{ '\n</think>\n\n' }}{% endif %}"
    "{#>#}{{ said }}{{ calls(m) }}<|im_end|>{#<#}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>"
    "{#>#}{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{#<#}"
    "{% else %}<|{{ m.role | upper }}_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
# All system turns first; what was thought is never written.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{#>#}{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{#<#}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
FAMILIES = {
    "qwen2.5": Family(CHATML, "<|im_end|>"),
    "llama-3": Family(LLAMA3, "<|eot_id|>", trims=True),
    "llama-2": Family(LLAMA2, " <eos>", trims=True, space=True),
    "mistral": Family(MISTRAL, "<eos>", system=False, trims=True, space=True),
    "gemma": Family(GEMMA, "<end_of_turn>", system=False, trims=True),
    "phi-3": Family(PHI3, "<|end|>"),
    "zephyr": Family(ZEPHYR, "<eos>"),
    "qwen3": Family(QWEN3, "<|im_end|>", thinks=True),
    "command-r": Family(COMMAND_R, "<|END_OF_TURN_TOKEN|>", trims=True),
    "deepseek": Family(DEEPSEEK, "<｜end▁of▁sentence｜>", thinks=True),
}

# Calls in the style of Qwen2.5 and Hermes: all of them below the content.
HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ '\n' }}{{ t | tojson }}"
    "{% endfor %}{{ '\n</tools>' }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\n' }}{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}"
    "{% if m.content or m.role != 'assistant' %}{{ '\n' ~ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# One call a turn, instead of the content, closed by another marker; answers of tools as JSON.
LLAMA31 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>{{ '\n\n' }}"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>{{ '\n\n' }}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    '{{ \'{"name": "\' ~ f.name ~ \'", "parameters": \' }}{{ f.arguments | tojson }}}<|eom_id|>'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}<|eot_id|>"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
    "{% endif %}"
)
# What the templates write that real vocabularies have as one token each.
MARKERS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|eom_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|end|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    *(
        "<|USER_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
    ),
]


def byte_level(folder: Path, *, bos: bool = True, markers: bool = True, trims: bool = False) -> Any:
    """GPT-2's and Llama 3's kind; `trims`: it says of blanks that they are of no character."""
    from tokenizers import processors

    tokenizer = make_tokenizer(folder, bos=bos)
    if markers:
        tokenizer.add_special_tokens({"extra_special_tokens": MARKERS})
    if trims:
        backend = tokenizer.backend_tokenizer
        parts = [processors.ByteLevel(trim_offsets=True)]
        parts += [backend.post_processor] if bos else []
        backend.post_processor = processors.Sequence(parts)
    return tokenizer


def sentence_piece(*, markers: bool = True) -> Any:
    """Llama 2's kind: a space before each text, spaces as ▁, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "<eos>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*special, *(f"<0x{n:02X}>" for n in range(256))],
        show_progress=False,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(sentences(100), trainer)
    # Only the first are special; bytes are ordinary tokens.
    import json

    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = parts["added_tokens"][: len(special)]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<s>", unk_token="<unk>"
    )
    made.pad_token = "<eos>"
    if markers:
        made.add_special_tokens({"extra_special_tokens": MARKERS})
    return made
