"""One batch of raw rows -> tokens, hashes and signatures, in this process or in several.

Nothing here knows of other batches, so the result is the same for any number of workers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from lora_kit.data.census import Count
from lora_kit.data.duplicates import UNSIGNED, hashed, ranks, sign
from lora_kit.data.formats import Columns, Example, normalised, to_example
from lora_kit.data.readers import Batch, Row
from lora_kit.errors import CheckFailed, NotUsable
from lora_kit.tasks.chat import ChatEncoder, Encoded

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


@dataclass(frozen=True)
class Part:
    """What became of a batch. Row i has the tokens ids[sum(lengths[:i]):][:lengths[i]].

    columns: by name, of each row (`table` says of what types): lengths; spans: pairs (first, last
    + 1) of learned tokens, span_counts of them a row; sizes: bytes they spell; answers; numbers;
    labels; keys, questions, groups: hashes; joins: the row goes on where the one before it ended.
    signed: of the rows below the sample's rank.
    """

    ids: np.ndarray
    columns: dict[str, list[Any]]
    signed_rows: np.ndarray
    signed: np.ndarray
    signed_questions: np.ndarray
    count: Count


class _Row(NamedTuple):
    number: int
    example: Example
    encoded: Encoded
    joins: bool = False


class Encoder:
    """Turns batches into parts with a tokenizer."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.settings = settings
        self.chat = ChatEncoder(tokenizer, settings.supervise, settings.max_length)

    def __call__(self, batch: Batch, format_name: str, sampled_below: int) -> Part:
        """Encode a batch.

        Args:
            format_name: of `formats.FORMATS`.
            sampled_below: rows whose rank is lower get a signature.
        """
        count = Count()
        if batch.whole:
            rows = self._blocks(batch, count)
        else:
            examples = list(self._examples(batch, format_name, count))
            rows = self._texts(examples) if format_name == "text" else self._chats(examples, count)
        return self._part(list(rows), count, sampled_below)

    def _examples(
        self, batch: Batch, format_name: str, count: Count
    ) -> Iterator[tuple[int, Example]]:
        columns = Columns() if batch.plain else self.settings.columns
        for number, row in zip(batch.numbers, batch.parsed(), strict=True):
            count.rows_read += 1
            try:
                yield number, to_example(row, format_name, columns)
            except NotUsable as error:
                _drop(count, error, row.place)

    def _texts(self, examples: list[tuple[int, Example]]) -> Iterator[_Row]:
        texts = [example.text or "" for _, example in examples]
        for (number, example), encoding in zip(examples, self.chat.encode(texts), strict=True):
            yield _Row(number, example, _whole(encoding.ids, example))

    def _chats(self, examples: list[tuple[int, Example]], count: Count) -> Iterator[_Row]:
        results = self.chat([example for _, example in examples])
        for (number, example), result in zip(examples, results, strict=True):
            if isinstance(result, NotUsable):
                _drop(count, result, example.place)
            elif not result.learned:
                count.samples_without_supervision += 1
                count.lose("with nothing to learn from", example.place)
            else:
                if result.cut:
                    reason = "cut after the last answer that fits"
                    count.lose(reason, example.place, what="truncated")
                yield _Row(number, example, result)

    def _blocks(self, batch: Batch, count: Count) -> Iterator[_Row]:
        """Cut a long text at line ends into blocks of about 2 KiB. It is tokenized whole, so that
        blocks which follow each other join to the tokens of the text itself."""
        row: Row = next(batch.parsed())
        text, line = row.columns["text"], batch.numbers[0]
        (encoding,) = self.chat.encode([text])
        ids, start, token = encoding.ids, 0, 0
        for end in _block_ends(text):
            until = _token_at(encoding, end, len(text))
            if until == token:
                continue  # a block of characters that the tokenizer leaves out
            example = Example(batch.place(line), text=text[start:end])
            encoded = _whole(ids[token:until], example)
            yield _Row(line, example, encoded, joins=token > 0 or not batch.starts)
            count.rows_read += 1
            line += text.count("\n", start, end)
            start, token = end, until

    def _part(self, found: list[_Row], count: Count, sampled_below: int) -> Part:
        """Rows as a part: tokens, and the hashes and signatures by which rows are split, and
        known again."""
        examples, rows = [row.example for row in found], [row.encoded for row in found]
        texts = [example.key for example in examples]
        keys = [hashed(text) for text in texts]
        order = ranks(np.array(keys, dtype=np.uint64), self.settings.seed)
        signed_rows = np.flatnonzero(order < np.uint64(sampled_below))
        questions, signed_questions = [0] * len(rows), UNSIGNED
        if self.settings.questions:
            asked = [normalised(example.question) for example in examples]
            questions = [hashed(text) for text in asked]
            signed_questions = sign([asked[n] for n in signed_rows])
        ids = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.int32)
        columns: dict[str, list[Any]] = {
            "lengths": [len(row.ids) for row in rows],
            "spans": [n for row in rows for span in row.learned for n in span],
            "span_counts": [len(row.learned) for row in rows],
            "answers": [row.answers for row in rows],
            "sizes": [row.learned_bytes for row in rows],
            "numbers": [row.number for row in found],
            "keys": keys,
            "questions": questions,
            "groups": [0 if e.group is None else hashed(e.group) for e in examples],
            "labels": [example.label for example in examples],
            "joins": [row.joins for row in found],
        }
        signed = sign([texts[n] for n in signed_rows])
        return Part(ids, columns, signed_rows, signed, signed_questions, count)


def _whole(ids: list[int], example: Example) -> Encoded:
    """A text is learned from as a whole."""
    return Encoded(ids, [(0, len(ids))], 1, len((example.text or "").encode()))


def _drop(count: Count, error: NotUsable, place: str) -> None:
    count.lose(error.reason, f"{place}: {error.detail}" if error.detail else place)


def _block_ends(text: str) -> Iterator[int]:
    """Where blocks end: at the first line end after BLOCK_BYTES bytes; in a longer line at a space,
    or where there is none, between two characters; and at the end."""
    raw = text.encode()
    start = characters = 0
    while start < len(raw):
        least, most = start + BLOCK_BYTES, start + 2 * BLOCK_BYTES
        end = raw.find(b"\n", least - 1, most) + 1 or raw.find(b" ", least, most)
        if end < least:
            end = least
            while end < len(raw) and raw[end] & 0xC0 == 0x80:  # inside a character
                end += 1
        characters += len(raw[start:end].decode())
        start = end
        yield characters


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
