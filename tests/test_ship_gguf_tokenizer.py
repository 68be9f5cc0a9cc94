"""llama.cpp splits text and writes conversations as the tokenizer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, MARKERS
from families import byte_level as with_markers
from gguf_models import make_model
from gguf_tokenizers import BYTE_LEVEL, SENTENCE_PIECE, byte_level, with_spaces

from lora_kit.base.load import load_tokenizer
from lora_kit.errors import UserError
from lora_kit.ship.gguf import write_model
from lora_kit.ship.llama_cpp import run

TEXTS = [
    "The quick brown fox can't jump over 1234567 lazy dogs, they'LL say; isn't it? Yes! (No...)",
    "def f(x):\n    if x  >= 3.14:\n\t\treturn {'a': [1, 22, 333]}\n\n\n    # done\r\n",
    "naïve café, Übergröße, Ελληνικά, Русский, العربية, हिन्दी, 日本語テキスト, 한국어, ไทย",
    "👩‍👩‍👧‍👦 😀 ½ ² Ⅷ ٣٤ ™ — “quoted” … \u00a0\u3000\u200b\ufeff end",
    "HelloWorld helloWORLD http://a.b/c?d=e&f=%20 user@example.org C:\\dir\\x $5,000.00 #1 @me",
    "trailing  spaces   \n  and\ttabs\t \n \n",
    "a <eos> b<eos>c <|im_end|>\nd",
    "x",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, "llama", vocab_size=1000)
    return folder


def _split(model: Path, words: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of TEXTS by the tokenizer and by llama.cpp."""
    file = words / "model.gguf"
    tokenizer = load_tokenizer(words)
    write_model(model, file, "f32", tokenizer=tokenizer)
    return [list(tokenizer(t).input_ids) for t in TEXTS], run(file, texts=TEXTS)["texts"]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokenizers_are_split_by_their_expression(
    name: str, model: Path, tmp_path: Path
) -> None:
    import gguf

    byte_level(tmp_path, name, bos=name in ("llama-bpe", "gpt-2"))
    wanted, got = _split(model, tmp_path)
    assert got == wanted
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.tokens"].contents(999) == "[PAD999]"


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
def test_tokenizers_that_write_spaces(kind: str, model: Path, tmp_path: Path) -> None:
    with_spaces(tmp_path, kind)
    wanted, got = _split(model, tmp_path)
    special = next(n for n, text in enumerate(TEXTS) if "<eos>" in text)
    if kind in ("metaspace always", "metaspace first"):
        # llama.cpp puts a space after each special token, or nowhere.
        assert got.pop(special) != wanted.pop(special)
    assert got == wanted


@pytest.mark.parametrize("kind", ["byte-level", "prepend", "metaspace first"])
def test_conversations_become_the_ids_they_were_trained_with(
    kind: str, model: Path, tmp_path: Path
) -> None:
    user, answer = {"role": "user", "content": "Größe {x}?"}, {"role": "assistant", "content": "y"}
    for name in ("llama-3", "llama-2", "zephyr", "qwen3"):
        folder = tmp_path / name
        folder.mkdir()
        if kind == "byte-level":
            tokenizer = with_markers(folder)
        else:
            with_spaces(folder, kind)
            tokenizer = load_tokenizer(folder)
            tokenizer.add_special_tokens({"extra_special_tokens": MARKERS})
        tokenizer.chat_template = FAMILIES[name].source.replace("{#>#}", "").replace("{#<#}", "")
        tokenizer.save_pretrained(str(folder))
        turns = [[user], [user, answer, user], [{"role": "system", "content": "Be kind."}, user]]
        options: Any = {"add_generation_prompt": True, "return_dict": False}
        wanted = [list(tokenizer.apply_chat_template(t, **options)) for t in turns]
        write_model(model, folder / "model.gguf", "f32", tokenizer=tokenizer)
        assert run(folder / "model.gguf", conversations=turns)["conversations"] == wanted


def test_it_stops_at_every_end_token(tmp_path: Path) -> None:
    """At those of the generation config too: whatever comes first is made one of them."""
    folder = tmp_path / "model"
    make_model(folder, "llama untied")
    write_model(folder, tmp_path / "before.gguf", "f32")
    ask: Any = {"prompts": [[7, 8, 9]], "tokens": 4}
    (before,) = run(tmp_path / "before.gguf", **ask)["answers"]
    assert not before["stopped"]
    ends = {"eos_token_id": [0, before["tokens"][0]]}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    write_model(folder, tmp_path / "after.gguf", "f32")
    (after,) = run(tmp_path / "after.gguf", **ask)["answers"]
    assert after["stopped"] and after["tokens"] == before["tokens"][:1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by Whitespace, which is none of"),
        ({"normalizer": {"type": "Lowercase"}}, "by Lowercase then GPT-2"),
    ],
)
def test_a_way_of_splitting_that_is_not_known_is_refused(
    changes: dict[str, Any], reason: str, model: Path, tmp_path: Path
) -> None:
    byte_level(tmp_path, "gpt-2", bos=False)
    file = tmp_path / "tokenizer.json"
    parts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**parts, **changes}), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=reason):
        write_model(model, tmp_path / "model.gguf", "f32", tokenizer=tokenizer)
