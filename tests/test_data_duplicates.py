"""Rows that repeat each other, exactly and nearly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from conftest import WORDS, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.data.census import histogram
from lora_kit.data.duplicates import (
    LONGEST,
    NEAR,
    POSITIONS,
    UNSIGNED,
    are_near,
    clusters,
    hashed,
    near_any,
    near_pairs,
    ranks,
    repeated,
    sign,
    split_large_clusters,
    union_clusters,
)


def prose(count: int, words: int = 40, seed: int = 0) -> list[str]:
    """Texts of different invented words: unlike each other, as texts are."""
    chooser = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    lexicon = ["".join(chooser.choices(syllables, k=chooser.choice([1, 2, 3]))) for _ in range(999)]
    return [" ".join(chooser.choices(lexicon, k=words)) for _ in range(count)]


def one_word_changed(text: str, seed: int = 0) -> str:
    chooser = random.Random(seed)
    words = text.split()
    words[chooser.randrange(len(words))] = "other"
    return " ".join(words)


def shingles(text: str) -> set[bytes]:
    data = text.encode()
    return {data[n : n + 5] for n in range(len(data) - 4)}


def keys_of(texts: list[str]) -> np.ndarray:
    return np.array([hashed(text) for text in texts], dtype=np.uint64)


def clusters_of(texts: list[str]) -> np.ndarray:
    return clusters(keys_of(texts), sign(texts), np.arange(len(texts)))


def test_hashes_are_the_same_everywhere() -> None:
    """A cached preparation of another process is found by them."""
    assert hashed("a text") == 0x50E9E05B93086453
    assert hashed("a text", seed=0) != hashed("a text") != hashed("a text", seed=1)
    assert 0 <= hashed("half a character: \ud83d") < 2**64


def test_ranks_are_a_different_order_for_each_seed() -> None:
    keys = keys_of(sentences(500))
    first, second = ranks(keys, 0), ranks(keys, 1)
    assert first.dtype == np.uint64 and len(np.unique(first)) == 500
    assert ranks(keys[::-1], 0).tolist() == first[::-1].tolist()
    assert abs(np.corrcoef(first.astype(float), second.astype(float))[0, 1]) < 0.2
    assert 0.4 < (first < np.uint64(2**63)).mean() < 0.6


def test_only_later_rows_repeat_one() -> None:
    assert repeated(keys_of(["b", "a", "b", "c", "a", "b"])).tolist() == [
        *(False, False, True, False, True, True)
    ]
    assert repeated(keys_of([])).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=8))
def test_a_signature_is_of_its_own_text_alone(texts: list[str]) -> None:
    together = sign(texts)
    for n, text in enumerate(texts):
        alone = sign([text])
        assert alone.tolist() == together[n : n + 1].tolist()
        assert int(together[n, POSITIONS]) == max(1, len(text.encode()) - 4)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 0.95])
def test_signatures_estimate_the_similarity(share: float) -> None:
    texts = prose(60, words=100)
    cut = int(share * 100)
    others = [
        " ".join(a.split()[:cut] + b.split()[cut:])
        for a, b in zip(texts, reversed(texts), strict=True)
    ]
    for a, b, n in zip(sign(texts), sign(others), range(60), strict=True):
        one, other = shingles(texts[n]), shingles(others[n])
        true = len(one & other) / len(one | other)
        assert abs((a == b)[:POSITIONS].mean() - true) < 5 * np.sqrt(0.25 / POSITIONS)


def test_light_edits_are_near_and_other_texts_are_not() -> None:
    texts = prose(500)
    edited = [one_word_changed(text, n) for n, text in enumerate(texts)]
    assert are_near(sign(texts), sign(edited)).mean() >= 0.99
    assert not are_near(sign(texts[:-1]), sign(texts[1:])).any()


def test_a_short_text_is_near_with_one_word_changed() -> None:
    texts = prose(300, words=8)
    edited = [one_word_changed(text, n) for n, text in enumerate(texts)]
    assert are_near(sign(texts), sign(edited)).mean() >= 0.95
    assert not are_near(sign(texts[:-1]), sign(texts[1:])).any()
    # The same few words in another order are another text.
    mixed = [" ".join(random.Random(n).sample(WORDS, 10)) for n in range(300)]
    assert are_near(sign(mixed[:-1]), sign(mixed[1:])).mean() < 0.01


def test_of_a_long_text_the_beginning_is_looked_at() -> None:
    begin = " ".join(prose(1, words=20_000))
    assert len(begin) > LONGEST
    signed = sign([begin, begin[:LONGEST] + "something else", begin.replace("a", "e")])
    assert signed[0].tolist() == signed[1].tolist() != signed[2].tolist()


def test_clusters_are_linked_by_what_is_in_between() -> None:
    first = prose(1, words=60)[0].split()
    steps = [first]
    for n in range(0, 24, 4):  # four words in 60 at a time
        steps.append([*steps[-1][:n], "eins", "zwei", "drei", "vier", *steps[-1][n + 4 :]])
    chain = [" ".join(words) for words in steps]
    assert not are_near(sign(chain[:1]), sign(chain[-1:]))[0]
    others = prose(50, seed=1)
    assert clusters_of([*others, *chain]).tolist() == [*range(50), *[50] * len(chain)]


def test_clusters_do_not_depend_on_the_order() -> None:
    texts = prose(120)
    texts += [one_word_changed(text, n) for n, text in enumerate(texts[:40])] + texts[:20]
    # Of many that are alike some are near and some are not.
    alike = [text for text in prose(40, 60, seed=1) for _ in range(10)]
    for seed in range(4):
        alike = [one_word_changed(text, 400 * seed + n) for n, text in enumerate(alike)]
    found = clusters_of(texts)
    assert len(np.unique(found)) == 120
    texts += list(dict.fromkeys(alike))
    found = clusters_of(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    again = clusters_of([texts[n] for n in order])
    for n, unit in enumerate(again):
        assert found[order[n]] == found[order[unit]]
    # A cluster has the number of its first row.
    assert (found <= np.arange(len(texts))).all() and (found[found] == found).all()


def test_rows_without_a_signature_are_known_by_their_hash() -> None:
    texts = ["same", *prose(3), "same"]
    assert clusters(keys_of(texts), sign([]), np.zeros(0, int)).tolist() == [0, 1, 2, 3, 0]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=30),
    )
))  # fmt: skip
def test_joining_is_what_walking_the_links_finds(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, links = case
    pairs = np.array(links, dtype=np.int64).reshape(-1, 2)
    found = union_clusters(np.arange(count), pairs[:, 0], pairs[:, 1])
    reached = list(range(count))
    for _ in range(count):
        for a, b in links:
            reached[a] = reached[b] = min(reached[a], reached[b])
    assert found.tolist() == reached


def test_every_near_pair_is_linked() -> None:
    texts = prose(400)
    texts += [one_word_changed(text, n) for n, text in enumerate(texts)]
    signed = sign(texts)
    pairs = near_pairs(signed)
    assert (pairs[:, 0] < pairs[:, 1]).all() and are_near(
        signed[pairs[:, 0]], signed[pairs[:, 1]]
    ).all()
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    found = {tuple(pair) for pair in pairs.tolist()}
    assert len(found & {(n, n + 400) for n in range(400)}) >= 0.99 * 400


def test_near_any_finds_one_of_those_that_are_near() -> None:
    known = prose(300)
    asked = [
        *[one_word_changed(text, n) for n, text in enumerate(known[:100])],
        *prose(100, seed=9),
    ]
    match = near_any(sign(asked), sign(known))
    assert (match[:100] == np.arange(100)).mean() >= 0.99
    assert (match[100:] == -1).all()
    nothing = UNSIGNED
    assert near_any(sign(asked[:3]), nothing).tolist() == [-1] * 3
    assert near_any(nothing, sign(known)).tolist() == [] and len(near_pairs(nothing)) == 0


def test_the_threshold_is_where_it_is_said_to_be() -> None:
    """One word in twelve changed is near, one in four is not."""
    texts = prose(300, words=96)
    for step, wanted in ((16, 1.0), (4, 0.0)):
        edited = [
            " ".join("changed" if n % step == 0 else word for n, word in enumerate(t.split()))
            for t in texts
        ]
        assert abs(are_near(sign(texts), sign(edited)).mean() - wanted) < 0.02
    assert NEAR == 0.7


def test_a_histogram_counts_every_length_once() -> None:
    lengths = np.array([1, 5, 5, 12, 100, 51])
    found = histogram(lengths, 100)
    assert sum(count for _, count in found) == 6 and len(found) == 12
    assert found[0] == (8, 3) and found[-1] == (100, 1)
    assert histogram(np.array([3, 2]), 3) == [(1, 0), (2, 1), (3, 1)]
    assert sum(count for _, count in histogram(np.zeros(0, int), 0)) == 0


def test_rows_that_share_a_long_instruction_can_be_split() -> None:
    """They are all near each other; equal ones stay together, and so does a small cluster."""
    shared = (
        "Sort this line into one of our kinds of complaints, questions, orders, or praise; say "
    )
    shared += (
        "none where you cannot tell which of them it may be. Never answer its question itself. "
    )
    shared += (
        "Think of former customers, who were once promised the very same quick reply by mail. "
    )
    texts = [f"{shared}{n} {n * n}" for n in range(60)] + ["a line of its own " * 4] * 2
    texts.append(texts[0])
    keys = np.array([hashed(text) for text in texts], dtype=np.uint64)
    roots = clusters(keys, sign(texts), np.arange(len(texts)))
    assert len(set(roots[:60])) == 1
    apart = split_large_clusters(roots, keys)
    assert len(set(apart[:60])) == 60 and apart[62] == apart[0] and apart[60] == apart[61]
    few = roots[:15]
    assert (split_large_clusters(few, keys[:15]) == few).all()
