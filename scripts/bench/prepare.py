"""How fast chat rows become labelled tokens, against TRL on the same rows; and in how much memory.

    python scripts/bench/prepare.py                    # 100,000 rows, 2 workers, A B A B
    python scripts/bench/prepare.py --gib 2            # memory: a jsonl of 2 GiB, census included

Rows are made of the docstrings that every CPython carries. TRL prepares them as SFTTrainer does,
from a loaded data set, with a template that marks the assistant's words; lora_kit reads the jsonl
as well. `label`: tokenizing and labelling alone; `census`: all of `prepare`, with hashes, near
duplicates, the split and the files of the cache; `cached`: its second start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.schema import Run

if TYPE_CHECKING:
    from lora_kit.tasks.encode import Prepared

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LENGTH = 1024


def rows() -> Iterator[dict[str, Any]]:
    """Conversations without an end: a question, and an answer of four to nine sentences."""
    from lora_kit import nano

    texts = [text for _, text in nano.docstrings()]
    sentences = [s.strip() for text in texts for s in text.split(". ") if 30 < len(s) < 200]
    chooser = random.Random(0)
    for number in itertools.count():
        answer = ". ".join(chooser.choices(sentences, k=chooser.randint(4, 9)))
        question = f"Question {number}: {chooser.choice(sentences)}?"
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }


def write_rows(file: Path, count: int | None, size: float = 0) -> int:
    """Write `count` rows, or as many as make `size` bytes; returns their number."""
    number = 0
    with file.open("w", encoding="utf-8") as out:
        for number, row in enumerate(rows(), 1):
            out.write(json.dumps(row) + "\n")
            if number == count or (count is None and out.tell() >= size):
                break
    return number


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from lora_kit import nano

    return AutoTokenizer.from_pretrained(nano.MODEL)


def trl_seconds(file: Path, workers: int, folder: Path) -> float:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(folder / f"hf{time.time()}")
    )
    tokens = tokenizer()
    tokens.chat_template = MARKED
    tiny: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_attention_heads=1, **tiny))
    config = SFTConfig(
        output_dir=str(folder / "out"),
        max_length=MAX_LENGTH,
        dataset_num_proc=workers,
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    started = time.perf_counter()
    SFTTrainer(model=model, args=config, train_dataset=loaded, processing_class=tokens)
    return time.perf_counter() - started


class Label:
    """Tokens and labels of the rows of a batch, as arrays; nothing is counted or compared."""

    def __init__(self, run: Run) -> None:
        self.run, self.tokenizer = run, tokenizer()

    def __call__(self, batch: Any) -> Any:
        import numpy as np

        from lora_kit.data.formats import Columns, to_example
        from lora_kit.tasks.causal import Conversations

        examples = [to_example(row, "messages", Columns()) for row in batch.parsed()]
        encoded = Conversations().encode(examples, self.tokenizer, {"kind": "chat"}, self.run)
        rows = [row for found in encoded if isinstance(found, list) for row in found]
        return [np.concatenate([row[name] for row in rows]) for name in ("input_ids", "labels")]


def run_of(file: Path, workers: int) -> Run:
    return Run.model_validate(
        {
            "recipe": "sft",
            "name": "prepare",
            "base": {"model": "nano"},
            "data": {"train": str(file), "workers": workers},
            "train": {"max_length": MAX_LENGTH},
        }
    )


def label_seconds(file: Path, workers: int) -> float:
    """Tokenizing and labelling alone, into one file of tokens."""
    from lora_kit.data.readers import table_batches
    from lora_kit.data.workers import in_order, stop

    stop()  # as the first start pays for its processes
    started = time.perf_counter()
    with file.with_suffix(".bin").open("wb") as out:
        for ids, _ in in_order(Label(run_of(file, workers)), table_batches(file), workers):
            out.write(ids.tobytes())
    seconds = time.perf_counter() - started
    stop()
    return seconds


def prepare_seconds(file: Path, workers: int) -> float:
    from lora_kit.data.workers import stop

    stop()
    started = time.perf_counter()
    prepared = prepared_rows(file, workers)
    for row in (0, len(prepared.train) - 1):
        prepared.train[row]
    return time.perf_counter() - started


def prepared_rows(file: Path, workers: int) -> Prepared:
    """What `sft` is trained on: read, checked, split and encoded."""
    from lora_kit.data.prepare import prepare
    from lora_kit.tasks.causal import Conversations
    from lora_kit.tasks.encode import encode

    run, task = run_of(file, workers), Conversations()
    split = prepare(run.data, task, run.seed)
    return encode(task, split, tokenizer(), task.facts(split.train, run.data), run)


def race(count: int, workers: int, rounds: int, folder: Path) -> dict[str, Any]:
    file = folder / "rows.jsonl"
    write_rows(file, count)
    seconds: dict[str, list[float]] = {"trl": [], "label": [], "census": [], "cached": []}
    for _ in range(rounds):
        seconds["trl"].append(trl_seconds(file, workers, folder))
        seconds["label"].append(label_seconds(file, workers))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        seconds["census"].append(prepare_seconds(file, workers))
        seconds["cached"].append(prepare_seconds(file, workers))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": count,
        "workers": workers,
        "seconds": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
        "rows_per_second": {name: round(count / value) for name, value in median.items()},
        "label_against_trl": round(median["trl"] / median["label"], 2),
        "census_against_trl": round(median["trl"] / median["census"], 2),
        "cached_seconds": round(median["cached"], 2),
    }


def anonymous_mib() -> float:
    """Memory of this process and its children that is not a mapped file."""
    import psutil

    here = psutil.Process()
    total = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue  # it has just ended
        line = next((x for x in status.splitlines() if x.startswith("RssAnon")), "RssAnon: 0 kB")
        total += int(line.split()[1]) / 1024
    return total


def memory(gib: float, workers: int, folder: Path) -> dict[str, Any]:
    file = folder / "rows.jsonl"
    # In a process of its own, whose memory is not counted.
    context = multiprocessing.get_context("spawn")
    maker = context.Process(target=write_rows, args=(file, None, gib * 2**30))
    maker.start()
    maker.join()
    most, ended = [anonymous_mib()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            most[0] = max(most[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    prepared = prepared_rows(file, workers)
    made = time.perf_counter() - started
    tokens = sum(len(row["input_ids"]) for row in prepared.train)
    ended.set()
    watcher.join()
    assert tokens == prepared.census.train.tokens
    return {
        "gib": gib,
        "rows": prepared.census.to_json()["rows_read"],
        "workers": workers,
        "tokens": tokens,
        "seconds": round(made, 1),
        "seconds_with_iteration": round(time.perf_counter() - started, 1),
        "most_anonymous_mib": round(most[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gib", type=float, help="measure memory with a file of this size")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LORA_KIT_CACHE"] = str(folder / "cache")
        if options.gib:
            result = memory(options.gib, options.workers, folder)
        else:
            result = race(options.rows, options.workers, options.rounds, folder)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
