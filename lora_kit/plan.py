"""What a run will need, known from its configuration alone, and the way of running it that fits.

`lora-kit plan` asks before anything is loaded; `train` asks the same, and follows the answer.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoConfig, AutoModelForCausalLM

import lora_kit.train.trainer  # noqa: F401 - what a run imports, it holds
from lora_kit.adapter.attach import attach
from lora_kit.base.load import check_length, gpu_is_used, load_tokenizer
from lora_kit.base.pin import pin
from lora_kit.data.packing import Packed
from lora_kit.data.prepare import Prepared, kind_of, prepare
from lora_kit.data.templates import set_template
from lora_kit.errors import LoraKitError, UserError
from lora_kit.schema import Run
from lora_kit.speed import fast
from lora_kit.speed import memory as costs
from lora_kit.speed.memory import Choice, Machine, Work
from lora_kit.train.checkpoint import checkpoint_bytes

_MIB = 2**20
_PROBED_S, _PROBED_ROWS = 0.05, 1024  # of measuring each rate of the device
_CALL_S = 15e-6  # that starting an operation takes, autograd's part included
_ADAM_BYTES, _ADAM_CALLS = 40, 12  # read and written for a value, and started for a tensor
_CODES = 2 * 16 * 4 + 256 * 4  # bytes: the tables of NF4, and of the 8 bits of its scales
_FEWEST_TOKENS, _SMALLEST_RANK = 64, 4  # of what is proposed where nothing fits
_CGROUPS = Path("/sys/fs/cgroup")


class Uncountable(UserError):
    """An architecture that does not run without content, as one whose experts are chosen by it."""


@dataclass(frozen=True)
class Plan:
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
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` prints."""

        def mib(sizes: dict[str, int]) -> dict[str, float]:
            return {what: round(size / _MIB, 1) for what, size in sizes.items()}

        return {
            "memory_mib": mib(self.memory),
            **mib({"total_mib": self.total, "room_mib": self.room}),
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
        rows = [*self.memory.items(), ("total", self.total), ("may be held", self.room)]
        disk = ", ".join(f"{what} {n / _MIB:,.0f} MiB" for what, n in self.disk.items())
        lines = [f"{cause:>16} {n / _MIB:>10,.1f} MiB" for cause, n in rows]
        lines.append(
            f"{self.tokens_per_second:,.0f} tokens/s, {self.flops / 1e9:,.0f} GFLOP a step, "
            f"{self.seconds:,.0f} s of training; disk: {disk}"
        )
        return "\n".join([*lines, self.why])


def plan(run: Run) -> Plan:
    """The plan of a run file: of its base only the configuration and the tokenizer are fetched.

    Raises:
        UserError: base or data cannot be used; or nothing fits, as `plan_run` says it.
    """
    pinned = pin(run.base, weights=False)
    check_length(pinned, run.train.max_length)
    tokenizer = load_tokenizer(pinned)
    set_template(tokenizer, run.data.chat_template)
    kind, length = kind_of(run.recipe), run.train.max_length
    data = prepare(run.data, kind, tokenizer, length, run.seed, limits=False)
    return plan_run(run, pinned.folder, data)


def plan_run(
    run: Run,
    folder: str,
    data: Prepared,
    plain: Collection[str] = (),
    framework: int | None = None,
) -> Plan:
    """The plan of a run, made before its base is loaded; all processes make the same one.

    Args:
        folder: where the base's configuration lies.
        data: the lengths of its rows decide.
        plain: the parts of `speed.fast.make_fast` that stayed plain, where that is known.
        framework: bytes held before the base was loaded; None: it is not loaded yet.

    Raises:
        UserError: with `speed: auto`, nothing fits: by how much, and what would.
        Uncountable: nothing can be said of this base; it may train all the same.
    """
    try:
        here = _Planning(run, folder, Lengths(data.train), data.eval.lengths, plain)
        here.framework = _resident() if framework is None else framework
        here.machine = _machine(run, here.model, here.framework)
        state = PartialState(cpu=not gpu_is_used())
        if state.num_processes > 1:  # the figures of the one with the least room, for all
            mine: Any = (here.machine.room, state.process_index, here.framework, here.machine)
            _, _, here.framework, here.machine = min(gather_object([mine]))
        here.processes = state.num_processes
        choice = here.choose()
        if choice is None:
            raise UserError(_what_would_fit(here, folder))
        return here.plan(choice)
    except LoraKitError:
        raise
    except Exception as error:  # whatever an architecture that was never tried raises
        if run.speed == "auto" and not plain:  # as training will: by the plain path
            return plan_run(run, folder, data, fast.PARTS, framework)
        reason = " ".join(str(error).split())[:200]
        raise Uncountable(f"base.model: {folder}: cannot be planned for: {reason}") from error


def plan_training(run: Run, folder: str, data: Prepared, say: Callable[[str], None]) -> Plan | None:
    """The plan that training follows, said in a line; None: as the run file has it.

    Raises:
        UserError: nothing fits.
    """
    if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
        return None  # the base is sharded
    try:
        found = plan_run(run, folder, data)
    except Uncountable as error:
        say(f"no plan, the batch is as written: {error}")
        return None
    needs = f"{found.total / _MIB:,.0f} MiB, {found.tokens_per_second:,.0f} tokens/s expected"
    say(f"plan: {needs}; {found.why}")
    return found


class Lengths:
    """The tokens of the rows that are learned from, int64 (rows,), and of the documents in each."""

    def __init__(self, train: Any, most: int | None = None) -> None:
        self.packed = train if isinstance(train, Packed) and most is None else None
        if isinstance(train, Packed):
            documents = train.rows.lengths
            self.rows = np.array([documents[some].sum() for some in train.bins])
        else:
            self.rows = train.lengths
        self.rows = np.minimum(self.rows, most or self.rows.max())
        self.train = train

    def largest(self, micro: int, seed: int, flat: bool) -> list[list[int]]:
        """The documents in each row of the largest batch, in a random order of all rows; `flat`:
        rows are not padded to the longest."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        micro = min(micro, len(order))
        batches = order[: len(order) // micro * micro].reshape(-1, micro)
        lengths = self.rows[batches]
        chosen = batches[int((lengths.sum(1) if flat else lengths.max(1)).argmax())].tolist()
        if self.packed is None:
            return [[int(self.rows[row])] for row in chosen]
        return [self.packed.rows.lengths[self.packed.bins[row]].tolist() for row in chosen]


class _Planning:
    """The numbers that a plan is made of; each pass is counted once."""

    framework: int
    machine: Machine
    processes = 1

    def __init__(
        self, run: Run, folder: str, lengths: Lengths, judged: np.ndarray, plain: Collection[str]
    ) -> None:
        self.run, self.lengths, self.judged, self.plain = run, lengths, judged, plain
        self.model, self.held, self.file, self.merged = _on_meta(run, folder)
        self.flat = run.speed == "auto" and costs.assume_fast(self.model, plain)
        self.masked = not (self.flat or costs.count_attention(self.model.get_base_model()))
        self.layers = costs.recompute(self.model, 0)
        self.forced = self.layers if run.train.gradient_checkpointing else 0
        self.own = run.train.per_device_train_batch_size
        self.rows = self.own * run.train.gradient_accumulation_steps
        self.works: dict[tuple[int, int], Work] = {}

    def work(self, micro: int, recomputed: int) -> Work:
        """The largest pass of the run."""
        if (micro, recomputed) not in self.works:
            costs.recompute(self.model, recomputed)
            rows = self.lengths.largest(micro, self.run.seed, self.flat)
            batch = costs.rows_on_meta(rows, self.flat, self.masked)
            self.works[micro, recomputed] = costs.count(self.model, batch)
        return self.works[micro, recomputed]

    @cached_property
    def judging(self) -> list[Work]:
        """The largest batch of `train.eval_steps`."""
        if not self.run.train.eval_steps:
            return []
        longest = np.sort(self.judged)[-self.run.train.per_device_eval_batch_size :]
        batch = costs.rows_on_meta([[int(n)] for n in longest], self.flat, self.masked)
        try:
            return [costs.count(self.model.eval(), batch, backward=False)]
        finally:
            self.model.train()

    def memory(self, micro: int, recomputed: int) -> dict[str, int]:
        """Bytes by cause when most are held."""
        held = dict(self.held)
        work = max([self.work(micro, recomputed), *self.judging], key=lambda work: work.peak)
        if micro < self.rows or self.processes > 1:
            held["gradients"] *= 2  # of this pass, and of those before or of all processes
        alive = work.peak - work.logits, work.logits
        held |= dict(zip(("activations", "logits"), alive, strict=True))
        if self.machine.name == "cpu":  # a GPU's driver is neither counted nor in what is free
            held |= {"framework": self.framework, "allocator": costs.unused_bytes(*alive)}
        return held

    def bytes(self, micro: int, recomputed: int) -> int:
        return sum(self.memory(micro, recomputed).values())

    def seconds(self, micro: int, recomputed: int) -> float:
        return self.machine.seconds(self.work(micro, recomputed))

    def choose(self) -> Choice | None:
        """The user's own batch where nothing is to be chosen; None: nothing fits."""
        own, limit = Choice(self.own, self.rows // self.own, self.forced), self.machine.limit
        # What is measured differs a little each time; a batch that fits is the same each time.
        if self.run.speed == "plain" or self.bytes(self.own, self.forced) <= limit:
            return own
        size, seconds = self._between(self.bytes), self._between(self.seconds)
        higher = 1.0  # is what was counted, than what was estimated
        more = self.layers - self.forced
        while found := costs.choose(self.rows, self.own, more, limit / higher, size, seconds):
            micro, again = found.micro_batch, self.forced + found.recomputed
            if (counted := self.bytes(micro, again)) <= limit:
                return Choice(micro, found.accumulation, again)
            higher = 1.001 * counted / size(micro, found.recomputed)
        return None

    def _between(self, of: Callable[[int, int], float]) -> Callable[[int, int], float]:
        """A figure of any (micro-batch, more layers computed again), of few passes that are
        counted: it is affine in tokens, as documents are of the same lengths, and in layers."""
        low, high = 1, self.own if self.own > 1 else min(2, self.rows)
        most = max(1, self.layers - self.forced)

        def at(micro: int, more: int) -> float:
            none, every = of(micro, self.forced), of(micro, self.layers)
            return none + (every - none) * more / most

        def value(micro: int, more: int) -> float:
            share = (micro - low) / max(1, high - low)
            return at(low, more) + share * (at(high, more) - at(low, more))

        return value

    def plan(self, choice: Choice) -> Plan:
        train, work = self.run.train, self.work(choice.micro_batch, choice.recomputed)
        held = self.memory(choice.micro_batch, choice.recomputed)
        total = sum(held.values())
        if self.machine.name == "cpu":
            held["mapped file"] = self._mapped(held)
        mean = float(self.lengths.rows.mean())
        usual = mean * choice.micro_batch / work.tokens  # of a usual pass, of the largest one
        values = held["adapter"] // 4
        tensors = sum(p.requires_grad for p in self.model.parameters())
        step = choice.accumulation * usual * self.machine.seconds(work)
        step += values * _ADAM_BYTES / self.machine.bandwidth
        step += tensors * _ADAM_CALLS * self.machine.seconds_per_operation
        epoch = math.ceil(len(self.lengths.rows) / (self.rows * self.processes))
        keep = train.save_total_limit + bool(train.eval_steps)
        return Plan(
            memory={cause: size for cause, size in held.items() if size},
            room=self.machine.room,
            flops=int(work.flops * choice.accumulation * usual),
            tokens_per_second=mean * self.rows * self.processes / step,
            seconds=step * (train.max_steps or math.ceil(epoch * train.num_train_epochs)),
            disk={
                "checkpoints": checkpoint_bytes(values, keep, train.optim),
                "adapter": 4 * values,
                "merged model": self.merged,
            },
            fits=total <= self.machine.room,
            choice=choice,
            layers=self.layers,
            why=self._why(choice, total),
        )

    def _mapped(self, held: dict[str, int]) -> int:
        """The base's file counts as resident while it is mapped: where weights are converted, until
        that is done; where they are quantized, as long as a tensor beside them lives. It is not
        taken from anybody: what is free does not have to hold it."""
        weights = sum(n for cause, n in held.items() if cause[:6] in ("weight", "quanti"))
        if self.run.base.quantize != "none" and self.file == self.merged:
            return self.file - held[f"weights {self.run.base.dtype}"]
        twice = self.framework + weights + self.file - sum(held.values())
        return max(0, twice) if self.file != self.merged else 0

    def _why(self, choice: Choice, total: int) -> str:
        what = f"{choice.micro_batch} x {choice.accumulation} rows a step"
        what += f", {choice.recomputed} of {self.layers} layers computed again: "
        if self.run.speed == "plain":
            what += f"as written (speed: plain){', too much' * (total > self.machine.room)}"
        elif choice.recomputed > self.forced or choice.micro_batch < self.own:
            written = self.bytes(self.own, self.forced) / _MIB
            what += f"the quickest that fits; as written it takes {written:,.0f} MiB"
        elif choice.micro_batch > self.own:
            what += f"quicker than {self.own} at once"
        else:
            what += "as written, it fits"
        what += f"; {self.machine.room / _MIB:,.0f} MiB may be held"
        slower = self.machine.flops["float32"] / self.machine.flops[self.run.base.dtype]
        if slower > 1.1:
            what += f"; bfloat16 takes {slower:.1f} times as long as float32 on this processor: "
            what += "base.dtype=float32 would be quicker"
        return what


def _on_meta(run: Run, folder: str) -> tuple[Any, dict[str, int], int, int]:
    """The base and its adapter as shapes alone, in training mode; bytes by cause that do not depend
    on the batch; bytes of the base's file; and of the merged model's."""
    dtype = getattr(torch, run.base.dtype)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    stored = config.dtype or dtype  # before it is set to what is computed in
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    values = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    linear = [m.weight for m in model.modules() if type(m) is torch.nn.Linear]
    packed = [w for w in linear if w is not model.get_output_embeddings().weight]
    packed = packed if run.base.quantize != "none" else []
    inside = sum(w.numel() for w in packed)
    held = {f"weights {run.base.dtype}": (values - inside) * dtype.itemsize}
    if run.base.quantize == "nf4":  # of each block of 64 a scale of 8 bits, of 256 of those a float
        held |= {"weights nf4": inside // 2, "quantization": inside // 64 * 260 // 256}
        held["quantization"] += _CODES * len(packed)
    elif run.base.quantize == "int8":  # a scale a row
        held |= {"weights int8": inside, "quantization": 4 * sum(map(len, packed))}
    # One layer at a time is unpacked.
    held["buffers"] = buffers + max((w.numel() for w in packed), default=0) * dtype.itemsize
    model = attach(model, run.adapter, run.seed).train()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    held |= {"adapter": 4 * sum(trained), "gradients": 4 * sum(trained)}
    # bitsandbytes keeps 32-bit state of small tensors.
    eight = "8bit" in run.train.optim
    held["optimizer"] = sum(n * (2 if eight and n >= 4096 else 8) for n in trained)
    return model, held, values * stored.itemsize, values * dtype.itemsize


def _what_would_fit(here: _Planning, folder: str) -> str:
    """By how much nothing fits, and the smallest change with which something does."""
    least, room = here.bytes(1, here.layers), here.machine.limit
    text = (
        f"nothing fits: {least / _MIB:,.0f} MiB at least, with a row a pass and all layers "
        f"computed again; {room / _MIB:,.0f} may be held, a margin of what is free is left: "
        f"{(least - room) / _MIB:,.1f} MiB too much; "
    )
    for change in _changes(here.run):
        values = here.run.model_dump()
        for key, value in change.items():
            section, name = key.split(".")
            values[section][name] = value
        run = Run.model_validate(values)
        lengths = Lengths(here.lengths.train, run.train.max_length)
        judged = np.minimum(here.judged, run.train.max_length)
        other = _Planning(run, folder, lengths, judged, here.plain)
        other.framework, other.machine = here.framework, here.machine
        if other.bytes(1, other.layers) <= room:
            return text + " ".join(f"{key}={value}" for key, value in change.items()) + " would fit"
    return text + "no setting would do: take a smaller base, or a larger device"


def _changes(run: Run) -> Iterator[dict[str, Any]]:
    """What makes a run smaller: one change, then several."""

    def halved(key: str, value: int, least: int) -> list[dict[str, Any]]:
        return [{key: value >> n} for n in range(1, 32) if value >> n >= least]

    four = {"base.quantize": "nf4"} if run.base.quantize != "nf4" else {}
    lengths = halved("train.max_length", run.train.max_length, _FEWEST_TOKENS)
    ranks = halved("adapter.r", run.adapter.r, _SMALLEST_RANK)
    if run.train.eval_steps and run.train.per_device_eval_batch_size > 1:
        yield {"train.per_device_eval_batch_size": 1}
    yield from [four][: len(four)] + lengths + ranks
    for length in lengths if four else []:
        yield four | length
    for rank in ranks:
        yield four | (lengths[-1] if lengths else {}) | rank


def _resident() -> int:
    """Bytes that this process holds."""
    return int(psutil.Process().memory_info().rss)


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


def _machine(run: Run, model: Any, framework: int) -> Machine:
    """The device: what may be held on it, and its rates, measured in a moment at the shape
    of the model's largest layer."""
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
        room = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room += max(framework, _resident())
    return Machine(device.type, room, rates, bandwidth, _CALL_S)


def _time(work: Callable[..., Any], *given: Any) -> float:
    """Seconds that it takes: the least of some, as others may work beside it."""
    least, end = math.inf, time.perf_counter() + _PROBED_S
    while not math.isfinite(least) or time.perf_counter() < end:
        start = time.perf_counter()
        work(*given)
        if given[0].is_cuda:
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
    return least
