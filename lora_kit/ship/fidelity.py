"""The loss of accuracy when an adapter trained on NF4 is merged: into the base, or dequantized.

Such an adapter partly compensates the quantization error. Merged into the 16-bit base, it is added
to other weights than in training; merged into the NF4-dequantized ones, it is added to the same
weights, rounded once, and the quantization error stays in the model (peft#2321).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.inspect import module_table
from lora_kit.adapter.load import load_model
from lora_kit.data.rows import Rows
from lora_kit.errors import CheckFailed, UserError
from lora_kit.prove.compare import prepared_again, task_of
from lora_kit.tasks.batches import IGNORED, collator
from lora_kit.tasks.bootstrap import interval
from lora_kit.tasks.measure import logits_at_once

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

INTO = ("dequantized", "base")
# The loss of a bfloat16 merge by rounding alone, in nats per token: not reported.
_ROUNDING = 1e-3


def fidelity(run: FinishedRun) -> dict[str, object]:
    """Evaluate both merges on the run's held-out rows; two models are in memory at a time.

    The merged models equal what `merge` writes if the base's files have the run's dtype; otherwise
    `merge` rounds to theirs.

    Returns:
        `modules`: for each adapted and quantized module the norms of its weight ||W||_F, of the
        quantization error ||W - Q(W)||_F and of the update ||dW||_F; `whole`: the same for all as
        one matrix; `documents` and `tokens` evaluated; `loss` of the adapter on the 4-bit base; for
        each of INTO its `loss`, the `difference` with `ci95`, and `kl`, KL(4-bit || merged), all in
        nats per token; `recommended`, one of INTO, and `why`; `command`.

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
            for _, weight, dequantized in dequantized_weights(trained, model):
                weight.copy_(dequantized.to(weight))
        if not model.config.get_text_config().tie_word_embeddings or not _on_ends(model):
            model.merge_adapter()  # so that it is rounded as in a merged model
        sums[into] = _measured(trained, model, rows, tokenizer.pad_token_id)
    as_trained, _, _, tokens = sums["base"]
    evaluated = tokens > 0
    size = tokens[evaluated]
    found |= {"documents": int(evaluated.sum()), "tokens": int(size.sum())}
    found["loss"] = float(as_trained.sum() / size.sum())
    for into in INTO:
        before, after, divergence, _ = sums[into]
        change = (after - before)[evaluated]
        found[into] = {
            "loss": float(after.sum() / size.sum()),
            "difference": float(change.sum() / size.sum()),
            "ci95": list(interval(change, size, opened.seed)),
            "kl": float(divergence.sum() / size.sum()),
        }
    low, high = interval((sums["base"][1] - sums["dequantized"][1])[evaluated], size, opened.seed)
    return {"run": run.path, **found, **_advice(run.path, found, low, high)}


def _advice(run: str, found: dict[str, Any], low: float, high: float) -> dict[str, str]:
    """`recommended`, `why` and `command` of `fidelity`. `low` and `high`: the confidence interval
    of the loss merged into the base minus that merged into the dequantized one."""
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


def dequantized_weights(
    trained: PeftModel, model: PeftModel
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, 16-bit weight, NF4-dequantized weight) of each quantized module, both (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    unquantized = dict(model.get_base_model().named_modules())
    for inner, module in trained.get_base_model().named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        name = inner.removesuffix(".base_layer")
        layer: Any = getattr(unquantized[name], "base_layer", unquantized[name])
        dequantized = dequantize_4bit(module.weight.data, module.weight.quant_state)
        # GPT-2's Conv1D keeps (in, out).
        weight = layer.weight.data
        yield name, weight.T if type(layer).__name__ == "Conv1D" else weight, dequantized


def _norms(run: FinishedRun, trained: PeftModel, model: PeftModel) -> dict[str, Any]:
    """`modules` and `whole` of `fidelity`."""
    adapter = run.adapter
    modules = [
        {
            "module": name,
            "weight": float(weight.float().norm()),
            "error": float((weight.float() - dequantized.to(weight.device).float()).norm()),
            "update": adapter.update(name).norm(),
        }
        for name, weight, dequantized in dequantized_weights(trained, model)
        if name in adapter.factors
    ]
    return {"modules": modules, "whole": _together(modules)}


def _together(modules: list[dict[str, Any]]) -> dict[str, float]:
    """The norms of all modules as one matrix."""
    return {key: math.hypot(*(m[key] for m in modules)) for key in ("weight", "error", "update")}


def _on_ends(model: PeftModel) -> bool:
    """Whether embeddings or head are adapted: merged into a tied matrix, the update would change
    both."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(hasattr(end, "base_layer") for end in ends)


def _measured(trained: PeftModel, merged: PeftModel, rows: Rows, pad_id: int) -> np.ndarray:
    """float64 (4, units): for each unit the nats of `trained` and of `merged`, KL(trained ||
    merged), all summed over its supervised tokens, and their number."""
    import torch

    collate = collator(pad_id)
    sums = torch.zeros((4, rows.units), dtype=torch.float64)
    lengths, units = rows.sizes("input_ids"), rows.column("unit").astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    # Logits of two models, log-probabilities and their difference are in memory at once.
    vocabulary = trained.config.get_text_config().vocab_size
    at_once = min(8, max(1, logits_at_once(trained) // (4 * vocabulary * int(lengths.max()))))
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
        divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        figures = torch.stack([*nats, divergence, torch.ones_like(divergence)]).double()
        sums.index_add_(1, torch.from_numpy(units[numbers])[row], figures)
    if not bool(sums.isfinite().all()):
        raise CheckFailed("a held-out loss is not finite: look for NaN with lora-kit inspect")
    return sums.numpy()


def show(found: dict[str, Any]) -> None:
    """Print the result of `fidelity`: norms by kind of module and by layer, losses, advice."""

    def cells(group: list[dict[str, Any]]) -> list[str]:
        norms = _together(group)
        ratio = norms["error"] / norms["update"] if norms["update"] else math.inf
        return [f"{number:.3g}" for number in (*norms.values(), ratio)]

    module_table(["weight", "NF4 error", "update", "error / update"], found["modules"], cells)
    print(f"held-out loss of the adapter on the 4-bit base: {found['loss']:.4f}")
    for into in INTO:
        one, (low, high) = found[into], found[into]["ci95"]
        change = f"{one['difference']:+.4f} (95% interval {low:+.4f} to {high:+.4f})"
        print(f"merged into {into}: {one['loss']:.4f}, {change}, KL {one['kl']:.2g}")
    print(f"{found['documents']} documents, {found['tokens']:,} tokens; nats per token")
    print(f"{found['why']}:\n  {found['command']}")
