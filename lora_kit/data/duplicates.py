"""Exact duplicates, by a hash, and near duplicates, by MinHash.

Two texts are near duplicates if the sets of their five-byte shingles (after `formats.normalised`)
have a Jaccard similarity of at least NEAR: about one word in twelve differs, or one word in shorter
texts. Signatures are rensa's R-MinHash; candidates share a band of BAND positions (Leskovec,
Rajaraman, Ullman: Mining of Massive Datasets, chapter 3) and are confirmed by the share of equal
positions in their whole signatures, which estimates the similarity.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

NEAR = 0.7
ONE_WORD = 12  # shingles that change with one word of eight letters
LARGEST_CLUSTER, LARGEST_SHARE = 20, 0.05  # largest cluster: rows, or share of all rows
POSITIONS = 128  # of a signature: the estimate's standard error is 0.04 at 0.7
BAND = 4  # 32 bands of 4: a pair at 0.7 is a candidate with 99.98%
SHINGLE = 5  # bytes
UNSIGNED = np.zeros((0, POSITIONS + 1), np.uint32)  # the signatures of no texts
_AT_ONCE = 2**15  # pairs of signatures compared at a time: 32 MB
LONGEST = 2**16  # bytes of a text that are compared, from its beginning
# Most texts with a signature (512 bytes each); of more, those of lowest rank are a sample.
LARGEST_SAMPLE = 150_000


def hashed(text: str, seed: int | None = None) -> int:
    """64-bit BLAKE2b hash; 5 million texts have a collision with a probability of 1e-6."""
    key = b"" if seed is None else seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
    return int.from_bytes(digest.digest(), "little")


def ranks(keys: np.ndarray, seed: int) -> np.ndarray:
    """uint64 (rows,): a pseudorandom order that depends only on the seed and the rows' hashes.

    SplitMix64's finalizer (Steele, Lea, Flood 2014).
    """
    x = keys ^ np.uint64(hashed("rank", seed))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def are_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool (texts,): whether each signature of `a` is a near duplicate of that in `b`; if `a` has
    only one, it is compared with all of `b`."""
    smaller = np.minimum(a[:, POSITIONS], b[:, POSITIONS]).astype(np.int64)
    # The Jaccard similarity of two texts of so many shingles that differ in one word.
    least = np.clip((smaller - ONE_WORD) / (smaller + ONE_WORD), 0.5, NEAR)
    return (a[:, :POSITIONS] == b[:, :POSITIONS]).mean(axis=1) >= least


def sign(texts: list[str]) -> np.ndarray:
    """MinHash signatures of normalised texts: uint32, (texts, POSITIONS + 1); the last column is
    the number of shingles."""
    import rensa

    if not texts:
        return UNSIGNED
    padded = [text.encode("utf-8", "surrogatepass")[:LONGEST].ljust(SHINGLE) for text in texts]
    starts = np.cumsum([0, *map(len, padded)])
    flat = np.frombuffer(b"".join(padded), dtype=np.uint8)
    shingles = np.zeros(len(flat) - SHINGLE + 1, dtype=np.uint64)
    for n in range(SHINGLE):
        shingles = (shingles << np.uint64(8)) | flat[n : n + len(shingles)]
    shingles *= np.uint64(0x9E3779B97F4A7C15)  # spread over all 64 bits
    shingles ^= shingles >> np.uint64(32)
    # Drop shingles that span two texts.
    ends = starts[1:, None] - np.arange(1, SHINGLE)
    inside = np.ones(len(flat), dtype=bool)
    inside[ends.ravel()] = False
    offsets = starts - (SHINGLE - 1) * np.arange(len(starts))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles[inside[: len(shingles)]], offsets.astype(np.uint64), POSITIONS, 0
    )
    values = np.array(matrix.to_rows(), dtype=np.uint32)
    return np.column_stack([values, np.diff(offsets).astype(np.uint32)])


@dataclass(frozen=True)
class Signatures:
    """MinHash signatures of a sample of examples: those of lowest rank.

    Attributes:
        rows: int64 (sampled,): indices of the examples. ranks: uint64 (sampled,).
        texts: signatures of their texts, as returned by `sign`.
        questions: of their prompts; of no texts unless data.decontaminate is set.
    """

    rows: np.ndarray
    ranks: np.ndarray
    texts: np.ndarray
    questions: np.ndarray

    def below(self, rank: int) -> Signatures:
        """Those of examples with a lower rank."""
        low = self.ranks < np.uint64(rank)
        questions = self.questions[low] if len(self.questions) else self.questions
        return Signatures(self.rows[low], self.ranks[low], self.texts[low], questions)


class SignatureSample:
    """Collects the signatures of one use of the data; examples whose rank is not under `below`
    need none."""

    def __init__(self) -> None:
        self.below = 2**64 - 1
        self._parts: list[Signatures] = []
        self._count = 0

    def add(self, part: Signatures, first: int) -> None:
        """Add the signatures of a batch that begins with example `first`."""
        kept = part.below(self.below)  # a worker may have started before it was lowered
        self._parts.append(replace(kept, rows=kept.rows + first))
        self._count += len(kept.rows)
        if self._count > LARGEST_SAMPLE:
            # Halve the sample. The remaining rows do not depend on when this happens.
            self.below //= 2
            self._parts = [part.below(self.below) for part in self._parts]
            self._count = sum(len(part.rows) for part in self._parts)

    def collected(self) -> Signatures:
        """All signatures, in reading order."""
        none = Signatures(np.zeros(0, np.int64), np.zeros(0, np.uint64), UNSIGNED, UNSIGNED)
        parts = [none, *self._parts]
        return Signatures(
            rows=np.concatenate([part.rows for part in parts]),
            ranks=np.concatenate([part.ranks for part in parts]),
            texts=np.concatenate([part.texts for part in parts]),
            questions=np.concatenate([part.questions for part in parts]),
        )


def repeated(keys: np.ndarray) -> np.ndarray:
    """bool (rows,): whether a row is an exact duplicate of an earlier one."""
    return _first_equal(keys) != np.arange(len(keys))


def clusters(keys: np.ndarray, signed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Connected components of exact and near duplicates.

    Args:
        keys: uint64 of every row. signed: signatures of some rows. rows: indices of those rows.

    Returns:
        int64 (rows,): the first row of each row's cluster.
    """
    roots = _first_equal(keys)
    pairs = near_pairs(signed)
    return union_clusters(roots, rows[pairs[:, 0]], rows[pairs[:, 1]])


def split_large_clusters(roots: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`clusters`, with large ones split into exact duplicates: int64 (rows,).

    A long instruction that many rows share makes them all near duplicates, and one such cluster
    could not be split. Real near duplicates form smaller clusters.
    """
    sizes = np.bincount(roots, minlength=len(roots))[roots]
    large = sizes > max(LARGEST_CLUSTER, LARGEST_SHARE * len(roots))
    return np.where(large, _first_equal(keys), roots)


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """int64 (rows,): the first row with the same key."""
    first, inverse = np.unique(keys, return_index=True, return_inverse=True)[1:]
    return first[inverse]


def union_clusters(roots: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Merge the clusters of rows a[i] and b[i], for every i; the first row of each is its root.

    Vectorised union-find: each root takes the lowest root it is linked to, until none changes.
    """
    roots = roots.copy()
    while True:
        left, right = roots[a], roots[b]
        if np.array_equal(left, right):
            return roots
        lowest = np.minimum(left, right)
        np.minimum.at(roots, left, lowest)
        np.minimum.at(roots, right, lowest)
        while not np.array_equal(roots[roots], roots):
            roots = roots[roots]


def near_pairs(signed: np.ndarray) -> np.ndarray:
    """Pairs of near duplicates: int64, (pairs, 2), the smaller index first.

    Among texts that share a band only neighbours are compared: not every pair is listed, but the
    pairs connect each cluster.
    """
    roots = np.arange(len(signed))
    found = [np.zeros((0, 2), dtype=np.int64)]
    # Neighbours are determined by content, not by row order.
    by_content = np.argsort(_row_hashes(signed[:, :POSITIONS]), kind="stable")
    for start in range(0, POSITIONS, BAND):
        # Hashes are reordered, not signatures, which are sixteen times as large.
        band = _row_hashes(signed[:, start : start + BAND])[by_content]
        order = np.argsort(band, kind="stable")
        same = band[order][1:] == band[order][:-1]
        a, b = by_content[order][:-1][same], by_content[order][1:][same]
        new = roots[a] != roots[b]  # not yet linked by an earlier band
        a, b = a[new], b[new]
        cuts = range(0, max(1, len(a)), _AT_ONCE)
        near = np.concatenate(
            [are_near(signed[a[n : n + _AT_ONCE]], signed[b[n : n + _AT_ONCE]]) for n in cuts]
        )
        a, b = a[near], b[near]
        roots = union_clusters(roots, a, b)
        found.append(np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1))
    return np.concatenate(found)


def near_any(signed: np.ndarray, known: np.ndarray) -> np.ndarray:
    """int64 (texts,): the index in `known` of a near duplicate, or -1."""
    match = np.full(len(signed), -1, dtype=np.int64)
    for start in range(0, POSITIONS, BAND):
        mine, theirs = (_row_hashes(some[:, start : start + BAND]) for some in (signed, known))
        order = np.argsort(theirs, kind="stable")
        first, end = (np.searchsorted(theirs[order], mine, side) for side in ("left", "right"))
        for row in np.flatnonzero((first < end) & (match < 0)):
            candidates = order[first[row] : end[row]]
            near = are_near(signed[[row]], known[candidates])
            match[row] = candidates[near.argmax()] if near.any() else -1
    return match


def _row_hashes(values: np.ndarray) -> np.ndarray:
    """uint64 (rows,): a hash of each row of integers."""
    mixed = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return mixed
