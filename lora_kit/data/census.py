"""The census: how many rows were read, kept, dropped and leaked, and the limits that stop a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np

from lora_kit.data.formats import REJECTED
from lora_kit.data.marks import EXCLUDED
from lora_kit.errors import UserError
from lora_kit.schema import Json, Limits

NO_SUPERVISION = "without supervised tokens"  # data.limits.without_supervision counts them
LEAKED = "that are also in data.train"  # rows of data.eval: data.limits.exact_leaks counts them

_MEANT = (LEAKED, REJECTED, EXCLUDED)  # beginnings of reasons that are meant by the data
_SUMMED = (
    "rows_read", "rows_kept", "unused", "samples", "tokens", "supervised_tokens",
    "samples_without_supervision", "end_markers_supervised",
)  # fmt: skip


@dataclass
class Count:
    """Counts of one use of the data: training rows, held-out rows, or general text.

    A row can be encoded as several samples, such as the windows of a long text.
    `rows_read` = `rows_kept` + the sum of `dropped` + `unused`, the rows not needed for the
    fractions of a mixture. `first`: the place of the first row for each reason. `lengths`: a
    histogram, pairs of (most tokens, rows); a row that is too long is in it as it was read.
    `too_long`: {tokens: rows} of those that are dropped or cut for their length.
    """

    rows_read: int = 0
    rows_kept: int = 0
    unused: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    samples_without_supervision: int = 0
    end_markers_supervised: int = 0
    longest: int = 0
    lengths: list[tuple[int, int]] = field(default_factory=list)
    too_long: dict[str, int] = field(default_factory=dict)

    @property
    def labels_are_tokens(self) -> bool:
        """Whether labels are tokens; otherwise each sample has one label, such as its class.

        Inferred from the counts, which is all that a stored census has.
        """
        return bool(self.end_markers_supervised) or self.supervised_tokens != self.samples

    def count_lost(
        self, reason: str, place: str, rows: int = 1, what: str = "dropped", length: int = 0
    ) -> None:
        """Count rows that are dropped or truncated (`what`); `place` is that of the first one, and
        `length` the train.max_length that would keep them."""
        counts = getattr(self, what)
        counts[reason] = counts.get(reason, 0) + rows
        self.first.setdefault(reason, place)
        if length:
            self.too_long[str(length)] = self.too_long.get(str(length), 0) + rows

    def dropped_text(self) -> str:
        """The dropped rows by reason, each with the place of the first one."""
        return "; ".join(f"{n} {why} (first: {self.first[why]})" for why, n in self.dropped.items())

    def __add__(self, other: Count) -> Count:
        """The sum of both, without the histogram of lengths."""
        total = Count(
            dropped=dict(Counter(self.dropped) + Counter(other.dropped)),
            truncated=dict(Counter(self.truncated) + Counter(other.truncated)),
            too_long=dict(Counter(self.too_long) + Counter(other.too_long)),
            first=other.first | self.first,
        )
        for name in _SUMMED:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def fitting(self, positions: int) -> str:
        """How many rows three values of train.max_length keep whole: two that fit rows which are
        too long now, and the base's limit, if it is known."""
        lengths = self._too_long()
        within = lengths[lengths <= positions] if positions else lengths
        values: list[int] = []
        if len(within):
            values = np.unique(np.quantile(within, (0.5, 0.95, 1), method="higher")).tolist()
        if positions:
            values = sorted({*values[-2:], positions})
        lost = sum(self.dropped.values()) + sum(self.truncated.values())
        kept = [(n, self.rows_read - lost + int((lengths <= n).sum())) for n in values]
        named = {positions: " (the base's limit)"}
        return ", ".join(f"{n}{named.get(n, '')} keeps {rows:,} rows" for n, rows in kept)

    def _too_long(self) -> np.ndarray:
        """int64 (rows,): the lengths of `too_long`."""
        return np.repeat([int(n) for n in self.too_long], [*self.too_long.values()])

    def measure(self, tokens: np.ndarray, supervised: int, cut: np.ndarray | None = None) -> None:
        """Set the counts of samples.

        Args:
            tokens: int64 (samples,). supervised: how many of them all are supervised.
            cut: bool (samples,), those that are in `too_long`; None: the samples are no rows.
        """
        self.samples = len(tokens)
        self.tokens, self.supervised_tokens = int(tokens.sum()), supervised
        self.longest = int(tokens.max(initial=0))
        whole = tokens
        if cut is not None and self.too_long:
            whole = np.concatenate([tokens[~cut], self._too_long()])
        self.lengths = histogram(whole, int(whole.max(initial=0)))


class Leak(TypedDict):
    """The rows of one source that are training rows too. `near` excludes the exact ones; `first_*`:
    the places of the first such row and of its training row, or ""."""

    rows: int
    exact: int
    near: int
    first_exact: str
    first_near: str


@dataclass
class Census:
    """The counts that `preview` shows, the log prints and the run directory keeps as census.json.

    `duplicates`: rows of data.train that repeat an earlier one. `leaks`: rows of the files of
    data.eval or data.decontaminate that are also in data.train; `rows` of them were checked, for
    near duplicates against `compared` of the training rows. `held_out`: data.eval is a share.
    `positions`: the most tokens that the base takes; 0: unknown.
    """

    train: Count = field(default_factory=Count)
    eval: Count = field(default_factory=Count)
    general: Count = field(default_factory=Count)
    held_out: bool = False
    duplicates: dict[str, int] = field(default_factory=lambda: {"exact": 0, "near": 0})
    leaks: dict[str, Leak] = field(default_factory=dict)
    compared: int = 0
    positions: int = 0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> Json:
        """Totals over train and eval as `rows_read`, ...; and each of the three uses."""
        both = self.train + self.eval
        totals = {name: getattr(both, name) for name in (*_SUMMED, "dropped", "truncated")}
        totals["supervised_share"] = round(both.supervised_tokens / max(1, both.tokens), 4)
        totals["duplicates"] = self.duplicates
        totals["leaks"] = {
            "exact": sum(leak["exact"] for leak in self.leaks.values()),
            "near": sum(leak["near"] for leak in self.leaks.values()),
        }
        return totals | asdict(self) | {"leaks": totals["leaks"], "leaks_by_source": self.leaks}

    @classmethod
    def from_json(cls, values: Json) -> Census:
        names = ("held_out", "duplicates", "compared", "positions", "notes")
        rest: dict[str, Any] = {name: values[name] for name in names}
        rest |= {name: Count(**values[name]) for name in ("train", "eval", "general")}
        return cls(**rest, leaks=values["leaks_by_source"])

    def problems(self, limits: Limits) -> list[str]:
        """The exceeded limits of `data.limits`, each with the key that raises it."""
        found = []
        # A held-out share is part of data.train, and has too few rows for limits of its own.
        parts = {"data.train": self.train, "data.eval": self.eval, "data.general": self.general}
        if self.held_out:
            parts |= {"data.train": self.train + self.eval, "data.eval": Count()}
        for name, count in parts.items():
            read = count.rows_read
            for what, limit in (("dropped", limits.dropped), ("truncated", limits.truncated)):
                reasons: dict[str, int] = getattr(count, what)
                lost = {r: n for r, n in reasons.items() if not r.startswith(_MEANT)}
                total = sum(lost.values())
                if read and total > limit * read:
                    most = max(lost, key=lost.__getitem__)
                    long = "train.max_length" in most or what == "truncated"
                    fix = "raise train.max_length" if long else "fix them"
                    if long and count.too_long:
                        fix += f" ({count.fitting(self.positions)})"
                    found.append(
                        f"{name}: {total:,} of {read:,} rows ({total / read:.1%}) are {what}, most "
                        f"of them {most} (first: {count.first[most]}); the limit is {limit:.1%}: "
                        f"{fix}, or raise data.limits.{what}"
                    )
            if count.samples_without_supervision > limits.without_supervision:
                found.append(
                    f"{name}: {count.samples_without_supervision:,} rows are without supervised "
                    f"tokens (first: {count.first[NO_SUPERVISION]}): remove them, or raise "
                    "data.limits.without_supervision"
                )
        for source, leak in self.leaks.items():
            if leak["exact"] > limits.exact_leaks:
                found.append(
                    f"{source}: {leak['exact']:,} of {leak['rows']:,} rows are training rows too "
                    f"(first: {leak['first_exact']}): remove them from one side, or raise "
                    "data.limits.exact_leaks"
                )
            if leak["near"] > limits.near_leaks * leak["rows"]:
                found.append(
                    f"{source}: {leak['near']:,} of {leak['rows']:,} rows are nearly training rows "
                    f"(first: {leak['first_near']}); the limit is {limits.near_leaks:.1%}: remove "
                    "them, or raise data.limits.near_leaks"
                )
        return found

    def check(self, limits: Limits) -> None:
        """Raises UserError with one line per exceeded limit."""
        problems = self.problems(limits)
        if problems:
            raise UserError("\n".join(problems))

    def lines(self) -> list[str]:
        """The census as lines of text."""
        lines = []
        for name, count in (("train", self.train), ("eval", self.eval), ("general", self.general)):
            if not (count.rows_read or count.rows_kept):
                continue
            share = count.supervised_tokens / max(1, count.tokens)
            line = f"{name}: {count.rows_read:,} rows read, {count.rows_kept:,} kept"
            line += f", {count.unused:,} not needed for the mixture" if count.unused else ""
            line += f"; {count.tokens:,} tokens, "
            if count.labels_are_tokens:
                ends = f"{count.end_markers_supervised:,} of them end-of-turn tokens"
                line += f"{count.supervised_tokens:,} ({share:.0%}) supervised, {ends}"
            else:
                line += "one label per row"
            lines.append(f"{line}; longest {count.longest:,}")
            for what in ("dropped", "truncated"):
                for reason, number in getattr(count, what).items():
                    lines.append(f"  {what}: {number:,} {reason} (first: {count.first[reason]})")
        exact, near = self.duplicates["exact"], self.duplicates["near"]
        lines.append(f"duplicates in train: {exact:,} exact, {near:,} near")
        for source, leak in self.leaks.items():
            lines.append(
                f"leaks: {source}: {leak['exact']:,} exact, {leak['near']:,} near of "
                f"{leak['rows']:,} rows"
            )
        return lines + [f"note: {note}" for note in self.notes]


def histogram(lengths: np.ndarray, longest: int) -> list[tuple[int, int]]:
    """(most tokens, rows) of at most twelve ranges of equal width up to `longest`."""
    edges = np.unique(np.linspace(0, max(longest, 1), 13).round().astype(int))
    return [
        (int(b), int(((lengths > a) & (lengths <= b)).sum())) for a, b in pairwise(edges.tolist())
    ]
