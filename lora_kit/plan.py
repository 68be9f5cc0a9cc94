"""What a run will need, known from its configuration alone, and the way of running it that fits.

`lora-kit plan` asks before anything is loaded; `train` asks the same, and follows the answer.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.benchmark import Timer
from transformers import AutoConfig

import lora_kit.train.trainer  # noqa: F401 - what a run imports, it holds
from lora_kit.adapter.attach import attach
from lora_kit.base.load import base_is_sharded, check_length, gpu_is_used
from lora_kit.base.pin import Pinned, pin
from lora_kit.data.rows import Row
from lora_kit.errors import LoraKitError, UserError
from lora_kit.schema import Run
from lora_kit.speed import memory as costs
from lora_kit.speed.memory import Choice, Machine, PassCost
from lora_kit.tasks.encode import Prepared, rows_of
from lora_kit.tasks.task import Batch, Processor, Task
from lora_kit.train.checkpoint import checkpoint_bytes
from lora_kit.train.guards import has_own_loss
from lora_kit.train.strategies import choose

_MIB = 2**20
_PROBED_S, _PROBED_ROWS = 0.05, 1024  # of measuring each rate of the device
_ADAM_BYTES, _ADAM_CALLS = 40, 12  # read and written for a value, and started for a tensor
_CODES = 2 * 16 * 4 + 256 * 4  # bytes: the tables of NF4, and of the 8 bits of its scales
_FEWEST_TOKENS = 64  # of a row that is proposed where nothing fits
_CGROUPS = Path("/sys/fs/cgroup")


class Uncountable(UserError):
    """An architecture that does not run without content, as one whose experts are chosen by it."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs of one process, and how it is run.

    Args:
        memory: bytes by cause, at the moment when most are held. room: what the process may hold.
        flops: of a step. tokens_per_second: of all processes, no padding counted. seconds: of the
            training steps alone. disk: bytes by what is written.
        choice: rows of a pass, passes of a step, and how many of `layers` that keep something
            `speed.memory.recompute` is to be told.
    """

    memory: dict[str, int]
    room: int
    flops: int
    tokens_per_second: float
    seconds: float
    disk: dict[str, int]
    fits: bool
    choice: Choice
    layers: int
    why: str

    @property
    def total(self) -> int:
        """What the process will be seen to hold."""
        return sum(self.memory.values())

    @property
    def needed(self) -> int:
        """What it must have: a mapped file is given back where memory is wanted."""
        return self.total - self.memory.get("mapped file", 0)

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` prints."""

        def mib(sizes: dict[str, int]) -> dict[str, float]:
            return {what: round(size / _MIB, 1) for what, size in sizes.items()}

        return {
            "memory_mib": mib(self.memory),
            **mib({"total_mib": self.total, "needed_mib": self.needed, "room_mib": self.room}),
            "fits": self.fits,
            "chosen": asdict(self.choice),
            "layers": self.layers,
            "why": self.why,
            "flops_per_step": self.flops,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "seconds": round(self.seconds, 1),
            "disk_mib": mib(self.disk),
        }

    def __str__(self) -> str:
        rows = [*self.memory.items(), ("total", self.total)]
        rows += [("needed of it", self.needed)] if self.needed < self.total else []
        rows += [("available", self.room)]
        disk = ", ".join(f"{what} {n / _MIB:,.0f} MiB" for what, n in self.disk.items())
        lines = [f"{cause:>16} {n / _MIB:>10,.1f} MiB" for cause, n in rows]
        lines.append(
            f"{self.tokens_per_second:,.0f} tokens/s, {self.flops / 1e9:,.0f} GFLOP a step, "
            f"{self.seconds:,.0f} s of training; disk: {disk}"
        )
        return "\n".join([*lines, self.why])


def plan(run: Run, task: Task) -> MemoryPlan:
    """The plan of a run file: of its base only the configuration and the tokenizer are fetched.

    Raises:
        UserError: base or data cannot be used; or nothing fits, as `plan_run` says it.
    """
    pinned = pin(run.base, weights=False)
    check_length(pinned, run.train.max_length)
    processor, data = rows_of(task, run, pinned, limits=False)
    return plan_run(run, task, pinned, processor, data)


def plan_run(
    run: Run, task: Task, pinned: Pinned, processor: Processor, data: Prepared, quick: bool = True
) -> MemoryPlan:
    """The plan of a run, made before its base is loaded; all processes make the same one.

    Args:
        data: the lengths of its rows decide.
        quick: with the quick paths of `speed: auto`, where they know the base.

    Raises:
        UserError: with `speed: auto`, nothing fits: by how much, and what would.
        Uncountable: nothing can be said of this base; it may train all the same.
    """
    try:
        here = _Planning(run, task, pinned, processor, data, quick)
        here.machine = _machine(run, here.model)
        if (choice := here.choose()) is None:
            raise UserError(_what_would_fit(here))
        return here.plan(choice)
    except LoraKitError:
        raise
    except Exception as error:  # whatever an architecture that was never tried raises
        if run.speed == "auto" and quick:  # as training will: by the standard path
            return plan_run(run, task, pinned, processor, data, quick=False)
        reason = " ".join(str(error).split())[:200]
        raise Uncountable(
            f"base.model: {pinned.folder}: cannot be planned for: {reason}"
        ) from error


def plan_training(
    run: Run,
    task: Task,
    pinned: Pinned,
    processor: Processor,
    data: Prepared,
    say: Callable[[str], None],
) -> MemoryPlan | None:
    """The plan that training follows, reported in a line; None: as the run file has it.

    Raises:
        UserError: nothing fits.
    """
    if base_is_sharded():
        return None
    if not has_own_loss(task):
        say("no plan, the batch is as written: the loss is the trainer's own")
        return None
    try:
        found = plan_run(run, task, pinned, processor, data)
    except Uncountable as error:
        say(f"no plan, the batch is as written: {error}")
        return None
    needs = f"{found.total / _MIB:,.0f} MiB, {found.tokens_per_second:,.0f} tokens/s expected"
    say(f"plan: {needs}; {found.why}")
    return found


class _Planning:
    """The numbers that a plan is made of; each pass is counted once."""

    machine: Machine

    def __init__(
        self,
        run: Run,
        task: Task,
        pinned: Pinned,
        processor: Processor,
        data: Prepared,
        quick: bool,
    ) -> None:
        self.run, self.task, self.pinned = run, task, pinned
        self.processor, self.data, self.quick = processor, data, quick
        self.model, self.held, self.file, self.merged = _on_meta(run, task, pinned, data)
        fast = quick and run.speed == "auto"
        self.flat = bool(fast and costs.assume_fast(self.model, task.flat))
        self.masked = not (self.flat or costs.count_attention(self.model.get_base_model()))
        self.layers = costs.recompute(self.model, 0)
        self.forced = self.layers if run.train.gradient_checkpointing else 0
        self.own = run.train.per_device_train_batch_size
        self.rows = self.own * run.train.gradient_accumulation_steps
        self.processes = PartialState(cpu=not gpu_is_used()).num_processes
        self.works: dict[tuple[int, int], PassCost] = {}
        packed = data.train is not data.rows("train")
        self.tokens = data.train.lengths if packed else task.tokens(data.train)
        # What is trained on may be cut shorter than it is: `_what_would_fit` asks.
        sides = max(1, round(float(self.tokens.max()) / run.train.max_length))
        self.tokens = np.minimum(self.tokens, sides * run.train.max_length)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """A micro-batch of rows on the meta device, cut to the longest that is allowed."""
        length = self.run.train.max_length
        short = [{name: _cut(value, length) for name, value in row.items()} for row in rows]
        collate = self.task.collate(self.processor, self.flat)
        assert collate is not None
        return costs.on_meta(collate(short), self.masked)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self.task.loss(model, batch, 1, self.run)

    def work(self, micro: int, recomputed: int) -> PassCost:
        """The largest pass of an epoch, its rows in a random order."""
        if (micro, recomputed) not in self.works:
            costs.recompute(self.model, recomputed)
            order = np.random.default_rng(self.run.seed).permutation(len(self.tokens))
            size = min(micro, len(order))
            passes = order[: len(order) // size * size].reshape(-1, size)
            tokens = self.tokens[passes]
            largest = passes[(tokens.sum(1) if self.flat else tokens.max(1)).argmax()]
            batch = self.batch([self.data.train[int(n)] for n in largest])
            self.works[micro, recomputed] = costs.count(self.model, batch, self.loss)
        return self.works[micro, recomputed]

    @cached_property
    def judging(self) -> list[PassCost]:
        """The largest batch of `train.eval_steps`."""
        train = self.run.train
        if not train.eval_steps:
            return []
        order = np.argsort(self.task.tokens(self.data.eval), kind="stable")
        longest = order[-train.per_device_eval_batch_size :]
        batch = self.batch([self.data.eval[int(n)] for n in longest])
        return [costs.count(self.model, batch, self.loss, backward=False)]

    def memory(self, micro: int, recomputed: int) -> dict[str, int]:
        """Bytes by cause when most are held."""
        held = dict(self.held)
        work = max([self.work(micro, recomputed), *self.judging], key=lambda work: work.peak)
        if micro < self.rows or self.processes > 1:
            held["gradients"] *= 2  # of this pass, and of those before or of all processes
        held |= {"activations": work.peak - work.logits, "logits": work.logits}
        if self.machine.name == "cpu":  # a GPU's driver is neither counted nor in what is free
            held["framework"] = self.machine.framework
            held["allocator"] = costs.unused_bytes(work)
        return held

    def fits(self, micro: int, again: int) -> bool:
        limit = self.machine.limit  # of most that cannot fit no pass has to be counted
        return sum(self.held.values()) <= limit and sum(self.memory(micro, again).values()) <= limit

    def seconds(self, micro: int, recomputed: int) -> float:
        return self.machine.seconds(self.work(micro, recomputed))

    def choose(self) -> Choice | None:
        """The user's own way wherever it fits; None: nothing fits."""
        # What is measured differs a little each time; a batch that fits is the same each time.
        if self.run.speed == "plain" or self.fits(self.own, self.forced):
            return Choice(self.own, self.rows // self.own, self.forced)
        again = range(self.forced, self.layers + 1)
        return costs.choose_batch(self.rows, self.own, again, self.fits, self.seconds)

    def plan(self, choice: Choice) -> MemoryPlan:
        train, machine = self.run.train, self.machine
        work = self.work(choice.micro_batch, choice.recomputed)
        held = self.memory(choice.micro_batch, choice.recomputed)
        total = sum(held.values())
        if machine.name == "cpu":
            held["mapped file"] = self._mapped(held)
        mean, there = float(self.tokens.mean()), len(self.tokens)
        # Of a usual pass, of the largest one.
        usual = mean * min(choice.micro_batch, there) / work.tokens
        values = held["adapter"] // 4
        tensors = sum(p.requires_grad for p in self.model.parameters())
        step = choice.accumulation * usual * machine.seconds(work)
        step += values * _ADAM_BYTES / machine.bandwidth + tensors * _ADAM_CALLS * costs.CALL_S
        epoch = math.ceil(len(self.tokens) / (self.rows * self.processes))
        keep = train.save_total_limit + bool(train.eval_steps)
        return MemoryPlan(
            memory={cause: size for cause, size in held.items() if size},
            room=machine.room,
            flops=int(work.flops * choice.accumulation * usual),
            tokens_per_second=mean * min(self.rows, there) * self.processes / step,
            seconds=step * (train.max_steps or math.ceil(epoch * train.num_train_epochs)),
            disk={
                "checkpoints": checkpoint_bytes(values, keep, train.optim),
                "adapter": 4 * values,
                "merged model": self.merged,
            },
            fits=total <= machine.room,
            choice=choice,
            layers=self.layers,
            why=self._why(choice, total),
        )

    def _mapped(self, held: dict[str, int]) -> int:
        """The base's file counts as resident while it is mapped: where weights are converted, until
        that is done; where they are quantized, as long as a tensor beside them lives. It is not
        taken from anybody: what is free does not have to hold it."""
        if self.file != self.merged:
            weights = sum(n for cause, n in held.items() if cause[:6] in ("weight", "quanti"))
            return max(0, self.machine.framework + weights + self.file - sum(held.values()))
        quantized = self.run.base.quantize != "none"
        return self.file - held[f"weights {self.run.base.dtype}"] if quantized else 0

    def _why(self, choice: Choice, total: int) -> str:
        rows, passes, again = asdict(choice).values()
        what = f"{rows} row{'s' * (rows > 1)} a micro-batch, "
        what += f"{passes} micro-batch{'es' * (passes > 1)} a step; "
        what += f"{again} of {self.layers} layers are" if again else "no layer is"
        what += " recomputed: "
        if (rows, again) != (self.own, self.forced):
            written = sum(self.memory(self.own, self.forced).values()) / _MIB
            what += f"the quickest that fits, as written it takes {written:,.0f} MiB"
        elif self.run.speed == "plain":
            what += f"as written (speed: plain){', too much' * (total > self.machine.room)}"
        else:
            what += "as written, it fits"
        what += f"; {self.machine.room / _MIB:,.0f} MiB are available"
        slower = self.machine.flops["float32"] / self.machine.flops[self.run.base.dtype]
        if slower > 1.1:
            what += f"; bfloat16 takes {slower:.1f} times as long as float32 on this processor: "
            what += "base.dtype=float32 would be quicker"
        return what


def _cut(value: Any, length: int) -> Any:
    return value[:length] if isinstance(value, np.ndarray) else value


def _on_meta(
    run: Run, task: Task, pinned: Pinned, data: Prepared
) -> tuple[Any, dict[str, int], int, int]:
    """The base and its adapter as shapes alone, in training mode; bytes by cause that do not depend
    on the batch; bytes of the base's file; and of the merged model's."""
    dtype = getattr(torch, run.base.dtype)
    config = AutoConfig.from_pretrained(
        pinned.folder, local_files_only=True, trust_remote_code=False
    )
    stored = config.dtype or dtype  # before it is set to what is computed in
    model, fresh = task.skeleton(pinned, data.facts, run)
    model.requires_grad_(False)
    model.config.get_text_config().use_cache = False
    values = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    head, quantized = model.get_output_embeddings(), run.base.quantize != "none"
    new = {id(m) for name in fresh for m in model.get_submodule(name).modules()} | {id(head)}
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear and id(m) not in new]
    packed = [m.weight for m in linear] if quantized else []
    inside = sum(w.numel() for w in packed)
    held = {f"weights {run.base.dtype}": (values - inside) * dtype.itemsize}
    if run.base.quantize == "nf4":  # of each block of 64 a scale of 8 bits, of 256 of those a float
        held |= {"weights nf4": inside // 2, "quantization": inside // 64 * 260 // 256}
        held["quantization"] += _CODES * len(packed)
    elif run.base.quantize == "int8":  # a scale a row
        held |= {"weights int8": inside, "quantization": 4 * sum(map(len, packed))}
    # One layer at a time is unpacked.
    held["buffers"] = buffers + max((w.numel() for w in packed), default=0) * dtype.itemsize
    # An adapter that is started from is read from its file, and torch warns that it goes nowhere.
    with torch.device("cpu" if run.adapter.start else "meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        strategy = choose(run.train, run.adapter, model, fresh)
        model = attach(model, strategy.adapter, fresh, run.seed).train()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    held |= {"adapter": 4 * sum(trained), "gradients": 4 * sum(trained)}
    # bitsandbytes keeps 32-bit state of small tensors.
    eight = "8bit" in run.train.optim
    held["optimizer"] = sum(n * (2 if eight and n >= 4096 else 8) for n in trained)
    return model, held, values * stored.itemsize, values * dtype.itemsize


def _what_would_fit(here: _Planning) -> str:
    """By how much nothing fits, and the first of the changes with which something does."""
    run, room = here.run, here.machine.limit
    least = sum(here.memory(1, here.layers).values())
    text = (
        f"nothing fits: {least / _MIB:,.0f} MiB at least, with a row a micro-batch and all "
        f"layers recomputed; {room / _MIB:,.0f} are available, without a margin of what is free: "
        f"{(least - room) / _MIB:,.1f} MiB too much; "
    )
    four: dict[str, Any] = {"base": {"quantize": "nf4"}} if run.base.quantize != "nf4" else {}
    # An adapter that is started from has its rank.
    rank: dict[str, Any] = {} if run.adapter.start else {"adapter": {"r": -(-run.adapter.r // 4)}}
    halved = [run.train.max_length >> n for n in range(1, 7)]
    lengths = [{"train": {"max_length": n}} for n in halved if n >= _FEWEST_TOKENS]
    both = [four | length for length in lengths]
    tried = [four, *lengths, rank, *both, *(some | rank for some in [four, *both])]
    for change in filter(None, tried):
        parts = {name: getattr(run, name).model_copy(update=new) for name, new in change.items()}
        other = _Planning(
            run.model_copy(update=parts),
            here.task,
            here.pinned,
            here.processor,
            here.data,
            here.quick,
        )
        other.machine = here.machine
        values = [f"{name}.{key}={new[key]}" for name, new in change.items() for key in new]
        if other.fits(1, other.layers):
            return text + " ".join(values) + " would fit"
    size = sum(other.memory(1, other.layers).values()) / _MIB
    return f"{text}{size:,.0f} MiB even with {' '.join(values)}: a smaller base, or a larger device"


def free_memory() -> int:
    """Bytes that may still be taken on a CPU: what is available, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # cgroups, first version
    ):
        with contextlib.suppress(OSError, ValueError):  # no such limit
            place = _CGROUPS / folder
            stat = (place / "memory.stat").read_text().split()
            # Cached files are counted as used, and given back when memory is wanted.
            cached = int(stat[stat.index("inactive_file") + 1])
            left = int((place / limit).read_text()) - int((place / used).read_text()) + cached
            free = min(free, left)
    return max(0, free)


def _machine(run: Run, model: Any) -> Machine:
    """The device: what may be held on it, and its rates, measured in a moment at the shape of the
    model's largest layer; of several processes the one with the least room."""
    framework = int(psutil.Process().memory_info().rss)  # before what is tried here
    device = torch.device("cuda" if gpu_is_used() else "cpu")
    linear = {m.weight.shape for m in model.modules() if type(m) is torch.nn.Linear}
    head = {model.get_input_embeddings().weight.shape}
    out, into = max(linear - head or head, key=math.prod)
    rates: dict[str, float] = {}
    for name in ("float32", run.base.dtype):
        kind: Any = {"dtype": getattr(torch, name), "device": device}
        x, w = torch.ones(_PROBED_ROWS, into, **kind), torch.ones(into, out, **kind)
        rates[name] = 2 * x.numel() * out / _time(torch.mm, x, w)
    bandwidth = 3 * x.numel() * x.element_size() / _time(torch.mul, x, x)
    if device.type == "cuda":
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    else:
        # Processes beside this one will want as much.
        room = framework + free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = Machine(device.type, room, framework, rates, bandwidth)
    return min(gather_object([mine]), key=lambda machine: machine.room)


def _time(work: Callable[..., Any], *given: Any) -> float:
    """Seconds that it takes: the least of some, as others may work beside it."""
    timer = Timer("work(*given)", globals=locals(), num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=_PROBED_S).times)
