"""Causal language modelling: each token is predicted from those before it.

`Text`: continued pre-training. Every token is supervised; documents are concatenated and cut into
chunks, or kept separate. `Conversations`: supervised fine-tuning. Loss is computed on assistant
turns and their end-of-turn token only (see `chat.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_kit.base.templates import context_token, set_template
from lora_kit.data.census import NO_SUPERVISION
from lora_kit.data.examples import Examples
from lora_kit.data.formats import FORMATS, Example
from lora_kit.data.rows import Row, Rows
from lora_kit.errors import NotUsable, UserError, problems_of
from lora_kit.tasks.batches import IGNORED, collator, halves, in_one_row, labels_with_loss
from lora_kit.tasks.chat import ChatEncoder, word_encoder
from lora_kit.tasks.task import (
    Batch,
    Collate,
    Contender,
    Dropped,
    Facts,
    Processor,
    Score,
    Shown,
    Task,
)

if TYPE_CHECKING:
    import torch

    from lora_kit.adapter.load import PeftModel
    from lora_kit.base.pin import Pinned
    from lora_kit.schema import Data, Json, Run, Train
    from lora_kit.tasks.encode import Prepared

_PAIRED_ROWS = 128  # at most; held-out rows whose completions are scored after another prompt


class Causal(Task):
    """Base class of text and conversations.

    Rows: `input_ids` and `labels`, int32 (tokens,), -100 for no loss; `bytes`: UTF-8 bytes of the
    unit's supervised text, in its first row (0 in the others); `end_markers`: number of supervised
    end-of-turn and end-of-text tokens.

    Attributes:
        chat: rows are conversations: a prompt followed by a completion.
    """

    scores = ("loss", "bits_per_byte")
    flat = True
    chat = False

    def collate(self, processor: Processor, flat: bool = False) -> Collate:
        return in_one_row if flat else collator(processor.pad_token_id)

    def items(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def loss(
        self, model: torch.nn.Module, batch: Batch, items: int | torch.Tensor, train: Train
    ) -> torch.Tensor:
        """Cross entropy in nats over all supervised tokens of the step: transformers' own loss."""
        loss: torch.Tensor = model(**batch, num_items_in_batch=items).loss
        return loss

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        return [(part, 1.0) for part, _ in halves(batch)]

    def supervised(self, rows: Rows) -> int:
        return labels_with_loss(rows, "labels")

    def score(
        self, model: Any, rows: Rows, processor: Processor, facts: Facts, run: Run
    ) -> list[Score]:
        """Nats per supervised token, and bits per byte of the supervised text."""
        from lora_kit.tasks.answers import completion_scores, drawn
        from lora_kit.tasks.measure import ROWS_AT_ONCE, measure

        train = run.train
        most = min(train.per_device_train_batch_size, train.per_device_eval_batch_size)
        at_once = min(ROWS_AT_ONCE, most)
        scores = measure(model, rows, processor.pad_token_id, at_once).scores()
        names = run.prove.metrics
        if names:
            numbers = drawn(rows, run.prove.answers, run.seed)
            scores += completion_scores(model, rows, self.chat, processor, names, numbers)
        return scores

    def check(self, data: Prepared, processor: Processor, facts: Facts, run: Run) -> list[str]:
        from lora_kit.tasks import answers, metrics

        problems, names = [], run.prove.metrics
        if not self.supervised(data.eval):
            problems.append("data.eval: no row has two tokens, so there is nothing to predict")
        problems += problems_of(metrics.check_names, names, self.chat)
        if "accuracy" in names:
            held_out = answers.answers_of(data.eval, self.chat, processor)
            trained = answers.answers_of(data.rows("train"), self.chat, processor)
            problems += problems_of(metrics.check_classes, held_out, trained)
        if names and run.data.supervise == "all":
            problems.append(
                "prove.metrics: with data.supervise: all there is no completion to score"
            )
        return problems

    def rivals(
        self, model: PeftModel, data: Prepared, processor: Processor, facts: Facts, run: Run
    ) -> list[Contender]:
        """The base with `prove.shots` training rows in its prompt, if they fit."""
        from lora_kit.tasks import answers, few_shot
        from lora_kit.tasks.measure import positions

        longest = int(data.eval.sizes("input_ids").max())
        if run.prove.metrics:
            longest += answers.BEYOND_REFERENCE  # of a generated completion
        examples = few_shot.choose_examples(
            data.rows("train"), longest, positions(model), run.prove.shots, self.chat, run.seed
        )
        if not examples:
            return []
        opening = few_shot.opening(processor) if self.chat else []

        def longer(rows: Rows) -> Rows:
            return few_shot.after_examples(rows, examples, opening)

        first = data.eval.select([0])
        tokens = int(longer(first).sizes("input_ids")[0] - first.sizes("input_ids")[0])
        about = {"shots": len(examples), "tokens": tokens}
        return [Contender("few_shot", model.disable_adapter, longer, about)]

    def examine(
        self,
        model: PeftModel,
        data: Prepared,
        scores: Mapping[str, list[Score]],
        processor: Processor,
        facts: Facts,
        run: Run,
    ) -> Json:
        from lora_kit.tasks import answers, metrics
        from lora_kit.tasks.pairing import prompt_use

        found: Json = {"prompt_use": None}
        for score in scores["adapted"]:
            if score.name == "accuracy":
                known = answers.answers_of(data.rows("train"), self.chat, processor)
                known += answers.answers_of(data.eval, self.chat, processor)
                found["classes"] = metrics.classes(*metrics.confusion(known, **score.about))
        if run.prove.shots and "few_shot" not in scores:
            found["not_measured"] = ["few_shot: the base's context is too short for examples"]
        rows = data.eval
        if self.chat:
            order = np.random.default_rng(run.seed).permutation(len(rows))[:_PAIRED_ROWS]
            # With a supervised prompt there is no separate completion.
            apart = [n for n in order.tolist() if rows.cell("labels", n)[0] == IGNORED]
            questions = [answers.question(rows[n], self.chat) for n in apart]
            if questions:
                pad = processor.pad_token_id
                found["prompt_use"] = prompt_use(model, pad, questions, run.seed)
        base, adapted = scores["base"][0], scores["adapted"][0]
        found["samples"] = answers.samples(model, rows, self.chat, processor, base, adapted)
        return found

    def objection(self, report: Json) -> str | None:
        """The loss can improve by the frequency of completions alone, without using the prompt."""
        used = report.get("prompt_use")
        return "completions hardly depend on their prompts" if used and used["blind"] else None

    def show(self, row: Row, processor: Processor, facts: Facts) -> list[Shown]:
        # The first token of a row is not predicted.
        trained = [False, *(row["labels"][1:] != IGNORED).tolist()]
        return [Shown("", row["input_ids"].tolist(), trained)]


class Text(Causal):
    """Continued pre-training on raw text.

    `encode` makes the rows for evaluation: windows of train.max_length tokens of one document, in
    which every token is scored once. The first window begins with the beginning-of-text token if
    the tokenizer adds one, else with the end-of-text token; later ones with the last token of the
    previous window. `arrange` makes the training rows from them.

    More columns: `joins`: the document continues the previous example's text (a long text is read
    in parts); `length`: training tokens of the document, in its first row.
    """

    formats = ("text",)
    unread = (
        "data.chat_template",
        "data.labels",
        "data.supervise",
        "prove.metrics",
        "prove.answers",
    )

    def facts(self, train: Examples, data: Data) -> Facts:
        return {"kind": "text", "joiner": ""}

    def encode(
        self, examples: Sequence[Example], processor: Processor, facts: Facts, run: Run
    ) -> Iterator[list[Row] | Dropped]:
        begin = context_token(processor)
        # Training adds an end-of-text token, and a beginning-of-text token if the tokenizer does.
        closing = 2 if begin == [processor.bos_token_id] else 1
        for example, tokens in zip(examples, _tokens(examples, processor), strict=True):
            if not len(tokens):
                yield Dropped("without any token")
                continue
            stream = np.concatenate([begin, tokens]).astype(np.int32)
            size = len((example.text or "").encode())
            length = len(tokens) if example.joins else len(tokens) + closing
            rows: list[Row] = []
            for window in _windows(stream, run.train.max_length):
                first = not rows
                rows.append(
                    {
                        **_scored_but_first(window),
                        "bytes": size if first else 0,
                        "end_markers": 0,
                        "joins": example.joins,
                        "length": length if first else 0,
                    }
                )
            yield rows

    def arrange(
        self, rows: Rows, replayed: Rows | None, processor: Processor, facts: Facts, run: Run
    ) -> Iterator[Row]:
        """Each text ends with the end-of-text token, which is supervised.

        running: all texts are concatenated and cut into rows of `train.max_length` tokens. none,
        documents: each text separately, longer ones in windows. Replayed text comes last; the
        trainer shuffles rows.
        """
        sources = [rows] if replayed is None else [rows, replayed]
        length = run.train.max_length
        if self.packing(run.data) == "running":
            yield from _running(sources, processor, length)
        else:
            for some in sources:
                yield from _closed(some, processor, length)

    def packing(self, data: Data) -> str:
        return data.packing or "running"


Text.general = Text()


class Conversations(Causal):
    """Supervised fine-tuning on conversations, and on rows that are converted to them.

    Uses the tokenizer's chat template; a base without one is trained on prompt, completion and
    end-of-text token, or with `data.chat_template`.
    """

    formats = tuple(name for name, known in FORMATS.items() if known.recipe == "sft")
    unread = ()
    general = Text()
    chat = True

    def packing(self, data: Data) -> str:
        return data.packing or "none"

    def notes(self, formats: set[str], facts: Facts) -> list[str]:
        if "preference" not in formats:
            return []
        return ["preference rows: only the chosen completions are trained on"]

    def processor(self, pinned: Pinned, data: Data) -> Processor:
        if data.packing == "running":
            raise UserError(
                "data.packing: running is for text: use none or documents for conversations"
            )
        tokenizer = super().processor(pinned, data)
        set_template(tokenizer, data.chat_template)
        return tokenizer

    def facts(self, train: Examples, data: Data) -> Facts:
        return {"kind": "chat", "joiner": next(iter(train)).joiner}

    def encode(
        self, examples: Sequence[Example], processor: Processor, facts: Facts, run: Run
    ) -> Iterator[list[Row] | Dropped]:
        encoder = chat_encoder(processor, run.data.supervise, run.train.max_length)
        for found in encoder(list(examples)):
            if isinstance(found, NotUsable):
                yield Dropped(found.reason, found.detail, found.length)
            elif not found.supervised:
                yield Dropped(NO_SUPERVISION)
            else:
                ids, labels = found.ids_and_labels()
                cut = "cut after the last completion that fits" if found.cut_from else ""
                row = {
                    "input_ids": ids,
                    "labels": labels,
                    "bytes": found.supervised_bytes,
                    "end_markers": found.completions,
                    "truncated": cut,
                    "cut_from": found.cut_from,
                }
                yield [row]

    def arrange(
        self, rows: Rows, replayed: Rows | None, processor: Processor, facts: Facts, run: Run
    ) -> Iterable[Row] | None:
        if replayed is None:
            return None
        own = ({name: row[name] for name in _TRAINED} for row in rows)
        return chain(own, _closed(replayed, processor, run.train.max_length))


# The columns of a row that general text for replay has as well.
_TRAINED = ("input_ids", "labels", "bytes", "end_markers", "file", "number")


@functools.lru_cache(maxsize=2)
def chat_encoder(processor: Processor, supervise: str, max_length: int) -> ChatEncoder:
    """The encoder of a tokenizer, with its caches of template pieces and words."""
    return ChatEncoder(processor, supervise, max_length)


_cached_words = functools.lru_cache(maxsize=2)(word_encoder)


def _tokens(examples: Sequence[Example], processor: Processor) -> list[Sequence[int]]:
    """The tokens of each text. Parts of one text are tokenized together, so that their tokens
    concatenate to those of the text."""
    texts: list[list[str]] = []
    for example in examples:
        if not example.joins or not texts:
            texts.append([])
        texts[-1].append(example.text or "")
    found: list[Sequence[int]] = []
    encodings = _cached_words(processor)(["".join(parts) for parts in texts])
    for parts, encoding in zip(texts, encodings, strict=True):
        if len(parts) == 1:
            found.append(encoding.ids)
            continue
        end, token, whole = 0, 0, sum(map(len, parts))
        for part in parts:
            end += len(part)
            until = _token_at(encoding, end, whole)
            found.append(encoding.ids[token:until])
            token = until
    return found


def _token_at(encoding: Any, position: int, length: int) -> int:
    """The first token that begins at or after a character's position."""
    while position < length:
        token = encoding.char_to_token(position)
        if token is not None:
            chars = encoding.token_to_chars(token)
            return token if chars[0] >= position else token + 1
        position += 1
    return len(encoding)


def _windows(stream: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Windows of at most `length` tokens. Each begins with the last token of the previous one, so
    that every token but the first of the stream is scored once."""
    for start in range(0, max(1, len(stream) - 1), length - 1):
        yield stream[start : start + length]


def _scored_but_first(window: np.ndarray) -> Row:
    labels = window.copy()
    labels[0] = IGNORED
    return {"input_ids": window, "labels": labels}


def _documents(rows: Rows, processor: Processor) -> Iterator[tuple[np.ndarray, Row]]:
    """Each text with its begin and end tokens, int32 (tokens,), and its place: `file` and `number`.
    Windows of a document and parts of a text (`joins`) are concatenated again."""
    begin = context_token(processor)
    begin = begin if begin == [processor.bos_token_id] else []
    end = [processor.eos_token_id]
    parts: list[np.ndarray] = []
    place: Row = {}
    before = unit = -1  # example and unit of the previous row
    units, examples = rows.column("unit"), rows.column("example")
    for number in range(len(rows)):
        tokens = rows.cell("input_ids", number)[1:]  # the first one is context (see `Text`)
        if units[number] != unit:
            follows = rows.cell("joins", number) and examples[number] == before + 1
            if parts and not follows:
                yield np.concatenate([begin, *parts, end]).astype(np.int32), place
                parts = []
            if not parts:
                place = {name: rows.cell(name, number) for name in ("file", "number")}
        parts.append(tokens)
        unit, before = units[number], examples[number]
    if parts:
        yield np.concatenate([begin, *parts, end]).astype(np.int32), place


def _closed(rows: Rows, processor: Processor, length: int) -> Iterator[Row]:
    """Separate texts, longer ones in windows, each ending with the end-of-text token."""
    for stream, place in _documents(rows, processor):
        if len(stream) < 2:  # a single token predicts nothing
            continue
        left = len(stream) - 1
        for window in _windows(stream, length):
            left -= len(window) - 1
            yield {**_scored_but_first(window), "bytes": 0, "end_markers": int(left == 0), **place}


def _running(sources: Sequence[Rows], processor: Processor, length: int) -> Iterator[Row]:
    """All texts concatenated, each ending with the end-of-text token, cut into chunks."""
    # Tokens that are not yet in a chunk, which of them end a text, and the place of the first.
    left, closed = np.zeros(0, np.int32), np.zeros(0, bool)
    left_place: Row = {}

    def chunk(size: int) -> Row:
        ids = left[:size]
        markers = int(closed[:size].sum())
        return {"input_ids": ids, "labels": ids, "bytes": 0, "end_markers": markers, **left_place}

    for rows in sources:
        for stream, place in _documents(rows, processor):
            if not len(left):
                left_place = place
            closes = np.zeros(len(stream), dtype=bool)
            closes[-1] = True
            left, closed = np.concatenate([left, stream]), np.concatenate([closed, closes])
            while len(left) >= length:
                yield chunk(length)
                left, closed, left_place = left[length:], closed[length:], place
    if len(left) > 1:
        yield chunk(len(left))
