"""Which rows are learned from, and which are judged: sides that never meet, shares that hold.

Everything here works on hashes of rows, not on the rows: it is decided by the seed and what the
rows say, and not by their order or by how many workers read them.
"""

from __future__ import annotations

import numpy as np

from lora_kit.data.duplicates import ranks
from lora_kit.errors import UserError

# Fewer held-out documents are measured, but not judged.
FEWEST_TO_JUDGE = 20


def hold_out(
    roots: np.ndarray,
    keys: np.ndarray,
    share: float,
    seed: int,
    labels: np.ndarray | None = None,
    key: str = "data.eval",
) -> np.ndarray:
    """Hold out a share of the units, which are rows that must stay together.

    A unit is ranked by the seed and the lowest key of its rows, and the first ranks are chosen: a
    row that is added moves at most one other unit to its side, and large units are not preferred.
    Those of more than twice the rows asked for come last: a template that most rows share would
    otherwise leave nothing to learn from.
    With labels each label gives its share of units, the rest going to those that lost most by
    rounding (largest remainder). The last unit of a label is learned from, where that is possible.

    Args:
        roots: (rows,) rows of one unit have the same number. keys: uint64 hashes, (rows,).
        labels: (rows,) a unit has the label of its row of the lowest key. key: of the run file, for
            messages.

    Returns:
        bool, (rows,): held out.

    Raises:
        UserError: there are less than two units.
    """
    by_key = np.argsort(keys, kind="stable")
    units, first, sizes = np.unique(roots[by_key], return_index=True, return_counts=True)
    if len(units) < 2:
        raise UserError(
            f"{key}: {len(units)} different document(s) cannot be split: "
            + ("name a source of its own" if key == "data.eval" else "name more text")
        )
    lowest = by_key[first]
    order = ranks(keys[lowest], seed)
    wanted = min(max(1, round(share * len(units))), len(units) - 1)
    labels = np.broadcast_to(np.int32(0), len(roots)) if labels is None else labels
    kinds, counts = np.unique(labels[lowest], return_inverse=True, return_counts=True)[1:]
    exact = wanted * counts / len(units)
    quota = np.floor(exact).astype(int)
    # Among equal remainders the most frequent label first, then that of the first rank.
    head = np.full(len(counts), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(head, kinds, order)
    order_of_labels = np.lexsort((head, -counts, quota - exact))
    most = counts - 1
    while (left := wanted - quota.sum()) > 0:
        some = order_of_labels[(quota < most)[order_of_labels]]
        most = most if len(some) else counts
        quota[some[:left]] += 1
    chosen = np.zeros(len(units), dtype=bool)
    first_chosen = np.lexsort((order, sizes > 2 * share * len(roots)))
    for kind, number in enumerate(quota):
        chosen[first_chosen[kinds[first_chosen] == kind][:number]] = True
    return chosen[np.searchsorted(units, roots)]


def mix(
    tokens: np.ndarray, sources: np.ndarray, order: np.ndarray, fractions: dict[int, float]
) -> np.ndarray:
    """Choose rows so that each source gives its fraction of the tokens.

    As many as possible without a row twice: the source that is short for its fraction is used
    whole, of the others the rows that come first in `order`.

    Args:
        tokens, sources, order: (rows,). fractions: {source: share}, together 1.

    Returns:
        bool, (rows,): chosen.
    """
    total = min(tokens[sources == s].sum() / share for s, share in fractions.items())
    chosen = np.zeros(len(tokens), dtype=bool)
    for source, share in fractions.items():
        members = np.flatnonzero(sources == source)
        chosen[members[take(tokens[members], order[members], share * total)]] = True
    return chosen


def take(tokens: np.ndarray, order: np.ndarray, wanted: float) -> np.ndarray:
    """The numbers of the rows, first by `order`, that come nearest to `wanted` tokens; sorted."""
    first = np.argsort(order, kind="stable")
    total = np.concatenate([[0], np.cumsum(tokens[first])])
    return np.sort(first[: int(np.abs(total - wanted).argmin())])
