"""An adapter in the format of another program, compared in that program before it is written.

The reference is base and adapter in this process, in float32. The export is loaded by its program
in a fresh process, and must give the same log-probabilities along the same greedy completions, the
same token ids of texts and of conversations, and stop at the same end tokens.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args

from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.files import WEIGHTS
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import changed_base, end_tokens
from lora_kit.adapter.portable import write_portable
from lora_kit.base.load import load_base
from lora_kit.errors import CheckFailed, UserError
from lora_kit.folders import new_folder, refuse_existing
from lora_kit.prove.into import choose, cost_of_original
from lora_kit.run import nearest, read_json
from lora_kit.ship import gguf, llama_cpp, ollama, reload
from lora_kit.ship.fidelity import dequantized_weights
from lora_kit.ship.merge import FLOAT32_TOLERANCE, LESS, RECORD, Into, merge, seen_scale
from lora_kit.ship.mlx import write_mlx

if TYPE_CHECKING:
    import torch

FORMS = ("portable", "merged", "gguf", "ollama", "mlx")
# Allowed differences of log-probabilities (nats): of float32 sums in another order, and of the
# kernels of llama.cpp and MLX.
SAME_ARITHMETIC, OTHER_ARITHMETIC = FLOAT32_TOLERANCE, 1e-3
# llama.cpp has GELU, which only Gemma uses, as a float16 table: up to 4.6e-3 in random models in
# float32, more with a large adapter. The second number is a share of the adapter's effect.
ROUGH_GELU = 5e-3, 1e-3
# Allowed difference by rounding, as a share of the adapter's effect. For the embedded model trained
# for 40 steps it is 0.002 in f16, 0.01 in bf16 and 0.05 in q8_0, and more for a smaller effect;
# twice the right scale gives about 1.
ROUNDED = {"f32": 0.0, "f16": 0.1, "bf16": 0.25, "q8_0": 0.5}
# Allowed error of the adapter's scale, fitted to all differences by those that LESS of the adapter
# makes: rounding errors nearly cancel in the fit, a wrong scale does not. Measured on nano and tiny
# models: 2e-4 in f16, 7e-4 in bf16, 0.006 in q8_0.
SCALE = {"f32": 1e-3, "f16": 0.02, "bf16": 0.1, "q8_0": 0.1}


@dataclass(frozen=True)
class Reference:
    """The output of base and adapter in this process; of the base alone if only that is exported.

    Attributes:
        prompts: token ids.
        answers: a greedy continuation of each prompt.
        less: the log-probabilities along each continuation, (steps, vocabulary), with the share
            `step` of the adapter removed; for the base alone, with the adapter, and `step` is 1.
        effect: the largest difference of these log-probabilities with and without the adapter.
        texts, conversations: the token ids of TEXTS and CONVERSATIONS of `reload`.
        ends: the end tokens.
    """

    prompts: list[list[int]]
    answers: list[reload.Continued]
    less: list[torch.Tensor]
    step: float
    effect: float
    texts: list[list[int]]
    conversations: list[list[int]]
    ends: list[int]


class Figures(TypedDict):
    """The result of a comparison: log-probabilities (nats), the fitted scale, and the number of
    compared tokens."""

    max_difference: float
    allowed: float
    adapter_effect: float
    scale: float
    tokens: int


class Exported(TypedDict):
    """The output of `export --json`. `reloaded`: None if the program does not run here; `notes`:
    what the user of the export must know."""

    to: str
    out: str
    kind: str | None
    what: str | None
    bytes_written: int
    reloaded: Figures | None
    notes: list[str]


def export(
    run: FinishedRun,
    to: str,
    out: str | Path,
    kind: str | None = None,
    what: str | None = None,
    into: Into = "auto",
) -> Exported:
    """Write a run's adapter for another program, and compare it there.

    Args:
        to: portable, an adapter for every loader; merged, base and adapter in one; gguf; ollama,
            a GGUF with its Modelfile; or mlx.
        kind: the type of a gguf's weights: f32, f16, bf16 or q8_0; None: f16.
        what: what the gguf contains: adapter, merged or base; None: merged, for ollama adapter.
        into: the weights that a merged model is merged into; see `merge`.

    Raises:
        UserError: the format does not support the adapter, or `out` exists.
        CheckFailed: the program's output differs from that of base and adapter; nothing is left.
    """
    out = Path(out)
    refuse_existing(out)
    run.require_language_model(f"export --to {to}")
    stored, part = _settled(to, kind, what)
    merged = "merged" in (to, part)
    if into == "dequantized" and not merged:
        raise UserError(f"--into {into}: only where a merged model is written: remove it")
    into, note = choose(run, into) if merged else ("base", cost_of_original(run))
    adapter, tokenizer, folder = run.adapter, run.processor, Path(run.pinned.folder)
    config = read_json(folder / "config.json")
    # `merge` checks the space that it needs itself.
    with new_folder(out, 2 * (adapter.folder / WEIGHTS).stat().st_size) as partial:
        if to == "portable":
            write_portable(adapter, partial)
            tokenizer.save_pretrained(str(partial))
        elif to == "mlx":
            write_mlx(adapter, config, partial)
        elif to == "merged":
            for file in merge(run, partial / "merged", into=into).out.iterdir():
                file.rename(partial / file.name)
            (partial / "merged").rmdir()
        elif to == "gguf":
            gguf.export_gguf(run, partial, stored, part, into)
        else:
            ollama.export_ollama(run, partial, stored, part, into)
        reference = _reference(run, into, alone=part == "base")
        got = _consumed(to, part, run, partial, reference)
        missing = "mlx-lm and mlx are not both installed: written, checked, not run here"
        figures, notes = None, [f"{missing}: pip install 'lora-kit[mlx]'"]
        if got:
            gemma = "gemma" in str(config.get("model_type"))
            # Only a merged model has this file.
            dtype = read_json(partial / RECORD).get("dtype", "float32")
            limits = _allowed(to, stored, dtype, gemma)
            figures, notes = _compared(out, reference, got, limits, to)
        if note and part != "base":
            notes.append(note)
        alone = (to, part) == ("gguf", "adapter")
        if alone and gguf.needs_untied(adapter, gguf.open_source(folder)):
            fitting = f"lora-kit export {run.path} --to gguf --what base --out FOLDER"
            notes.append(f"it changes one of two tied matrices: it fits the base of {fitting}")
        if to == "ollama":
            notes.append("Ollama itself is not run: its GGUF was, in llama.cpp, without Modelfile")
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return Exported(
        to=to,
        out=str(out),
        kind=stored,
        what=part,
        bytes_written=written,
        reloaded=figures,
        notes=notes,
    )


def _settled(to: str, kind: str | None, what: str | None) -> tuple[Any, Any]:
    """`kind` and `what` with the format's defaults. Raises UserError if they do not apply to it."""
    if to not in FORMS:
        raise UserError(f"--to {to}: unknown{nearest(to, list(FORMS))}: one of {', '.join(FORMS)}")
    for flag, value, known in (("--type", kind, gguf.Kind), ("--what", what, gguf.What)):
        if value is not None and to not in ("gguf", "ollama"):
            raise UserError(f"{flag} {value}: only for --to gguf and --to ollama: remove it")
        if value is not None and value not in get_args(known):
            raise UserError(f"{flag} {value}: one of {', '.join(get_args(known))}")
    if to not in ("gguf", "ollama"):
        return None, None
    llama_cpp.need_llama_cpp()
    what = what or ("merged" if to == "gguf" else "adapter")
    if (to, what) == ("gguf", "adapter"):
        if kind not in (None, "f32"):
            raise UserError(f"--type {kind}: an adapter alone stays f32, it is small: remove it")
        return "f32", what
    return kind or "f16", what


def _reference(run: FinishedRun, into: Into, alone: bool) -> Reference:
    """What the export must reproduce, in float32; `alone`: of the base without the adapter."""
    import torch
    from peft.helpers import rescale_adapter_scale

    tokenizer = run.processor
    exact = changed_base(run.base, dtype="float32", quantize="none")
    model = load_adapter(load_base(exact, run.pinned), run.adapter)
    if into == "dequantized":
        trained = load_adapter(load_base(run.base, run.pinned), run.adapter)
        for _, weight, rough in dequantized_weights(trained, model):
            weight.copy_(rough.to(weight))
    with_it, without = contextlib.nullcontext, model.disable_adapter
    asked, other = (without, with_it) if alone else (with_it, without)
    ends = end_tokens(model, tokenizer)
    spread = torch.randint(0, len(tokenizer), (48,), generator=torch.Generator().manual_seed(0))
    texts = [list(tokenizer(text)["input_ids"]) for text in reload.TEXTS]
    conversations = [reload.template_ids(tokenizer, m) for m in reload.CONVERSATIONS]
    prompts = [spread.tolist(), texts[0], *filter(None, conversations)]
    with asked():
        answers = [reload.continued(reload.torch_step(model), p, ends) for p in prompts]

    def along(prompt: list[int], answer: reload.Continued) -> torch.Tensor:
        """The log-probabilities along a continuation, (steps, vocabulary), at the model's current
        scale of the adapter."""
        ids = torch.tensor([[*prompt, *answer.tokens]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
        return logits[: len(answer.log_probabilities)].float().log_softmax(-1)

    with other(), torch.inference_mode():
        opposite = list(map(along, prompts, answers))
    pairs = zip(opposite, answers, strict=True)
    effect = max(float((rows - known.log_probabilities).abs().max()) for rows, known in pairs)
    if alone:
        return Reference(prompts, answers, opposite, 1.0, effect, texts, conversations, ends)
    with rescale_adapter_scale(model, 1 - LESS), torch.inference_mode():
        less = list(map(along, prompts, answers))
    return Reference(prompts, answers, less, LESS, effect, texts, conversations, ends)


def _consumed(
    to: str, what: str | None, run: FinishedRun, partial: Path, reference: Reference
) -> llama_cpp.Consumed | None:
    """The output of the export's program; None if the program does not run here."""
    if to == "merged":
        return reload.reloaded("transformers", partial, None, reference.prompts)
    if to in ("portable", "mlx"):
        consumer, ends = ("peft", None) if to == "portable" else ("mlx", reference.ends)
        return reload.reloaded(consumer, run.pinned.folder, partial, reference.prompts, ends)
    with tempfile.TemporaryDirectory(dir=partial) as folder:
        files = sorted(partial.glob("*.gguf"))  # of Ollama's two the adapter is the first
        adapters = files[:1] if what == "adapter" else []
        if files == adapters:
            files = [gguf.export_gguf(run, Path(folder), "f32", "base")]
        pairs = zip(reload.CONVERSATIONS, reference.conversations, strict=True)
        return llama_cpp.run(
            files[-1],
            adapters,
            prompts=reference.prompts,
            tokens=reload.TOKENS,
            top=reload.TOP,
            texts=reload.TEXTS,
            conversations=[turns for turns, ids in pairs if ids],
        )


def _allowed(to: str, kind: str | None, dtype: str, gemma: bool) -> tuple[float, float, float]:
    """The allowed difference of log-probabilities in nats and as a share of the adapter's effect,
    and the allowed error of the adapter's scale."""
    if to in ("portable", "merged"):
        rounded = {"float16": "f16", "bfloat16": "bf16"}.get(dtype, "f32")
        return SAME_ARITHMETIC, ROUNDED[rounded], SCALE[rounded]
    rough = ROUGH_GELU if gemma and to != "mlx" else (OTHER_ARITHMETIC, 0.0)
    return rough[0], max(rough[1], ROUNDED[kind or "f32"]), SCALE[kind or "f32"]


def _compared(
    out: Path,
    reference: Reference,
    got: llama_cpp.Consumed,
    limits: tuple[float, float, float],
    to: str,
) -> tuple[Figures, list[str]]:
    """Figures and notes; `limits`: of `_allowed`.

    Log-probabilities are compared up to the first token at which the program continues differently.
    `along` and `whole` are for `seen_scale`: the scale that explains all differences best.

    Raises:
        CheckFailed: log-probabilities or scale exceed the limits, or tokens differ.
    """
    import torch

    least, share, scale_allowed = limits
    allowed = max(least, share * reference.effect)
    worst, steps, along, whole, count = 0.0, 0, 0.0, 0.0, 0
    wrong: list[str] = []
    notes: list[str] = []
    for known, less, answer in zip(reference.answers, reference.less, got["answers"], strict=True):
        rows, tops = known.log_probabilities, answer["top"]
        for row, less_row, top in zip(rows, less, tops, strict=False):
            steps, count = steps + 1, count + len(top)
            ids = torch.tensor([int(n) for n in top])
            # llama.cpp has null for NaN.
            numbers = [math.nan if value is None else value for value in top.values()]
            values = torch.tensor(numbers, dtype=torch.float64)
            differences = values - row[ids].double()
            changes = (row[ids] - less_row[ids]).double()
            along += float(changes @ differences)
            whole += float(changes @ changes)
            largest = float(differences.abs().max())
            worst = max(worst, largest) if math.isfinite(largest) else math.inf
            chosen, expected = int(ids[values.argmax()]), int(row.argmax())
            if chosen != expected and not {chosen, expected} <= set(reference.ends):
                # Of two equally likely tokens either may be chosen; all later ones then differ.
                if not float(row[expected] - row[chosen]) <= allowed:
                    wrong.append(f"it says token {chosen} in place of {expected}")
                break
        else:  # the same tokens
            if (answer["stopped"], len(tops)) != (known.stopped, len(rows)):
                wrong.append("it does not stop where the answer ends")
    if not worst <= allowed:  # also for NaN
        at_most = f"allowed: {allowed:.2g}, the adapter's effect: {reference.effect:.2g}"
        wrong.insert(0, f"its log-probabilities differ by {worst:.2g} ({at_most})")
    scale, unsure = seen_scale(along, whole, reference.step, count, least)
    if not abs(1 - scale) <= max(scale_allowed, unsure):
        wrong.append(f"it acts as if the adapter's scale were {scale:.3f} times what it is")
    same = [c for c in got["conversations"] if c] == [c for c in reference.conversations if c]
    if got["texts"] != reference.texts:
        # If the chat template writes the BOS token, llama.cpp may treat a bare text differently.
        bare = to in ("gguf", "ollama") and same and any(reference.conversations)
        (notes if bare else wrong).append("it splits texts without a template into other tokens")
    # mlx-lm uses the base's tokenizer; template and end tokens can be set on its command line.
    fixable = notes if to == "mlx" else wrong
    if any(reference.conversations) and not same:
        fixable.append("it writes conversations by another template (mlx-lm: --chat-template)")
    if missing := sorted(set(reference.ends) - set(got.get("ends", reference.ends))):
        fixable.append(f"it does not stop at tokens {missing} (mlx-lm: --extra-eos-token)")
    if wrong:
        raise CheckFailed(f"{out}: not written: loaded again, {'; '.join(dict.fromkeys(wrong))}")
    figures = Figures(
        max_difference=worst,
        allowed=allowed,
        adapter_effect=reference.effect,
        scale=scale,
        tokens=steps,
    )
    return figures, notes
