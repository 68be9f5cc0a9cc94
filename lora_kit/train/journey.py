"""The context of a recipe's steps: signal handling, the run directory, and its lock file."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lora_kit.base.load import base_is_sharded, check_length
from lora_kit.base.pin import Pinned
from lora_kit.errors import CheckFailed, LoraKitError, out_of_memory
from lora_kit.folders import only_writer
from lora_kit.hashes import file_hash
from lora_kit.run import read_lock, recipe_file
from lora_kit.schema import Json, Run
from lora_kit.tasks.task import Processor, Task
from lora_kit.train import directory
from lora_kit.train.arguments import check_installed
from lora_kit.train.interrupt import StopSignal

if TYPE_CHECKING:
    from lora_kit.tasks.encode import Prepared

_SAMPLE_TOKENS = 48


class Journey:
    """One run of a recipe, from its first step to its report.

    >>> with Journey(run, TASK, resume) as journey:  # doctest: +SKIP
    ...     pinned = pin(run.base, journey.lock)
    ...     ...
    ...     journey.begin(pinned, data, processor)

    Inside the block SIGINT, SIGTERM and SIGHUP are handled: `fit` saves and stops; elsewhere they
    raise `Interrupted`. On a user error before the first checkpoint the run directory is removed,
    so that the corrected run can use the same name.

    Attributes:
        lock: run.lock.json of the run to resume; empty for a new one.
        stop: the received signal.

    Raises:
        RunFileError: on entry, a key that the installed libraries do not support.
        UserError: on entry, another process is writing into the run directory to resume.
    """

    def __init__(self, run: Run, task: Task, resume: bool = False) -> None:
        self.run, self.task, self.resume = run, task, resume
        self.lock: Json = read_lock(run.directory) if resume else {}
        self.stop = StopSignal()
        self._inside = ExitStack()
        self._created = False
        self._facts: Json = {}

    def say(self, text: str) -> None:
        """Print a line to stderr, on rank 0 only."""
        directory.say(text)

    def __enter__(self) -> Journey:
        if not gc.isenabled():  # in a recipe's own process
            gc.freeze()  # what the libraries made stays, and costs each collection 0.3 s
            gc.enable()
        check_installed(self.run, self.task.classes()[1])
        if self.resume and self.run.directory.is_dir():
            self._hold()
        self._inside.enter_context(self.stop.listening())
        return self

    def _hold(self) -> None:
        """Be the only writer of the run directory until the end of the block; for rank 0, which
        writes for all."""
        if directory.is_first_rank():
            self._inside.enter_context(only_writer(self.run.directory))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        user_error = isinstance(error, LoraKitError) and not isinstance(error, CheckFailed)
        user_error |= out_of_memory(error)
        if user_error and self._created and not any(self.run.directory.glob("checkpoints/*")):
            directory.remove(self.run.directory)
        self._inside.close()

    def begin(self, pinned: Pinned, data: Prepared, processor: Processor) -> None:
        """Connect the processes, and check that they agree; create the run directory, or open the
        one to resume; print the census and a sample.

        Raises:
            UserError: the processes differ in what they were given; the directory of a new run
                exists; the run to resume does not exist, is finished, or differs in a key that
                affects the result; the adapter to start from is of another base or other classes;
                or `train.max_length` exceeds the base's context.
            CheckFailed: the number of processes is not the requested one.
        """
        run, task = self.run, self.task
        directory.check_processes(directory.processes())
        check_length(pinned, run.train.max_length)
        recipe = {"name": Path(run.recipe).stem, "sha256": file_hash(recipe_file(run.recipe))}
        if directory.processes() > 1:
            given = {"recipe": recipe["sha256"], "--resume": self.resume, "commits": data.commits}
            self._facts = directory.facts_of(run, pinned, data.hashes, given)
        if not base_is_sharded():  # else after it is loaded, as accelerate expects
            self.connect()
        if self.resume:
            directory.check_same(run, task, pinned, data.hashes)
            begun_with = (self.lock.get("recipe") or {}).get("sha256")
            if run.recipe.endswith(".py") and begun_with not in (None, recipe["sha256"]):
                self.say(f"{run.recipe} changed since the run began: it continues with the new one")
            if directory.is_first_rank():
                directory.write_run_files(run, pinned, data.hashes, {"recipe": recipe})
        else:
            labels = data.facts.get("labels", ())
            directory.check_start(run.adapter, pinned, task.auto, labels)
            if directory.is_first_rank():
                # What later verbs read, so that none of them has to run the recipe.
                known = {"facts": data.facts, "commits": data.commits, "uses": data.uses}
                for name in ("kind", "joiner"):  # of causal tasks
                    if name in data.facts:
                        known[name] = data.facts[name]
                entries = {"recipe": recipe, "auto": task.auto, **known}
                directory.create(run, pinned, data.hashes, entries)
                self._hold()
                self._created = True
                directory.write_json(run.directory / "census.json", data.census.to_json())
        self.say("\n".join(data.summary()))
        self.say(f"sample: {self._sample(data, processor)!r}")

    def connect(self) -> None:
        """Connect the processes, and check that all were given the same. Raises UserError if they
        were not."""
        directory.connect(self._facts, self.run.train.ddp_timeout)

    def _sample(self, data: Prepared, processor: Processor) -> str:
        """The beginning of the first training row."""
        shown = self.task.show(data.rows("train")[0], processor, data.facts)[0]
        if shown.text:
            return shown.text
        tokenizer: Processor = getattr(processor, "tokenizer", processor)
        return str(tokenizer.decode(shown.ids[:_SAMPLE_TOKENS]))
