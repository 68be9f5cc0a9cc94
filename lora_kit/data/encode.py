"""One batch of raw rows -> tokens, hashes and signatures, in this process or in several.

Nothing here knows of other batches, so the result is the same for any number of workers.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from lora_kit.data.chat import ChatEncoder, Encoded
from lora_kit.data.duplicates import Signed, hashed, ranks, sign
from lora_kit.data.formats import Columns, Dropped, Example, NotUsable, normalised, to_example
from lora_kit.data.readers import Batch, Row
from lora_kit.errors import CheckFailed

BLOCK_BYTES = 2048
# With fewer batches than this, starting processes takes longer than the work.
FEWEST_FOR_WORKERS = 8
_WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**28),  # keep freed memory: 3% faster
}


@dataclass(frozen=True)
class Settings:
    """What decides how a row becomes tokens. `questions`: what is asked is hashed apart, to be
    looked for in benchmarks."""

    columns: Columns
    supervise: str
    max_length: int
    seed: int
    questions: bool


@dataclass
class Part:
    """What became of a batch. Row i has the tokens ids[sum(lengths[:i]):][:lengths[i]].

    spans: pairs (first, last + 1) of learned tokens, span_counts of them a row; sizes: bytes they
    spell; keys, questions, groups: uint64 hashes; joins: the row goes on where the one before it
    ended. signed: of the rows below the sample's rank.
    """

    read: int = 0
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    lengths: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    span_counts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    joins: list[bool] = field(default_factory=list)
    signed_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    signed: Signed = field(default_factory=lambda: Signed.join([]))
    signed_questions: Signed = field(default_factory=lambda: Signed.join([]))
    dropped: Dropped = field(default_factory=Dropped)
    cut: Dropped = field(default_factory=Dropped)
    without_supervision: int = 0


class Encoder:
    """Turns batches into parts with a tokenizer."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.chat = ChatEncoder(tokenizer, settings.supervise, settings.max_length)

    def __call__(self, batch: Batch, format_name: str, sampled_below: int) -> Part:
        """Encode a batch.

        Args:
            format_name: of `formats.FORMATS`.
            sampled_below: rows whose rank is lower get a signature.
        """
        if batch.whole:
            return self._blocks(batch, sampled_below)
        part = Part()
        examples = list(self._examples(batch, format_name, part))
        part.numbers = [number for number, _ in examples]
        chosen = [example for _, example in examples]
        if format_name == "text":
            texts = [e.text or "" for e in chosen]
            ids = [encoding.ids for encoding in self.chat.encode(texts)]
            part.ids = _flat(ids)
            self._add_texts(part, texts, [len(row) for row in ids])
        else:
            chosen = self._add_chats(part, chosen)
        self._survey(part, chosen, sampled_below)
        return part

    def _examples(
        self, batch: Batch, format_name: str, part: Part
    ) -> Iterator[tuple[int, Example]]:
        columns = Columns() if batch.plain else self.settings.columns
        for number, row in zip(batch.numbers, batch.parsed(), strict=True):
            part.read += 1
            try:
                yield number, to_example(row, format_name, columns)
            except NotUsable as error:
                _drop(part, error, row.place)

    def _add_texts(self, part: Part, texts: list[str], lengths: list[int]) -> None:
        """Texts are learned from as a whole."""
        part.lengths = lengths
        part.spans = list(chain.from_iterable((0, n) for n in lengths))
        part.span_counts = part.answers = [1] * len(lengths)
        part.sizes = [len(text.encode()) for text in texts]

    def _add_chats(self, part: Part, examples: list[Example]) -> list[Example]:
        kept: list[tuple[int, Example, Encoded]] = []
        for number, example, result in zip(
            part.numbers, examples, self.chat(examples), strict=True
        ):
            if isinstance(result, NotUsable):
                _drop(part, result, example.place)
            elif not result.learned:
                part.without_supervision += 1
                part.dropped.add("with nothing to learn from", example.place)
            else:
                if result.cut:
                    part.cut.add("cut after the last answer that fits", example.place)
                kept.append((number, example, result))
        part.numbers = [number for number, _, _ in kept]
        rows = [row for _, _, row in kept]
        part.ids = _flat([row.ids for row in rows])
        part.lengths = [len(row.ids) for row in rows]
        part.spans = [n for row in rows for span in row.learned for n in span]
        part.span_counts = [len(row.learned) for row in rows]
        part.answers = [row.answers for row in rows]
        part.sizes = [row.learned_bytes for row in rows]
        return [example for _, example, _ in kept]

    def _survey(self, part: Part, examples: list[Example], sampled_below: int) -> None:
        """Hashes and signatures, by which rows are split, and known again."""
        texts = [example.key for example in examples]
        part.joins = part.joins or [False] * len(examples)
        part.keys = [hashed(text) for text in texts]
        part.groups = [0 if e.group is None else hashed(e.group) for e in examples]
        part.labels = [example.label for example in examples]
        order = ranks(np.array(part.keys, dtype=np.uint64), self.settings.seed)
        part.signed_rows = np.flatnonzero(order < np.uint64(sampled_below))
        part.signed = sign([texts[n] for n in part.signed_rows])
        part.questions = [0] * len(examples)
        if self.settings.questions:
            questions = [normalised(e.question) for e in examples]
            part.questions = [hashed(text) for text in questions]
            part.signed_questions = sign([questions[n] for n in part.signed_rows])

    def _blocks(self, batch: Batch, sampled_below: int) -> Part:
        """Cut a long text at line ends into blocks of about 2 KiB. It is tokenized whole, so that
        blocks which follow each other join to the tokens of the text itself."""
        part = Part()
        row: Row = next(batch.parsed())
        text, first = row.columns["text"], batch.numbers[0]
        (encoding,) = self.chat.encode([text])
        examples: list[Example] = []
        lengths: list[int] = []
        start = token = 0
        for end in _block_ends(text):
            until = _token_at(encoding, end, len(text))
            if until == token:
                continue  # a block of characters that the tokenizer leaves out
            block = text[start:end]
            line = first + text.count("\n", 0, start)
            part.numbers.append(line)
            lengths.append(until - token)
            part.joins.append(bool(examples) or not batch.starts)
            examples.append(Example(batch.place(line), text=block))
            start, token = end, until
        part.read = len(examples)
        part.ids = np.array(encoding.ids, dtype=np.int32)
        self._add_texts(part, [example.text or "" for example in examples], lengths)
        self._survey(part, examples, sampled_below)
        return part


def _drop(part: Part, error: NotUsable, place: str) -> None:
    part.dropped.add(error.reason, f"{place}: {error.detail}" if error.detail else place)


def _flat(rows: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=sum(map(len, rows)))


def _block_ends(text: str) -> Iterator[int]:
    """Where blocks end: at the first line end after BLOCK_BYTES bytes; in a longer line at a space,
    or where there is none, between two characters; and at the end."""
    start = size = 0
    for end in _line_ends(text):
        size += len(text[start:end].encode())
        start = end
        if size >= BLOCK_BYTES:
            yield end
            size = 0
    if size:
        yield len(text)


def _line_ends(text: str) -> Iterator[int]:
    """Where a text may be cut: at its line ends, and within long lines."""
    position = 0
    while position < len(text):
        end = text.find("\n", position) + 1 or len(text)
        while end - position > BLOCK_BYTES:
            space = text.find(" ", position + BLOCK_BYTES, position + 2 * BLOCK_BYTES)
            position = position + BLOCK_BYTES if space < 0 else min(space, end)
            yield position
        position = end
        yield end


def _token_at(encoding: Any, position: int, length: int) -> int:
    """The first token that begins at or after a character's position."""
    while position < length:
        token = encoding.char_to_token(position)
        if token is not None:
            chars = encoding.token_to_chars(token)
            return token if chars[0] >= position else token + 1
        position += 1
    return len(encoding)


Work = tuple[int, Batch, str]  # the file's number, a batch of it, its format
_encoder: Encoder | None = None  # of this worker


def _start_worker(tokenizer: Any, settings: Settings, parent: int) -> None:
    import ctypes
    import gc
    import signal

    global _encoder
    if sys.platform.startswith("linux"):
        # Where the parent is killed, a worker would wait for its next batch for ever.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the request was made
            os._exit(1)
    gc.disable()  # it would look through a million tokens again and again; there are no cycles
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and stops us
    _encoder = Encoder(tokenizer, settings)


def _work(batch: Batch, format_name: str, sampled_below: int) -> Part:
    assert _encoder is not None
    return _encoder(batch, format_name, sampled_below)


def encode_all(
    work: Iterable[Work], tokenizer: Any, settings: Settings, sample: Any, workers: int
) -> Iterator[tuple[int, Part]]:
    """Encode batches in order, with several processes where there is enough to do.

    Args:
        sample: its attribute `below` is read for each batch, and may fall.

    Raises:
        UserError: from reading a batch. CheckFailed: a worker was killed.
    """
    batches = iter(work)
    first = list(islice(batches, FEWEST_FOR_WORKERS))
    if workers == 1 or len(first) < FEWEST_FOR_WORKERS:
        encoder = Encoder(tokenizer, settings)
        for file, batch, format_name in chain(first, batches):
            yield file, encoder(batch, format_name, sample.below)
        return
    # Unlike multiprocessing, loky does not run the caller's script again in each worker.
    from loky import ProcessPoolExecutor
    from loky.process_executor import BrokenProcessPool

    pool = ProcessPoolExecutor(
        workers,
        timeout=10,
        initializer=_start_worker,
        initargs=(tokenizer, settings, os.getpid()),
        env=_WORKER_ENVIRONMENT,
    )
    running: deque[tuple[int, Any]] = deque()
    try:
        for file, batch, format_name in chain(first, batches):
            running.append((file, pool.submit(_work, batch, format_name, sample.below)))
            if len(running) > 3 * workers:
                file, future = running.popleft()
                yield file, future.result()
        while running:
            file, future = running.popleft()
            yield file, future.result()
    except BrokenProcessPool:
        raise CheckFailed(
            "a process that prepared data was killed: memory may have run out; try fewer with "
            "data.workers"
        ) from None
    finally:
        pool.shutdown(wait=True, kill_workers=bool(running))
