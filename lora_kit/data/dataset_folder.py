"""A folder with a data set -> the files of one split.

What `save_to_disk` writes, a clone of a Hub data set, or files that are named after splits. Of
another folder all files are read, without the card of a data set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_kit.data import hub
from lora_kit.data.marks import HELD_OUT
from lora_kit.data.readers import is_table, suffix_of
from lora_kit.errors import UserError
from lora_kit.schema import Json, Source
from lora_kit.trust import read_json

_TRAIN = {"train", "training"}  # as in `datasets.data_files`
_BETWEEN_WORDS = re.compile("[-._ 0-9/]+")
_CARD_KEYS = {"configs", "dataset_info", "task_categories", "size_categories"}
_BESIDE_DATA = re.compile(r"state\.json|cache-\w+\.arrow")
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")


def choose(source: Source, found: list[Path], use: str) -> tuple[list[Path], dict[str, list[str]]]:
    """The files of a folder to read, and {column: class names} from its card.

    Args:
        found: all of its files that are not hidden.
        use: the key of `data:`; of `decontaminate` every split is read, unless another
            than `train` is named.

    Raises:
        UserError: the data set has no such split or config; some files are named after a test
            split, and it is not clear which are for training; or the data set is incomplete.
    """
    check_unused(source, "it is a folder, not a data set of the Hub", ("revision",))
    folder = Path(source.source)
    rest = _without_descriptions(found)
    if use == "decontaminate" and source.split == "train" and source.config is None:
        return rest, {}
    saved = _saved(source, folder)
    if saved:
        return saved, {}
    readme = folder / "README.md"
    card = _card(readme)
    # Documents other than .txt are not data of a split.
    data = [file for file in rest if is_table(file) or suffix_of(file) == ".txt"]
    words = {word for file in data for word in _words(file, folder)}
    described = bool(_CARD_KEYS & card.keys()) or (folder / "dataset_infos.json") in found
    if described or (words & HELD_OUT and (words & _TRAIN or source.split != "train")):
        # A README.md without a card is nothing for `datasets`.
        names = [f.relative_to(folder).as_posix() for f in rest if card or f != readme]
        names += [name for name in hub.CARD[1:] if (folder / name).is_file() and name not in names]
        chosen, labels = hub.files_of_split(source, folder, names)
        return [folder / name for name in chosen], labels
    if use == "train":
        check_splits(source.source, rest, folder)
    check_unused(source, "it is no data set with a card, and its files are not named after splits")
    others = [file for file in rest if file != readme]
    describes = "license" in card or all(map(is_table, others))
    return (others if others and describes else rest), {}


def check_unused(
    source: Source, why: str, keys: Sequence[str] = ("config", "split", "revision")
) -> None:
    """Raises UserError if a source is given one of these keys, which it has no use for."""
    for key in keys:
        value = getattr(source, key)
        if value != Source.model_fields[key].default:
            raise UserError(f"{source.source}: has no {key} `{value}`: {why}")


def check_splits(name: str, files: Sequence[Path], folder: Path) -> None:
    """Raises UserError if some of these tables are named after a held-out split and others are
    not."""
    held_out = [file for file in files if is_table(file) and HELD_OUT & _words(file, folder)]
    others = [file for file in files if is_table(file) and file not in held_out]
    if held_out and others:
        raise UserError(
            f"{name}: {held_out[0].relative_to(folder)} is named after a held-out split, "
            f"{others[0].relative_to(folder)} is not: name the files to read, for example "
            f"{others[0]}"
        )


def note(files: Sequence[Path], found: Sequence[Path], folder: Path) -> str:
    """Which files are read, and which are not."""
    left = sorted({*found} - {*files})
    text = f"files that are read: {_listed(files, folder)}"
    return f"{text}; not read: {_listed(left, folder)}" if left else text


def _listed(files: Sequence[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in files[:6]]
    return ", ".join(names) + (f" and {len(files) - 6:,} more" if len(files) > 6 else "")


def _words(file: Path, folder: Path) -> set[str]:
    """The words of a file's path below a folder."""
    return set(_BETWEEN_WORDS.split(file.relative_to(folder).as_posix().lower()))


def _without_descriptions(found: list[Path]) -> list[Path]:
    """The files without those that describe a data set, or that `map` and `filter` cache in its
    folder."""
    folders = {file.parent for file in found if file.name == "dataset_info.json"}
    return [
        file
        for file in found
        if file.name not in _METADATA
        and not (file.parent in folders and _BESIDE_DATA.fullmatch(file.name))
    ]


def _card(file: Path) -> Json:
    """The YAML at the beginning of a README.md; empty if there is none."""
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(file) if file.is_file() else None) or {}
    except Exception:  # YAML's errors, and text that is not UTF-8: a document, not a card
        return {}


def _saved(source: Source, folder: Path) -> list[Path]:
    """The files of a Dataset or of a split of a DatasetDict as `save_to_disk` wrote them, in their
    order; empty if the folder is neither."""
    splits = _listed_in(folder / "dataset_dict.json", "splits")
    if splits:
        if source.split not in splits:
            raise hub.name_one_of(source.source, "split", source.split, splits)
        folder = folder / source.split
    listed = _listed_in(folder / "state.json", "_data_files")
    missing = [name for name in listed if "/" in name or not (folder / name).is_file()]
    if missing or (splits and not listed):
        lost = missing[0] if missing else f"{source.split}/state.json"
        raise UserError(f"{source.source}: saved by `datasets`, but without its {lost!r:.80}")
    if listed:
        unused = ("config",) if splits else ("config", "split")
        check_unused(source, "it was saved by `datasets` without one", unused)
    return [folder / name for name in listed]


def _listed_in(file: Path, key: str) -> list[str]:
    """The names in a list of a JSON file, such as those of shards; empty if the file has another
    content or does not exist."""
    try:
        listed = read_json(file)[key]
        return [part if isinstance(part, str) else str(part["filename"]) for part in listed]
    except (OSError, ValueError, LookupError, TypeError):
        return []
