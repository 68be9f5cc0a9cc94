"""A Hub data set -> the files of one split, downloaded once and read like local files.

`datasets` determines which files belong to a config and a split; `readers` reads them, so that a
row's place is a line of a file and no value is coerced. Loading scripts never run.
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
from lora_kit.data.readers import OpenedSource
from lora_kit.errors import UserError, reason_of
from lora_kit.hashes import cached_hash
from lora_kit.run import nearest
from lora_kit.schema import Source

# Files with metadata of a data set: configs, splits, class names.
CARD = ["README.md", ".huggingface.yaml", "dataset_infos.json", ".gitattributes"]
_FETCHED_AT_ONCE = 8
# Settings of a `datasets` builder config that do not change how a file is read.
_NOT_FOR_READING = {"name", "version", "data_dir", "data_files", "description", "features"}


def fetch(source: Source, commits: dict[str, str]) -> OpenedSource:
    """Find the files of a split and download those that are not in the Hub's cache.

    Args:
        commits: {data set with split: commit} to read where the source names no revision.

    Raises:
        UserError: the data set, revision, config or split does not exist, is not accessible, or
            is not cached and the Hub cannot be reached; or it has files of unsupported types.
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
        card = Path(snapshot_download(**repo, revision=revision, allow_patterns=CARD))
        # The cache has a folder per commit, named after it, and the list of the commit's files.
        repo["revision"] = card.name
        listed = [file.path for file in get_cached_repo_tree(**repo)]
        names, labels = files_of_split(source, card, listed)
        with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
            files = list(pool.map(lambda n: Path(hf_hub_download(**repo, filename=n)), names))
    except UserError:
        raise
    except (CachedRepoTreeNotFoundError, OSError, ValueError) as error:
        problem = hub_errors.problem(error, source.source, revision, "dataset")
        raise UserError(f"{source.source}: {problem}") from None
    content = [labels, [(n, cached_hash(file)) for n, file in zip(names, files, strict=True)]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return OpenedSource(name, source.fraction, digest, tuple(files), labels, card.name)


def files_of_split(
    source: Source, card: Path, listed: list[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """File names, and {column: class names} from the card (a parquet schema may have them too; its
    reader looks there).

    Args:
        card: a folder with the files of metadata. listed: all file names of the data set.

    `datasets` resolves the split offline, from a folder with the card and an empty file in place of
    each data file.
    """
    import datasets
    from datasets.load import dataset_module_factory

    repo = source.source
    if f"{repo.partition('/')[2]}.py" in listed:
        raise UserError(
            f"{repo}: needs a loading script, which is not supported: name another data set"
        )
    datasets.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        root, cache = Path(temporary).resolve() / "set", Path(temporary) / "cache"
        for name in listed:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{repo}: lists a file outside of the data set: {name!r:.60}")
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
            if name in CARD:
                shutil.copyfile(card / name, root / name)
        try:
            known = dataset_module_factory(str(root)).builder_configs_parameters
            default = known.default_config_name
            configs = list(dict.fromkeys(c.name for c in known.builder_configs or []))
            wanted = source.config or default
            if wanted not in [*configs, default] or (wanted is None and len(configs) > 1):
                raise name_one_of(repo, "config", source.config, configs)
            builder = datasets.load_dataset_builder(str(root), source.config, cache_dir=str(cache))
        except UserError:
            raise
        except Exception as error:  # datasets raises anything on an invalid card
            reason = reason_of(error, most=1000).replace(str(root), repo)[:200]
            raise UserError(f"{repo}: no data files found: {reason}") from None
        splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
        if source.split not in splits:
            raise name_one_of(repo, "split", source.split, list(splits))
        # Patterns can overlap, and can point outside.
        names = list(dict.fromkeys(os.path.relpath(file, root) for file in splits[source.split]))
        if not set(names) <= set(listed):
            raise UserError(f"{repo}: its card lists files outside of the data set")
    for name in names:
        if readers.suffix_of(Path(name)) not in readers.SUFFIXES:
            kinds = " ".join(sorted(readers.SUFFIXES))
            raise UserError(f"{repo}: {name}: unsupported file type; supported: {kinds}")
    _check_options(repo, builder.config, names)
    inner = {c: getattr(f, "feature", f) for c, f in (builder.info.features or {}).items()}
    return names, {c: f.names for c, f in inner.items() if isinstance(f, datasets.ClassLabel)}


def name_one_of(repo: str, key: str, wanted: str | None, known: list[str]) -> UserError:
    listed = ", ".join(known[:10]) + (f", and {len(known) - 10} more" if len(known) > 10 else "")
    if wanted is None:
        return UserError(f"{repo}: name one of its {key}s as `{key}:`: {listed}")
    return UserError(f"{repo}: has no {key} `{wanted}`; it has: {listed}{nearest(wanted, known)}")


def _check_options(repo: str, config: Any, names: list[str]) -> None:
    """Raises UserError if the card sets reading options: separators, fields, filters."""
    default = type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _NOT_FOR_READING or value == getattr(default, field.name):
            continue
        if value == "\t" and all(readers.suffix_of(Path(name)) == ".tsv" for name in names):
            continue
        raise UserError(
            f"{repo}: its card sets `{field.name}: {value!r:.40}`, which is not "
            "supported: save its rows as jsonl and name that file"
        )
