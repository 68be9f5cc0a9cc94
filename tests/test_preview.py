"""What `preview` shows of prepared data: every token with its own text, marked as it is learned."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from conftest import sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import chats, prepared, put, put_texts

from lora_kit import preview
from lora_kit.errors import UserError, harmless
from lora_kit.schema import Run
from lora_kit.tasks.causal import Conversations, Text
from lora_kit.tasks.encode import Prepared

CHAT = Conversations()
HOSTILE = "\x1b[31mred\x07 \u202eback \x85 <b>\r\n\ttab \udcff"


@pytest.fixture(scope="module")
def pieces_of_words() -> Any:
    """A tokenizer as SentencePiece's are: ▁ for spaces, bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: n for n, token in enumerate([*known, "▁f", "ox", "▁fox"])}
    merges = [("▁", "f"), ("o", "x"), ("▁f", "ox")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def all_pieces(tokenizer: Any, ids: list[int]) -> list[preview.Piece]:
    return list(preview.pieces(tokenizer, ids, [True] * len(ids), 0, len(ids)))


def run_of(**values: Any) -> Run:
    return Run.model_validate(
        {"recipe": "sft", "name": "test", "base": {"model": "nano"}, "data": {"train": "x"}}
        | values
    )


@pytest.fixture
def found(tokenizer: Any, tmp_path: Path) -> Prepared:
    return prepared(tokenizer, train=put(tmp_path / "rows.jsonl", chats(60)), eval=0.4)


# --- Tokens


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd")))
def test_the_pieces_of_a_text_are_its_tokens_and_spell_it(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = all_pieces(tokenizer, ids)
    assert [n for piece in found for n in piece.ids] == ids
    assert "".join(piece.text for piece in found) == harmless(text)


def test_only_the_tokens_of_one_character_are_put_together(tokenizer: Any) -> None:
    ids = tokenizer("~ 🧀é!").input_ids
    found = [(piece.text, len(piece.ids)) for piece in all_pieces(tokenizer, ids)]
    assert found == [("~", 1), (" ", 1), ("🧀", 4), ("é", 2), ("!", 1)]


def test_spaces_stay_with_a_tokenizer_that_writes_them_as_part_of_words(
    pieces_of_words: Any,
) -> None:
    ids = pieces_of_words("the fox 🧀 fox é").input_ids
    found = all_pieces(pieces_of_words, ids)
    # The space before a text is no part of it: its token spells nothing, and shows its name.
    assert [piece.text for piece in found] == [*"▁the", " fox", " ", "🧀", " fox", " ", "é"]
    assert not any(piece.special for piece in found)


def test_a_character_that_is_cut_off_stays_alone(tokenizer: Any) -> None:
    cheese = tokenizer("🧀").input_ids
    (f,) = tokenizer("f").input_ids
    found = all_pieces(tokenizer, [*cheese[2:], f, *cheese[:1], 3, f])
    assert [piece.ids for piece in found] == [
        *((n,) for n in cheese[2:]),
        *((f,), (cheese[0],), (3,), (f,)),
    ]
    assert [piece.text for piece in found][2:] == ["f", "\ufffd", "<|im_end|>", "f"]
    assert [piece.special for piece in found] == [False] * 4 + [True, False]


def test_the_middle_of_a_row_begins_as_it_is_written(tokenizer: Any) -> None:
    ids = tokenizer("the lazy dog").input_ids
    shown = list(preview.pieces(tokenizer, ids, [False] * len(ids), 1, len(ids)))
    assert "".join(piece.text for piece in shown) == " lazy dog"


def test_nothing_harmful_is_left_of_a_text() -> None:
    assert harmless(HOSTILE) == (
        "⟨U+001B⟩[31mred⟨U+0007⟩ ⟨U+202E⟩back ⟨U+0085⟩ <b>⟨U+000D⟩\n\ttab ⟨U+DCFF⟩"
    )
    for kept in ("日本語 العربية café 👨‍👩‍👧", "no-break\u00a0space", "می\u200cخواهم"):
        assert harmless(kept) == kept


# --- Samples


@pytest.mark.parametrize("packing", [None, "documents"])
def test_samples_show_what_the_labels_say(
    tokenizer: Any, tmp_path: Path, packing: str | None
) -> None:
    source = put(tmp_path / "rows.jsonl", chats(30))
    found = prepared(tokenizer, train=source, packing=packing, max_length=256)
    rows = found.rows("train")
    shown = preview.samples(CHAT, found, tokenizer, "train", len(rows), 256)
    assert len(shown) == len(rows) == 27
    assert sum(s.supervised for s in shown) == found.census.train.supervised_tokens
    assert sum(s.tokens for s in shown) == found.census.train.tokens
    answers = {f"{row['completion']}<|im_end|>" for row in chats(30)}
    for sample in shown:
        assert "".join(p.text for p in sample.pieces if p.supervised) in answers
        line = int(sample.place.rpartition(":")[2])
        assert chats(30)[line - 1]["prompt"] in "".join(p.text for p in sample.pieces)


def test_the_first_token_of_running_text_is_not_learned_from(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = put_texts(tmp_path / "text.txt", sentences(60))
    found = prepared(tokenizer, "text", train=source, max_length=64)
    for sample in preview.samples(Text(), found, tokenizer, "train", 5, 64):
        assert [piece.supervised for piece in sample.pieces] == [
            False,
            *[True] * (len(sample.pieces) - 1),
        ]
        assert sample.supervised == sample.tokens - 1


def test_samples_are_evenly_apart_from_the_first_to_the_last(
    tokenizer: Any, found: Prepared
) -> None:
    numbers = [s.number for s in preview.samples(CHAT, found, tokenizer, "train", 3, 512)]
    last = len(found.rows("train"))
    assert numbers == [1, round((last - 1) / 2) + 1, last]
    assert preview.samples(CHAT, found, tokenizer, "train", 0, 512) == []
    everything = preview.samples(CHAT, found, tokenizer, "eval", 500, 512)
    assert [s.number for s in everything] == list(range(1, len(found.eval) + 1))


def test_of_a_long_row_both_ends_are_shown(tokenizer: Any, found: Prepared) -> None:
    (whole,) = preview.samples(CHAT, found, tokenizer, "train", 1, 512)
    (short,) = preview.samples(CHAT, found, tokenizer, "train", 1, 20)
    gap = [n for n, piece in enumerate(short.pieces) if not piece.ids]
    assert len(gap) == 1
    before, after = short.pieces[: gap[0]], short.pieces[gap[0] + 1 :]
    assert before == whole.pieces[: len(before)] and after == whole.pieces[-len(after) :]
    assert f"{whole.tokens - 20} tokens not shown" in short.pieces[gap[0]].text
    assert sum(len(piece.ids) for piece in short.pieces) == 20
    assert any(piece.supervised for piece in after)
    assert (short.tokens, short.supervised) == (whole.tokens, whole.supervised)


def test_a_split_that_is_not_there_is_named(tokenizer: Any, found: Prepared) -> None:
    with pytest.raises(UserError, match=r"--split general: data\.general is not set"):
        preview.samples(CHAT, found, tokenizer, "general", 3, 512)


# --- The terminal


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}])
def test_without_colours_brackets_say_what_is_learned(
    tokenizer: Any,
    found: Prepared,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    preview.show(CHAT, found, tokenizer, "train", 3)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    summary, _, shown = out.partition("\n⟦trained on⟧ and not trained on\n")
    assert [line for line in summary.splitlines() if line in found.summary()] == found.summary()
    answers = {f"{row['completion']}<|im_end|>" for row in chats(60)}
    learned = re.findall("⟦(.*?)⟧", shown)
    assert len(learned) == 3 and set(learned) <= answers
    assert shown.count("<|im_start|>user↵\n") == 3


def test_on_a_terminal_colours_say_it(
    tokenizer: Any,
    found: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    preview.show(CHAT, found, tokenizer, "eval", 1)
    out = capsys.readouterr().out
    (sample,) = preview.samples(CHAT, found, tokenizer, "eval", 1, 512)
    green = "".join(re.findall(r"\x1b\[1(?:;4)?;32m(.*?)\x1b\[0m", out))
    learned = "".join(piece.text for piece in sample.pieces if piece.supervised)
    assert green == "evaluated on" + learned and learned.endswith("<|im_end|>")
    assert "⟦" not in out


def test_what_would_steer_the_terminal_does_not_reach_it(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{p} {HOSTILE[:-1]}", "completion": p} for p in sentences(30)]
    found = prepared(tokenizer, train=put(tmp_path / "a\x1b[2J.jsonl", rows))
    preview.show(CHAT, found, tokenizer, "train", 2)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\u202e\x85\r")
    assert "a⟨U+001B⟩[2J.jsonl:" in out and "⟨U+202E⟩back" in out


@pytest.mark.parametrize(
    ("kind", "settings_", "mode"),
    [
        ("text", {}, "running"),
        ("text", {"packing": "none"}, "none"),
        ("text", {"packing": "documents"}, "documents"),
    ],
)
def test_packing_is_told(
    tokenizer: Any, tmp_path: Path, kind: Any, settings_: dict[str, Any], mode: str
) -> None:
    source = put_texts(tmp_path / "text.txt", sentences(60))
    found = prepared(tokenizer, kind, train=source, max_length=64, **settings_)
    run = run_of(recipe="cpt", data={"train": "x", **settings_}, train={"max_length": 64})
    told = preview.to_json(Text(), run, found, ["why"])
    assert told["packing"]["mode"] == mode and told["packing"]["rows"] == len(found.train)
    tokens = sum(len(found.train[n]["input_ids"]) for n in range(len(found.train)))
    fill = None if mode == "none" else round(tokens / (64 * len(found.train)), 4)
    assert told["packing"]["fill"] == fill
    assert (told["recipe"], told["kind"], told["problems"]) == ("cpt", "text", ["why"])
    assert told["tokens"] == found.census.to_json()["tokens"]


@pytest.mark.slow
def test_no_model_is_loaded_for_it(run_file: Callable[..., Path]) -> None:
    # transformers' tokenizers bring torch themselves; of ours, nothing asks for it.
    code = """
import sys
import lora_kit.preview, lora_kit.data.prepare, lora_kit.tasks.encode
print([m for m in ("torch", "transformers") if m in sys.modules])
from lora_kit import cli
try:
    cli.main()
finally:
    names = ("peft", "datasets", "transformers.trainer", "transformers.modeling_utils")
    print([m for m in names if m in sys.modules])
"""
    command = [sys.executable, "-c", code, "preview", str(run_file("cpt")), "--samples", "0"]
    done = processes.run(command)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1], done.returncode) == ("[]", "[]", 0), done.stderr
