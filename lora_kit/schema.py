"""The schema of a run: every key, its type, its default and what it means.

pydantic's, frozen and strict, unknown keys refused. `adapter:` uses the field names of
`peft.LoraConfig`, `train:` those of `transformers.TrainingArguments` plus `max_length`; only fields
that this package reads are here. A task may add keys of its own: `tasks.task.Task.settings` are
classes derived from these sections.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)

EMBEDDED = ("nano:topics", "nano:docstrings", "nano:instructions")
Path_ = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
# The columns that data.formats knows.
Column = Literal[
    "text", "label", "messages", "conversations", "tools", "system", "prompt", "completion",
    "instruction", "input", "context", "output", "response", "question", "answer", "tokens", "tags",
    "chosen", "rejected", "sentence1", "sentence2", "score",
]  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Base(Section):
    """The model that is adapted. Its weights are never changed."""

    model: str = Field(
        min_length=1,
        description="Hub id (owner/name), local folder, or `nano`, the embedded model.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the Hub; null: the newest, pinned in the lock."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Type of the frozen weights, and of computing on a quantized base."
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="QLoRA: nf4 (4-bit NormalFloat, double quantization) or int8; or none."
    )


class Adapter(Section):
    """LoRA, in the spelling of `peft.LoraConfig`."""

    r: Positive = Field(16, description="Rank of the update B·A.")
    lora_alpha: Positive = Field(32, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of inputs of A dropped; 0: off."
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="`all-linear` (without the head), a regular expression, or name endings.",
    )
    exclude_modules: str | list[str] | None = Field(
        None, description="Modules left out, as a regular expression or name endings; null: none."
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Numbers of the layers to adapt, from 0; null: all."
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Other ranks by module name or regular expression."
    )
    alpha_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Other lora_alpha by module name or regular expression."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead.")
    use_dora: bool = Field(False, description="Learn the magnitude of each output apart (DoRA).")
    start: str | None = Field(
        None,
        description="Begin from the adapter of this run or adapter folder; its rank, scale and "
        "target modules are taken over. null: a fresh adapter.",
    )


class Source(Section):
    """A source with more to say than where it is."""

    source: Path_ = Field(description="A file, folder, glob or Hub data set (owner/name).")
    config: str | None = Field(None, description="Of a Hub set; null: its default one.")
    split: str = Field("train", min_length=1, description="Of a Hub set.")
    revision: str | None = Field(None, description="Of a Hub set: branch, tag or commit.")
    fraction: float | None = Field(
        None, gt=0, lt=1, description="The share of the tokens trained on that come from here."
    )


AnySource = Path_ | Source
Sources = AnySource | list[AnySource]


class Limits(Section):
    """What a run may lose before it is stopped; a share of rows (0.05: 5%) or a number."""

    dropped: Share = Field(0.05, description="Share of rows left out; 1: off.")
    truncated: Share = Field(0.05, description="Share of conversations cut short; 1: off.")
    without_supervision: int = Field(0, ge=0, description="Samples with nothing to learn from.")
    exact_leaks: int = Field(
        0, ge=0, description="Rows of data.eval or data.decontaminate that are training rows too."
    )
    near_leaks: Share = Field(
        0.01, description="Share of those rows that are nearly a training row; 1: off."
    )


class Data(Section):
    """Rows in: a file, a folder, a glob, a Hub data set, `nano:topics|docstrings|instructions`, or
    a list of them. Paths are relative to the run file."""

    train: Sources = Field(description="What to learn from: a source or several.")
    eval: float | Sources = Field(
        0.1, description="The share of documents held out (0 < share < 1), or sources of its own."
    )
    general: Sources | None = Field(
        None, description="General text that should not be forgotten; measured beside the domain."
    )
    replay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The share of the tokens trained on that are general text, against forgetting; "
        "null: none.",
    )
    decontaminate: Sources | None = Field(
        None,
        description="Benchmark files of any columns whose rows must not be in the training rows.",
    )
    columns: dict[Column, str] = Field(
        default_factory=dict,
        description="Renames columns: {prompt: my_question, completion: my_answer}.",
    )
    labels: str | list[str] | None = Field(
        None, description="The names of the labels, or a .json or .txt file of them; null: any."
    )
    chat_template: Literal["chatml", "alpaca"] | None = Field(
        None, description="A shipped template for a base that has none; null: the tokenizer's own."
    )
    supervise: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="Learn from the assistant's turns, from its last one, or from all there is.",
    )
    packing: Literal["none", "documents", "running"] | None = Field(
        None,
        description="none: a document a row; documents: several, kept apart; running: one stream "
        "of text, cut. null: running for text, none for chat.",
    )
    group: str | None = Field(
        None, description="The column whose equal values stay on one side of the split; null: none."
    )
    limits: Limits = Limits()
    workers: Positive | None = Field(
        None, description="Processes that prepare; changes no result. null: the cores, 8 at most."
    )

    @field_validator("eval")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a share held out lies between 0 and 1")
        return value


class Train(Section):
    """The trainer, in the spelling of `transformers.TrainingArguments`, plus `max_length` and what
    trains."""

    trainable: Literal["adapter", "head"] = Field(
        "adapter",
        description="adapter: LoRA, and the new head of a task that has one; head: the new head "
        "alone, without LoRA.",
    )
    top_layers: Positive | None = Field(
        None,
        description="Put LoRA in the k highest layers only: the ones below run without gradients. "
        "null: in all.",
    )
    max_length: int = Field(512, ge=8, description="Tokens a row at most; the length of a chunk.")
    max_steps: Positive | None = Field(
        None, description="Optimizer steps; null: as many as num_train_epochs needs."
    )
    num_train_epochs: float = Field(
        1.0, gt=0, description="Passes over the data without max_steps."
    )
    per_device_train_batch_size: Positive = Field(8, description="Rows in one forward pass.")
    gradient_accumulation_steps: Positive = Field(1, description="Forward passes in one step.")
    per_device_eval_batch_size: Positive = Field(8, description="Rows in a pass of eval_steps.")
    learning_rate: float = Field(
        2e-4, ge=0, description="Peak; about ten times that of full tuning."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate goes after the warm-up."
    )
    warmup_steps: float = Field(
        0.03, ge=0, description="Steps of warm-up; below 1: as a share of all steps; 0: none."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of the adapter; 0: off.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm here; 0: off.")
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"
    ] = Field("adamw_torch_fused", description="8-bit and paged ones are bitsandbytes'.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the mean of squares.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the root of squares.")
    # Called activation_checkpointing from transformers 5.21 on; both names are taken until 6.
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, a third slower.",
    )
    logging_steps: Positive = Field(10, description="Steps between rows of metrics.jsonl.")
    eval_steps: Positive | None = Field(
        None,
        description="Steps between losses on held-out rows (eval_loss); the checkpoint of the "
        "lowest is kept. null: at the end only.",
    )
    early_stopping_patience: Positive | None = Field(
        None,
        description="Evaluations without a lower eval_loss before the run stops; null: it goes on.",
    )
    load_best_model_at_end: bool = Field(
        True, description="With eval_steps: save the adapter of the lowest eval_loss, not the last."
    )
    save_steps: Positive = Field(500, description="Steps between checkpoints.")
    save_total_limit: Positive = Field(2, description="Checkpoints kept, besides the best.")
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        default_factory=list,
        description="Who is told the figures of metrics.jsonl as well; []: nobody.",
    )
    dataloader_num_workers: int = Field(0, ge=0, description="Processes that collate; 0: none.")

    @field_validator("early_stopping_patience")
    @classmethod
    def _counts_evaluations(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("eval_steps", 0) is None:
            raise ValueError("it counts evaluations: set train.eval_steps")
        return value

    @field_validator("top_layers")
    @classmethod
    def _holds_lora(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("trainable") == "head":
            raise ValueError("train.trainable: head trains no layer: leave one of the two out")
        return value


class Gate(Section):
    """What must hold for a run to count as done; each null: not asked for."""

    domain: Literal["better", "no different"] | None = Field(
        "better", description="The verdict on the domain, at least."
    )
    general: Literal["kept"] | None = Field(
        "kept",
        description="The verdict on general text, which needs data.general; null where there is "
        "none. Not asked for where the model has no language-model head.",
    )
    few_shot: Literal["better", "no different"] | None = Field(
        None, description="The verdict against the base with prove.shots examples, at least."
    )
    loss: float | None = Field(
        None, gt=0, description="The adapted model's loss on the domain at most, in nats per token."
    )
    metrics: dict[str, float] = Field(
        default_factory=dict,
        description="Bounds of the adapted model's scores, by name: {exact_match: 0.8}: at least, "
        "and at most where lower is better.",
    )


class Prove(Section):
    """How base and adapter are compared, after the training and by `lora-kit compare`."""

    shots: int = Field(
        3,
        ge=0,
        description="Training rows put before each held-out one, for the base without the adapter: "
        "what examples in the prompt would have bought. 0: off.",
    )
    metrics: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Scores of the answers that are generated: exact_match, f1, accuracy, rouge_l, "
        "or a metric of the evaluate library by name or path, whose code runs here. classify: "
        "accuracy, macro_f1; dpo: accuracy, margin. The first one decides. []: the first of the "
        "task's own scores does.",
    )
    answers: Positive = Field(
        200, description="Held-out rows that are answered for the metrics, at most."
    )
    harness: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Tasks of lm-evaluation-harness, by name or as a .yaml, which may name code "
        "that runs here; []: none.",
    )
    gate: Gate | None = Field(
        None, description="What must hold, else `train` and `compare` end with 1; null: nothing."
    )


class Ship(Section):
    """Where the adapter will be served."""

    target: Literal["vllm", "sglang", "llama.cpp", "ollama", "mlx", "transformers"] | None = Field(
        None, description="Checked before training: settings it would refuse or misread; null: no."
    )


class Run(Section):
    """One run: everything that decides its result."""

    recipe: str = Field(description="A shipped recipe by name, or a path to a recipe (.py).")
    name: str = Field(
        max_length=200,
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$",
        description="The run is written to runs/<name>. Letters, digits, `_`, `-`, `.` (not as the "
        "first), and `/` for a folder in between.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the adapter, the split and the row order.")
    base: Base
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    prove: Prove = Prove()
    ship: Ship = Ship()
    speed: Literal["auto", "plain"] = Field(
        "auto",
        description="auto: quicker ways to the same numbers, each tried on the model before it is "
        "used, and the batch and recomputation that fit the memory; plain: transformers' and "
        "PEFT's own way, with the batch as it stands here.",
    )
    # Absolute paths of this run that its file names relative to itself. `run.load_run` fills it.
    _relative: frozenset[str] = PrivateAttr(frozenset())

    def written(self, path: str, folder: Path) -> str:
        """A path as a file in `folder` names it: relative to the folder if the user's run file has
        it relative, else unchanged. So a project that was moved as a whole still works.
        """
        if path not in self._relative:
            return path
        relative = os.path.relpath(path, folder.resolve())
        # `folder/name` alone could be an id on the Hub.
        return relative if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)

    @property
    def directory(self) -> Path:
        """Where the run is written, below the working folder."""
        return Path("runs") / self.name


SECTIONS: dict[str, type[Section]] = {
    "base": Base,
    "adapter": Adapter,
    "data": Data,
    "train": Train,
    "prove": Prove,
    "ship": Ship,
}
