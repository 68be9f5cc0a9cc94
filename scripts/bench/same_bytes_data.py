"""What the run files of same_bytes.py name: small files of random words, and a base."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

SENTENCE = (
    "the a every some river stone engine garden letter window teacher machine bridge forest "
    "carries opens repairs follows measures paints counts remembers old quiet broken green "
    "distant clever before after under near without slowly twice again tomorrow because while"
)
WORDS = SENTENCE.split()


def write_data(folder: Path, checkout: Path) -> None:
    """All of it. A new file comes last, so that the others keep their words.

    The words are the same in each call; the base `bare` is the embedded one of a checkout without
    its chat template.
    """
    embedded, template = checkout / "lora_kit" / "nano" / "model", "chat_template.jinja"
    shutil.copytree(embedded, folder / "bare", ignore=shutil.ignore_patterns(template))
    chooser = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(least, most))) + "."

    def text(sentences: int) -> str:
        return "".join(words(5, 15) + chooser.choice([" ", "\n"]) for _ in range(sentences))

    def turn(role: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": words(3, 10), **more}

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            if name.endswith(".jsonl"):
                file.writelines(json.dumps(row) + "\n" for row in rows)
            elif name.endswith(".json"):
                json.dump(rows, file)
            else:
                delimiter = "\t" if name.endswith(".tsv") else ","
                table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
                table.writeheader()
                table.writerows(rows)

    def write_columns(name: str, columns: tuple[str, ...], rows: int) -> None:
        write(name, [{column: words(3, 12) for column in columns} for _ in range(rows)])

    (folder / "text").mkdir()  # without markers: split in blocks of 2 KiB
    for name, sentences in {"a.txt": 200, "b.md": 60, "c.txt": 20, "d.txt": 150}.items():
        (folder / "text" / name).write_text(text(sentences), encoding="utf-8")
    for name, documents in {"documents.txt": 60, "held.txt": 3, "general.txt": 40}.items():
        parts = [text(chooser.randint(3, 12)) for _ in range(documents)]
        (folder / name).write_text("<|endoftext|>".join(parts), encoding="utf-8")
    write("long.jsonl", [{"text": text(chooser.randint(2, 40))} for _ in range(24)])
    write("book.csv", [{"body": text(4), "chapter": n // 5, "page": n} for n in range(60)])

    pairs = [{"prompt": words(4, 12), "completion": words(2, 20)} for _ in range(70)]
    write("prompts.jsonl", [{**pair, "author": n // 6} for n, pair in enumerate(pairs[:64])])
    write("held.jsonl", pairs[64:])
    conversations = []
    for number in range(60):
        messages = [turn("system")] if number % 3 == 0 else []
        for exchange in range(number % 3 + 1):
            skipped = number % 3 == 2 and exchange == 0  # weight 0: not trained on
            messages += [turn("user"), turn("assistant", weight=int(not skipped))]
        conversations.append({"messages": messages})
    write("messages.jsonl", conversations)
    dialogues = []
    for _ in range(12):
        speakers = ("human", "gpt", "human", "gpt")
        turns = [{"from": speaker, "value": words(3, 9)} for speaker in speakers]
        dialogues.append({"conversations": turns})
    write("sharegpt.jsonl", dialogues)
    write_columns("instructions.json", ("instruction", "input", "output"), 12)
    write_columns("questions.tsv", ("context", "question", "answer"), 12)
    write_columns("pairs.jsonl", ("prompt", "chosen", "rejected"), 40)
    write("liked.jsonl", [{**pair, "label": True} for pair in pairs[:12]])
    write("labels.csv", [{"text": words(4, 16), "label": n % 3} for n in range(60)])
    tagged = []
    for number in range(40):
        tags = ["O", "B-PART", "I-PART", "O", "B-TOOL"] if number % 4 else ["O"] * 5
        tagged.append({"tokens": chooser.choices(WORDS, k=5), "tags": tags})
    write("tags.jsonl", tagged)
