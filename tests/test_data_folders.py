"""A folder with a data set: which of its files are read, and what is never trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_sets import CARD, lines, put
from test_data_marks import chat

from lora_kit.data.prepare import prepare
from lora_kit.data.sources import open_sources
from lora_kit.errors import UserError
from lora_kit.schema import Data, Source
from lora_kit.tasks.causal import Conversations

PLAIN_CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n"
SPLITS = "  - split: train\n    path: data/a*\n  - split: test\n    path: data/b*\n---\n# Things\n"


def table(folder: Path, *names: str) -> None:
    """Files of one row, which names its file."""
    for name in names:
        row = {"prompt": "Q", "completion": name}
        if name.endswith(".parquet"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row]), folder / name)
        else:
            put(folder, name, lines(row))


def read(folder: Path | str, use: str = "train", **settings: Any) -> list[str]:
    """The files that are read, relative to the folder."""
    (opened,) = open_sources(Source(source=str(folder), **settings), use=use)
    return [str(file).removeprefix(f"{folder}/") for file in opened.files]


def refused(folder: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_sources(Source(source=str(folder), **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- A clone of a Hub data set


def test_a_card_says_which_files_are_of_a_split(tmp_path: Path) -> None:
    put(tmp_path, "README.md", PLAIN_CARD + SPLITS)
    put(tmp_path, ".git/config", "x")
    table(tmp_path, "data/a1.parquet", "data/a2.parquet", "data/b.parquet", "data/c.parquet")
    assert read(tmp_path) == ["data/a1.parquet", "data/a2.parquet"]
    assert read(tmp_path, split="test") == ["data/b.parquet"]
    assert "has no split `dev`; it has: train, test" in refused(tmp_path, split="dev")
    (opened,) = open_sources(str(tmp_path))
    assert opened.note == (
        "files that are read: data/a1.parquet, data/a2.parquet; not read: README.md, "
        "data/b.parquet, data/c.parquet"
    )


def test_a_card_has_configs_and_class_names(tmp_path: Path) -> None:
    put(tmp_path, "README.md", CARD)
    put(tmp_path, "short/train.jsonl", lines({"text": "s"}))
    put(tmp_path, "short/test.jsonl", lines({"text": "t"}))
    put(tmp_path, "long/a.csv", "text,label\na,0\n")
    put(tmp_path, "long/b.csv", "text,label\nb,1\n")
    assert read(tmp_path) == ["short/train.jsonl"]
    assert read(tmp_path, config="long") == ["long/a.csv", "long/b.csv"]
    (opened,) = open_sources(Source(source=str(tmp_path), config="long"))
    found = [row.columns["label"] for batch in opened.batches() for row in batch.parsed()]
    assert found == ["ham", "spam"]
    put(tmp_path, "README.md", CARD.replace("spam", "junk"))
    (changed,) = open_sources(Source(source=str(tmp_path), config="long"))
    assert changed.digest != opened.digest
    assert "did you mean `short`?" in refused(tmp_path, config="shrt")


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.jsonl", "test.jsonl"),
        ("train.jsonl", "valid.jsonl", "dev.jsonl"),
        ("set-train.csv.gz", "set_test.csv.gz"),
        ("train/a.jsonl", "test/a.jsonl", "validation/a.jsonl"),
        ("wiki.train.txt", "wiki.valid.txt"),
        ("set-train.arrow", "set-test.arrow", "cache-0123abc.arrow", "dataset_info.json"),
    ],
)
@pytest.mark.parametrize("card", [None, "# Things", "---\nlicense: mit\n---\n", "---\n: :\n---\n"])
def test_files_are_of_the_split_that_they_are_named_after(
    tmp_path: Path, names: tuple[str, ...], card: str | None
) -> None:
    table(tmp_path, *names)
    if card:
        put(tmp_path, "README.md", card)
    put(tmp_path, "notes.md", "about it")
    assert read(tmp_path) == [names[0]]
    # A benchmark is searched for as a whole.
    assert {*names} - {"dataset_info.json", "cache-0123abc.arrow"} <= {
        *read(tmp_path, use="decontaminate")
    }


def test_other_splits_than_train_are_named_first(tmp_path: Path) -> None:
    shards = [f"data/{name}-00000-of-00001.parquet" for name in ("train_sft", "test_sft")]
    table(tmp_path, *shards)
    assert "has no split `train`; it has: test_sft, train_sft" in refused(tmp_path)
    assert read(tmp_path, split="train_sft") == shards[:1]


@pytest.mark.parametrize("names", [("rows.jsonl", "test.jsonl"), ("a/x.csv", "validation/x.csv")])
def test_it_is_not_guessed_which_files_are_for_training(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    table(tmp_path, *names)
    line = refused(tmp_path)
    assert f"{names[1]} is named after a held-out split, {names[0]} is not" in line
    assert line.endswith(str(tmp_path / names[0]))
    assert read(tmp_path, use="eval") == [*names]
    split = "test" if "test" in names[1] else "validation"
    assert read(tmp_path, use="eval", split=split) == [names[1]]


def test_a_pattern_does_not_mix_splits(tmp_path: Path) -> None:
    table(tmp_path, "train-1.jsonl", "train-2.jsonl", "test.jsonl")
    assert "is named after a held-out split" in refused(f"{tmp_path}/*.jsonl")
    for pattern, count in (("train*", 2), ("test*", 1), ("train-1*", 1)):
        assert len(read(f"{tmp_path}/{pattern}")) == count


@pytest.mark.parametrize("card", ["# Things", "---\nlicense: mit\n---\n# Things"])
def test_a_card_is_not_trained_on(tmp_path: Path, card: str) -> None:
    table(tmp_path, "a.jsonl", "b.csv")
    put(tmp_path, "README.md", card)
    put(tmp_path, "dataset_info.json", "{}")
    assert read(tmp_path) == ["a.jsonl", "b.csv"]


def test_a_folder_of_documents_is_read_whole(tmp_path: Path) -> None:
    names = ["README.md", "dev/setup.md", "evaluation.md", "test.py", "train.md", "training.html"]
    for name in names:
        put(tmp_path, name, "---\ntitle: A page\n---\nWords.")
    assert read(tmp_path) == names
    assert "has no split `test`: it is no data set" in refused(tmp_path, split="test")
    assert "has no config `en`" in refused(tmp_path, config="en")


def test_a_readme_alone_is_a_document(tmp_path: Path) -> None:
    put(tmp_path, "README.md", "Words of a document.")
    assert read(tmp_path) == ["README.md"]


def test_what_has_no_splits_is_not_given_one(tmp_path: Path) -> None:
    table(tmp_path, "a.jsonl", "b.jsonl")
    saved(tmp_path / "set", train=["a"])
    embedded = "nano:topics"
    for source in (tmp_path / "a.jsonl", f"{tmp_path}/*.jsonl", embedded, tmp_path / "set/train"):
        assert "has no split `test`: it " in refused(source, split="test")
        assert "has no config `en`: it " in refused(source, config="en")
    assert "has no config `en`: it " in refused(tmp_path / "set", config="en")
    for source in (tmp_path, tmp_path / "a.jsonl"):
        assert "has no revision `v1`: it is a " in refused(source, revision="v1")


def test_a_benchmark_in_a_split_is_told_from_the_training_rows(tmp_path: Path) -> None:
    table(tmp_path, "train.jsonl", "test.jsonl")
    assert read(tmp_path, use="decontaminate", split="test") == ["test.jsonl"]


def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    for name in (tmp_path, tmp_path / "a.txt"):
        assert "a.txt: a Git LFS pointer, not the file: run `git lfs pull`" in refused(name)


# --- What `save_to_disk` writes


def saved(folder: Path, shards: int = 1, **splits: list[str]) -> None:
    import datasets

    made = {}
    for split, answers in splits.items():
        made[split] = datasets.Dataset.from_dict(
            {"prompt": ["Q"] * len(answers), "completion": answers}
        )
    datasets.DatasetDict(made).save_to_disk(folder, num_shards=dict.fromkeys(splits, shards))


def answers(folder: Path, **settings: Any) -> list[str]:
    (opened,) = open_sources(Source(source=str(folder), **settings))
    return [row.columns["completion"] for batch in opened.batches() for row in batch.parsed()]


def test_a_saved_data_set_is_read_as_its_state_says(tmp_path: Path) -> None:
    saved(tmp_path, 2, train=["a", "b", "c"], test=["d"] * 2)
    # `map` caches in the folder, and a larger data set may have been saved there before.
    for name in ("cache-0123abc.arrow", "data-00002-of-00003.arrow"):
        (tmp_path / "train" / name).write_bytes(b"stale")
    assert answers(tmp_path) == ["a", "b", "c"]
    assert answers(tmp_path, split="test") == answers(tmp_path / "test") == ["d"] * 2
    assert "has no split `dev`; it has: train, test" in refused(tmp_path, split="dev")
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    assert "without its 'data-00001-of-00002.arrow'" in refused(tmp_path)
    (tmp_path / "test" / "state.json").write_text('{"_data_files": [1]}')
    assert "without its 'test/state.json'" in refused(tmp_path, split="test")


def test_an_index_of_a_saved_data_set_is_none_of_its_rows(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"prompt": ["Q"] * 4, "completion": list("abcd")})
    rows.select([2, 0]).save_to_disk(tmp_path)
    assert answers(tmp_path) == ["c", "a"]


# --- As a user meets it


def test_a_cloned_data_set_trains_on_its_training_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_data_marks import shown

    put(tmp_path / "set", "README.md", PLAIN_CARD + SPLITS)
    rows = [chat(n) for n in range(60)]
    random.Random(0).shuffle(rows)
    put(tmp_path / "set", "data/a.jsonl", lines(*rows))
    put(tmp_path / "set", "data/b.jsonl", lines(*(chat(n, "HELDOUT") for n in range(60, 80))))
    code, out = shown(tmp_path, train=str(tmp_path / "set"))
    assert code == 0 and "HELDOUT" not in out and "# Things" not in out
    assert "files that are read: data/a.jsonl; not read: README.md, data/b.jsonl" in out
    source = Source(source=str(tmp_path / "set"), split="test")
    data = Data(train=str(tmp_path / "set"), eval=source, workers=1)
    assert prepare(data, Conversations(), 0).census.eval.rows_read == 20
    assert json.dumps(prepare(data, Conversations(), 0).census.notes).count("b.jsonl") == 2
