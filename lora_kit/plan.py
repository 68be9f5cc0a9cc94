"""The memory plan: memory, time and disk of a run, and the micro-batch that fits.

Made from the configuration alone, without loading weights. `train` follows the plan.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.benchmark import Timer
from transformers import AutoConfig

import lora_kit.train.trainer  # noqa: F401 - counts as `framework` memory
from lora_kit.adapter.attach import attach
from lora_kit.base.head import CAUSAL
from lora_kit.base.load import base_is_sharded, check_length, gpu_is_used
from lora_kit.base.pin import Pinned, pin
from lora_kit.data.rows import Row
from lora_kit.errors import LoraKitError, UserError, reason_of
from lora_kit.schema import Run
from lora_kit.speed import memory as costs
from lora_kit.speed.memory import Choice, Machine, PassCost
from lora_kit.tasks.encode import Prepared, rows_of
from lora_kit.tasks.measure import LOGITS_AT_ONCE, PIECE, ROWS_AT_ONCE
from lora_kit.tasks.packing import Packed
from lora_kit.tasks.task import Batch, Processor, Task
from lora_kit.train.guards import has_own_loss
from lora_kit.train.save import checkpoint_bytes
from lora_kit.train.strategies import choose

_MIB = 2**20
_PROBED_S, _PROBED_ROWS = 0.05, 1024  # seconds and rows per measurement of the device
_LEAST_SHARE = 0.8  # of the measurement's time on a core, for the rates to be reported
_ADAM_BYTES, _ADAM_CALLS = 40, 12  # bytes read and written per value; operations per tensor
_CODES = 2 * 16 * 4 + 256 * 4  # bytes of the lookup tables of NF4 and of its 8-bit scales
_FEWEST_TOKENS = 64  # smallest max_length to suggest
_CGROUPS = Path("/sys/fs/cgroup")
Change = dict[str, dict[str, object]]  # {section: {key: new value}}


class Uncountable(UserError):
    """The architecture cannot run on the meta device, for instance because of expert routing."""


@dataclass(frozen=True)
class MemoryPlan:
    """Resources of one process, and the chosen batch.

    Attributes:
        memory: peak bytes by cause.
        room: bytes that the process may use.
        flops: per optimizer step.
        tokens_per_second: of all processes, without padding; None: unknown, since other processes
            used the CPU while its rates were measured.
        seconds: of the training steps only; None: unknown.
        evaluation_seconds: of scoring the contenders afterwards, without generated text; None:
            unknown.
        disk: bytes by kind.
        fits: whether `needed` is within `room`.
        choice: micro-batch, accumulation and number of recomputed layers.
        layers: the layers that could be recomputed.
        why: the reason for the choice, in one line.
    """

    memory: dict[str, int]
    room: int
    flops: int
    tokens_per_second: float | None
    seconds: float | None
    evaluation_seconds: float | None
    disk: dict[str, int]
    fits: bool
    choice: Choice
    layers: int
    why: str

    @property
    def total(self) -> int:
        """Expected resident memory."""
        return sum(self.memory.values())

    @property
    def needed(self) -> int:
        """Required memory: `total` without the pages of a mapped file, which can be reclaimed."""
        return self.total - self.memory.get("mapped file", 0)

    def to_json(self) -> dict[str, object]:
        """The output of `plan --json`."""

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
            "tokens_per_second": _rounded(self.tokens_per_second),
            "seconds": _rounded(self.seconds),
            "evaluation_seconds": _rounded(self.evaluation_seconds),
            "disk_mib": mib(self.disk),
        }

    def __str__(self) -> str:
        rows = [*self.memory.items(), ("total", self.total)]
        rows += [("required", self.needed)] if self.needed < self.total else []
        rows += [("available", self.room)]
        disk = ", ".join(f"{what} {n / _MIB:,.0f} MiB" for what, n in self.disk.items())
        lines = [f"{cause:>16} {n / _MIB:>10,.1f} MiB" for cause, n in rows]
        long = ""
        if self.seconds is not None and self.evaluation_seconds is not None:
            long = f", {self.seconds:,.0f} s of training"
            long += f", {self.evaluation_seconds:,.0f} s of evaluation"
        lines.append(f"{self.speed}, {self.flops / 1e9:,.0f} GFLOP a step{long}; disk: {disk}")
        return "\n".join([*lines, self.why])

    @property
    def speed(self) -> str:
        """Tokens per second in words."""
        if self.tokens_per_second is None:
            return "tokens/s unknown (other processes use the CPU)"
        return f"about {self.tokens_per_second:,.0f} tokens/s"


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 1)


def plan(run: Run, task: Task) -> MemoryPlan:
    """The plan of a run file; of the base only config and tokenizer are downloaded.

    Raises:
        UserError: base or data are unusable; or nothing fits (see `plan_run`).
    """
    pinned = pin(run.base, weights=False)
    check_length(pinned, run.train.max_length)
    processor, data = rows_of(task, run, pinned, limits=False)
    return plan_run(run, task, pinned, processor, data)


def plan_run(
    run: Run, task: Task, pinned: Pinned, processor: Processor, data: Prepared, quick: bool = True
) -> MemoryPlan:
    """The plan of a run, before its base is loaded; the same in all processes.

    Args:
        data: its row lengths are used.
        quick: with the fast paths of `speed: auto`, if the base supports them.

    Raises:
        UserError: with `speed: auto`, nothing fits; the message suggests a change.
        Uncountable: this base cannot be planned for; it may still train.
    """
    try:
        here = _Planner(run, task, pinned, processor, data, quick)
        choice = here.choose()
        if choice is None:
            raise UserError(_what_would_fit(here))
        return here.plan(choice)
    except LoraKitError:
        raise
    except Exception as error:  # an untested architecture can raise anything
        if run.speed == "auto" and quick:  # training will fall back to the standard path, too
            return plan_run(run, task, pinned, processor, data, quick=False)
        raise Uncountable(
            f"base.model: {pinned.folder}: cannot be planned: {reason_of(error)}"
        ) from error


def plan_training(
    run: Run,
    task: Task,
    pinned: Pinned,
    processor: Processor,
    data: Prepared,
    say: Callable[[str], None],
) -> MemoryPlan | None:
    """The plan that training follows, reported in one line; None: use the run file's batch.

    Raises:
        UserError: nothing fits.
    """
    if base_is_sharded():
        return None
    if not has_own_loss(task):
        say("no memory plan: using the batch as written: the trainer computes the loss")
        return None
    try:
        found = plan_run(run, task, pinned, processor, data)
    except Uncountable as error:
        say(f"no memory plan: using the batch as written: {error}")
        return None
    say(f"plan: {found.total / _MIB:,.0f} MiB, {found.speed}; {found.why}")
    return found


@dataclass(eq=False)
class _Planner:
    """The costs of a run, by micro-batch and number of recomputed layers; each is counted once.

    Attributes:
        quick: see `plan_run`.
        measured: the device, if it was measured before.
        model: base and adapter on the meta device.
        held: bytes by cause that do not depend on the batch.
        file, merged: bytes of the base's file and of the merged model.
        flat: batches are concatenated instead of padded.
        masked: attention gets a mask.
        layers: the layers that can be recomputed; `forced` of them are by the run file.
        own: the run file's micro-batch.
        rows: rows per step of one process.
        works: {(micro-batch, recomputed layers): cost}. evaluated: {(rows, whether to score them):
            cost}.
        tokens: the length of each training row.
    """

    run: Run
    task: Task
    pinned: Pinned
    processor: Processor
    data: Prepared
    quick: bool
    measured: Machine | None = None

    def __post_init__(self) -> None:
        run, task, data = self.run, self.task, self.data
        self.model, self.held, self.file, self.merged = _on_meta(run, task, self.pinned, data)
        self.machine = self.measured or _machine(run.base.dtype, self.model)
        fast = self.quick and run.speed == "auto"
        self.flat = bool(fast and costs.assume_fast(self.model, task.flat))
        self.masked = not (self.flat or costs.count_attention(self.model.get_base_model()))
        self.layers = costs.recompute(self.model, 0)
        self.forced = self.layers if run.train.gradient_checkpointing else 0
        self.own = run.train.per_device_train_batch_size
        self.rows = self.own * run.train.gradient_accumulation_steps
        self.processes = PartialState(cpu=not gpu_is_used()).num_processes
        self.works: dict[tuple[int, int], PassCost] = {}
        self.evaluated: dict[tuple[int, bool], PassCost] = {}
        rows = data.train
        self.tokens = rows.lengths if isinstance(rows, Packed) else task.tokens(rows)
        # For a smaller max_length, as tried by `_what_would_fit`.
        sequences = max(1, round(float(self.tokens.max()) / run.train.max_length))
        self.tokens = np.minimum(self.tokens, sequences * run.train.max_length)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """A micro-batch of rows on the meta device, truncated to max_length."""
        length = self.run.train.max_length
        short = [
            {name: v[:length] if isinstance(v, np.ndarray) else v for name, v in row.items()}
            for row in rows
        ]
        collate = self.task.collate(self.processor, self.flat)
        assert collate is not None
        return costs.on_meta(collate(short), self.masked)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.task.loss(model, batch, 1, self.run.train)

    def work(self, micro: int, recomputed: int) -> PassCost:
        """The cost of the largest micro-batch of an epoch with shuffled rows."""
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

    def evaluation(self, micro: int) -> list[PassCost]:
        """The costs of the largest batches without gradients: of the evaluation after training,
        and with `train.eval_steps` of those during it."""
        found = [self._evaluated(min(ROWS_AT_ONCE, micro), scores=True)]
        if self.run.train.eval_steps:
            found.append(self._evaluated(self.run.train.per_device_eval_batch_size, scores=False))
        return found

    def _evaluated(self, rows: int, scores: bool) -> PassCost:
        """The cost of the longest rows without gradients; to score them, the logits of the whole
        batch exist, and float32 ones of a piece."""
        if (rows, scores) not in self.evaluated:
            tokens = self.task.tokens(self.data.eval)
            vocabulary = len(costs.embedding_weight(self.model))
            most = LOGITS_AT_ONCE[self.machine.name] // vocabulary // int(tokens.max())
            size = min(rows, max(1, most)) if scores else rows
            longest = np.argsort(tokens, kind="stable")[-size:]
            batch = self.batch([self.data.eval[int(n)] for n in longest])
            work = costs.count(self.model, batch, self.loss, backward=False)
            if scores and self.task.auto == CAUSAL:
                values = work.tokens * vocabulary
                wide = values * getattr(torch, self.run.base.dtype).itemsize
                wide += 3 * 4 * min(PIECE[self.machine.name], values)
                work = replace(work, peak=work.peak - work.logits + wide, logits=wide)
            self.evaluated[rows, scores] = work
        return self.evaluated[rows, scores]

    def evaluation_seconds(self, trained: float) -> float:
        """Seconds of scoring the held-out rows within `prove.budget`: by the adapted model (on a
        quantized base with both weights), the base, and one more contender; general text by two.
        trained: tokens of the training."""
        times = 3 + (self.run.base.quantize != "none")
        held_out = times * float(self.task.tokens(self.data.eval).sum())
        if self.task.general is not None and self.data.general is not None:
            held_out += 2 * float(self.task.general.tokens(self.data.general).sum())
        budget = self.run.prove.budget
        if budget is not None:
            held_out = min(held_out, 2 * budget * trained)  # a forward pass counts a half
        work = self.evaluation(self.own)[0]
        return held_out * self.machine.seconds(work) / work.tokens

    def memory(self, micro: int, recomputed: int) -> dict[str, int]:
        """Peak bytes by cause."""
        held = dict(self.held)
        work = max(
            [self.work(micro, recomputed), *self.evaluation(micro)], key=lambda work: work.peak
        )
        if micro < self.rows or self.processes > 1:
            held["gradients"] *= 2  # accumulated ones, or a communication buffer
        held |= {"activations": work.peak - work.logits, "logits": work.logits}
        if self.machine.name == "cpu":  # a GPU's driver memory is not counted
            held["framework"] = self.machine.framework
            held["allocator"] = costs.unused_bytes(work)
        return held

    def fits(self, micro: int, recomputed: int) -> bool:
        limit = self.machine.limit
        if sum(self.held.values()) > limit:  # without counting a forward pass
            return False
        return sum(self.memory(micro, recomputed).values()) <= limit

    def seconds(self, micro: int, recomputed: int) -> float:
        return self.machine.seconds(self.work(micro, recomputed))

    def choose(self) -> Choice | None:
        """The run file's batch if it fits, else the fastest that does; None: nothing fits."""
        # Measured rates vary between runs; a batch that fits is kept as written.
        if self.run.speed == "plain" or self.fits(self.own, self.forced):
            return Choice(self.own, self.rows // self.own, self.forced)
        again = range(self.forced, self.layers + 1)
        return costs.choose_batch(self.rows, self.own, again, self.fits, self.seconds)

    def plan(self, choice: Choice) -> MemoryPlan:
        train, machine = self.run.train, self.machine
        work = self.work(choice.micro_batch, choice.recomputed)
        held = self.memory(choice.micro_batch, choice.recomputed)
        needed = sum(held.values())
        if machine.name == "cpu":
            held["mapped file"] = self._mapped(held)
        mean, count = float(self.tokens.mean()), len(self.tokens)
        # Average micro-batch relative to the largest one.
        usual = mean * min(choice.micro_batch, count) / work.tokens
        trained = held["adapter"] // 4  # values in float32
        tensors = sum(p.requires_grad for p in self.model.parameters())
        step = choice.accumulation * usual * machine.seconds(work)
        step += trained * _ADAM_BYTES / machine.bandwidth + tensors * _ADAM_CALLS * costs.CALL_S
        epoch = math.ceil(count / (self.rows * self.processes))  # steps
        steps = train.max_steps or math.ceil(epoch * train.num_train_epochs)
        tokens_of_step = mean * min(self.rows, count) * self.processes
        evaluation = self.evaluation_seconds(tokens_of_step * steps) / self.processes
        known = machine.share >= _LEAST_SHARE
        keep = train.save_total_limit + bool(train.eval_steps)
        return MemoryPlan(
            memory={cause: size for cause, size in held.items() if size},
            room=machine.room,
            flops=int(work.flops * choice.accumulation * usual),
            tokens_per_second=tokens_of_step / step if known else None,
            seconds=step * steps if known else None,
            evaluation_seconds=evaluation if known else None,
            disk={
                "checkpoints": checkpoint_bytes(trained, keep, train.optim),
                "adapter": 4 * trained,
                "merged model": self.merged,
            },
            fits=needed <= machine.room,
            choice=choice,
            layers=self.layers,
            why=self._why(choice, needed),
        )

    def _mapped(self, held: dict[str, int]) -> int:
        """Resident bytes of the base's mapped file: while weights are converted, or for quantized
        weights as long as other tensors map it. These pages can be reclaimed."""
        if self.file != self.merged:
            weights = sum(n for cause, n in held.items() if cause.startswith(("weights", "quant")))
            return max(0, self.machine.framework + weights + self.file - sum(held.values()))
        quantized = self.run.base.quantize != "none"
        return self.file - held[f"weights {self.run.base.dtype}"] if quantized else 0

    def _why(self, choice: Choice, needed: int) -> str:
        rows, passes, again = choice.micro_batch, choice.accumulation, choice.recomputed
        layers = f"{again} of {self.layers} layers are" if again else "no layer is"
        if (rows, again) != (self.own, self.forced):
            written = sum(self.memory(self.own, self.forced).values()) / _MIB
            reason = f"the fastest that fits; as written it would take {written:,.0f} MiB"
        elif self.run.speed == "plain":
            reason = f"as written (speed: plain){', does not fit' * (needed > self.machine.room)}"
        else:
            reason = "as written, which fits"
        what = (
            f"{rows} row{'s' * (rows > 1)} a micro-batch, {passes} micro-batch"
            f"{'es' * (passes > 1)} a step; {layers} recomputed: {reason}; "
            f"{self.machine.room / _MIB:,.0f} MiB available"
        )
        slower = self.machine.flops["float32"] / self.machine.flops[self.run.base.dtype]
        if slower > 1.1:
            what += f"; bfloat16 is {slower:.1f} times slower than float32 on this CPU: "
            what += "base.dtype=float32 would be faster"
        return what


def _on_meta(
    run: Run, task: Task, pinned: Pinned, data: Prepared
) -> tuple[Any, dict[str, int], int, int]:
    """Base and adapter on the meta device, in training mode; bytes by cause that do not depend on
    the batch; bytes of the base's file; bytes of the merged model."""
    dtype = getattr(torch, run.base.dtype)
    config = AutoConfig.from_pretrained(
        pinned.folder, local_files_only=True, trust_remote_code=False
    )
    stored = config.dtype or dtype  # before it is set to the compute dtype
    base, fresh = task.skeleton(pinned, data.facts, run)
    base.requires_grad_(False)
    base.config.get_text_config().use_cache = False
    parameters = sum(p.numel() for p in base.parameters())
    buffers = sum(b.numel() * b.element_size() for b in base.buffers())
    # bitsandbytes quantizes every linear layer but the head and fresh modules.
    head, quantized = base.get_output_embeddings(), run.base.quantize != "none"
    new = {id(m) for name in fresh for m in base.get_submodule(name).modules()} | {id(head)}
    linear = [m for m in base.modules() if type(m) is torch.nn.Linear and id(m) not in new]
    packed = [m.weight for m in linear] if quantized else []
    quantizable = sum(w.numel() for w in packed)
    held = {f"weights {run.base.dtype}": (parameters - quantizable) * dtype.itemsize}
    if run.base.quantize == "nf4":  # per block of 64 an 8-bit scale, and per 256 scales a float
        held["weights nf4"] = quantizable // 2
        held["quantization"] = quantizable // 64 * 260 // 256 + _CODES * len(packed)
    elif run.base.quantize == "int8":  # one scale per row
        held |= {"weights int8": quantizable, "quantization": 4 * sum(map(len, packed))}
    # One layer at a time is dequantized.
    held["buffers"] = buffers + max((w.numel() for w in packed), default=0) * dtype.itemsize
    # A start adapter is read from its file; torch warns that copies to meta have no effect.
    with torch.device("cpu" if run.adapter.start else "meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        strategy = choose(run.train, run.adapter, base, fresh)
        model = attach(base, strategy.adapter, fresh, run.seed).train()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    held |= {"adapter": 4 * sum(trained), "gradients": 4 * sum(trained)}
    # bitsandbytes keeps 32-bit state for small tensors.
    eight = "8bit" in run.train.optim
    held["optimizer"] = sum(n * (2 if eight and n >= 4096 else 8) for n in trained)
    return model, held, parameters * stored.itemsize, parameters * dtype.itemsize


def _what_would_fit(here: _Planner) -> str:
    """The message that nothing fits, with the first change that would: 4 bits, shorter rows, a
    lower rank, then combinations."""
    run, room = here.run, here.machine.limit
    least = sum(here.memory(1, here.layers).values())
    text = (
        f"does not fit into memory: at least {least / _MIB:,.0f} MiB, with one row per "
        f"micro-batch and all layers recomputed; {room / _MIB:,.0f} MiB available after a margin: "
        f"{(least - room) / _MIB:,.1f} MiB too much; "
    )
    four_bits: Change = {} if run.base.quantize == "nf4" else {"base": {"quantize": "nf4"}}
    # A start adapter keeps its rank.
    rank: Change = {} if run.adapter.start else {"adapter": {"r": math.ceil(run.adapter.r / 4)}}
    halved = [run.train.max_length >> n for n in range(1, 7)]
    lengths: list[Change] = [{"train": {"max_length": n}} for n in halved if n >= _FEWEST_TOKENS]
    both = [four_bits | length for length in lengths]
    tried = [four_bits, *lengths, rank, *both]
    tried += [change | rank for change in [four_bits, *both]]
    even = ""
    for change in filter(None, tried):
        parts = {name: getattr(run, name).model_copy(update=new) for name, new in change.items()}
        other = replace(here, run=run.model_copy(update=parts), measured=here.machine)
        values = [f"{name}.{key}={new[key]}" for name, new in change.items() for key in new]
        if other.fits(1, other.layers):
            return text + " ".join(values) + " would fit"
        size = sum(other.memory(1, other.layers).values()) / _MIB
        even = f"{size:,.0f} MiB even with {' '.join(values)}: "
    return f"{text}{even}use a smaller base or more memory"


def free_memory() -> int:
    """Available bytes on a CPU, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # cgroups, first version
    ):
        with contextlib.suppress(OSError, ValueError):  # no such limit
            place = _CGROUPS / folder
            stat = (place / "memory.stat").read_text().split()
            # Cached files count as used but can be reclaimed.
            cached = int(stat[stat.index("inactive_file") + 1])
            left = int((place / limit).read_text()) - int((place / used).read_text()) + cached
            free = min(free, left)
    return max(0, free)


def _machine(base_dtype: str, model: Any) -> Machine:
    """The device: available memory, and its rates, measured briefly with the shape of the model's
    largest layer other than the head; of several processes, that with the least memory."""
    framework = int(psutil.Process().memory_info().rss)  # before the measurements
    device = torch.device("cuda" if gpu_is_used() else "cpu")
    linear = {m.weight.shape for m in model.modules() if type(m) is torch.nn.Linear}
    head = {model.get_input_embeddings().weight.shape}
    out, into = max((linear - head) or head, key=math.prod)
    rates: dict[str, float] = {}
    start, used = time.perf_counter(), time.thread_time()
    for name in ("float32", base_dtype):
        dtype = getattr(torch, name)
        x = torch.ones(_PROBED_ROWS, into, dtype=dtype, device=device)
        w = torch.ones(into, out, dtype=dtype, device=device)
        rates[name] = 2 * x.numel() * out / _time(torch.mm, x, w)
    bandwidth = 3 * x.numel() * x.element_size() / _time(torch.mul, x, x)
    share = (time.thread_time() - used) / (time.perf_counter() - start)
    if device.type == "cuda":
        share = 1.0
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    else:
        # Divided by the number of local processes.
        room = framework + free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = Machine(device.type, room, framework, rates, bandwidth, share)
    return min(gather_object([mine]), key=lambda machine: machine.room)


def _time(work: Callable[..., torch.Tensor], *given: torch.Tensor) -> float:
    """Seconds of a call: the minimum of several, since other processes may interfere."""
    timer = Timer("work(*given)", globals=locals(), num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=_PROBED_S).times)
