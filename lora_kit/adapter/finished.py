"""A run directory or an adapter folder, opened once and passed to the verbs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import nano
from lora_kit.adapter.files import (
    WEIGHTS,
    Adapter,
    adapter_folder,
    config_hash,
    open_adapter,
    processor_hashes,
    read_config,
)
from lora_kit.base.head import CAUSAL, Head
from lora_kit.base.load import load_tokenizer
from lora_kit.base.pin import Pinned, pin
from lora_kit.base.templates import set_template
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash
from lora_kit.run import TaskKeys, check_settings, load_run, read_json, read_lock
from lora_kit.schema import Base, Json, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPTION = "--base FOLDER_OR_ID"
# Tokenizer files.
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model")


class FinishedRun:
    """A finished run, or the folder of a PEFT adapter.

    Files are verified by the hashes in run.lock.json, not by path: a run that was moved or copied
    with its project still works. Expensive properties are read on access.

    A user may edit in run.yaml: name, `prove:`, FREE_TO_CHANGE of `run`, and paths; in
    adapter_config.json: base_model_name_or_path and revision; and may add other files.

    Attributes:
        path: as given, for messages.
        home: the run directory, also for RUN/adapter; else the adapter folder.
        folder: the adapter folder.
        lock: run.lock.json; empty if there is none.

    Args:
        path: a run directory, its adapter/, or the folder of any LoRA adapter.
        base: a folder or Hub id instead of the base that the run names; it must be the same base by
            the hashes of the lock file.
        overrides: `key=value` settings of the run file.

    Raises:
        UserError: there is no finished run, or its files are corrupt.
    """

    def __init__(
        self, path: str | Path, base: str | None = None, overrides: Sequence[str] = ()
    ) -> None:
        self.path = str(path)
        self.folder = adapter_folder(path)
        self.home = _home(Path(path), self.folder)
        self._overrides = list(overrides)
        self.lock = read_lock(self.home)
        if base is not None and os.path.isdir(os.path.expanduser(base)):
            base = os.path.abspath(os.path.expanduser(base))
        self._given = base

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.home.resolve().name

    @cached_property
    def run(self) -> Run | None:
        """The run file with absolute paths; None for an adapter without a run. Raises UserError if
        its settings were changed since the run."""
        file = self.home / "run.yaml"
        if not file.is_file():
            return None
        check_settings(self.home)
        return load_run(file, self._overrides, needs_sources=False)

    def require_run(self) -> Run:
        """The run file. Raises UserError for an adapter without a run."""
        if self.run is None:
            raise UserError(f"{self.path}: no run directory (run.yaml) for this adapter")
        return self.run

    def run_of(self, task: TaskKeys) -> Run:
        """`require_run`, including the task's own keys."""
        self.require_run()
        file = self.home / "run.yaml"
        return load_run(file, self._overrides, needs_sources=False, task_of=lambda _: task)

    # ------------------------------------------------------------------ the adapter
    @cached_property
    def adapter(self) -> Adapter:
        """The adapter's files. Raises UserError if they were changed since the run, or PEFT would
        not load all of it."""
        self.refuse_changed()
        found = open_adapter(self.folder)
        if found.misnamed:
            weights = self.folder / WEIGHTS
            raise UserError(f"{weights}: {found.misnamed}: save it again, from an unwrapped model")
        return found

    @cached_property
    def changed(self) -> list[str]:
        """The files of the adapter that are not as the run saved them, by its lock file."""
        locked, weights = self.lock.get("adapter") or {}, self.folder / WEIGHTS
        changed = []
        if "sha256" in locked and weights.is_file() and file_hash(weights) != locked["sha256"]:
            changed.append(WEIGHTS)
        if locked.get("config") not in (None, config_hash(read_config(self.folder))):
            changed.append("adapter_config.json")
        found = processor_hashes(self.folder)
        known = locked.get("files")
        if known is None:  # of an older version
            tokenizer = self.lock.get("tokenizer", {}).get("sha256")
            known = {**found, "tokenizer.json": tokenizer} if tokenizer else found
        if not isinstance(known, dict):
            raise UserError(f"{self.home}/run.lock.json: adapter.files: invalid: edited or corrupt")
        names = sorted(known.keys() | found.keys())
        return changed + [name for name in names if known.get(name) != found.get(name)]

    def refuse_changed(self) -> None:
        """Raises UserError if a file of the adapter was changed since the run."""
        if self.changed:
            raise UserError(
                f"{self.folder / self.changed[0]}: was changed since the run saved it: copy it "
                "again, or train again (only the base's name in adapter_config.json may be edited)"
            )

    # ------------------------------------------------------------------ the task
    @cached_property
    def head(self) -> Head:
        """The model's head, from the lock file or from head.json."""
        name = self._locked("auto", str)
        if name is None:
            return Head.read(self.folder) or Head()
        if not re.fullmatch(r"AutoModel\w*", name):
            raise UserError(f"{self.home}/run.lock.json: auto: {name!r:.80} is not an auto class")
        labels = tuple(str(label) for label in self.facts.get("labels") or ())
        return Head(name, labels, self.pooling)

    @property
    def auto(self) -> str:
        """The auto class of transformers that loads the model."""
        return self.head.auto

    @property
    def facts(self) -> Json:
        """Facts from the training rows, such as `labels`."""
        return self._locked("facts", dict) or {}

    @property
    def fresh(self) -> tuple[str, ...]:
        """Newly initialised modules, whose weights are in the adapter's files."""
        return tuple(map(str, self._locked("fresh", list) or ()))

    @property
    def pooling(self) -> str | None:
        """The pooling of a sequence classifier; None: that of its class."""
        return self._locked("pooling", str)

    def require_language_model(self, verb: str) -> None:
        """Raises UserError unless the model is a language model, which `verb` requires."""
        if self.auto != CAUSAL:
            raise UserError(
                f"{self.path}: {verb} needs a language model, and this adapter is for "
                f"{self.auto}: use lora_kit.load, or lora-kit merge"
            )

    def _locked(self, key: str, kind: type) -> Any:
        """An entry of the lock file; None: missing. Raises UserError if it is of another type."""
        value = self.lock.get(key)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{self.home}/run.lock.json: {key}: invalid: edited or corrupt")
        return value

    # ------------------------------------------------------------------ the base
    @property
    def hashes(self) -> dict[str, str]:
        """{file: sha256} of the base that it was trained on; empty if unknown."""
        hashes = self.lock.get("base", {}).get("hashes") or {}
        if not isinstance(hashes, dict):
            raise UserError(f"{self.home}/run.lock.json: base.hashes: invalid: edited or corrupt")
        return hashes

    @cached_property
    def base(self) -> Base:
        """The base, with the dtype and quantization of training.

        Raises:
            UserError: no base is named.
        """
        if self.run is not None:
            named = self.run.base
        else:
            config, locked = read_config(self.folder), self.lock.get("base", {})
            values = {key: locked[key] for key in ("dtype", "quantize") if key in locked}
            values["model"] = self._given or config.get("base_model_name_or_path")
            values["revision"] = config.get("revision")
            if not values["model"]:
                raise UserError(f"{self._base_key}: no base: name it with {_OPTION}")
            try:
                named = Base.model_validate(values)
            except ValueError:
                files = "adapter_config.json or run.lock.json"
                raise UserError(f"{self.home}: {files}: names an invalid base") from None
        if self._given is not None:
            named = named.model_copy(update={"model": self._given, "revision": None})
        return named

    @property
    def given(self) -> Pinned | None:
        """The base that was named in place of the run's, compared with that one by its hashes."""
        return None if self._given is None else self.pinned

    @property
    def peft_base(self) -> tuple[str | None, str | None]:
        """The base as an adapter_config.json names it, so that PEFT alone finds it: a folder or Hub
        id, and its revision; None where none is named."""
        on_hub = self.lock.get("base", {}).get("revision")  # its commit is in the adapter's config
        if self._given is None and (self.run is None or on_hub):
            config = read_config(self.folder)
            return config.get("base_model_name_or_path"), config.get("revision")
        return str(nano.MODEL) if self.base.model == "nano" else self.base.model, self.base.revision

    @cached_property
    def pinned(self) -> Pinned:
        """The base on this machine.

        Raises:
            UserError: it does not exist, is already quantized, or is not the training's base.
        """
        return self._pin(weights=True)

    @cached_property
    def located(self) -> Pinned:
        """`pinned` without hashing the weights of a local folder, for callers that verify them
        while reading, or do not need them."""
        return self._pin(weights=not Path(self.base.model).is_dir())

    def _pin(self, weights: bool) -> Pinned:
        """The base, compared with the hashes of the lock file; `weights`: also its weights."""
        locked = self.lock.get("base", {})
        if not locked and self.run:
            what = "cannot verify that this is the base it was trained on"
            print(f"warning: {self.path}: no run.lock.json: {what}", file=sys.stderr)
        try:
            # A commit belongs to one repository.
            lock = self.lock if locked.get("model") == self.base.model else None
            found = pin(self.base, lock, weights)
        except UserError as error:
            why = str(error).removeprefix("base.model: ")
            elsewhere = "" if self._given else "; if it is elsewhere, name it with " + _OPTION
            raise UserError(f"{self._base_key}: {why}{elsewhere}") from None
        if read_json(Path(found.folder) / "config.json").get("quantization_config"):
            raise UserError(
                f"{self._base_key}: {self.base.model}: its weights are already quantized: name the "
                f"original model with {_OPTION}"
            )
        expected = self.hashes or found.hashes
        names = expected.keys() | found.hashes.keys()
        changed = [name for name in names if expected.get(name) != found.hashes.get(name)]
        if not weights:
            changed = [name for name in changed if not name.endswith(".safetensors")]
            return self.pinned if changed else found  # `pinned` reports all files that differ
        if changed:
            self.refuse_base(changed)
        return found

    @property
    def _base_key(self) -> str:
        """Where the base is named."""
        if self._given is not None:
            return "--base"
        if self.run is not None:
            return f"{self.home}/run.yaml: base.model"
        return f"{self.folder}/adapter_config.json: base_model_name_or_path"

    def refuse_base(self, files: Sequence[str]) -> None:
        """Raises UserError: these files differ from the base that it was trained on."""
        raise UserError(
            f"{self.path}: trained on another base than {self.base.model}: "
            f"{', '.join(sorted(files))} {'differs' if len(files) == 1 else 'differ'}; an adapter "
            f"only works on its own base: name that one with {_OPTION}"
        )

    # ------------------------------------------------------------------ the processor
    @property
    def has_processor(self) -> bool:
        """Whether adapter or base has a tokenizer."""
        if any(self.folder.glob("tokenizer*")):
            return True
        base = Path(self.located.folder)
        return any(file for pattern in _TOKENIZER for file in base.glob(pattern))

    @cached_property
    def processor(self) -> PreTrainedTokenizerBase:
        """The tokenizer of training with its chat template; the base's if the adapter folder has
        none."""
        self.refuse_changed()
        folder = self.folder
        if not any(folder.glob("tokenizer*")):
            folder = Path(self.located.folder)
        base = None
        with suppress(UserError):  # an adapter's own tokenizer is usable without the base
            base = Path(self.base.model) if Path(self.base.model).is_dir() else None
        tokenizer = load_tokenizer(folder, generates=self.auto == CAUSAL, base=base)
        set_template(tokenizer, None)  # rejects a template that does not terminate
        return tokenizer


def _home(path: Path, folder: Path) -> Path:
    """The run directory of an adapter folder; the folder itself if it belongs to no run. Raises
    UserError for a run whose run file or lock file is missing."""
    # A run's lock file is next to adapter/; a pulled or exported adapter has it inside, and may be
    # in a folder with an unrelated run.yaml.
    if folder.name != "adapter" or (folder / "run.lock.json").is_file():
        return folder
    home = path if (path / "adapter").exists() else folder.parent
    run, lock, trained = (
        (home / name).is_file() for name in ("run.yaml", "run.lock.json", "metrics.jsonl")
    )
    if lock and not run:
        raise UserError(f"{home / 'run.yaml'}: missing, beside run.lock.json: copy it again")
    if run and trained and not lock:
        raise UserError(f"{home / 'run.lock.json'}: missing, beside run.yaml: copy it again")
    return home if lock else folder
