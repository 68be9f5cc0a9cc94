"""Which side a row is on, through `prepare`: eval as a share or a source, groups, labels, kinds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer
from prepared import chats, prepared, put, put_texts, said, texts

from lora_kit.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


pytestmark = pytest.mark.usefixtures("own_cache")


def lines(found: Any, use: str) -> set[int]:
    return set(found.rows(use).column("number").tolist())


def test_a_share_and_a_source_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    train = put(tmp_path / "a.jsonl", chats(50))
    found = prepared(tokenizer, train=train, eval=0.3)
    assert len(found.eval) == 15 and found.census.held_out
    assert lines(found, "train") | lines(found, "eval") == set(range(1, 51))
    assert not lines(found, "train") & lines(found, "eval")
    other = put(tmp_path / "b.jsonl", chats(9, seed=1))
    found = prepared(tokenizer, train=train, eval=other)
    assert (len(found.train), len(found.eval)) == (50, 9) and not found.census.held_out
    assert "a verdict needs 20 held-out documents" in "\n".join(found.summary())
    more = put(tmp_path / "c.jsonl", chats(7, seed=2))
    assert len(prepared(tokenizer, train=train, eval=[other, more]).eval) == 16


def test_the_side_of_a_row_depends_on_neither_the_order_nor_the_file(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = chats(60)
    before = prepared(tokenizer, train=put(tmp_path / "a.jsonl", rows), eval=0.3)
    random.Random(0).shuffle(rows)
    halves = [put(tmp_path / "b.jsonl", rows[:30]), put(tmp_path / "c.jsonl", rows[30:])]
    after = prepared(tokenizer, train=halves, eval=0.3)
    for use in ("train", "eval"):
        assert sorted(said(before, use, tokenizer)) == sorted(said(after, use, tokenizer))


def test_rows_of_one_system_prompt_are_no_repeats(tmp_path: Path, tokenizer: Any) -> None:
    system = {"system": texts(1, 100)[0]}
    train = put(tmp_path / "a.jsonl", [row | system for row in chats(40, 6)])
    found = prepared(make_tokenizer(tmp_path / "chatml", CHATML), train=train, max_length=4096)
    assert len(found.eval) == 4 and found.census.duplicates == {"exact": 0, "near": 0}


def test_rows_that_repeat_each_other_stay_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    rows = chats(40)
    again = [{**row, "prompt": row["prompt"].upper()} for row in rows]
    nearly = [{**row, "completion": row["completion"] + " too"} for row in rows]
    found = prepared(
        tokenizer, train=put(tmp_path / "a.jsonl", [*rows, *again, *nearly]), eval=0.25
    )
    assert len(found.eval) == 30
    held = lines(found, "eval")
    assert all(len(held & {n, n + 40, n + 80}) in (0, 3) for n in range(1, 41))
    assert found.census.duplicates == {"exact": 40, "near": 40}


def test_a_group_stays_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**row, "book": n % 10} for n, row in enumerate(chats(100))]
    train = put(tmp_path / "a.jsonl", rows)
    found = prepared(tokenizer, train=train, eval=0.2, group="book")
    books = {use: {(n - 1) % 10 for n in lines(found, use)} for use in ("train", "eval")}
    assert len(books["eval"]) == 2 and not books["train"] & books["eval"]
    assert len(found.eval) == 20


def test_documents_of_text_files_are_no_group(tmp_path: Path, tokenizer: Any) -> None:
    """Rows of a table have groups; the documents beside them are each for itself."""
    rows = [{"text": text, "book": f"b{n % 5}"} for n, text in enumerate(texts(50))]
    table = put(tmp_path / "a.jsonl", rows)
    documents = put_texts(tmp_path / "b.txt", texts(45, seed=1))
    found = prepared(tokenizer, "text", train=[table, documents], eval=0.2, group="book")
    files, numbers = found.eval.column("file").tolist(), found.eval.column("number").tolist()
    held = [(found.files[f].name, n) for f, n in zip(files, numbers, strict=True)]
    assert 8 <= sum(name == documents for name, _ in held) <= 10
    books = {(n - 1) % 5 for name, n in held if name == table}
    assert len(held) == 10 * len(books) + sum(name == documents for name, _ in held)


def test_a_group_that_no_row_has_is_a_mistake(tmp_path: Path, tokenizer: Any) -> None:
    train = put(tmp_path / "a.jsonl", [{**row, "book": 1} for row in chats(30)])
    with pytest.raises(UserError, match=r"a\.jsonl:1: data\.group names `page`; the columns are"):
        prepared(tokenizer, train=train, group="page")
    for source in (put(tmp_path / "b.jsonl", [{"text": t} for t in texts(30)]),
                   put_texts(tmp_path / "b.txt", texts(30))):  # fmt: skip
        with pytest.raises(
            UserError, match=r"data\.group: no row of data\.train has a column `page`"
        ):
            prepared(tokenizer, "text", train=source, group="page")


def test_each_label_is_judged_in_its_share(tmp_path: Path, tokenizer: Any) -> None:
    labels = ["ham"] * 60 + ["spam"] * 30 + ["scam"] * 10
    rows = [{"text": text, "label": label} for text, label in zip(texts(100), labels, strict=True)]
    found = prepared(tokenizer, train=put(tmp_path / "a.jsonl", rows), eval=0.2)
    answers = [text.rpartition("\n\n")[2] for text in said(found, "eval", tokenizer)]
    counts = {label: answers.count(f"{label}<eos>") for label in ("ham", "spam", "scam")}
    assert counts == {"ham": 12, "spam": 6, "scam": 2}


def test_a_label_that_was_never_learned_cannot_be_judged(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": t, "label": ("ham", "spam")[n % 2]} for n, t in enumerate(texts(30))]
    other = [{"text": t, "label": "spom"} for t in texts(3, seed=1)]
    data = {"train": put(tmp_path / "a.jsonl", rows), "eval": put(tmp_path / "b.jsonl", other)}
    with pytest.raises(UserError, match=r"b\.jsonl:1: the label 'spom' is in no row .*spam"):
        prepared(tokenizer, **data)


@pytest.mark.parametrize("suffix", [".json", ".txt", ""])
def test_labels_are_a_list_or_a_file_of_them(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    """Numbers become names, and a row whose label is none of them is left out."""
    names = ["ham", "spam"]
    file = tmp_path / f"labels{suffix}"
    file.write_text(json.dumps(names) if suffix == ".json" else "ham\n\nspam\n", encoding="utf-8")
    rows: list[dict[str, Any]] = [{"text": t, "label": n % 2} for n, t in enumerate(texts(30))]
    rows += [{"text": "a", "label": 2}, {"text": "b", "label": "scam"}]
    train = put(tmp_path / "a.jsonl", rows)
    found = prepared(tokenizer, train=train, labels=str(file) if suffix else names, check=False)
    assert found.census.train.dropped == {"whose `label` is not in data.labels": 2}
    answers = {t.rpartition("\n\n")[2] for t in said(found, "train", tokenizer)}
    assert answers == {"ham<eos>", "spam<eos>"}


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "[]", "nonsense"])
def test_a_file_of_labels_that_holds_none_is_a_mistake(
    tmp_path: Path, tokenizer: Any, content: str
) -> None:
    (tmp_path / "labels.json").write_text(content)
    train = put(tmp_path / "a.jsonl", [{"text": t, "label": "ham"} for t in texts(9)])
    with pytest.raises(UserError, match=r"data\.labels: .*labels\.json: "):
        prepared(tokenizer, train=train, labels=str(tmp_path / "labels.json"))


@pytest.mark.parametrize(
    ("settings", "wanted", "words"),
    [
        (
            {"train": "text"},
            "chat",
            "these columns (text) are text, and this recipe reads text+",
        ),
        ({"train": "rows"}, "text", "such as `recipe: sft`, or rename them"),
        ({"train": "rows", "eval": "text"}, "chat", "such as `recipe: cpt`, or rename them"),
        ({"train": ["rows", "text"]}, "chat", "such as `recipe: cpt`, or rename them"),
        ({"train": "text", "general": "rows"}, "text", "data.general: expected text"),
        ({"train": "blank"}, "text", "data.train: no rows left; dropped: 3 empty (first: "),
        ({"train": "text", "eval": "blank"}, "text", "data.eval: no rows left; dropped: 3 empty"),
        ({"train": "text", "general": "blank"}, "text", "data.general: no rows left"),
        ({"train": "text", "general": "text"}, "text", "data.general: no rows left"),
        ({"train": "single"}, "text", "data.eval: 1 different document(s) cannot be split"),
        ({"train": "text", "replay": 0.1}, "text", "data.replay is a share of general text"),
        (
            {"train": "text", "general": "single", "replay": 0.1},
            "text",
            "data.general: 1 different document(s) cannot be split: add more text",
        ),
    ],
)
def test_what_leaves_nothing_to_learn_or_judge_is_refused(
    tmp_path: Path, tokenizer: Any, settings: dict[str, Any], wanted: Any, words: str
) -> None:
    files = {
        "text": put_texts(tmp_path / "text.txt", texts(30)),
        "rows": put(tmp_path / "rows.jsonl", chats(30)),
        "single": put_texts(tmp_path / "single.txt", ["one text"]),
        "blank": put(tmp_path / "blank.jsonl", [{"text": " "}] * 3),
    }

    def named(value: Any) -> Any:
        return [files[v] for v in value] if isinstance(value, list) else files.get(value, value)

    with pytest.raises(UserError) as caught:
        prepared(tokenizer, wanted, **{key: named(value) for key, value in settings.items()})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_renamed_columns_leave_text_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    """`general` is text; it has no columns to rename."""
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in chats(30)]
    found = prepared(
        tokenizer,
        train=put(tmp_path / "a.jsonl", rows),
        eval=0.2,
        general=put_texts(tmp_path / "general.txt", texts(30)),
        columns={"prompt": "q", "completion": "a"},
    )
    assert (len(found.train), len(found.eval)) == (24, 6)
    assert found.general is not None and len(found.general) == 30
