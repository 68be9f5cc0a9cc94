"""A data set of the Hub -> the files of one split, fetched once and read like any others.

`datasets` says which files belong to a config and a split, and reads none of them: `readers` does,
so that a row's place is a line of a file, and no value is coerced. A set's own code never runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from lora_kit import hub_errors
from lora_kit.data import readers
from lora_kit.data.readers import Opened
from lora_kit.errors import UserError
from lora_kit.hashes import cached_hash
from lora_kit.run import nearest
from lora_kit.schema import Source

# What a set says of itself: configs, splits, names of classes.
_CARD = ["README.md", ".huggingface.yaml", "dataset_infos.json", ".gitattributes"]
_FETCHED_AT_ONCE = 8
# Settings of a config that say nothing about how a file is read.
_NOT_FOR_READING = {"name", "version", "data_dir", "data_files", "description", "features"}


def fetch(source: Source, commits: dict[str, str]) -> Opened:
    """Find the files of a split and fetch those that are not in the Hub's cache yet.

    Args:
        commits: {name of a split: commit} to take where the source names no revision.

    Raises:
        UserError: the set, the revision, the config or the split is not there or may not be read,
            cannot be reached and is not in the cache, or has files of kinds that are not read.
    """
    from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    name = f"{source.source}{f'/{source.config}' if source.config else ''}[{source.split}]"
    revision = source.revision or commits.get(name)
    repo: dict[str, Any] = {"repo_id": source.source, "repo_type": "dataset"}
    try:
        card = Path(snapshot_download(**repo, revision=revision, allow_patterns=_CARD))
        # The cache keeps each commit in a folder of its name, and what files there are.
        repo["revision"] = card.name
        listed = [file.path for file in get_cached_repo_tree(**repo)]
        names, labels = _files_of_split(source, card, listed)
        with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
            files = list(pool.map(lambda n: Path(hf_hub_download(**repo, filename=n)), names))
    except UserError:
        raise
    except (CachedRepoTreeNotFoundError, OSError, ValueError) as error:
        said = hub_errors.problem(error, source.source, revision, "dataset")
        raise UserError(f"{source.source}: {said}") from None
    content = [labels, [(n, cached_hash(file)) for n, file in zip(names, files, strict=True)]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Opened(name, source.fraction, digest, tuple(files), labels, card.name)


def _files_of_split(
    source: Source, card: Path, listed: list[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Names of files, and of classes by column where the card has them (the schema of a parquet
    file may, too: its reader looks there).

    A folder with the set's card and an empty file in place of each of its files is all that
    `datasets` needs to tell what belongs to a split, without a network.
    """
    import datasets
    from datasets.load import dataset_module_factory

    what = source.source
    if f"{what.partition('/')[2]}.py" in listed:
        raise UserError(f"{what}: a set that is made by a script, which is not run: name another")
    datasets.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        root, cache = Path(temporary).resolve() / "set", Path(temporary) / "cache"
        for name in listed:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{what}: names a file outside of the set: {name!r:.60}")
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
            if name in _CARD:
                shutil.copyfile(card / name, root / name)
        try:
            known = dataset_module_factory(str(root)).builder_configs_parameters
            usual = known.default_config_name
            configs = list(dict.fromkeys(c.name for c in known.builder_configs or []))
            wanted = source.config or usual
            if wanted not in [*configs, usual] or (wanted is None and len(configs) > 1):
                raise _choose(what, "config", source.config, configs)
            builder = datasets.load_dataset_builder(str(root), source.config, cache_dir=str(cache))
        except UserError:
            raise
        except Exception as error:  # whatever a card can say that is not right
            reason = " ".join(str(error).replace(str(root), what).split())[:160]
            raise UserError(f"{what}: holds no rows that can be found: {reason}") from None
        splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
        if source.split not in splits:
            raise _choose(what, "split", source.split, list(splits))
        # Patterns overlap, and can lead anywhere.
        names = list(dict.fromkeys(os.path.relpath(file, root) for file in splits[source.split]))
        if not set(names) <= set(listed):
            raise UserError(f"{what}: its card names files outside of the set")
    for name in names:
        if readers.suffix_of(Path(name)) not in readers.SUFFIXES:
            kinds = " ".join(sorted(readers.SUFFIXES))
            raise UserError(f"{what}: {name}: of no known kind: {kinds}")
    _check_options(what, builder.config, names)
    inner = {c: getattr(f, "feature", f) for c, f in (builder.info.features or {}).items()}
    return names, {c: f.names for c, f in inner.items() if isinstance(f, datasets.ClassLabel)}


def _choose(what: str, key: str, wanted: str | None, known: list[str]) -> UserError:
    listed = ", ".join(known[:10]) + (f", and {len(known) - 10} more" if len(known) > 10 else "")
    if wanted is None:
        return UserError(f"{what}: name one of its {key}s as `{key}:`: {listed}")
    return UserError(f"{what}: has no {key} `{wanted}`; it has: {listed}{nearest(wanted, known)}")


def _check_options(what: str, config: Any, names: list[str]) -> None:
    """Raises UserError if the card tells how to read a file: separators, fields, filters."""
    usual = type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _NOT_FOR_READING or value == getattr(usual, field.name):
            continue
        if value == "\t" and all(readers.suffix_of(Path(name)) == ".tsv" for name in names):
            continue
        raise UserError(
            f"{what}: its card says how to read it (`{field.name}: {value!r:.40}`), which is not "
            "followed: save its rows as jsonl and name that file"
        )
