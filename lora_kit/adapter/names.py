"""Which tensors of the base's files an adapter changes, and how: names and shapes, no arithmetic.

PEFT names the modules of a loaded model; files on disk may lack a prefix (GPT-2's `transformer.`),
keep experts one by one that the model has in one parameter (transformers' conversion_mapping.py),
or leave out a head that is tied to the embeddings.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from operator import eq
from typing import Any

from lora_kit.adapter.files import Adapter
from lora_kit.base.tensors import Stored
from lora_kit.errors import UserError

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out")
# Their linear weights lie as (in, out): transformers' Conv1D.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# PEFT's parameter of the experts, in the order of the model -> what it is on disk, from its first
# row on, in one of two spellings.
_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_TOKENS = "token_adapter.trainable_tokens_delta"
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"
_SPECIAL = re.compile(rf"(.+)\.({_MAGNITUDE}|{_BIAS}|{_TOKENS})(\.weight)?")
_WRAPPERS = r"\.(token_adapter|base_layer|modules_to_save)(?=\.)"
# These starts take a part out of the base's weights, which the adapter alone does not tell.
_TAKES_FROM_BASE = ("pissa", "olora", "lora_ga", "mica")


@dataclass(frozen=True)
class Change:
    """What becomes of a matrix: `source` + scale · B A of `module`, rescaled by DoRA's `magnitude`,
    the rows of `tokens` replaced; or of a bias: `source` + scale · `bias`."""

    source: Stored  # the base's, or the adapter's own in its place
    module: str | None = None
    rank: int = 0
    scale: float = 0.0
    expert: int = 0  # of a module of experts
    first: int = 0  # row of B that is the first one of `source`
    transposed: bool = False  # `source` is (in, out), so that (B A)^T is added
    magnitude: Stored | None = None  # (out,)
    tokens: tuple[int, ...] = ()
    token_rows: Stored | None = None
    bias: Stored | None = None


@dataclass(frozen=True)
class Plan:
    """`changes`: {tensor: its change}. `parted`: embeddings and head were tied, and are no more; a
    head that the files lack is then among the changes. `vocabulary`: the rows of the embeddings,
    where the adapter has others than the base."""

    changes: dict[str, Change]
    parted: bool
    vocabulary: int | None


def tensor_of(module: str, tensors: Mapping[str, Stored], kind: str = "weight") -> str:
    """The tensor that holds a module's weight. Raises UserError when nothing fits."""
    name = f"{module}.{kind}"
    inner = name.partition(".")[2]
    for known in (name, inner, name.replace(".mlp.", ".block_sparse_moe.")):
        if known in tensors:
            return known
    for end in (name, inner):
        found = [known for known in tensors if known.endswith(f".{end}")]
        if len(found) == 1 and "." in end:
            return found[0]
    raise UserError(f"{module}: the base has no such {kind}; is it the adapter's own base?")


def plan(
    adapter: Adapter,
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    head: Mapping[str, tuple[int, ...]] | None = None,
) -> Plan:
    """What a merge does to the base's `tensors`, whose config.json is `config`.

    Args:
        head: {name: shape} of the parameters that the adapter may bring whole, in place of the
            base's or in addition to them; None: a language model, which has none.

    Raises:
        UserError: a module that the base lacks, a shape that does not fit, or what cannot be
            merged; all of them, a line each.
    """
    planner = _Planner(adapter, tensors, config, head)
    init = str(adapter.config.get("init_lora_weights")).lower()
    if init.startswith(_TAKES_FROM_BASE):
        planner.problems.append(f"init_lora_weights: {init}: convert it with PEFT to plain LoRA")
    for name, tensor in adapter.others.items():
        planner.attempt(planner.beside, name.removeprefix("base_model.model."), tensor)
    stray = {m for kind in (_MAGNITUDE, _BIAS) for m in planner.special[kind]}
    for module in sorted(stray - adapter.halves.keys()):
        planner.problems.append(f"{module}: no lora_A and lora_B to it")
    experts: dict[str, list[str]] = defaultdict(list)
    for module in adapter.halves:
        core = re.sub(r"(\.base_layer)+$", "", module)
        if core.endswith("experts"):
            experts[core].append(module)
        else:
            planner.attempt(planner.matrix, module)
    for core, modules in experts.items():
        planner.attempt(planner.experts, core, modules)
    for module, rows in planner.special[_TOKENS].items():
        planner.attempt(planner.tokens, module, rows)
    if problems := planner.problems:
        more = [f"and {len(problems) - 5} more of the kind"] if len(problems) > 5 else []
        raise UserError("\n".join(f"{adapter.folder}: {p}" for p in problems[:5] + more))
    return planner.settled()


class _Planner:
    def __init__(
        self,
        adapter: Adapter,
        tensors: Mapping[str, Stored],
        config: Mapping[str, Any],
        head: Mapping[str, tuple[int, ...]] | None,
    ) -> None:
        self.adapter, self.tensors, self.config = adapter, tensors, config
        self.brought = head or {}
        self.problems: list[str] = []
        self.changes: dict[str, Change] = {}
        self.special: dict[str, dict[str, Stored]] = defaultdict(dict)
        self.own: dict[str, Stored] = {}  # whole tensors of the adapter, by the base's names
        last = {name.split(".")[-2]: name for name in tensors if name.endswith(".weight")}
        self.embeddings = next((last[n] for n in _EMBEDDINGS if n in last), "")
        vocabulary = next((last[n] for n in _HEADS if n in last), "")
        flags = [c.get("tie_word_embeddings") for c in (config, config.get("text_config") or {})]
        self.tied = any(flags) if any(f is not None for f in flags) else not vocabulary
        if head is not None:  # it has no language-model head
            self.tied = False
        self.head = vocabulary or ("embed_out" if "embed_in" in last else "lm_head") + ".weight"

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except UserError as error:
            self.problems.append(str(error))

    def locate(self, module: str, kind: str = "weight") -> str:
        if self.tied and kind == "weight" and module.split(".")[-1] in _HEADS and self.embeddings:
            return self.head
        return tensor_of(module, self.tensors, kind)

    def source(self, name: str) -> Stored:
        """The base's tensor, or the adapter's own in its place."""
        if self.tied and name == self.head and name not in self.own:
            return self.own.get("tied") or self.tensors[self.embeddings]
        return self.own.get(name) or self.tensors[name]

    def beside(self, name: str, tensor: Stored) -> None:
        """A tensor that is no half of a LoRA."""
        if match := _SPECIAL.fullmatch(name):
            self.special[match[2]][match[1]] = tensor
        elif "lora_" in name:
            raise UserError(f"{name}: not known, and so not merged")
        else:
            self.whole(name, tensor)

    def whole(self, name: str, tensor: Stored) -> None:
        module, _, kind = re.sub(_WRAPPERS, "", name).rpartition(".")
        if (shape := self.brought.get(f"{module}.{kind}")) is not None:
            if tensor.shape != shape:
                raise UserError(f"{name} is {tensor.shape}, and {shape} by its labels and base")
            self.own[f"{module}.{kind}"] = tensor
            self.changes[f"{module}.{kind}"] = Change(tensor)
            return
        found = self.locate(module, kind)
        ends = found in (self.embeddings, self.head)  # these may have more rows, or fewer
        there = self.source(found).shape
        saved = self.adapter.config.get("modules_to_save") or []
        bias = kind == "bias" and self.adapter.config.get("bias", "none") != "none"
        named = any(re.search(rf"{re.escape(one)}(\.|$)", module) for one in saved)
        if not (ends or bias or named):
            raise UserError(f"{name}: a weight of the base that its config does not speak of")
        if tensor.shape[ends:] != there[ends:] or not tensor.shape:
            raise UserError(f"{name} is {tensor.shape}, {found} is {there}: another base")
        if self.tied and ends and ".base_layer." in name:
            self.own["tied"] = tensor  # below its LoRA lies what a tied head reads as well
        self.own[found] = tensor
        self.changes[found] = Change(tensor)

    def matrix(self, module: str) -> None:
        name, pair = self.locate(module), self.adapter.halves[module]
        source, (rank, scale) = self.source(name), self.adapter.rank_and_scale(module)
        size = (pair["B"].shape[0], pair["A"].shape[1])
        conv1d = self.config.get("model_type") in _CONV1D and name != self.head
        turned = conv1d or "lora_embedding" in pair["A"].name
        if source.shape != (size[::-1] if turned else size):
            raise UserError(f"{module}: B A is {size}, {name} is {source.shape}: another base")
        magnitude = self.special[_MAGNITUDE].get(module)
        given = magnitude.shape if magnitude else None
        if given != (size[:1] if self.adapter.config.get("use_dora") else None):
            raise UserError(f"{module}: B A is {size}, its magnitude (DoRA) {given}")
        change = Change(source, module, rank, scale, transposed=turned, magnitude=magnitude)
        self.changes[name] = change
        if bias := self.special[_BIAS].get(module):
            name = self.locate(module, "bias")
            if bias.shape != self.source(name).shape:
                raise UserError(f"{module}: lora_B.bias is {bias.shape}: another base")
            self.changes[name] = Change(self.source(name), scale=scale, bias=bias)

    def experts(self, core: str, modules: list[str]) -> None:
        targets = self.adapter.config.get("target_parameters") or []
        # As PEFT finds them: by the end of the name.
        kinds = [k for k in _EXPERTS if any(f".{core}.{k}".endswith(f".{t}") for t in targets)]
        if len(kinds) != len(modules):
            raise UserError(f"{core}: which of its parameters are adapted is not known")
        # PEFT wraps one parameter after the other: the first lies innermost.
        for kind, module in zip(kinds, sorted(modules, key=len, reverse=True), strict=True):
            rank, scale = self.adapter.rank_and_scale(f"{core}.{kind}")
            pair = self.adapter.halves[module]
            count, size = pair["A"].shape[0] // rank, (pair["B"].shape[0], pair["A"].shape[1])
            other = core.replace(".mlp.", ".block_sparse_moe.")
            mixtral = f"{other}.0.w2.weight" in self.tensors
            names = _EXPERTS[kind][mixtral]
            height = size[0] // len(names)
            beyond = f"{other if mixtral else core}.{count}.{names[0]}"
            if pair["A"].shape[0] % rank or f"{beyond}.weight" in self.tensors:
                raise UserError(f"{core}.{kind}: not as many experts as the base has")
            for n, (part, end) in product(range(count), enumerate(names)):
                name = tensor_of(f"{core}.{n}.{end}", self.tensors)
                one = self.tensors[name]
                if one.shape != (height, size[1]):
                    raise UserError(f"{core}.{kind}: B A is {size}, {name} {one.shape}")
                self.changes[name] = Change(one, module, rank, scale, n, part * height)

    def tokens(self, module: str, rows: Stored) -> None:
        name, given = self.locate(module), self.adapter.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((v for k, v in given.items() if f".{module}".endswith(f".{k}")), None)
        source, chosen = self.source(name), tuple(given or ())
        inside = all(type(n) is int and 0 <= n < source.shape[0] for n in chosen)
        if not (chosen and inside and rows.shape == (len(chosen), *source.shape[1:])):
            raise UserError(f"{module}: trainable_token_indices do not fit what was saved")
        if (known := self.changes.get(name)) and known.module:
            raise UserError(f"{module}: both LoRA and single tokens: merge it with PEFT")
        self.changes[name] = Change(source, tokens=chosen, token_rows=rows)

    def settled(self) -> Plan:
        """Where only one of two tied matrices changes, or each in its own way, they part."""
        if "tied" in self.own:
            self.changes.setdefault(self.embeddings, Change(self.own["tied"]))
        first, second = self.changes.get(self.embeddings), self.changes.get(self.head)
        rows = first.source.shape[0] if first else 0
        others = rows if first and rows != self.tensors[self.embeddings].shape[0] else None
        if not self.tied or not (first or second):
            ends = [
                self.source(n).shape[0] for n in (self.embeddings, self.head) if n in self.tensors
            ]
            if len(set(ends)) > 1:
                raise UserError(
                    f"{self.adapter.folder}: tokens were added, and only their rows of the "
                    "embeddings or of the head are in it: save both with PEFT (modules_to_save)"
                )
            return Plan(self.changes, False, others)
        below = self.embeddings not in self.own or "tied" in self.own
        together = below if first and first.tokens and not second else _equal(first, second)
        if not together and first and not second:
            self.changes[self.head] = Change(self.source(self.head))
        elif together and self.head in self.tensors:
            self.changes[self.head] = self.changes[self.embeddings]
        elif together:
            self.changes.pop(self.head, None)
        return Plan(self.changes, not together, others)


def _equal(one: Change | None, other: Change | None) -> bool:
    """Whether two matrices that the adapter replaces are the same."""
    if not one or not other or one.module or other.module or one.tokens != other.tokens:
        return False
    pairs = [(one.source, other.source), (one.token_rows, other.token_rows)]
    return all(
        a is b or (a and b and a.shape == b.shape and all(map(eq, a.pieces(), b.pieces())))
        for a, b in pairs
    )
