"""The audit: what the adapter covers, what gradients reach, and whether only the adapter changed.

Trainable tensors are in groups (the adapter, a new head): each group must receive gradients and
change, and nothing else may change. With a single group, a head that trains would hide an adapter
that does not.

Each check is stored with its finding. A run in which nothing can train aborts immediately; other
failures are reported as problems: the finding, its likely cause, and the fix.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.errors import CheckFailed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from torch import Tensor

SMALLEST_PART = 0.01  # smaller shares of the base's parameters are not listed
# A contiguous block of zero rows of this share is a lost shard; dead units are scattered.
LOST_BLOCK = 1 / 16
# Words per row of a checksum: a prime, so that it does not align with a matrix's rows.
_COLUMNS = 1021
# Matrices that are initialised with zeros, and in which every row trains.
_FROM_ZERO = re.compile(r"\.(lora_B(\.default)?\.weight|lora_embedding_A(\.default)?)$")
# An expert may get no token from the router, and then does not train.
_MAY_REST = re.compile(r"\.experts\.\d")
# The reference copy of an adapter in preference trainers, which may follow the adapter.
_REFERENCE = re.compile(r"\.(lora_\w+|modules_to_save)\.ref\b")
_LORA_OR_SAVED = re.compile(r"\.lora_|\.modules_to_save\.")
_ADAPTER = "adapter"  # the default group, not named in messages
Groups = Mapping[str, Callable[[str], bool]]  # name -> whether a parameter's name belongs to it


# For each check: the finding, its likely cause, and the fix.
_PROBLEMS = {
    "gradients": (
        "got no gradient in the first steps",
        "it is frozen, the rows have no labels, or with gradient checkpointing the layers' inputs "
        "do not require gradients (open-unlearning#178)",
        "see `lora-kit preview`, unfreeze it, or train without gradient_checkpointing",
    ),
    "moved": (
        "did not change",
        "the learning rate was 0 (as in the first warm-up step) or too small, or the optimizer "
        "does not have the tensor",
        "raise train.learning_rate or train.max_steps",
    ),
    "lora_B": (
        "is zero, or a block of its rows is",
        "it was overwritten, or a checkpoint was loaded without its shards (accelerate#4206)",
        "train again from the start, without --resume",
    ),
    "frozen": (
        "changed during training although it is frozen",
        "an adapter was merged in place, or a module updates itself",
        "find what changes the base: the adapter no longer fits the base on disk",
    ),
    "saved": (
        "is incomplete or zero in the saved file",
        "shards of other processes were lost while saving (as in accelerate#4206)",
        "update accelerate, and save again from the last checkpoint (--resume)",
    ),
    "effect": (
        "changes no score",
        "its update is zero, or it is disabled during the evaluation",
        "check its norms with lora-kit inspect, and train again",
    ),
}


@dataclass(frozen=True)
class Coverage:
    """The part of the base that an adapter covers.

    Attributes:
        modules: {name ending: number of adapted modules}.
        share: of the base's parameters that are in adapted modules.
        not_covered: {part: share} of large parts that are not adapted.
        whole: names of modules that are fully trained, without LoRA.
        problems: likely mistakes.
    """

    modules: dict[str, int]
    share: float
    not_covered: dict[str, float]
    whole: list[str]
    problems: list[dict[str, str]]

    def __str__(self) -> str:
        rest = ", ".join(f"{part} {share:.0%}" for part, share in self.not_covered.items())
        line = f"{self.share:.0%} of the base's parameters" + (f", not {rest}" if rest else "")
        if any(part.startswith("experts.") for part in self.not_covered):
            line += (
                "; the experts do not train: adapter.target_modules matches modules, but most "
                "architectures keep the experts of a layer in one tensor (as in unsloth#11014); "
                "`all-linear` adapts those that PEFT supports"
            )
        return line


def coverage(model: PeftModel) -> Coverage:
    """The coverage of a PEFT model's adapter, by number of parameters; 4-bit parameters count
    unpacked, tied ones once."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    adapted: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    inside: set[int] = set()
    for module in adapted.values():
        # PEFT adapts fused experts tensor by tensor.
        is_parameter = hasattr(module, "get_param")
        parameters = [module.get_param()] if is_parameter else module.base_layer.parameters()
        inside |= {id(parameter) for parameter in parameters}
    covered, outside = 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if ".lora_" in name or parameter.requires_grad:
            continue
        state = getattr(parameter, "quant_state", None)
        # DeepSpeed leaves an empty tensor and keeps its size in ds_numel.
        size = state.shape.numel() if state else getattr(parameter, "ds_numel", parameter.numel())
        if id(parameter) in inside:
            covered += size
        else:
            outside[_part(name)] += size
    total = covered + sum(outside.values())
    parts = (_part(f"{n}.{getattr(m, 'parameter_name', 'weight')}") for n, m in adapted.items())
    return Coverage(
        modules=dict(Counter(parts)),
        share=round(covered / total, 4),
        not_covered={
            part: round(size / total, 4)
            for part, size in outside.most_common()
            if size >= SMALLEST_PART * total
        },
        whole=[
            name.removeprefix("base_model.model.")
            for name, module in model.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        ],
        problems=list(_partly_adapted(model, set(adapted))),
    )


def _part(name: str) -> str:
    """layers.3.self_attn.q_proj.weight -> q_proj; layers.3.mlp.experts.up -> experts.up"""
    skipped = {"weight", "bias", "base_layer"}
    words = [word for word in name.split(".") if not word.isdigit() and word not in skipped]
    return ".".join(words[words.index("experts") if "experts" in words else -1 :])


def _partly_adapted(model: PeftModel, adapted: set[str]) -> Iterator[dict[str, str]]:
    """Modules that are adapted in only some layers, without a setting that asks for it."""
    config: Any = model.peft_config[str(model.active_adapter)]
    if config.layers_to_transform is not None or config.exclude_modules:
        return
    alike = defaultdict(list)
    for name, _ in model.named_modules():
        alike[re.sub(r"\.\d+(?=\.)", ".*", name)].append(name in adapted)
    wanted = config.target_modules
    wanted = repr(wanted if isinstance(wanted, str) else sorted(wanted or ()))[:100]
    for shape, hits in alike.items():
        if any(hits) and not all(hits):
            ending = shape.rsplit(".", 1)[-1]
            yield {
                "what": f"{ending} is adapted in {sum(hits)} of {len(hits)} layers",
                "cause": f"adapter.target_modules, {wanted}, matches only these",
                "fix": "correct it, or if intended, set adapter.layers_to_transform",
            }


class Audit:
    """The checks of one training, created before the first step. All ranks call each method; only
    rank 0 checks the saved file.

    >>> audit = Audit(model, accelerator, {"adapter": lambda name: ".lora_" in name})
    ... # doctest: +SKIP
    >>> audit.begin()                      # with the model on its device
    >>> audit.observe()                    # before each optimizer step
    >>> audit.end(steps)
    >>> audit.report()["problems"]

    Args:
        groups: {name: which tensors must train}. Reference copies of an adapter (`lora_A.ref`) are
            in no group and are not checked.

    Raises:
        CheckFailed: nothing trains, or nothing of a group does, or a tensor outside of all groups
            does that is not saved with the adapter.
    """

    def __init__(self, model: PeftModel, accelerator: Accelerator, groups: Groups) -> None:
        self.model, self.accelerator = model, accelerator
        self.coverage = coverage(model)
        self.problems = list(self.coverage.problems)
        found = f"the adapter covers {self.coverage}"
        self.checks: list[dict[str, Any]] = []
        self._check("coverage", not self.problems, found)
        self._group = _members(model, groups)  # tensor -> its group
        tensors = self._tensors()
        alive = {self._group[name] for name, tensor in tensors.items() if tensor.requires_grad}
        dead = [group for group in groups if group not in alive]
        if dead:
            what = f"{_named(dead)} does not train" if alive else "nothing trains"
            raise CheckFailed(
                f"{what}: every tensor of {_named(dead)} is frozen: freeze the base before "
                "attach(), and nothing after it"
            )
        self._initial = _fetch({name: _checksum(tensor) for name, tensor in tensors.items()})
        self._frozen: dict[str, int] = {}
        self._reached: Tensor | None = None  # bool (tensors,), on the device
        self._steps = 0
        self._explained: set[str] = set()  # modules with a problem: later checks do not repeat it

    def begin(self) -> None:
        """Compute checksums of everything that must not change."""
        if not self._hidden_by:
            self._frozen = self._frozen_now()

    def observe(self) -> None:
        """Record which tensors have a gradient, in the first two steps of this process (B starts at
        zero, so A has none in the first). Later steps are not checked.

        Raises:
            CheckFailed: no tensor of a group had a gradient.
        """
        import torch

        self._steps += 1
        if self._steps > 2 or self._hidden_by:
            return
        none = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        gradients = [tensor.grad for tensor in self._tensors().values()]
        now = torch.stack([none if g is None else _local(g).ne(0).any() for g in gradients])
        self._reached = now if self._reached is None else self._reached | now
        if self._steps == 2:
            self._check_gradients()

    def without_gradient(self, groups: Sequence[str] = ()) -> CheckFailed:
        """The error for a loss that depends on no tensor of these groups (default: all groups)."""
        _, cause, fix = _PROBLEMS["gradients"]
        return CheckFailed(f"no gradient reaches {_named(groups or self._groups)}: {cause}; {fix}")

    def end(self, step: int) -> None:
        """Check the model after `step` steps, including earlier parts of a resumed run."""
        if self._hidden_by:
            for name in ("gradients", "moved", "lora_B", "frozen"):
                self._check(name, None, f"not checked under {self._hidden_by}")
            return
        if self._steps == 0:
            self._check("gradients", None, "no training step was left")
        elif self._steps == 1:
            self._check_gradients()
        self._check_values(step)
        now = self._frozen_now()
        moved = self._on_any_rank({n: float(now.get(n) != old) for n, old in self._frozen.items()})
        self._check_tensors("frozen", moved, f"{len(moved)} of {len(now)} tensors changed")

    def check_saved(self, weights: Path) -> None:
        """Check the adapter's file: every B, and every tensor of the other groups, is present,
        complete and not zero."""
        import torch
        from safetensors import safe_open

        lost = []
        checked: Counter[str] = Counter()  # by kind
        complete: Counter[str] = Counter()
        with safe_open(str(weights), framework="pt") as opened:
            stored = set(opened.keys())
            for name, tensor in self._tensors().items():
                group = self._group[name]
                if group == _ADAPTER and not _FROM_ZERO.search(name):
                    continue
                key = _saved_name(name)
                saved = opened.get_tensor(key) if key in stored else torch.empty(0, 0)
                whole = saved.shape == getattr(tensor, "ds_shape", tensor.shape)
                if whole and saved.dim() == 2:
                    whole = float(_zero_block(saved)) < LOST_BLOCK
                kind = "lora_B" if group == _ADAPTER else f"tensors of the {group}"
                checked[kind] += 1
                complete[kind] += whole
                if not whole:
                    lost.append(name)
        counts = [f"{complete[kind]} of {count} {kind}" for kind, count in checked.items()]
        self._check_tensors("saved", lost, f"{', '.join(counts)} are complete in {weights.name}")

    def effect(self, most: float | None) -> None:
        """Check that the adapter changes the model's output.

        Args:
            most: the largest change of a unit's contribution to the first score (for a loss, in
                nats); None: the base has no score, because its head is new.
        """
        if most is None:
            self._check("effect", None, "the head is new: there is no base score to compare with")
            return
        found = f"the score of a held-out row or document changes by {most:.3g} at most"
        self._check("effect", most > 0, found)
        if most == 0 and not self._explained:
            self._problem("effect", "the adapter")

    def report(self) -> dict[str, object]:
        """`audit` of report.json."""
        return {
            "modules": self.coverage.modules,
            "coverage": self.coverage.share,
            "not_covered": self.coverage.not_covered,
            "checks": self.checks,
            "problems": self.problems,
        }

    @property
    def _hidden_by(self) -> str | None:
        """A framework that hides values and gradients in flat buffers, or None."""
        kind = self.accelerator.distributed_type.value
        if kind == "FSDP":
            return None if self.accelerator.is_fsdp2 else "FSDP version 1"
        return "DeepSpeed" if kind == "DEEPSPEED" else None

    @property
    def _groups(self) -> list[str]:
        return list(dict.fromkeys(self._group.values()))

    def _tensors(self) -> dict[str, Any]:
        """The tensors of all groups, trainable or not, by their names before the model was
        wrapped."""
        unwrapped = (
            (name.replace("_checkpoint_wrapped_module.", ""), parameter)
            for name, parameter in self.model.named_parameters()
        )
        return {name: parameter for name, parameter in unwrapped if name in self._group}

    def _groups_without(self, modules: set[str]) -> list[str]:
        """The groups with none of these modules."""
        alive = {group for name, group in self._group.items() if _module(name) in modules}
        return [group for group in self._groups if group not in alive]

    def _check_gradients(self) -> None:
        assert self._reached is not None
        counts = self.accelerator.reduce(self._reached.float(), "sum").tolist()
        names = list(self._tensors())
        modules = dict.fromkeys(map(_module, names))
        reached = {_module(name) for name, count in zip(names, counts, strict=True) if count}
        dead = self._groups_without(reached)
        if dead:
            raise self.without_gradient(dead)
        missed = [m for m in modules if m not in reached and not _MAY_REST.search(m)]
        found = f"gradients reached {len(reached)} of {len(modules)} modules in the first steps"
        self._check_tensors("gradients", missed, found)

    def _check_values(self, step: int) -> None:
        """Check on all ranks which tensors changed from their initial values, and the rows of B."""
        sums, blocks = {}, {}
        for name, tensor in self._tensors().items():
            # Of sharded tensors only one at a time is in memory.
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            sums[name] = _checksum(whole)
            if _FROM_ZERO.search(name):
                blocks[name] = _zero_block(whole.detach())
        now = _fetch(sums)
        same = self._on_any_rank({name: float(now[name] == self._initial[name]) for name in now})
        living = {_module(name) for name in now if name not in same}
        blocks = _fetch(blocks)
        zeros = self._on_any_rank({n: float(share >= LOST_BLOCK) for n, share in blocks.items()})
        cut = [name for name in zeros if _module(name) in living]
        # A does not change before B has, and the first warm-up step has a learning rate of 0.
        still = [
            name
            for name in same
            if name not in cut
            and not _MAY_REST.search(name)
            and (step > 2 or _module(name) not in living)
        ]
        dead = self._groups_without(living)
        if dead:  # one problem for the whole group
            still = [name for name in still if self._group[name] not in dead]
            still.insert(0, _named(dead))
        found = f"{len(now) - len(same)} of {len(now)} tensors changed"
        self._check_tensors("moved", still, found)
        if blocks:
            most = max(blocks.values())
            found = f"largest block of zero rows in a lora_B: {most:.1%}"
            self._check_tensors("lora_B", cut, found)
        else:
            self._check("lora_B", None, "no lora_B")
        self._explained |= {_module(name) for name in now if self._group[name] in dead}

    def _frozen_now(self) -> dict[str, int]:
        """Checksums of this rank's frozen parameters and persistent buffers; other buffers may
        change (dynamic position scaling)."""
        sums = {
            name: _checksum(parameter)
            for name, parameter in self.model.named_parameters()
            if not parameter.requires_grad and not _REFERENCE.search(name)
        }
        for place, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    sums[f"{place}.{name}"] = _checksum(buffer)
        return _fetch(sums)

    def _on_any_rank(self, flags: dict[str, float]) -> list[str]:
        """The names whose flag is 1 on at least one rank."""
        import torch

        here = torch.tensor(list(flags.values()), dtype=torch.float, device=self.accelerator.device)
        counts = self.accelerator.reduce(here, "sum").tolist()
        return [name for name, count in zip(flags, counts, strict=True) if count]

    def _check(self, name: str, passed: bool | None, found: str) -> None:
        self.checks.append({"name": name, "passed": passed, "found": found})

    def _check_tensors(self, name: str, bad: list[str], found: str) -> None:
        """Add a check that fails for `bad` tensors or modules without an earlier problem."""
        new = [one for one in bad if _module(one) not in self._explained]
        self._explained |= set(map(_module, bad))
        self._check(name, not new, found)
        if new:
            first = new[0].removeprefix("base_model.model.")
            group = self._group_of_module(new[0])
            if group not in (None, _ADAPTER):
                first += f" (of the {group})"
            more = f" and {len(new) - 1} more:" if len(new) > 1 else ""
            self._problem(name, first + more)

    def _group_of_module(self, module: str) -> str | None:
        """The group of a tensor or module; None if it is in none."""
        for name, group in self._group.items():
            if _module(name) == _module(module):
                return group
        return None

    def _problem(self, check: str, subject: str) -> None:
        what, cause, fix = _PROBLEMS[check]
        self.problems.append({"what": f"{subject} {what}", "cause": cause, "fix": fix})


def _members(model: PeftModel, groups: Groups) -> dict[str, str]:
    """{tensor: its group}. Tensors that PEFT saves with the adapter (such as those of a start
    adapter) belong to the adapter.

    Raises:
        CheckFailed: a trainable tensor belongs to no group.
    """
    from peft import get_peft_model_state_dict

    found: dict[str, str] = {}
    strays = []
    for name, parameter in model.named_parameters():
        if _REFERENCE.search(name):
            continue
        group = next((group for group, has in groups.items() if has(name)), None)
        if group is not None:
            found[name] = group
        elif parameter.requires_grad:
            strays.append(name)
    if strays and _ADAPTER in groups:
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
        found |= {name: _ADAPTER for name in strays if _saved_name(name) in saved}
    strays = [name for name in strays if name not in found]
    if strays:
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        raise CheckFailed(
            f"{strays[0].removeprefix('base_model.model.')}{more}: trainable, but not part of "
            f"{_named(list(groups))}, so it would not be saved: freeze it, or add it to the "
            "task's groups"
        )
    return found


def _named(groups: Sequence[str]) -> str:
    """`the adapter and the head`"""
    return " and ".join(f"the {group}" for group in groups)


def _saved_name(name: str) -> str:
    """A tensor's name in the adapter's file."""
    return re.sub(r"\.(modules_to_save\.)?default\b", "", name)


def _module(name: str) -> str:
    """The module of the base that a tensor of the adapter, or of a saved copy, belongs to."""
    return _LORA_OR_SAVED.split(name)[0]


def _local(tensor: Any) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _zero_block(matrix: Tensor) -> Tensor:
    """(rows, columns) -> (): the longest block of zero rows, as a share of all rows."""
    import torch

    alive = matrix.ne(0).any(dim=1)
    index = torch.arange(1, len(alive) + 1, device=alive.device)
    last = torch.where(alive, index, 0).cummax(0).values
    return (index - last).max() / len(alive)


def _checksum(tensor: Tensor) -> Tensor:
    """int64 () on the tensor's device: the sum modulo 2^64 of its 64-bit words, each times an odd
    number that depends on its position. Detects every change of a single word; makes no copy.
    """
    import torch

    if tensor.is_meta:  # on a rank that gets its values from rank 0
        return torch.zeros((), dtype=torch.int64)
    flat = _local(tensor.data).contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    cut = len(flat) // 8 * 8
    words, rest = flat[:cut].view(torch.int64), flat[cut:]
    rows = len(words) // _COLUMNS
    sums = words[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0)
    sums[: len(words) - rows * _COLUMNS] += words[rows * _COLUMNS :]
    sums[_COLUMNS - len(rest) :] += rest
    return (sums * torch.arange(1, 2 * _COLUMNS, 2, device=sums.device)).sum()


def _fetch(numbers: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy all numbers from the device in one transfer."""
    import torch

    values = torch.stack(list(numbers.values())).tolist() if numbers else []
    return dict(zip(numbers, values, strict=True))
