"""Data sets as people keep them on the Hub, well made and otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hub import OLDER, SHA

Repos = dict[str, dict[str, Path]]

CARD = """---
configs:
- config_name: short
  default: true
  data_files:
  - split: train
    path: short/train.jsonl
  - split: test
    path: [short/te*.jsonl, short/test*]
- config_name: long
  data_files:
  - split: train
    path: [long/a.csv, long/b.csv]
dataset_info:
- config_name: long
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': ham
          '1': spam
---
# A set
"""


def put(folder: Path, name: str, content: str | bytes) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(folder: Path, name: str, **columns: Any) -> None:
    """A file as `push_to_hub` writes it: numbers for classes, their names in the schema."""
    import datasets

    features = columns.pop("features")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / name)


def make_sets(root: Path) -> Repos:
    """Folders of sets, below `root`, as `hub.serving` takes them."""
    import datasets

    older, newer = root / "older", root / "newer"
    put(older, "README.md", CARD)
    put(older, "short/train.jsonl", "\n" + lines({"text": "a", "n": 1}, {"text": "b", "n": "two"}))
    put(older, "short/test [1].jsonl", lines({"text": "c"}))
    put(older, "short/other.jsonl", "never fetched")
    put(older, "long/a.csv", "text,label\nx,1\ny,0\n")
    put(older, "long/b.csv", "text,label\nz,-1\n")
    shutil.copytree(older, newer)
    put(newer, "README.md", CARD + "More words.\n")
    put(newer, "long/b.csv", "text,label\nz,0\n")
    shutil.copytree(newer, root / "renamed")
    put(root / "renamed", "README.md", CARD.replace("spam", "junk"))
    classes = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
            "meta": {"id": datasets.Value("int64")},
        }
    )
    columns = {"tokens": [["a", "b"]], "tags": [[0, 1]], "meta": [{"id": 7}]}
    plain = root / "plain"
    for split in ("train", "validation"):
        parquet(plain, f"data/{split}-00000-of-00001.parquet", features=classes, **columns)
    odd = {
        "script": {"script.py": "raise SystemExit", "train.jsonl": lines({"text": "a"})},
        "lines": {"train.json": lines({"text": "a"}, {"text": "b"})},
        "separator": {
            "README.md": "---\nconfigs:\n- config_name: default\n  sep: ';'\n"
            "  data_files: a.csv\n---\n",
            "a.csv": "a;b\n1;2\n",
        },
        "outside": {
            "README.md": "---\nconfigs:\n- config_name: default\n"
            f"  data_files: {older / 'short' / 'train.jsonl'}\n---\n",
            "a.jsonl": lines({"text": "a"}),
        },
        "card": {"README.md": "---\nconfigs: 7\n---\n", "a.jsonl": lines({"text": "a"})},
        "yaml": {"README.md": "---\nconfigs: [\n---\n", "a.jsonl": lines({"text": "a"})},
        "zipped": {"a.jsonl.zst": b"\x28\xb5", "b.jsonl.zst": b"\x28\xb5"},
        "nothing": {"README.md": "# Soon\n"},
        "empty": {"train.jsonl": ""},
        "choice": {
            "README.md": "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n"
            "- config_name: de\n  data_files: de.jsonl\n---\n",
            "en.jsonl": lines({"text": "a"}),
            "de.jsonl": lines({"text": "a"}),
        },
    }
    for name, files in odd.items():
        for file, content in files.items():
            put(root / name, file, content)
    folders = {name: root / name for name in ("plain", "renamed", *odd)}
    return {f"datasets/org/{name}": {SHA: folder} for name, folder in folders.items()} | {
        "datasets/org/set": {SHA: newer, OLDER: older}
    }
