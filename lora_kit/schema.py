"""The schema of a run file: every key with its type, default and meaning.

pydantic models: frozen, strict, unknown keys are errors. `adapter:` uses the field names of
`peft.LoraConfig`, `train:` those of `transformers.TrainingArguments` plus `max_length`; only fields
that this package reads are included. A task may add keys: `tasks.task.Task.settings` are classes
derived from these sections.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator

# A JSON object of a file (config.json, report.json, the lock), whose values are checked where they
# are read.
Json = dict[str, Any]
EMBEDDED = ("nano:topics", "nano:docstrings", "nano:instructions")
Path_ = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
# The columns of data.formats.
Column = Literal[
    "text", "label", "messages", "conversations", "tools", "system", "prompt", "completion",
    "instruction", "input", "context", "output", "response", "question", "answer", "tokens", "tags",
    "chosen", "rejected", "sentence1", "sentence2", "score",
]  # fmt: skip


class Section(BaseModel):
    """A part of a run file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Base(Section):
    """The model to adapt. Its weights are never changed."""

    model: str = Field(
        min_length=1,
        description="Hub id (owner/name), local folder, or `nano`, the embedded model.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the Hub; null: the newest, pinned in the lock."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Type of the frozen weights, and compute type of a quantized base."
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="nf4 (QLoRA: 4-bit NormalFloat, double quantization), int8, or none."
    )


class Adapter(Section):
    """LoRA, with the field names of `peft.LoraConfig`."""

    r: Positive = Field(16, description="Rank of the update B·A.")
    lora_alpha: Positive = Field(32, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability on the input of A; 0: off."
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="`all-linear` (without the head), a regular expression, or name endings.",
    )
    exclude_modules: str | list[str] | None = Field(
        None, description="Modules to skip: a regular expression or name endings; null: none."
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Indices of the layers to adapt, from 0; null: all."
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Other ranks by module name or regular expression."
    )
    alpha_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Other lora_alpha by module name or regular expression."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead.")
    use_dora: bool = Field(
        False, description="Train the magnitude of each output separately (DoRA)."
    )
    start: str | None = Field(
        None,
        description="Start from the adapter of this run or adapter folder, with its rank, scale "
        "and target modules. null: a new adapter.",
    )


class Source(Section):
    """A source with further settings."""

    source: Path_ = Field(description="A file, folder, glob or Hub data set (owner/name).")
    config: str | None = Field(None, description="Config of a data set; null: its default.")
    split: str = Field(
        "train", min_length=1, description="Split of a data set of the Hub, or of a folder of one."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set.")
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of the training tokens from this source."
    )


AnySource = Path_ | Source
Sources = AnySource | list[AnySource]


class Limits(Section):
    """Limits on lost and leaked rows beyond which a run stops; a share (0.05: 5%) or a number."""

    dropped: Share = Field(0.05, description="Share of dropped rows; 1: off.")
    truncated: Share = Field(0.05, description="Share of truncated rows; 1: off.")
    without_supervision: int = Field(0, ge=0, description="Samples without supervised tokens.")
    exact_leaks: int = Field(
        0, ge=0, description="Rows of data.eval or data.decontaminate that are training rows."
    )
    near_leaks: Share = Field(
        0.01, description="Share of those rows that are near duplicates of one; 1: off."
    )


class Data(Section):
    """Data: a file, folder, glob, Hub data set, `nano:topics|docstrings|instructions`, or
    a list of them. Paths are relative to the run file."""

    train: Sources = Field(description="Training data: a source or several.")
    eval: float | Sources = Field(
        0.1, description="Share of documents to hold out (0 < share < 1), or separate sources."
    )
    general: Sources | None = Field(
        None, description="General text, to measure forgetting (retention)."
    )
    replay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the training tokens from general text, against forgetting; null: "
        "none.",
    )
    decontaminate: Sources | None = Field(
        None, description="Benchmark files, of any columns, whose rows must not be training rows."
    )
    columns: dict[Column, str] = Field(
        default_factory=dict,
        description="Renames columns: {prompt: my_question, completion: my_answer}.",
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="Columns that are not read, such as an `image` that the text does not need.",
    )
    labels: str | list[str] | None = Field(
        None, description="Label names, or a .json or .txt file of them; null: any."
    )
    chat_template: Literal["chatml", "alpaca"] | None = Field(
        None, description="A shipped template for a base without one; null: the tokenizer's own."
    )
    supervise: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="Supervised tokens: all assistant turns, the last one, or everything.",
    )
    packing: Literal["none", "documents", "running"] | None = Field(
        None,
        description="none: one document per row; documents: several per row, isolated; running: "
        "concatenated text, cut into chunks. null: running for text, none for chat.",
    )
    group: str | None = Field(
        None, description="Column whose equal values stay in the same split; null: none."
    )
    limits: Limits = Limits()
    workers: Positive | None = Field(
        None, description="Processes that prepare data; same result. null: the cores, at most 8."
    )

    @field_validator("eval")
    @classmethod
    def _share(cls, value: float | Sources) -> float | Sources:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a held-out share must be between 0 and 1")
        return value


class Train(Section):
    """Training, with the field names of `transformers.TrainingArguments`, plus `max_length` and
    strategies."""

    trainable: Literal["adapter", "head"] = Field(
        "adapter",
        description="adapter: LoRA, and the new head if the task has one; head: only the new head, "
        "without LoRA.",
    )
    top_layers: Positive | None = Field(
        None,
        description="LoRA only in the top k layers: the layers below run without gradients. null: "
        "all layers.",
    )
    max_length: int = Field(512, ge=8, description="Most tokens per row; length of a chunk.")
    max_steps: Positive | None = Field(
        None, description="Optimizer steps; null: num_train_epochs decides."
    )
    num_train_epochs: float = Field(1.0, gt=0, description="Epochs, if max_steps is null.")
    per_device_train_batch_size: Positive = Field(8, description="Rows per micro-batch.")
    gradient_accumulation_steps: Positive = Field(1, description="Micro-batches per step.")
    per_device_eval_batch_size: Positive = Field(8, description="Rows per evaluation batch.")
    learning_rate: float = Field(
        2e-4, ge=0, description="Peak; about ten times that of full fine-tuning."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Learning rate schedule after the warm-up."
    )
    warmup_steps: float = Field(
        0.03, ge=0, description="Warm-up steps; below 1: a share of all steps; 0: none."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's weight decay of the adapter; 0: off."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping norm; 0: off.")
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"
    ] = Field("adamw_torch_fused", description="Optimizer; 8-bit and paged ones are bitsandbytes'.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay rate of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay rate of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the denominator.")
    # Renamed to activation_checkpointing in transformers 5.21; both names work until 6.
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, a third slower.",
    )
    logging_steps: Positive = Field(10, description="Steps between rows of metrics.jsonl.")
    eval_steps: Positive | None = Field(
        None,
        description="Steps between evaluations on held-out rows (eval_loss); the checkpoint with "
        "the lowest is kept. null: only at the end.",
    )
    early_stopping_patience: Positive | None = Field(
        None, description="Evaluations without a lower eval_loss before early stopping; null: off."
    )
    load_best_model_at_end: bool = Field(
        True, description="With eval_steps: save the adapter of the lowest eval_loss, not the last."
    )
    save_steps: Positive = Field(500, description="Steps between checkpoints.")
    save_total_limit: Positive = Field(2, description="Checkpoints kept, besides the best.")
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        default_factory=list,
        description="Trackers that also receive the values of metrics.jsonl; []: none.",
    )
    dataloader_num_workers: int = Field(0, ge=0, description="Data loader processes; 0: none.")
    ddp_timeout: Positive = Field(
        600, description="Seconds that a process waits for another one before all stop."
    )

    @field_validator("early_stopping_patience")
    @classmethod
    def _needs_eval_steps(cls, value: int | None, info: ValidationInfo) -> int | None:
        # An invalid eval_steps is missing in `data`, and reported itself.
        if value and info.data.get("eval_steps", 0) is None:
            raise ValueError("it counts evaluations: set train.eval_steps")
        return value

    @field_validator("top_layers")
    @classmethod
    def _needs_adapter(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and info.data.get("trainable") == "head":
            raise ValueError("conflicts with train.trainable: head: remove one of the two")
        return value


class Gate(Section):
    """Conditions for a run to pass; null: not checked."""

    domain: Literal["better", "no different"] | None = Field(
        "better", description="Minimal verdict on the domain."
    )
    scores: Literal["not worse"] | None = Field(
        "not worse", description="The verdict on every other score that was measured."
    )
    general: Literal["kept"] | None = Field(
        "kept",
        description="The verdict on general text, which needs data.general; null where there is "
        "none. Not asked for where the model has no language-model head.",
    )
    few_shot: Literal["better", "no different"] | None = Field(
        None, description="Minimal verdict against the base with prove.shots examples."
    )
    loss: float | None = Field(
        None, gt=0, description="Largest loss of the adapted model on the domain, in nats a token."
    )
    metrics: dict[str, float] = Field(
        default_factory=dict,
        description="Bounds on the adapted model's scores, such as {exact_match: 0.8}: lower "
        "bounds, or upper bounds for scores where lower is better.",
    )


class Prove(Section):
    """Comparison of base and adapter, after training and by `lora-kit compare`."""

    shots: int = Field(
        3,
        ge=0,
        description="Few-shot baseline: training rows in the prompt of the base, before each "
        "held-out row. 0: off.",
    )
    metrics: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Metrics of generated completions: exact_match, f1, accuracy, rouge_l, or a "
        "metric of the evaluate library by name or path, whose code runs here. classify: accuracy, "
        "macro_f1; dpo: accuracy, margin. The first one decides the verdict. []: the task's first "
        "score does.",
    )
    answers: Positive = Field(200, description="Most held-out rows to generate completions for.")
    budget: float | None = Field(
        0.25,
        gt=0,
        description="Evaluated tokens of all contenders, each counted a half, as a share of the "
        "tokens trained on: a random sample of at least 20 held-out documents or rows. null: all.",
    )
    harness: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Tasks of lm-evaluation-harness, by name or .yaml file, which may name code "
        "that runs here; []: none.",
    )
    gate: Gate | None = Field(
        None, description="Conditions; if one fails, `train` and `compare` exit with 1. null: none."
    )


class Ship(Section):
    """Deployment."""

    target: Literal["vllm", "sglang", "llama.cpp", "ollama", "mlx", "transformers"] | None = Field(
        None, description="Runtime to check settings for, before training; null: none."
    )


class Run(Section):
    """One run: everything that its result depends on."""

    recipe: str = Field(description="A shipped recipe by name, or a path to a recipe (.py).")
    name: str = Field(
        max_length=200,
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$",
        description="The run is written to runs/<name>. Letters, digits, `_`, `-`, `.` (not "
        "first), and `/` for subfolders.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of adapter, split and row order.")
    base: Base
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    prove: Prove = Prove()
    ship: Ship = Ship()
    speed: Literal["auto", "plain"] = Field(
        "auto",
        description="auto: fast paths, each compared with the standard path on the model before it "
        "is used, and a batch and recomputation that fit into memory; plain: the standard path of "
        "transformers and PEFT, with the batch as written.",
    )
    # Absolute paths that are relative in the run file; set by `run.load_run`.
    _relative: frozenset[str] = PrivateAttr(frozenset())

    def written(self, path: str, folder: Path) -> str:
        """A path for a file in `folder`: relative if it is relative in the user's run file, so that
        a moved project still works; else unchanged."""
        if path not in self._relative:
            return path
        relative = os.path.relpath(path, folder.resolve())
        # `folder/name` could be a Hub id.
        return relative if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)

    @property
    def directory(self) -> Path:
        """The run directory, relative to the working folder."""
        return Path("runs") / self.name


SECTIONS: dict[str, type[Section]] = {
    "base": Base,
    "adapter": Adapter,
    "data": Data,
    "train": Train,
    "prove": Prove,
    "ship": Ship,
}
