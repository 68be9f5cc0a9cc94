"""Did it train? What the adapter covers, what gradients reach, and whether it, and it alone, moved.

What trains is named in groups (the adapter, a new head): each must be reached by gradients and must
move, and nothing else may. With one group for everything, a head that trains would hide an adapter
that does not.

Each check is stored with what was found. A run that cannot get better is stopped; what lets it end
is a problem: what was found, its likely cause, and what to do.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import CheckFailed

SMALLEST_PART = 0.01  # parts of the base below this share of its parameters are not named
# A block of zero rows as long as this is a lost shard; units that never fire lie scattered.
LOST_BLOCK = 1 / 16
# Words in a row of a checksum: a prime, so that a matrix's own rows do not line up with it.
_COLUMNS = 1021
# The matrices that begin as zeros, of which each row learns something.
_FROM_ZERO = re.compile(r"\.(lora_B(\.default)?\.weight|lora_embedding_A(\.default)?)$")
# An expert that is a module of its own learns only from the tokens that the router sends it.
_MAY_REST = re.compile(r"\.experts\.\d")
# The copy of an adapter that a preference trainer compares with, which may follow the adapter.
_REFERENCE = re.compile(r"\.(lora_\w+|modules_to_save)\.ref\b")
_LORA_OR_SAVED = re.compile(r"\.lora_|\.modules_to_save\.")
_ADAPTER = "adapter"  # the group that messages do not have to name
Groups = Mapping[str, Callable[[str], bool]]  # name -> whether a parameter's name belongs to it


# Of a check that fails: what is wrong with a tensor, the likely cause, and the fix.
_PROBLEMS = {
    "gradients": (
        "got no gradient in the first steps",
        "it is frozen, the rows have no labels, or gradients are checkpointed and the layers' "
        "inputs need none (open-unlearning#178)",
        "see `lora-kit preview`, unfreeze it, or train without gradient_checkpointing",
    ),
    "moved": (
        "did not move",
        "the learning rate was 0 in every step, as it is in the first of a warm-up, or too small "
        "to change a digit, or the optimizer does not have it",
        "raise train.learning_rate or train.max_steps",
    ),
    "lora_B": (
        "is zeros, all or a block of its rows",
        "it was overwritten, or a checkpoint was loaded without its shards (accelerate#4206)",
        "train again from the start, without --resume",
    ),
    "frozen": (
        "changed while it trained, though it is frozen",
        "an adapter was merged in place, or a module updates itself",
        "find what writes into the base: the adapter fits one that is not on disk",
    ),
    "saved": (
        "has only a part of its rows, or zeros, in the saved file",
        "the shards of other processes were lost in saving (as in accelerate#4206)",
        "update accelerate, and save again from the last checkpoint (--resume)",
    ),
    "effect": (
        "changes no score",
        "its update is zero, or it is switched off when the model is evaluated",
        "look at its norms with lora-kit inspect, and train again",
    ),
}


@dataclass(frozen=True)
class Coverage:
    """{name ending: adapted modules}, the share of the base's parameters in them, {part: share} of
    the large parts that are not, and what looks like a mistake."""

    modules: dict[str, int]
    share: float
    not_covered: dict[str, float]
    problems: list[dict[str, str]]

    def __str__(self) -> str:
        rest = ", ".join(f"{part} {share:.0%}" for part, share in self.not_covered.items())
        line = f"{self.share:.0%} of the base's parameters" + (f", not {rest}" if rest else "")
        if any(part.startswith("experts.") for part in self.not_covered):
            line += (
                "; the experts do not train: names in adapter.target_modules match modules, and "
                "most families keep the experts of a layer in one tensor (as in unsloth#11014); "
                "`all-linear` adapts those that PEFT knows"
            )
        return line


def coverage(model: Any) -> Coverage:
    """What of the base the adapter of a PEFT model sits on, by number of parameters; 4-bit ones
    count unpacked, tied ones once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    inside: set[int] = set()
    for module in adapted.values():
        # PEFT adapts fused experts tensor by tensor.
        one = hasattr(module, "get_param")
        inside |= set(map(id, [module.get_param()] if one else module.base_layer.parameters()))
    covered, outside = 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if ".lora_" in name or parameter.requires_grad:
            continue
        state = getattr(parameter, "quant_state", None)
        # DeepSpeed leaves an empty tensor, and the size apart.
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
        problems=list(_partial(model, set(adapted))),
    )


def _part(name: str) -> str:
    """layers.3.self_attn.q_proj.weight -> q_proj; layers.3.mlp.experts.up -> experts.up"""
    skipped = {"weight", "bias", "base_layer"}
    words = [word for word in name.split(".") if not word.isdigit() and word not in skipped]
    return ".".join(words[words.index("experts") if "experts" in words else -1 :])


def _partial(model: Any, adapted: set[str]) -> Iterator[dict[str, str]]:
    """Modules that are adapted in some of the layers that have them, though nobody asked for it."""
    config = model.peft_config[model.active_adapter]
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
                "fix": "correct it, or name the layers with adapter.layers_to_transform if meant",
            }


class Audit:
    """The checks of one training, made when the adapter has its first values. All ranks call each
    method; only the first checks what was saved.

    >>> audit = Audit(model, accelerator, {"adapter": lambda name: ".lora_" in name})
    ... # doctest: +SKIP
    >>> audit.begin()                      # the model is where and how it trains
    >>> audit.observe()                    # before each step of the optimizer
    >>> audit.end(steps)
    >>> audit.report()["problems"]

    Args:
        groups: what must train, by name. Reference copies of an adapter (`lora_A.ref`) belong to
            no group, and are not checked.

    Raises:
        CheckFailed: nothing trains, or nothing of a group, or something outside all groups that is
            not saved with the adapter.
    """

    def __init__(self, model: Any, accelerator: Any, groups: Groups) -> None:
        self.model, self.accelerator = model, accelerator
        self.coverage = coverage(model)
        self.problems = list(self.coverage.problems)
        found = f"the adapter is on {self.coverage}"
        self.checks: list[dict[str, Any]] = []
        self._check("coverage", not self.problems, found)
        self._group = _members(model, groups)  # tensor -> its group
        tensors = self._tensors()
        alive = {self._group[name] for name, tensor in tensors.items() if tensor.requires_grad}
        if dead := [group for group in groups if group not in alive]:
            what = f"{_named(dead)} does not train" if alive else "nothing trains"
            raise CheckFailed(
                f"{what}: every tensor of {_named(dead)} is frozen: freeze the base before "
                "attach(), and nothing after it"
            )
        self._initial = _fetch({name: _checksum(tensor) for name, tensor in tensors.items()})
        self._frozen: dict[str, int] = {}
        self._reached: Any = None  # bool (tensors,), on the device
        self._steps = 0
        self._explained: set[str] = set()  # modules whose first problem explains what follows

    def begin(self) -> None:
        """Take the checksums of all that must not change."""
        if not self._hidden:
            self._frozen = self._frozen_now()

    def observe(self) -> None:
        """See which tensors have a gradient, in the first two steps of this process: B begins as
        zeros, and A has none before B moves. Later steps cost nothing.

        Raises:
            CheckFailed: no tensor of a group had one.
        """
        import torch

        self._steps += 1
        if self._steps > 2 or self._hidden:
            return
        none = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        gradients = [tensor.grad for tensor in self._tensors().values()]
        now = torch.stack([none if g is None else _local(g).ne(0).any() for g in gradients])
        self._reached = now if self._reached is None else self._reached | now
        if self._steps == 2:
            self._judge_gradients()

    def without_gradient(self, groups: Sequence[str] = ()) -> CheckFailed:
        """The error of a training in which the loss depends on no tensor of these groups; of none
        at all by default."""
        _, cause, fix = _PROBLEMS["gradients"]
        return CheckFailed(f"no gradient reaches {_named(groups or self._groups)}: {cause}; {fix}")

    def end(self, step: int) -> None:
        """Judge what is in memory after `step` steps, earlier parts of the run included."""
        if self._hidden:
            for name in ("gradients", "moved", "lora_B", "frozen"):
                self._check(name, None, f"not checked under {self._hidden}")
            return
        if self._steps == 0:
            self._check("gradients", None, "no step was left to train")
        elif self._steps == 1:
            self._judge_gradients()
        self._judge_values(step)
        now = self._frozen_now()
        moved = self._on_any_rank({n: float(now.get(n) != old) for n, old in self._frozen.items()})
        self._judge("frozen", moved, f"{len(moved)} of {len(now)} tensors changed")

    def check_saved(self, weights: Path) -> None:
        """Read the adapter's file: every B and every tensor of another group than the adapter is
        there, whole, and not made of zeros."""
        import torch
        from safetensors import safe_open

        lost = []
        checked: Counter[str] = Counter()  # by what they are
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
        self._judge("saved", lost, f"{', '.join(counts)} are complete in {weights.name}")

    def effect(self, most: float | None) -> None:
        """Whether the adapter changes what the model computes.

        Args:
            most: the largest difference that it makes to a unit's part of the first score (of a
                loss, in nats); None: the base has no score, because its head is new.
        """
        if most is None:
            self._check("effect", None, "the base has a new head: there is nothing to compare with")
            return
        found = f"the score of a held-out row or document changes by {most:.3g} at most"
        self._check("effect", most > 0, found)
        if most == 0 and not self._explained:
            self._problem("effect", "the adapter")

    def report(self) -> dict[str, Any]:
        """What report.json holds as `audit`."""
        return {
            "modules": self.coverage.modules,
            "coverage": self.coverage.share,
            "not_covered": self.coverage.not_covered,
            "checks": self.checks,
            "problems": self.problems,
        }

    @property
    def _hidden(self) -> str | None:
        """Who keeps values and gradients in flat buffers of its own, where they are not seen."""
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

    def _without(self, living: set[str]) -> list[str]:
        """The groups of which none of these modules is a part."""
        alive = {group for name, group in self._group.items() if _module(name) in living}
        return [group for group in self._groups if group not in alive]

    def _judge_gradients(self) -> None:
        counts = self.accelerator.reduce(self._reached.float(), "sum").tolist()
        names = list(self._tensors())
        modules = dict.fromkeys(map(_module, names))
        reached = {_module(name) for name, count in zip(names, counts, strict=True) if count}
        if dead := self._without(reached):
            raise self.without_gradient(dead)
        missed = [m for m in modules if m not in reached and not _MAY_REST.search(m)]
        found = f"they reached {len(reached)} of {len(modules)} modules in the first steps"
        self._judge("gradients", missed, found)

    def _judge_values(self, step: int) -> None:
        """Which tensors moved from their first values, on all ranks; and the rows of B."""
        sums, blocks = {}, {}
        for name, tensor in self._tensors().items():
            # Shards are put together one tensor at a time.
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
        # A cannot move before B has, and the first step of a warm-up has a rate of 0.
        still = [
            name
            for name in same
            if name not in cut
            and not _MAY_REST.search(name)
            and (step > 2 or _module(name) not in living)
        ]
        dead = self._without(living)
        if dead:  # one problem, which explains those of its tensors
            still = [name for name in still if self._group[name] not in dead]
            still.insert(0, _named(dead))
        found = f"{len(now) - len(same)} of {len(now)} tensors did"
        self._judge("moved", still, found)
        if blocks:
            most = max(blocks.values())
            found = f"{most:.1%} of the rows of a lora_B are zeros in a block, at most"
            self._judge("lora_B", cut, found)
        else:
            self._check("lora_B", None, "there is none")
        self._explained |= {_module(name) for name in now if self._group[name] in dead}

    def _frozen_now(self) -> dict[str, int]:
        """Checksums of this rank's part of the frozen parameters, and of the buffers that are saved
        with a model; dynamic position scaling computes others anew."""
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
        import torch

        here = torch.tensor(list(flags.values()), dtype=torch.float, device=self.accelerator.device)
        counts = self.accelerator.reduce(here, "sum").tolist()
        return [name for name, count in zip(flags, counts, strict=True) if count]

    def _check(self, name: str, passed: bool | None, found: str) -> None:
        self.checks.append({"name": name, "passed": passed, "found": found})

    def _judge(self, name: str, bad: list[str], found: str) -> None:
        """A check that fails for `bad` tensors or modules, if those had no problem before."""
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
        """The group of a tensor or module; None of what is in none."""
        for name, group in self._group.items():
            if _module(name) == _module(module):
                return group
        return None

    def _problem(self, check: str, subject: str) -> None:
        what, cause, fix = _PROBLEMS[check]
        self.problems.append({"what": f"{subject} {what}", "cause": cause, "fix": fix})


def _members(model: Any, groups: Groups) -> dict[str, str]:
    """{tensor: its group}. What PEFT saves with the adapter, as an adapter that the run starts from
    may bring it, belongs to the adapter.

    Raises:
        CheckFailed: something trains that belongs to no group.
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
    if strays := [name for name in strays if name not in found]:
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        raise CheckFailed(
            f"{strays[0].removeprefix('base_model.model.')}{more}: trains, and is no part of "
            f"{_named(list(groups))}: it would not be saved: freeze it, or name it in the task's "
            "groups"
        )
    return found


def _named(groups: Sequence[str]) -> str:
    """`the adapter and the head`"""
    return " and ".join(f"the {group}" for group in groups)


def _saved_name(name: str) -> str:
    """A tensor's name in the adapter's file."""
    return re.sub(r"\.(modules_to_save\.)?default\b", "", name)


def _module(name: str) -> str:
    """The module that a tensor belongs to."""
    return _LORA_OR_SAVED.split(name)[0]


def _local(tensor: Any) -> Any:
    """This rank's shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _zero_block(matrix: Any) -> Any:
    """(rows, columns) -> (): the share of its rows in the longest block of them that are zeros."""
    import torch

    alive = matrix.ne(0).any(dim=1)
    index = torch.arange(1, len(alive) + 1, device=alive.device)
    last = torch.where(alive, index, 0).cummax(0).values
    return (index - last).max() / len(alive)


def _checksum(tensor: Any) -> Any:
    """int64 () on the tensor's device: its bits as 64-bit words, each times an odd number that
    depends on its place, summed modulo 2^64. One word that changes always shows; no copy is made.
    """
    import torch

    if tensor.is_meta:  # on a rank that will get its values from the first
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


def _fetch(numbers: dict[str, Any]) -> dict[str, Any]:
    """From the device, at once."""
    import torch

    values = torch.stack(list(numbers.values())).tolist() if numbers else []
    return dict(zip(numbers, values, strict=True))
