"""Which rows are trained on and which are held out, and how sources are mixed.

Everything here works on hashes of rows: the result depends on the seed and the rows' text, not on
their order or on the number of workers.
"""

from __future__ import annotations

import numpy as np

from lora_kit.data.duplicates import ranks
from lora_kit.errors import UserError

# With fewer held-out documents, scores are reported without a verdict.
FEWEST_TO_EVALUATE = 20


def hold_out(
    roots: np.ndarray,
    keys: np.ndarray,
    share: float,
    seed: int,
    labels: np.ndarray | None = None,
    key: str = "data.eval",
) -> np.ndarray:
    """Hold out a share of the units; a unit is a set of rows that must stay together.

    Units are ranked by a hash of the seed and the lowest key of their rows, and the first ranks are
    held out: adding a row moves at most one other unit, and large units are not preferred. Units
    with more than twice the wanted number of rows come last, so that a template that most rows
    share does not take all training rows.
    With labels, the selection is stratified, rounded by the largest remainder method. The last unit
    of a label is trained on where possible.

    Args:
        roots: (rows,) the unit of each row. keys: uint64 hashes, (rows,).
        labels: (rows,) a unit has the label of its row with the lowest key.
        key: of the run file, for messages.

    Returns:
        bool, (rows,): held out.

    Raises:
        UserError: there are fewer than two units.
    """
    by_key = np.argsort(keys, kind="stable")
    units, first, sizes = np.unique(roots[by_key], return_index=True, return_counts=True)
    if len(units) < 2:
        raise UserError(
            f"{key}: {len(units)} different document(s) cannot be split: "
            + ("name a separate source" if key == "data.eval" else "add more text")
        )
    lowest = by_key[first]
    order = ranks(keys[lowest], seed)
    wanted = min(max(1, round(share * len(units))), len(units) - 1)
    labels = np.broadcast_to(np.int32(0), len(roots)) if labels is None else labels
    kinds, counts = np.unique(labels[lowest], return_inverse=True, return_counts=True)[1:]
    exact = wanted * counts / len(units)
    quota = np.floor(exact).astype(int)
    # Ties: the most frequent label first, then the one whose unit ranks first.
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
    """Choose rows so that each source contributes its fraction of the tokens.

    As many as possible without repeating a row: the source that is smallest for its fraction is
    used whole; of the others, the rows that come first in `order`.

    Args:
        tokens, sources, order: (rows,). fractions: {source: share}, summing to 1.

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
    """Sorted indices of the first rows by `order` whose tokens come nearest to `wanted`."""
    first = np.argsort(order, kind="stable")
    total = np.concatenate([[0], np.cumsum(tokens[first])])
    return np.sort(first[: int(np.abs(total - wanted).argmin())])
