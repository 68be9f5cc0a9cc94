"""A pinned base -> a tokenizer and a frozen model, optionally quantized, on this rank's device."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lora_kit.base.pin import Pinned, check_sizes
from lora_kit.base.tensors import stored_in
from lora_kit.errors import LoraKitError, UserError, is_panic, out_of_memory, reason_of
from lora_kit.schema import Base, Json
from lora_kit.trust import no_kernels_from_the_hub, read_json

if TYPE_CHECKING:
    import torch
    from tokenizers.normalizers import Normalizer
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from lora_kit.base.pooled import PooledClassifier

    Model: TypeAlias = PreTrainedModel | PooledClassifier

# Largest change of logits due to rounding (such as of batched experts in bfloat16), relative to
# their standard deviation; an encoder with random weights changes them by 0.012, a trained one by
# more than 1.
_ROUNDING = 5e-3
_PROBE = "Aa 1.\n\u00e9"  # a broken tokenizer may only fail when it is used
_LARGEST_GROWTH, _MOST_ADDED = 4096, 65_536
_SMALL, _BYTES_PER_TOKEN = 2**21, 512  # of a tokenizer.json; Gemma's has 127 a token
# Parts of keys of config.json, and the largest value of such a key: each layer takes time to build.
LARGEST_COUNTS = {"layers": 1000, "n_layer": 1000, "experts": 4096, "heads": 4096, "labels": 2**17}
# Types of the keys that are read here.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), (int, float)),
    **dict.fromkeys(("text_config", "rope_parameters", "rope_scaling"), (dict,)),
    "factor": (int, float),
}


def quiet_libraries() -> None:
    """Silence library messages that a user cannot act on."""
    import warnings

    no_kernels_from_the_hub()
    # bitsandbytes looks for an optional kernel package on every CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed logs to stdout, from which `--json` is read; it sets its level when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message=".*MatMul8bitLt: inputs will be cast.*")
    # transformers renamed it; PEFT 0.21 and our key use the old name, which works until 6.
    old_name = ".*gradient_checkpointing.*is deprecated.*"
    warnings.filterwarnings("ignore", message=old_name, category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def gpu_is_used() -> bool:
    """Whether this process uses a GPU: there is one, and accelerate does not use the CPU."""
    import torch

    return torch.cuda.is_available() and not _accelerate_uses("CPU")


def to_gpu(model: torch.nn.Module, base: Base) -> None:
    """Move a model to the GPU, if this process uses one; quantized ones are loaded there."""
    if gpu_is_used() and base.quantize == "none":
        model.to("cuda")


def base_is_sharded() -> bool:
    """Whether accelerate was told to divide the base among the processes: FSDP or DeepSpeed."""
    return _accelerate_uses("FSDP") or _accelerate_uses("DEEPSPEED")


def _accelerate_uses(what: Literal["CPU", "FSDP", "DEEPSPEED"]) -> bool:
    """Whether accelerate was told to use it."""
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env(f"ACCELERATE_USE_{what}"))


def load_tokenizer(
    folder: str | Path, generates: bool = True, base: Path | None = None
) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a base, with a padding token and right padding.

    Args:
        folder: of the base, or of an adapter that has a tokenizer.
        generates: the model generates text, so an end-of-text token is required.
        base: the folder of the base, if `folder` is an adapter's.

    Raises:
        UserError: there is none, or it has more tokens than the base has embeddings.
    """
    from transformers import AutoTokenizer

    check_sizes(Path(folder))
    stored = Path(folder) / "tokenizer.json"
    content = stored.read_bytes() if stored.is_file() else b""
    added = content.count(b'"single_word"')
    if added > _MOST_ADDED:  # adding a token takes 50 us
        raise UserError(f"base.model: {stored}: {added:,} added tokens: use another base")
    rows = embedding_rows(base or Path(folder))
    if rows is not None and len(content) > _SMALL + _BYTES_PER_TOKEN * rows:
        raise UserError(f"base.model: {stored}: too large for a base of {rows:,} embeddings")
    try:
        # Without trust_remote_code, transformers asks at the terminal whether to run code.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if tokenizer.is_fast:
            _check_normalizer(tokenizer.backend_tokenizer.normalizer)
            tokenizer(_PROBE)
    except BaseException as error:  # parsers raise anything on a corrupt file
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise unusable(folder, "no usable tokenizer", error) from None
    if not tokenizer.is_fast:
        raise UserError(f"base.model: {folder}: no fast tokenizer: a tokenizer.json is required")
    if tokenizer.eos_token is None and (generates or tokenizer.pad_token is None):
        missing = "end-of-text token (eos_token)" if generates else "padding token (pad_token)"
        raise UserError(
            f"base.model: {folder}: the tokenizer has no {missing}: "
            "name one in its tokenizer_config.json"
        )
    embeddings = embedding_rows(Path(folder))
    if embeddings is not None and len(tokenizer) > embeddings:
        raise UserError(
            f"base.model: {folder}: the tokenizer has {len(tokenizer)} tokens, "
            f"the base {embeddings} embeddings: use the tokenizer of this base"
        )
    if tokenizer.pad_token is None:
        # Any token will do: labels and attention ignore padding by position.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _check_normalizer(normalizer: Normalizer | None) -> None:
    """Raises ValueError if a tokenizer's normalizer can make a text more than 4,096 times longer:
    by replacing parts by longer ones, repeatedly."""
    parts = [json.loads(normalizer.__getstate__())] if normalizer is not None else []
    growth = 1.0
    while parts:
        part = parts.pop()
        parts += part.get("normalizers", [])
        pattern, content = part.get("pattern") or {}, part.get("content") or ""
        if "String" in pattern:
            growth *= max(1.0, len(content) / max(1, len(pattern["String"])))
        elif pattern:  # a regular expression can match between any two characters
            growth *= 1 + len(content)
        if max(growth, len(part.get("prepend", ""))) > _LARGEST_GROWTH:
            raise ValueError("its normalizer makes texts thousands of times longer")


def embedding_rows(folder: Path) -> int | None:
    """The vocabulary size in the base's config; None if there is no config."""
    if not (folder / "config.json").is_file():  # a tokenizer in an adapter's folder
        return None
    config = _config(folder)
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def positions(folder: Path) -> int:
    """The tokens that a base has positions for, by its config; 0 if it does not say."""
    config = _config(folder)
    config = config.get("text_config") or config
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stated = config.get("max_position_embeddings") or config.get("n_positions") or 0
    # The factor extends the positions of pre-training. `stated` are those, or (Llama 3.1) already
    # the extended ones.
    original = scaling.get("original_max_position_embeddings") or stated
    return max(stated, int(original * scaling.get("factor", 1)))


def check_length(pinned: Pinned, max_length: int) -> None:
    """Raises UserError if `max_length` exceeds the positions of the base."""
    most = positions(Path(pinned.folder))
    if 0 < most < max_length:
        raise UserError(
            f"train.max_length: {max_length} is too long: {pinned.model} has {most} "
            f"positions: use at most {most}"
        )


def _config(folder: Path) -> Json:
    """config.json. Raises UserError if it is not a JSON object, has more layers than any model, or
    names a compiled attention kernel of the Hub."""
    file = folder / "config.json"
    try:
        config = read_json(file)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"base.model: {file}: not a JSON object: download the base again")
    objects = [config]
    while objects:
        for key, value in objects.pop().items():
            if isinstance(value, dict):
                objects.append(value)
            if key.endswith("_implementation") and "/" in json.dumps(value):
                raise UserError(f"base.model: {folder}: config.json: {key} names code: remove it")
            kinds = _KINDS.get(key)
            if kinds and value is not None and not isinstance(value, kinds):
                raise UserError(f"base.model: {file}: {key}: invalid: download the base again")
            most = next((most for part, most in LARGEST_COUNTS.items() if part in key), None)
            if most and isinstance(value, (int, float)) and value > most:
                raise UserError(
                    f"base.model: {file}: {key}: {value!s:.20} is too large (most: {most:,}): use "
                    "another base"
                )
    return config


def unquantized_config(folder: Path) -> Json:
    """config.json. Raises UserError if it is invalid, the weights are already quantized, or files
    point outside of the folder or to code."""
    try:
        stored_in(folder)
    except UserError as error:
        raise UserError(f"base.model: {error}") from None
    config = _config(folder)
    stored = config.get("quantization_config")
    if stored:
        method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else "unknown"
        raise UserError(
            f"base.model: {folder}: its weights are already quantized ({method}): name the "
            "original model, and choose base.quantize"
        )
    return config


def unusable(folder: str | Path, what: str, error: BaseException) -> LoraKitError:
    """The error for a base that a library cannot load: `what` is wrong, and why."""
    if isinstance(error, LoraKitError):
        return error  # for instance a signal
    if out_of_memory(error):
        raise error  # it says nothing about the base
    reason = reason_of(error, most=240)
    kinds = re.search(r"configuration class <class '.*\.(\w+)'> .*: (AutoModel\w*)\.", reason)
    if kinds:
        reason = f"transformers has no {kinds[2]} for {kinds[1]}: use another base"
    if "trust_remote_code" in reason:
        reason = "needs remote code (auto_map), which is never run: use another base"
    return UserError(f"base.model: {folder}: {what}: {reason}")


def load_base(base: Base, pinned: Pinned, quantize: str | None = None) -> PreTrainedModel:
    """Load the base as a causal language model, every parameter frozen.

    Args:
        base: dtype and quantization; NF4 uses double quantization and computes in `dtype` (QLoRA,
            Dettmers et al. 2023, arXiv:2305.14314), int8 is LLM.int8() (arXiv:2208.07339).
        quantize: overrides the run's setting, for instance `none` for a merge.

    Returns:
        A transformers model on this rank's device, in evaluation mode. Do not call `to` on a
        quantized one.

    Raises:
        UserError: the architecture is unknown, a weight is missing or corrupt, or the weights are
            already quantized.
    """
    from transformers import AutoModelForCausalLM

    unquantized_config(Path(pinned.folder))
    model, missing = from_files(AutoModelForCausalLM, base, pinned, quantize)
    check_whole(pinned.folder, missing)
    freeze(model)
    return model


def freeze(model: torch.nn.Module) -> None:
    """Set evaluation mode, and freeze all parameters."""
    model.requires_grad_(False)
    modules: Iterator[Any] = model.modules()
    for module in modules:
        # In evaluation mode bitsandbytes 0.50 permanently repacks 4-bit weights for AVX512-BF16.
        # That product has no gradient, so training after an evaluation would silently not train
        # the layers below; it also needs row counts divisible by 32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.eval()


def base_on_meta(base: Base, folder: str | Path) -> PreTrainedModel:
    """The base in this folder on torch's meta device: no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, base.dtype))
    model.config.pad_token_id = None  # some architectures inspect the input for padding
    return model


def from_files(
    auto: type[_BaseAutoModelClass],
    base: Base,
    pinned: Pinned,
    quantize: str | None,
    unquantized: Sequence[str] | None = None,
    **options: object,
) -> tuple[PreTrainedModel, list[str]]:
    """A transformers model, and the names of parameters that its files lack or have in another
    shape: these are newly initialised.

    Args:
        auto: its auto class.
        base, quantize: as in `load_base`.
        unquantized: modules that are not quantized; None: transformers' default.
        options: further arguments of `from_pretrained`.
    """
    import torch

    dtype = getattr(torch, base.dtype)
    quantize = base.quantize if quantize is None else quantize
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, dtype, unquantized)
        # bitsandbytes' weights cannot be moved after quantization: load them in place.
        if gpu_is_used():
            options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        model, info = auto.from_pretrained(
            pinned.folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # parsers raise anything; safetensors' own error is a bare Exception
        raise unusable(pinned.folder, "cannot be loaded", error) from None
    return model, sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})


def check_whole(folder: str, missing: list[str]) -> None:
    """Raises UserError if weights are missing, which transformers would initialise randomly with
    only a warning."""
    if missing:
        raise UserError(
            f"base.model: {folder}: weights are missing: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + ": download the base again, or use another"
        )


def check_causal(model: Model, pinned: Pinned) -> None:
    """Check that no token changes the logits of earlier positions: encoders also load as causal
    language models (RoBERTa as RobertaForCausalLM), and would see the tokens that they predict.

    Costs one forward pass of eight tokens; uses no random numbers.

    Raises:
        UserError: earlier logits change with the last token.
    """
    import torch

    if any(p.numel() == 0 or p.is_meta for p in model.parameters()):
        return  # sharded: the rank that has the weights checks
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(4, device=model.device) + vocabulary // 2).repeat(2, 1)
    ids[1, -1] = vocabulary // 3
    with torch.no_grad():
        # One batch, so that batch-dependent arithmetic (int8 outliers) is the same for both.
        logits = model(input_ids=ids).logits[:, :-1].float()
    moved = (logits[0] - logits[1]).abs().max().item()
    if moved > _ROUNDING * logits.std().item():
        raise UserError(
            f"base.model: {pinned.model}: {type(model).__name__} is not causal: the last token "
            "changes earlier predictions, as in an encoder; use a decoder, or recipe: classify"
        )


def _quantization(
    kind: str, dtype: torch.dtype, unquantized: Sequence[str] | None
) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    # For None transformers skips the module of the last parameter, which for a head with a bias
    # is the bias, so its matrix would be quantized.
    skipped = None if unquantized is None else list(unquantized)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
        # FSDP shards tensors of a single floating dtype: store the packed 4-bit values in it.
        bnb_4bit_quant_storage=dtype if _accelerate_uses("FSDP") else None,
    )
