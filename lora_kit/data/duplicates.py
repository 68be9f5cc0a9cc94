"""Rows that repeat each other: exactly, by a hash, and nearly, by MinHash.

Two texts are near if the sets of their five-byte shingles (normalised: see `formats.normalised`)
have a Jaccard similarity of NEAR or more, which is one word in twelve changed; in a text too short
for that, one word. Signatures are rensa's R-MinHash; candidates share a band of BAND positions
(Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3), and are near if their whole
signatures, which estimate the similarity, agree so far.
"""

from __future__ import annotations

import hashlib

import numpy as np

NEAR = 0.7
ONE_WORD = 12  # shingles that a changed word of eight letters takes away
LARGEST_CLUSTER, LARGEST_SHARE = 20, 0.05  # rows, or share of the rows, that stay together
POSITIONS = 128  # of a signature: the estimate's standard error is 0.04 at 0.7
BAND = 4  # 32 bands of 4: a pair at 0.7 is a candidate with 99.98%
SHINGLE = 5  # bytes
UNSIGNED = np.zeros((0, POSITIONS + 1), np.uint32)  # the signatures of no texts
_AT_ONCE = 2**15  # pairs whose signatures are compared in one go: 32 MB
LONGEST = 2**16  # bytes of a text that are looked at, from its beginning


def hashed(text: str, seed: int | None = None) -> int:
    """64 bits of a text's BLAKE2b hash; two of 5 million texts are mixed up once in a million."""
    key = b"" if seed is None else seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
    return int.from_bytes(digest.digest(), "little")


def ranks(keys: np.ndarray, seed: int) -> np.ndarray:
    """A pseudorandom order of rows: uint64, decided by the seed and the rows' own hashes alone.

    SplitMix64's finalizer (Steele, Lea, Flood 2014).
    """
    x = keys ^ np.uint64(hashed("rank", seed))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def are_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether each signed text of `a`, or its only one, is near its counterpart in `b`: bool."""
    smaller = np.minimum(a[:, POSITIONS], b[:, POSITIONS]).astype(np.int64)
    least = np.clip((smaller - ONE_WORD) / (smaller + ONE_WORD), 0.5, NEAR)
    return (a[:, :POSITIONS] == b[:, :POSITIONS]).mean(axis=1) >= least


def sign(texts: list[str]) -> np.ndarray:
    """The signatures of normalised texts: uint32, (texts, POSITIONS + 1); what stands last is the
    number of a text's shingles."""
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
    # A shingle that begins in one text and ends in the next belongs to neither.
    ends = starts[1:, None] - np.arange(1, SHINGLE)
    inside = np.ones(len(flat), dtype=bool)
    inside[ends.ravel()] = False
    offsets = starts - (SHINGLE - 1) * np.arange(len(starts))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles[inside[: len(shingles)]], offsets.astype(np.uint64), POSITIONS, 0
    )
    values = np.array(matrix.to_rows(), dtype=np.uint32)
    return np.column_stack([values, np.diff(offsets).astype(np.uint32)])


def repeated(keys: np.ndarray) -> np.ndarray:
    """Which rows repeat an earlier one exactly: bool."""
    return _first_equal(keys) != np.arange(len(keys))


def clusters(keys: np.ndarray, signed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows that are equal or near, directly or by others in between, have the same number.

    Args:
        keys: uint64 of every row. signed: signatures of some rows. rows: which these are.

    Returns:
        For each row the number of the first row of its cluster: int64.
    """
    roots = _first_equal(keys)
    pairs = near_pairs(signed)
    return joined(roots, rows[pairs[:, 0]], rows[pairs[:, 1]])


def parted(roots: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Large clusters taken apart into rows that are equal: int64, as `clusters` gives.

    A long instruction that many rows share makes all of them near each other, though they are not
    repeats; together they could not be split. Real repeats come in smaller numbers.
    """
    sizes = np.bincount(roots, minlength=len(roots))[roots]
    large = sizes > max(LARGEST_CLUSTER, LARGEST_SHARE * len(roots))
    return np.where(large, _first_equal(keys), roots)


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """For each row the number of the first one with its key: int64."""
    first, inverse = np.unique(keys, return_index=True, return_inverse=True)[1:]
    return first[inverse]


def joined(roots: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Put row a[i] and row b[i] into one cluster, for every i; the first row is its root.

    All at once: each root takes the lowest one it is linked to, until none changes.
    """
    roots = roots.copy()
    while not np.array_equal(left := roots[a], right := roots[b]):
        lowest = np.minimum(left, right)
        np.minimum.at(roots, left, lowest)
        np.minimum.at(roots, right, lowest)
        while not np.array_equal(up := roots[roots], roots):
            roots = up
    return roots


def near_pairs(signed: np.ndarray) -> np.ndarray:
    """Pairs of texts that are near: int64, (pairs, 2), the first the smaller number.

    Of many that share a band only neighbours are compared, so not every pair is listed, but rows
    that are alike are linked by others in between.
    """
    roots = np.arange(len(signed))
    found = [np.zeros((0, 2), dtype=np.int64)]
    # Which ones are neighbours is decided by what they say, not by where they stand.
    said = np.argsort(_mixed(signed[:, :POSITIONS]), kind="stable")
    for start in range(0, POSITIONS, BAND):
        band = _mixed(signed[said, start : start + BAND])
        order = np.argsort(band, kind="stable")
        same = band[order][1:] == band[order][:-1]
        a, b = said[order][:-1][same], said[order][1:][same]
        new = roots[a] != roots[b]  # by an earlier band
        a, b = a[new], b[new]
        cuts = range(0, max(1, len(a)), _AT_ONCE)
        near = np.concatenate(
            [are_near(signed[a[n : n + _AT_ONCE]], signed[b[n : n + _AT_ONCE]]) for n in cuts]
        )
        a, b = a[near], b[near]
        roots = joined(roots, a, b)
        found.append(np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1))
    return np.concatenate(found)


def near_any(signed: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each text the number of one in `known` that is near it, or -1: int64."""
    match = np.full(len(signed), -1, dtype=np.int64)
    for start in range(0, POSITIONS, BAND):
        mine, theirs = (_mixed(some[:, start : start + BAND]) for some in (signed, known))
        order = np.argsort(theirs, kind="stable")
        first, end = (np.searchsorted(theirs[order], mine, side) for side in ("left", "right"))
        for row in np.flatnonzero((first < end) & (match < 0)):
            candidates = order[first[row] : end[row]]
            near = are_near(signed[[row]], known[candidates])
            match[row] = candidates[near.argmax()] if near.any() else -1
    return match


def _mixed(values: np.ndarray) -> np.ndarray:
    """A hash of each row of numbers: uint64."""
    mixed = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return mixed
