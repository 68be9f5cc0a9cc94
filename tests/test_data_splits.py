"""What is held out and what is mixed: by seed and content alone, in the shares asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.data.duplicates import hashed, ranks
from lora_kit.data.splits import hold_out, mix, take
from lora_kit.errors import UserError


def keys_of(count: int, name: str = "row") -> np.ndarray:
    return np.array([hashed(f"{name} {n}") for n in range(count)], dtype=np.uint64)


def split(
    keys: np.ndarray, share: float, seed: int = 0, roots: np.ndarray | None = None
) -> set[int]:
    """The keys held out; by default each row is a unit."""
    roots = np.arange(len(keys)) if roots is None else roots
    return set(keys[hold_out(roots, keys, share, seed)].tolist())


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 3, 50, 1000])
def test_the_share_is_held_out_and_both_sides_have_a_row(share: float, count: int) -> None:
    held = split(keys_of(count), share)
    assert len(held) == min(count - 1, max(1, round(count * share)))


def test_the_choice_depends_on_seed_and_content_and_not_on_the_order() -> None:
    keys = keys_of(200)
    held = split(keys, 0.3, seed=5)
    shuffled = np.random.default_rng(1).permutation(keys)
    assert split(shuffled, 0.3, seed=5) == held
    assert split(keys, 0.3, seed=6) != held


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 80), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_a_row_that_is_added_moves_at_most_one_other(count: int, share: float, seed: int) -> None:
    keys = keys_of(count + 1)
    before, after = split(keys[:-1], share, seed), split(keys, share, seed)
    assert len((before ^ after) - {int(keys[-1])}) <= 1


def clustered(sizes: list[int]) -> np.ndarray:
    """roots of clusters of these sizes, whose rows do not stand together."""
    first = np.repeat(np.arange(len(sizes)), sizes)
    mixed = np.random.default_rng(0).permutation(first)
    return np.array([int((mixed == unit).argmax()) for unit in mixed])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_a_unit_stays_on_one_side(sizes: list[int], share: float) -> None:
    roots = clustered(sizes)
    held = hold_out(roots, keys_of(len(roots)), share, seed=0)
    for unit in np.unique(roots):
        assert len(set(held[roots == unit].tolist())) == 1
    wanted = min(max(1, round(share * len(sizes))), len(sizes) - 1)
    assert len(np.unique(roots[held])) == wanted


def test_large_units_are_not_preferred() -> None:
    """One of 30 rows among 69 single ones is held out as often as its share of units says."""
    roots = np.concatenate([np.zeros(30, int), np.arange(30, 99)])
    keys = keys_of(99)
    times = sum(bool(hold_out(roots, keys, 0.2, seed)[0]) for seed in range(400))
    assert 50 <= times <= 110  # 80 expected; 8 is the standard deviation


def test_a_unit_of_nearly_all_rows_is_learned_from() -> None:
    """Rows of one template can be alike: 950 of 1,000, say."""
    roots = np.concatenate([np.zeros(950, int), np.arange(950, 1000)])
    for seed in range(20):
        held = hold_out(roots, keys_of(1000), 0.1, seed)
        assert held.sum() == 5 and not held[0]
    # Where all are so large there is a choice nevertheless.
    assert hold_out(np.repeat([0, 50], 50), keys_of(100), 0.1, 0).sum() == 50


def test_each_label_gives_its_share() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    held = hold_out(np.arange(1000), keys_of(1000), 0.1, 0, labels)
    assert np.bincount(labels[held]).tolist() == [50, 30, 20]


def test_what_rounding_leaves_goes_to_the_largest_remainders() -> None:
    # 10 of 100: exactly 4.7, 3.6 and 1.7: rounded down 4, 3 and 1, and two are left.
    labels = np.repeat([0, 1, 2], [47, 36, 17])
    held = hold_out(np.arange(100), keys_of(100), 0.1, 0, labels)
    assert np.bincount(labels[held]).tolist() == [5, 3, 2]
    # Equal remainders: the more frequent label.
    labels = np.repeat([0, 1, 2], [25, 15, 10])
    held = hold_out(np.arange(50), keys_of(50), 0.1, 0, labels)
    assert np.bincount(labels[held]).tolist() == [3, 1, 1]


def test_equal_labels_do_not_depend_on_the_order() -> None:
    keys, names = keys_of(40), np.repeat(np.arange(5), 8)
    units = np.arange(40)
    units[[9, 20, 30]] = 0  # a unit whose rows have other labels
    chosen = set()
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(40)
        first = list(dict.fromkeys(names[order].tolist()))  # labels are numbered as they come
        labels = np.array([first.index(name) for name in names[order]])
        held = hold_out(units[order], keys[order], 0.075, 0, labels)
        chosen.add(tuple(sorted(keys[order][held].tolist())))
    assert len(chosen) == 1


def test_a_label_keeps_a_row_to_be_learned_from() -> None:
    """What was never learned cannot be judged; 20 labels of one row each stay in train."""
    labels = np.concatenate([np.zeros(100, int), np.arange(1, 21)])
    for seed in range(5):
        held = hold_out(np.arange(120), keys_of(120), 0.1, seed, labels)
        assert held.sum() == 12 and not labels[held].any()
    # Unless there is no other way.
    assert hold_out(np.arange(40), keys_of(40), 0.25, 0, np.arange(40)).sum() == 10


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_labels_change_which_are_held_out_and_not_how_many(counts: list[int], share: float) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    total = len(labels)
    if total < 2:
        return
    held = hold_out(np.arange(total), keys_of(total), share, 0, labels)
    assert held.sum() == min(max(1, round(share * total)), total - 1)
    for label, count in enumerate(counts):
        assert int(held[labels == label].sum()) <= count


def test_less_than_two_units_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"data\.eval: 1 different document\(s\) cannot be split"):
        hold_out(np.zeros(5, int), keys_of(5), 0.5, 0)
    with pytest.raises(UserError, match=r"data\.general: 1 different document"):
        hold_out(np.zeros(1, int), keys_of(1), 0.5, 0, key="data.general")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=200),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_the_shares_of_tokens_hold_within_one_row(
    lengths: list[int], share: float, seed: int
) -> None:
    tokens = np.array(lengths)
    sources = np.arange(len(tokens)) % 2
    order = ranks(keys_of(len(tokens)), seed)
    fractions = {0: share, 1: 1 - share}
    chosen = mix(tokens, sources, order, fractions)
    there = {s: int(tokens[sources == s].sum()) for s in fractions}
    total = min(there[s] / fractions[s] for s in fractions)
    for source, fraction in fractions.items():
        got = int(tokens[chosen & (sources == source)].sum())
        assert abs(got - fraction * total) <= tokens[sources == source].max() / 2 + 1e-6
    # The source that is short for its share is used whole.
    short = min(fractions, key=lambda s: there[s] / fractions[s])
    assert chosen[sources == short].all()


def test_of_the_others_the_first_ranks_are_mixed_in() -> None:
    tokens, sources = np.full(30, 10), np.repeat([0, 1], [10, 20])
    order = np.random.default_rng(0).permutation(30).astype(np.uint64)
    chosen = mix(tokens, sources, order, {0: 0.5, 1: 0.5})
    assert chosen[:10].all() and chosen[10:].sum() == 10
    assert order[10:][chosen[10:]].max() < order[10:][~chosen[10:]].min()


def test_as_many_rows_are_taken_as_come_nearest() -> None:
    tokens, order = np.array([4, 10, 3, 5]), np.array([2, 0, 3, 1])
    assert take(tokens, order, 0).tolist() == []
    assert take(tokens, order, 11).tolist() == [1]
    assert take(tokens, order, 14).tolist() == [1, 3]
    assert take(tokens, order, 1e9).tolist() == [0, 1, 2, 3]
