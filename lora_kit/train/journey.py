"""The context of a recipe's steps: signals, the run directory, the lock file on resume."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lora_kit.base.load import check_length
from lora_kit.base.pin import Pinned
from lora_kit.errors import CheckFailed, LoraKitError
from lora_kit.hashes import file_hash
from lora_kit.run import read_lock, recipe_file
from lora_kit.schema import Run
from lora_kit.tasks.task import Processor, Task
from lora_kit.train import checkpoint, directory
from lora_kit.train.arguments import check_installed
from lora_kit.train.directory import RunDirectory, is_first_rank
from lora_kit.train.interrupt import StopSignal

if TYPE_CHECKING:
    from lora_kit.tasks.encode import Prepared

_SAMPLE_TOKENS = 48


class Journey:
    """One run of a recipe.

    >>> with Journey(run, TASK, resume) as journey:  # doctest: +SKIP
    ...     pinned = pin(run.base, journey.lock)
    ...     ...
    ...     journey.begin(pinned, data, processor)

    Inside the block SIGINT and SIGTERM are handled: `fit` saves and stops; elsewhere they raise
    `Interrupted`. On a user error before the first checkpoint the run directory is removed, so that
    the corrected run can use the same name.

    Attributes:
        lock: run.lock.json of the run to resume; empty for a new one.
        directory: paths of the run's files.
        stop: the received signal.

    Raises:
        RunFileError: on entry, a key that the installed libraries do not support.
    """

    def __init__(self, run: Run, task: Task, resume: bool = False) -> None:
        self.run, self.task, self.resume = run, task, resume
        self.directory = RunDirectory(run.directory)
        self.lock: dict[str, Any] = read_lock(run.directory) if resume else {}
        self.stop = StopSignal()
        self._listening = contextlib.ExitStack()
        self._begun = False

    def say(self, text: str) -> None:
        """A line for people, on stderr, once for all ranks."""
        self.directory.say(text)

    def __enter__(self) -> Journey:
        with contextlib.ExitStack() as listening:
            listening.enter_context(self.stop.listening())
            check_installed(self.run, self.task.classes()[1])
            self._listening = listening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        users = isinstance(error, LoraKitError) and not isinstance(error, CheckFailed)
        mine = self._begun and not self.resume and is_first_rank()
        if users and mine and not any(self.directory.checkpoints.glob("*")):
            directory.remove(self.directory)
        self._listening.close()

    def begin(self, pinned: Pinned, data: Prepared, processor: Processor) -> None:
        """Create the run directory, or open the one to resume; print the census and a sample.

        Raises:
            UserError: it exists; or it is to be continued, and does not, is finished, or differs
                in a key that decides the result; or the adapter to start from belongs to another
                base or other classes; or rows are longer than the base's positions go.
            CheckFailed: not as many processes run as were asked for.
        """
        run = self.run
        self.directory.check_world(directory.processes())
        check_length(pinned, run.train.max_length)
        if self.resume:
            directory.check_same(self.directory, run, self.task, pinned, data.hashes)
            begun_with = (self.lock.get("recipe") or {}).get("sha256")
            if run.recipe.endswith(".py") and begun_with not in (None, self._recipe()["sha256"]):
                self.say(f"{run.recipe} changed since the run began: it continues with the new one")
        else:
            labels = data.facts.get("labels", ())
            directory.check_start(run.adapter, pinned, self.task.auto, labels)
        if is_first_rank():
            if self.resume:
                directory.reopen(self.directory, run, pinned, data.hashes)
                self.directory.lock(recipe=self._recipe())
            else:
                directory.create(self.directory, run, pinned, data.hashes, self._entries(data))
                self._begun = True
                file = self.directory.path / "census.json"
                checkpoint.write_json(file, data.census.to_json())
        self.say("\n".join(data.summary()))
        self.say(f"sample: {self._sample(data, processor)!r}")

    def _recipe(self) -> dict[str, str]:
        return {
            "name": Path(self.run.recipe).stem,
            "sha256": file_hash(recipe_file(self.run.recipe)),
        }

    def _entries(self, data: Prepared) -> dict[str, Any]:
        """What the lock file keeps of recipe and data, so that no later verb has to run the
        recipe."""
        entries: dict[str, Any] = {
            "recipe": self._recipe(),
            "auto": self.task.auto,
            "facts": data.facts,
            "commits": data.commits,
        }
        for name in ("kind", "joiner"):  # of causal tasks; verbs read them here
            if name in data.facts:
                entries[name] = data.facts[name]
        return entries

    def _sample(self, data: Prepared, processor: Processor) -> str:
        """The beginning of the first training row."""
        shown = self.task.show(data.rows("train")[0], processor, data.facts)[0]
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        text: str = shown.text or tokenizer.decode(shown.ids[:_SAMPLE_TOKENS])
        return text
