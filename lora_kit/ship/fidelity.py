"""What an adapter trained on 4 bits loses when merged: into its base, or what NF4 leaves of it.

The adapter learned on the quantized base, and in part to undo its error. Merged into the 16-bit
base it meets other weights; merged into the dequantized ones it meets the same, rounded once, and
the error of the quantization stays in the model for good (peft#2321).
"""

from __future__ import annotations

import math
import shlex
from typing import Any

import numpy as np

from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.inspect import module_table
from lora_kit.adapter.load import load_model
from lora_kit.data.rows import Rows
from lora_kit.errors import CheckFailed, UserError
from lora_kit.prove.compare import prepared_again, task_of
from lora_kit.tasks.batches import IGNORED, collator
from lora_kit.tasks.bootstrap import interval
from lora_kit.tasks.measure import LOGITS_AT_ONCE

INTO = ("dequantized", "base")
# What a merge of a bfloat16 model loses by rounding alone, in nats per token: not worth a word.
_ROUNDING = 1e-3


def fidelity(run: FinishedRun) -> dict[str, Any]:
    """The losses of both merges on the run's held-out rows; two models are in memory at a time.

    The merged models are what `merge` writes, bit for bit, where the base's files are in the run's
    type; of a base in float32 `merge` adds before it rounds, and is a little nearer.

    Returns:
        `modules`: of each adapted and quantized one the norms of its weight W, of the error
        ||W - Q(W)||_F and of the update ||dW||_F; `whole`: the same of all as one matrix;
        `documents` and `tokens` judged; `loss` of the adapter on the 4-bit base; for each way of
        INTO its `loss`, the `difference` with `ci95`, and `kl`, KL(4-bit || merged), all in nats
        per token; `recommended`, of INTO, and `why` in words; `command`.

    Raises:
        UserError: the run was not trained on NF4; see also `lora_kit.compare`.
    """
    opened = run.require_run()
    run.require_language_model("check --fidelity")
    if opened.base.quantize != "nf4":
        raise UserError(
            f"{run.path}: base.quantize is {opened.base.quantize}: only an adapter trained on nf4 "
            "can be merged in two ways; merge it: lora-kit merge"
        )
    rows = prepared_again(run, task_of(run))[1].eval
    trained, tokenizer = load_model(run)
    found: dict[str, Any] = {}
    sums = {}
    for into in INTO:
        model, _ = load_model(run, quantize="none")
        if into == "base":
            found |= _norms(run, trained, model)
        else:
            for _, weight, rough in rough_weights(trained, model):
                weight.copy_(rough.to(weight))
        if not model.config.get_text_config().tie_word_embeddings or not _on_ends(model):
            model.merge_adapter()  # so that it is rounded as in a merged model
        sums[into] = _measured(trained, model, rows, tokenizer.pad_token_id)
    tokens = sums["base"][3]
    judged = tokens > 0
    size = tokens[judged]
    found |= {"documents": int(judged.sum()), "tokens": int(size.sum())}
    found["loss"] = float(sums["base"][0].sum() / size.sum())
    for into in INTO:
        before, after, apart, _ = sums[into]
        change = (after - before)[judged]
        found[into] = {
            "loss": float(after.sum() / size.sum()),
            "difference": float(change.sum() / size.sum()),
            "ci95": list(interval(change, size, opened.seed)),
            "kl": float(apart.sum() / size.sum()),
        }
    low, high = interval((sums["base"][1] - sums["dequantized"][1])[judged], size, opened.seed)
    return {"run": run.path, **found, **_advice(run.path, found, low, high)}


def _advice(run: str, found: dict[str, Any], low: float, high: float) -> dict[str, str]:
    """`low` and `high`: the interval of the base's loss over the dequantized one's."""
    apart = found["base"]["loss"] - found["dequantized"]["loss"]
    kept = found["dequantized"]["difference"]
    higher = f"{abs(kept):.4f} nats per token {'higher' if kept > 0 else 'lower'}"
    same = "as it was trained" if abs(kept) <= _ROUNDING else f"its loss is {higher}"
    words = f"merged into the dequantized base, {same}; into the 16-bit base, "
    if low <= 0 <= high or abs(apart) <= _ROUNDING:
        into, words = "dequantized", words + "no difference that these rows show"
    elif apart > 0:
        into, words = "dequantized", words + f"{apart:.4f} nats per token worse"
    else:
        why = "the 16-bit weights help more than the adapter misses its own"
        into, words = "base", words + f"{-apart:.4f} better: {why}"
    return {
        "recommended": into,
        "why": words,
        "command": f"lora-kit merge {shlex.quote(run)} --into {into} --out merged",
    }


def rough_weights(trained: Any, model: Any) -> Any:
    """(name, the 16-bit weight, what NF4 leaves of it), both (out, in), float32."""
    from bitsandbytes.functional import dequantize_4bit

    sharp = dict(model.get_base_model().named_modules())
    for inner, module in trained.get_base_model().named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        name = inner.removesuffix(".base_layer")
        layer: Any = getattr(sharp[name], "base_layer", sharp[name])
        rough = dequantize_4bit(module.weight.data, module.weight.quant_state)
        # GPT-2's Conv1D keeps (in, out).
        weight = layer.weight.data
        yield name, weight.T if type(layer).__name__ == "Conv1D" else weight, rough


def _norms(run: FinishedRun, trained: Any, model: Any) -> dict[str, Any]:
    adapter = run.adapter
    modules = [
        {
            "module": name,
            "weight": float(weight.float().norm()),
            "error": float((weight.float() - rough.to(weight.device).float()).norm()),
            "update": adapter.update(name).norm(),
        }
        for name, weight, rough in rough_weights(trained, model)
        if name in adapter.factors
    ]
    return {"modules": modules, "whole": _together(modules)}


def _together(modules: list[dict[str, Any]]) -> dict[str, float]:
    return {key: math.hypot(*(m[key] for m in modules)) for key in ("weight", "error", "update")}


def _on_ends(model: Any) -> bool:
    """Whether the adapter sits on embeddings or head: merged into a shared matrix, it would change
    the other one as well."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(hasattr(end, "base_layer") for end in ends)


def _measured(trained: Any, merged: Any, rows: Rows, pad_id: int) -> np.ndarray:
    """By unit, float64 (4, units): nats of `trained` and of `merged`, KL(trained || merged) summed
    over the labels, and how many those are."""
    import torch

    collate = collator(pad_id)
    sums = torch.zeros((4, rows.units), dtype=torch.float64)
    lengths, units = rows.sizes("input_ids"), rows.column("unit").astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    # Of two models, and their differences.
    vocabulary = trained.config.get_text_config().vocab_size
    at_once = min(8, max(1, LOGITS_AT_ONCE // (4 * vocabulary * int(lengths.max()))))
    for start in range(0, len(order), at_once):
        numbers = order[start : start + at_once]
        batch = collate([rows[int(n)] for n in numbers])
        labels = batch.pop("labels")[:, 1:]
        row, place = (labels != IGNORED).nonzero(as_tuple=True)
        targets = labels[row, place][:, None]  # (labels, 1)
        logs = []  # (labels, vocabulary), of both
        with torch.inference_mode():
            for model in (trained, merged):
                device = next(model.parameters()).device
                logits = model(**{k: v.to(device) for k, v in batch.items()}).logits[:, :-1]
                logs.append(logits[row, place].float().log_softmax(-1).cpu())
        nats = [-log.gather(1, targets)[:, 0] for log in logs]
        apart = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        figures = torch.stack([*nats, apart, torch.ones_like(apart)]).double()
        sums.index_add_(1, torch.from_numpy(units[numbers])[row], figures)
    if not bool(sums.isfinite().all()):
        raise CheckFailed("a held-out loss is not finite: look for NaN with lora-kit inspect")
    return sums.numpy()


def show(found: dict[str, Any]) -> None:
    """Print what `fidelity` found: the norms by kind of module and by layer, losses, advice."""

    def cells(group: list[dict[str, Any]]) -> list[str]:
        of = _together(group)
        share = of["error"] / of["update"] if of["update"] else math.inf
        return [f"{number:.3g}" for number in (*of.values(), share)]

    module_table(["weight", "NF4 error", "update", "error / update"], found["modules"], cells)
    print(f"held-out loss of the adapter on the 4-bit base: {found['loss']:.4f}")
    for into in INTO:
        one, (low, high) = found[into], found[into]["ci95"]
        change = f"{one['difference']:+.4f} (95% interval {low:+.4f} to {high:+.4f})"
        print(f"merged into {into}: {one['loss']:.4f}, {change}, KL {one['kl']:.2g}")
    print(f"{found['documents']} documents, {found['tokens']:,} tokens; nats per token")
    print(f"{found['why']}:\n  {found['command']}")
