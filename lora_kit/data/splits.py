"""Which rows are trained on and which are held out, and how sources are mixed.

Splits and mixtures work on hashes of rows: the result depends on the seed and the rows' text, not
on their order or on the number of workers.
"""

from __future__ import annotations

import numpy as np

from lora_kit.data.census import LEAKED, Census
from lora_kit.data.duplicates import ranks, repeated, split_large_clusters, union_clusters
from lora_kit.data.examples import Examples, SignedExamples
from lora_kit.data.leaks import train_against_eval, train_against_files
from lora_kit.data.readers import OpenedSource
from lora_kit.data.sources import source_list
from lora_kit.errors import UserError
from lora_kit.run import nearest
from lora_kit.schema import Data, Source

# With fewer held-out documents, scores are reported without a verdict.
FEWEST_TO_EVALUATE = 20


def divide(
    data: Data,
    opened: dict[str, list[OpenedSource]],
    seed: int,
    read: dict[str, SignedExamples],
    census: Census,
) -> dict[tuple[str, str], np.ndarray]:
    """Assign examples to uses, and count duplicates and leaks.

    Args:
        opened: the sources by use. seed: of the held-out selection. read: the examples by use.
        census: of the rows that were read; it is extended.

    Returns:
        {(use that was read, use that it is for): bool (examples,)}, as in `prepare.Split.masks`.

    Raises:
        UserError: no training, held-out or general rows are left; or a label or a group is missing.
    """
    train = read["train"]
    roots = train.clusters()
    _count_duplicates(train, roots, census)
    chosen = np.ones(len(roots), dtype=bool)
    masks: dict[tuple[str, str], np.ndarray] = {}
    if isinstance(data.eval, float):
        census.held_out = True
        held = _hold_out(train, roots, data.eval, data.group, seed, census)
        chosen &= ~held
        masks["train", "eval"] = held
    else:
        exact = _against_eval(train, read["eval"], source_list(data.eval), census)
        _check_labels(train.examples, read["eval"].examples)
        masks["eval", "eval"] = ~exact
    if "decontaminate" in opened:
        for name, leak in train_against_files(opened["decontaminate"], train, chosen):
            census.leaks[f"data.decontaminate: {name}"] = leak
    masks["train", "train"] = chosen
    if "general" in read:
        kept = _general_apart(read, census)
        if data.replay is not None:
            pool = _replay_pool(read["general"], kept, seed)
            kept &= ~pool
            masks["general", "replay"] = pool
        masks["general", "general"] = kept
    elif data.replay is not None:
        raise UserError("data.replay is a share of general text: set data.general")
    return masks


def _count_duplicates(train: SignedExamples, roots: np.ndarray, census: Census) -> None:
    exact = repeated(train.keys)
    near = (roots != np.arange(len(roots))) & ~exact
    census.duplicates = {"exact": int(exact.sum()), "near": int(near.sum())}
    census.compared = len(train.signed.rows)
    if census.compared < len(roots):
        census.notes.append(
            f"near duplicates and near leaks were searched among a random sample of "
            f"{census.compared:,} of {len(roots):,} rows"
        )


def _hold_out(
    train: SignedExamples,
    roots: np.ndarray,
    share: float,
    group: str | None,
    seed: int,
    census: Census,
) -> np.ndarray:
    """bool (examples,): held out. Duplicates, and examples of one group, stay together."""
    units = split_large_clusters(roots, train.keys)
    separated = int((roots != units).sum())
    if separated:
        census.notes.append(
            f"{separated:,} rows share long text with many others: of them only exact duplicates "
            "are kept in the same split"
        )
    names, codes = train.examples.classes()
    groups = train.examples.rows.column("group")
    if group and not groups.any():
        raise UserError(f"data.group: no row of data.train has a column `{group}`")
    # Clusters that share a group are merged; documents of text files have no group.
    rows = np.flatnonzero(groups)
    first, inverse = np.unique(groups[rows], return_index=True, return_inverse=True)[1:]
    units = union_clusters(units, rows, rows[first][inverse])
    return hold_out(units, train.keys, share, seed, codes if names else None)


def _against_eval(
    train: SignedExamples, other: SignedExamples, sources: list[Source], census: Census
) -> np.ndarray:
    """bool (evaluation examples,): exact duplicates of training examples; counts all leaks."""
    exact, leak = train_against_eval(train, other)
    if exact.any():
        place = other.examples.place(int(exact.argmax()))
        census.eval.count_lost(LEAKED, place, leak["exact"])
    if exact.all():
        raise UserError("data.eval: every row is also in data.train: name a held-out set")
    only = f": {sources[0].source}" if len(sources) == 1 else ""
    census.leaks[f"data.eval{only}"] = leak
    return exact


def _check_labels(train: Examples, held_out: Examples) -> None:
    """Raises UserError if the held-out rows have a class that is in no training row."""
    names, codes = held_out.classes()
    known = train.classes()[0]
    unknown = [name for name in names if name not in known]
    if unknown and known:
        row = int(np.flatnonzero(codes == names.index(unknown[0]))[0])
        raise UserError(
            f"data.eval: {held_out.place(row)}: the label {unknown[0]!r:.60} is in no "
            f"row of data.train{nearest(unknown[0], known)}"
        )


def _general_apart(read: dict[str, SignedExamples], census: Census) -> np.ndarray:
    """bool (general examples,): those that are not in data.train or data.eval; the others are
    counted."""
    general = read["general"]
    known = np.concatenate([some.keys for use, some in read.items() if use != "general"])
    in_domain = np.isin(general.keys, known)
    if in_domain.any():
        first = general.examples.place(int(in_domain.argmax()))
        census.general.count_lost("that are also in the domain data", first, int(in_domain.sum()))
    if in_domain.all():
        raise UserError(f"data.general: no rows left; dropped: {census.general.dropped_text()}")
    return ~in_domain


def _replay_pool(general: SignedExamples, kept: np.ndarray, seed: int) -> np.ndarray:
    """bool (general examples,): those that are not evaluated on, so they may be trained on."""
    rows = np.flatnonzero(kept)
    roots = split_large_clusters(general.clusters(), general.keys)[rows]
    # A tenth is evaluated on, or as much more as a verdict needs, but at most half.
    share = max(0.1, min(0.5, FEWEST_TO_EVALUATE / len(np.unique(roots))))
    held = hold_out(roots, general.keys[rows], share, seed, key="data.general")
    pool = np.zeros(len(kept), dtype=bool)
    pool[rows[~held]] = True
    return pool


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
        share: of the units, not of the rows.
        labels: (rows,) a unit has the label of its row with the lowest key.
        key: `data.eval` or `data.general`, for messages.

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
    lowest = by_key[first]  # the row with the lowest key of each unit
    order = ranks(keys[lowest], seed)
    wanted = min(max(1, round(share * len(units))), len(units) - 1)
    labels = np.broadcast_to(np.int32(0), len(roots)) if labels is None else labels
    kinds, counts = np.unique(labels[lowest], return_inverse=True, return_counts=True)[1:]
    exact = wanted * counts / len(units)
    quota = np.floor(exact).astype(int)
    # Ties: the most frequent label first, then the one whose unit ranks first.
    first_rank = np.full(len(counts), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(first_rank, kinds, order)
    by_remainder = np.lexsort((first_rank, -counts, quota - exact))
    most = counts - 1  # of each label; all of them only if no label has another unit left
    while quota.sum() < wanted:
        left = wanted - quota.sum()
        not_full = by_remainder[(quota < most)[by_remainder]]
        most = most if len(not_full) else counts
        quota[not_full[:left]] += 1
    chosen = np.zeros(len(units), dtype=bool)
    by_rank = np.lexsort((order, sizes > 2 * share * len(roots)))  # large units last
    for kind, number in enumerate(quota):
        chosen[by_rank[kinds[by_rank] == kind][:number]] = True
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
    """Sorted indices of the first rows by `order`, so many that their tokens come nearest to
    `wanted` in total."""
    first = np.argsort(order, kind="stable")
    total = np.concatenate([[0], np.cumsum(tokens[first])])
    return np.sort(first[: int(np.abs(total - wanted).argmin())])


def take_units(units: np.ndarray, costs: np.ndarray, room: float, seed: int) -> np.ndarray:
    """Sorted indices of the rows of random units that cost at most `room` in total, of at least 20
    units.

    Args:
        units, costs: (rows,).
    """
    numbers, unit = np.unique(units, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(numbers))
    total = np.cumsum(np.bincount(unit, costs)[order])
    count = max(FEWEST_TO_EVALUATE, int((total <= room).sum()))
    return np.flatnonzero(np.isin(unit, order[:count]))
