"""`data:` keys -> files, Hub data sets and embedded texts, each with a hash of its content."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_kit import nano
from lora_kit.data import dataset_folder, hub, readers
from lora_kit.data.readers import OpenedSource
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash
from lora_kit.run import is_hub_id
from lora_kit.schema import EMBEDDED, Source, Sources

_POINTER, _LONGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024  # bytes
_BINARY_DOCUMENTS = (".docx", ".doc", ".odt", ".epub", ".xlsx", ".rtf")


def source_list(sources: Sources) -> list[Source]:
    """The sources that a key of `data:` names."""
    listed = sources if isinstance(sources, list) else [sources]
    return [source if isinstance(source, Source) else Source(source=source) for source in listed]


def open_sources(
    sources: Sources, commits: dict[str, str] | None = None, use: str = "train"
) -> list[OpenedSource]:
    """Find every source and hash its content.

    Args:
        sources: as in `data.train`: a name, a `Source`, or a list of them.
        commits: {Hub data set with split: commit} to read where no revision is named.
        use: the key of `data:`.

    Raises:
        UserError: a source is missing, unsupported, or named twice; only some have a `fraction`,
            or the fractions do not sum to 1.
    """
    wanted = source_list(sources)
    fractions = [source.fraction for source in wanted if source.fraction is not None]
    if fractions and len(fractions) < len(wanted):
        missing = next(s.source for s in wanted if s.fraction is None)
        raise UserError(
            f"{missing}: no fraction, but other sources have one: set it for each source"
        )
    if fractions and abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"data: the fractions of a list must sum to 1, not {sum(fractions):g}: "
            + ", ".join(f"{s.source} {s.fraction:g}" for s in wanted)
        )
    opened = [_open(source, commits or {}, use) for source in wanted]
    seen: dict[Any, str] = {}
    for source in opened:
        names: list[Any] = [file.resolve() for file in source.files] or [source.name]
        if source.commit:  # equal files of a data set are links to one file of the Hub's cache
            names = list(dict.fromkeys(names))
        for name in names:
            if name in seen:
                twice = seen[name] == source.name
                where = "named twice" if twice else f"{name} is also in {seen[name]}"
                raise UserError(f"{source.name}: {where}: remove one of the two")
            seen[name] = source.name
    return opened


def check_apart(train: list[OpenedSource], other: list[OpenedSource], key: str) -> None:
    """Raises UserError if a training file is also an evaluation file."""
    known = {file.resolve(): source.name for source in train for file in source.files}
    for source in other:
        for file in source.files:
            if file.resolve() in known:
                raise UserError(
                    f"data.{key}: {file} is also trained on (data.train: "
                    f"{known[file.resolve()]}): name different rows"
                )


def _open(source: Source, commits: dict[str, str], use: str) -> OpenedSource:
    name = source.source
    labels: dict[str, list[str]] = {}
    folder = Path(name)
    if name.startswith("nano:"):
        return _open_nano(source)
    if os.path.isdir(name):
        found = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p, name))
        wanted, labels = dataset_folder.choose(source, found, use)
    elif os.path.isfile(name):
        wanted = found = [folder]
        dataset_folder.check_unused(source, "it is a file")
        if readers.suffix_of(found[0]) in _BINARY_DOCUMENTS:
            raise UserError(f"{name}: not text: save it as text, HTML or PDF first")
    elif glob.has_magic(name):
        dataset_folder.check_unused(source, "it is a pattern of files")
        matches = filter(os.path.isfile, glob.glob(name, recursive=True))
        wanted = found = sorted({Path(path) for path in matches})
        folder = Path(os.path.commonpath([file.parent for file in found] or [Path()]))
        if use == "train":
            dataset_folder.check_splits(name, found, folder)
    elif is_hub_id(name):
        opened = hub.fetch(source, commits)
        _check_not_empty(opened.name, opened.files)
        return opened
    else:
        raise UserError(f"{name}: no such file or folder")
    # A file that is named explicitly is read whatever its suffix, as text.
    files = [p for p in wanted if os.path.isfile(name) or readers.suffix_of(p) in readers.SUFFIXES]
    if not files:
        kinds = " ".join(sorted(readers.SUFFIXES))
        raise UserError(f"{name}: no file of a supported type ({kinds}) among {len(found)}")
    digest = hashlib.sha256(json.dumps(labels).encode() if labels else b"")
    for file in files:
        try:
            readers.check_first_line(file)
            digest.update(bytes.fromhex(file_hash(file)))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    _check_not_empty(name, files)
    note = "" if os.path.isfile(name) else dataset_folder.note(files, found, folder)
    return OpenedSource(name, source.fraction, digest.hexdigest(), tuple(files), labels, note=note)


def _is_hidden(file: Path, folder: str) -> bool:
    """Whether a file, or a folder below `folder` that it is in, begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _check_not_empty(name: str, files: Iterable[Path]) -> None:
    sizes = {file: file.stat().st_size for file in files}
    if not any(sizes.values()):
        raise UserError(f"{name}: empty: there is nothing to train on")
    for file, size in sizes.items():
        if size < _LONGEST_POINTER and file.read_bytes().startswith(_POINTER):
            raise UserError(f"{file}: a Git LFS pointer, not the file: run `git lfs pull`")


def _open_nano(source: Source) -> OpenedSource:
    name = source.source
    dataset_folder.check_unused(source, "it is an embedded text")
    if name not in EMBEDDED:
        raise UserError(f"{name}: no such embedded text: {', '.join(EMBEDDED)}")
    rows: list[dict[str, Any]]
    if name == "nano:instructions":
        rows = [dict(row) for row in nano.instructions()]
    else:
        texts = nano.topics() if name == "nano:topics" else nano.general()
        rows = [{"text": text} for _, text in texts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return OpenedSource(name, source.fraction, digest, rows=rows)
