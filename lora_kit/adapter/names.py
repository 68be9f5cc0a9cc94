"""The merge plan: which tensors of the base's files an adapter changes, and how; no arithmetic.

PEFT uses module names of the loaded model; files may lack a prefix (GPT-2's `transformer.`), store
experts separately that the model fuses (transformers' conversion_mapping.py), or omit a head that
is tied to the embeddings.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

from lora_kit.adapter.files import Adapter
from lora_kit.base.tensors import Stored
from lora_kit.errors import UserError
from lora_kit.schema import Json

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out")
# Models whose linear weights are stored as (in, out): transformers' Conv1D.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# PEFT's parameter of fused experts -> its parts on disk, in row order: the usual names, Mixtral's.
_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_TOKENS = "token_adapter.trainable_tokens_delta"
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"
_SPECIAL = re.compile(rf"(.+)\.({_MAGNITUDE}|{_BIAS}|{_TOKENS})(\.weight)?")
_WRAPPERS = r"\.(token_adapter|base_layer|modules_to_save)(?=\.)"
# Initialisations that change the base's weights, which the adapter does not record.
_TAKES_FROM_BASE = ("pissa", "olora")


@dataclass(frozen=True)
class Change:
    """The change of a matrix: `source` + scale · B A of `module`, rescaled by DoRA's `magnitude`,
    with the rows of `tokens` replaced; or of a bias: `source` + scale · `bias`."""

    source: Stored  # the base's tensor, or the adapter's replacement
    module: str | None = None
    rank: int = 0
    scale: float = 0.0
    expert: int = 0  # index in fused experts
    first: int = 0  # row of B of the first row of `source`
    transposed: bool = False  # `source` is (in, out): add (B A)^T
    magnitude: Stored | None = None  # (out,)
    tokens: tuple[int, ...] = ()
    token_rows: Stored | None = None
    bias: Stored | None = None


@dataclass(frozen=True)
class MergePlan:
    """`changes`: {tensor: its change}. `untied`: embeddings and head are no longer tied; the head
    is then among the changes. `vocabulary`: rows of the embeddings, if the adapter changes them."""

    changes: dict[str, Change]
    untied: bool
    vocabulary: int | None


def tensor_of(module: str, tensors: Mapping[str, Stored], kind: str = "weight") -> str:
    """The name of the tensor with a module's weight (`kind`: or its bias), by the full name, or the
    only one with this ending. Raises UserError if there is none."""
    name = f"{module}.{kind}"
    inner = name.partition(".")[2]
    for known in (name, inner, name.replace(".mlp.", ".block_sparse_moe.")):
        if known in tensors:
            return known
    for end in (name, inner):
        found = [known for known in tensors if known.endswith(f".{end}")]
        if len(found) == 1 and "." in end:
            return found[0]
    raise UserError(f"{module}: the base has no such {kind}: is it the right base?")


def plan_merge(
    adapter: Adapter,
    tensors: Mapping[str, Stored],
    config: Json,
    head: Mapping[str, tuple[int, ...]] | None = None,
) -> MergePlan:
    """Plan the merge of an adapter into the base's `tensors`.

    Args:
        config: the base's config.json.
        head: {name: shape} of head parameters that the adapter may replace or add; None for a
            language model.

    Raises:
        UserError: missing modules, wrong shapes, or unsupported features; one line each.
    """
    planner = _MergePlanner(adapter, tensors, config, head)
    init = str(adapter.config.get("init_lora_weights")).lower()
    if init.startswith(_TAKES_FROM_BASE):
        planner.problems.append(f"init_lora_weights: {init}: convert it to standard LoRA with PEFT")
    for name, tensor in adapter.others.items():
        planner.attempt(planner.add_other, name.removeprefix("base_model.model."), tensor)
    stray = {m for kind in (_MAGNITUDE, _BIAS) for m in planner.special[kind]}
    for module in sorted(stray - adapter.factors.keys()):
        planner.problems.append(f"{module}: without lora_A and lora_B")
    experts: dict[str, list[str]] = defaultdict(list)
    for module in adapter.factors:
        core = re.sub(r"(\.base_layer)+$", "", module)
        if core.endswith("experts"):
            experts[core].append(module)
        else:
            planner.attempt(planner.add_update, module)
    for core, modules in experts.items():
        planner.attempt(planner.add_experts, core, modules)
    for module, rows in planner.special[_TOKENS].items():
        planner.attempt(planner.add_token_rows, module, rows)
    problems = planner.problems
    if len(problems) > 5:
        problems = [*problems[:5], f"and {len(problems) - 5} more"]
    if problems:
        raise UserError("\n".join(f"{adapter.folder}: {problem}" for problem in problems))
    return planner.finish()


class _MergePlanner:
    """Collects the changes of all tensors of an adapter, and all problems.

    `embeddings` and `head` are the names of the language model's tensors, `head` also where a tied
    head is not stored; `head_shapes` are of a head for classes or numbers. `special`: {kind:
    {module: tensor}} of DoRA's magnitudes, B's biases and trained tokens. `replaced["tied"]`: the
    base layer that tied embeddings and head share.
    """

    def __init__(
        self,
        adapter: Adapter,
        tensors: Mapping[str, Stored],
        config: Json,
        head: Mapping[str, tuple[int, ...]] | None,
    ) -> None:
        self.adapter, self.tensors, self.config = adapter, tensors, config
        self.head_shapes = head or {}
        self.problems: list[str] = []
        self.changes: dict[str, Change] = {}
        self.special: dict[str, dict[str, Stored]] = defaultdict(dict)
        self.replaced: dict[str, Stored] = {}  # by the adapter's whole tensors; the base's names
        last = {name.split(".")[-2]: name for name in tensors if name.endswith(".weight")}
        self.embeddings = next((last[n] for n in _EMBEDDINGS if n in last), "")
        stored_head = next((last[n] for n in _HEADS if n in last), "")
        flags = [c.get("tie_word_embeddings") for c in (config, config.get("text_config") or {})]
        self.tied = any(flags) if any(f is not None for f in flags) else not stored_head
        if head is not None:  # it has no language-model head
            self.tied = False
        self.head = stored_head or ("embed_out" if "embed_in" in last else "lm_head") + ".weight"

    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        """Take a step; its UserError becomes one of the problems."""
        try:
            step(*arguments)
        except UserError as error:
            self.problems.append(str(error))

    def locate(self, module: str, kind: str = "weight") -> str:
        """`tensor_of`, also for a tied head, which the files may omit."""
        if self.tied and kind == "weight" and module.split(".")[-1] in _HEADS and self.embeddings:
            return self.head
        return tensor_of(module, self.tensors, kind)

    def source(self, name: str) -> Stored:
        """The base's tensor, or the adapter's replacement."""
        if self.tied and name == self.head and name not in self.replaced:
            return self.replaced.get("tied") or self.tensors[self.embeddings]
        return self.replaced.get(name) or self.tensors[name]

    def add_other(self, name: str, tensor: Stored) -> None:
        """Add a tensor that is neither A nor B."""
        match = _SPECIAL.fullmatch(name)
        if match:
            self.special[match[2]][match[1]] = tensor
        elif "lora_" in name:
            raise UserError(f"{name}: unsupported tensor, cannot be merged")
        else:
            self.add_replacement(name, tensor)

    def add_replacement(self, name: str, tensor: Stored) -> None:
        """Add a tensor that replaces one of the base, or is part of the head."""
        module, _, kind = re.sub(_WRAPPERS, "", name).rpartition(".")
        in_head = f"{module}.{kind}"
        if in_head in self.head_shapes:
            shape = self.head_shapes[in_head]
            if tensor.shape != shape:
                raise UserError(f"{name} is {tensor.shape}, but base and labels need {shape}")
            self.replaced[in_head] = tensor
            self.changes[in_head] = Change(tensor)
            return
        found = self.locate(module, kind)
        base_shape = self.source(found).shape
        saved = self.adapter.config.get("modules_to_save") or []
        is_end = found in (self.embeddings, self.head)
        is_bias = kind == "bias" and self.adapter.config.get("bias", "none") != "none"
        is_listed = any(re.search(rf"{re.escape(one)}(\.|$)", module) for one in saved)
        if not (is_end or is_bias or is_listed):
            raise UserError(f"{name}: a base weight that its config does not list")
        compared = slice(1 if is_end else 0, None)  # embeddings and head may have other rows
        if tensor.shape[compared] != base_shape[compared] or not tensor.shape:
            raise UserError(f"{name} is {tensor.shape}, {found} is {base_shape}: another base")
        if self.tied and is_end and ".base_layer." in name:
            self.replaced["tied"] = tensor  # the tied head uses the same base layer
        self.replaced[found] = tensor
        self.changes[found] = Change(tensor)

    def add_update(self, module: str) -> None:
        """Add scale · B A of a module, with DoRA's magnitude and B's bias."""
        name = self.locate(module)
        source = self.source(name)
        pair = self.adapter.factors[module]
        rank, scale = self.adapter.rank_and_scale(module)
        size = (pair["B"].shape[0], pair["A"].shape[1])
        conv1d = self.config.get("model_type") in CONV1D and name != self.head
        turned = conv1d or "lora_embedding" in pair["A"].name
        if source.shape != (size[::-1] if turned else size):
            raise UserError(f"{module}: B A is {size}, {name} is {source.shape}: another base")
        magnitude = self.special[_MAGNITUDE].get(module)
        given = magnitude.shape if magnitude else None
        if given != (size[:1] if self.adapter.config.get("use_dora") else None):
            raise UserError(f"{module}: B A is {size}, its magnitude (DoRA) {given}")
        change = Change(source, module, rank, scale, transposed=turned, magnitude=magnitude)
        self.changes[name] = change
        bias = self.special[_BIAS].get(module)
        if bias:
            name = self.locate(module, "bias")
            if bias.shape != self.source(name).shape:
                raise UserError(f"{module}: lora_B.bias is {bias.shape}: another base")
            self.changes[name] = Change(self.source(name), scale=scale, bias=bias)

    def add_experts(self, core: str, modules: list[str]) -> None:
        """Add the updates of the fused experts of a layer, whose parameters are stored by expert.

        Args:
            core: the name of the experts' module.
            modules: the adapted modules inside, `core` with a `.base_layer` for each but the last.
        """
        for module in modules:
            kind = self.adapter.parameters.get(module, "").rpartition(".")[2]
            if kind not in _EXPERTS:
                raise UserError(f"{core}: cannot tell which of its parameters are adapted")
            rank, scale = self.adapter.rank_and_scale(module)
            pair = self.adapter.factors[module]
            count, size = pair["A"].shape[0] // rank, (pair["B"].shape[0], pair["A"].shape[1])
            other = core.replace(".mlp.", ".block_sparse_moe.")
            mixtral = f"{other}.0.w2.weight" in self.tensors
            names = _EXPERTS[kind][1 if mixtral else 0]
            height = size[0] // len(names)
            # The base must not have an expert after the adapter's last one.
            beyond = f"{other if mixtral else core}.{count}.{names[0]}"
            if pair["A"].shape[0] % rank or f"{beyond}.weight" in self.tensors:
                raise UserError(f"{core}.{kind}: the base has another number of experts")
            for n, (part, end) in product(range(count), enumerate(names)):
                name = tensor_of(f"{core}.{n}.{end}", self.tensors)
                one = self.tensors[name]
                if one.shape != (height, size[1]):
                    raise UserError(f"{core}.{kind}: B A is {size}, {name} {one.shape}")
                self.changes[name] = Change(one, module, rank, scale, n, part * height)

    def add_token_rows(self, module: str, rows: Stored) -> None:
        """Add trained embeddings of single tokens."""
        name, given = self.locate(module), self.adapter.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((v for k, v in given.items() if f".{module}".endswith(f".{k}")), None)
        source, chosen = self.source(name), tuple(given or ())
        inside = all(type(n) is int and 0 <= n < source.shape[0] for n in chosen)
        if not (chosen and inside and rows.shape == (len(chosen), *source.shape[1:])):
            raise UserError(f"{module}: trainable_token_indices do not match the saved rows")
        known = self.changes.get(name)
        if known and known.module:
            raise UserError(f"{module}: both LoRA and trainable tokens: merge it with PEFT")
        self.changes[name] = Change(source, tokens=chosen, token_rows=rows)

    def finish(self) -> MergePlan:
        """Untie embeddings and head if only one of them changes, or they change differently."""
        if "tied" in self.replaced:
            self.changes.setdefault(self.embeddings, Change(self.replaced["tied"]))
        embeddings, head = self.changes.get(self.embeddings), self.changes.get(self.head)
        vocabulary = None
        if embeddings and embeddings.source.shape[0] != self.tensors[self.embeddings].shape[0]:
            vocabulary = embeddings.source.shape[0]
        if not self.tied or not (embeddings or head):
            both = [name for name in (self.embeddings, self.head) if name in self.tensors]
            if len({self.source(name).shape[0] for name in both}) > 1:
                raise UserError(
                    f"{self.adapter.folder}: tokens were added, but only the embeddings or only "
                    "the head have their rows: save both with PEFT (modules_to_save)"
                )
            return MergePlan(self.changes, False, vocabulary)
        if embeddings and embeddings.tokens and not head:
            # PEFT applies trained tokens to a tied head too, unless only the embeddings under them
            # were replaced.
            stay_tied = self.embeddings not in self.replaced or "tied" in self.replaced
        else:
            stay_tied = _equal(embeddings, head)
        if stay_tied and self.head in self.tensors:
            self.changes[self.head] = self.changes[self.embeddings]
        elif stay_tied:
            self.changes.pop(self.head, None)
        elif embeddings and not head:
            self.changes[self.head] = Change(self.source(self.head))
        return MergePlan(self.changes, not stay_tied, vocabulary)


def _equal(one: Change | None, other: Change | None) -> bool:
    """Whether embeddings and head change to equal matrices, by replacement or by tokens; LoRA on
    either makes them differ."""
    if not one or not other or one.module or other.module or one.tokens != other.tokens:
        return False
    pairs = [(one.source, other.source), (one.token_rows, other.token_rows)]
    return all(
        a is b or (a and b and a.shape == b.shape and a.read().equal(b.read())) for a, b in pairs
    )
