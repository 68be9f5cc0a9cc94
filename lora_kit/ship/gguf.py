"""GGUF, llama.cpp's format: a model folder or a LoRA adapter, tensor by tensor, as one file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Which metadata an architecture
reads is documented only in llama.cpp's src/models/*.cpp. Settings that llama.cpp does not support
are rejected here, because it would ignore them silently.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_kit.adapter.files import Adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.portable import check_portable
from lora_kit.base.load import load_tokenizer
from lora_kit.base.tensors import Stored, stored_in
from lora_kit.errors import UserError
from lora_kit.run import read_json
from lora_kit.schema import Json
from lora_kit.ship.gguf_tokenizer import add_tokenizer
from lora_kit.ship.llama_cpp import WRITTEN_BY
from lora_kit.ship.merge import Into, generation, merge
from lora_kit.tasks.task import Processor

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from gguf.tensor_mapping import TensorNameMap

Kind = Literal["f32", "f16", "bf16", "q8_0"]
What = Literal["adapter", "merged", "base"]
# transformers' model_type -> llama.cpp's architecture.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
}
_NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_Q8_BLOCK = 32  # values that share a scale, along a row
# Architectures for which llama.cpp has no head other than the embeddings.
_ALWAYS_TIED = ("gemma", "gemma2")


@dataclass(frozen=True)
class GgufSource:
    """A model folder, as llama.cpp sees it.

    Attributes:
        config: of the text model, with transformers' defaults.
        architecture: llama.cpp's name.
        tied: embeddings and head share a matrix.
        names: gguf's map from names in the files to names in GGUF; see `name`.
    """

    folder: Path
    config: Json
    architecture: str
    tied: bool

    @cached_property
    def names(self) -> TensorNameMap:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(kinds[self.architecture], self.config["num_hidden_layers"])

    def name(self, name: str) -> str | None:
        """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight; None: no such tensor."""
        name = name.replace("model.language_model.", "model.").removeprefix("language_model.")
        return self.names.get_name(name, try_suffixes=(".weight", ".bias"))

    @property
    def context(self) -> int:
        """The context length in tokens; at most the sliding window where llama.cpp would ignore it:
        it has one for Gemma only."""
        most, window = self.config["max_position_embeddings"], self.config.get("sliding_window")
        return most if "gemma" in self.architecture or not window else min(most, window)

    def heads_permuted(self, name: str) -> int:
        """The number of heads whose rows llama.cpp has in another order; 0: the same order."""
        if self.architecture != "llama":
            return 0
        heads, of_keys = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        return {"attn_q": heads, "attn_k": of_keys}.get(name.split(".")[-2], 0)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """RoPE rotates pairs of rows: transformers pairs row i of a head with i + half, llama.cpp's
    `llama` neighbouring rows. (heads · d, ...) -> the same shape, in the order 0, half, 1, half+1
    ... within each head."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def open_source(folder: Path) -> GgufSource:
    """Read config.json, and reject a model that llama.cpp would compute differently.

    Raises:
        UserError: not a dense Llama, Mistral, Qwen2, Qwen3 or Gemma, or with settings that its
            llama.cpp architecture does not support.
    """
    from transformers import AutoConfig

    whole = read_json(folder / "config.json")
    stated = {**whole, **(whole.get("text_config") or {})}
    if (kind := str(whole.get("model_type"))) not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"{folder}: {kind!r} is not written as GGUF: one of {known}")
    if missing := [key for key in _NUMBERS if type(stated.get(key)) is not int]:
        raise UserError(f"{folder}: config.json has no {', '.join(missing)}: copy the model again")
    ropes = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    for rope in (ropes, *(inner for inner in ropes.values() if isinstance(inner, dict))):
        form = rope.get("rope_type") or rope.get("type") or "default"
        if form not in ("default", "linear", "llama3"):
            raise UserError(f"{folder}: llama.cpp: no rope_type {form}: export it with --to merged")
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = loaded.get_text_config().to_dict()
    # Qwen2's config has no head_dim.
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    architecture = _ARCHITECTURES[kind]
    source = GgufSource(folder, config, architecture, config["tie_word_embeddings"])
    if problems := list(_unknown_to_llama_cpp(source)):
        raise UserError(
            f"{folder}: llama.cpp's {architecture} does not compute {'; nor '.join(problems)}: "
            "export it with --to merged"
        )
    return source


def _unknown_to_llama_cpp(source: GgufSource) -> Iterator[str]:
    """Settings that the architecture in llama.cpp does not support."""
    config, architecture = source.config, source.architecture
    activation = config.get("hidden_activation") or config.get("hidden_act")
    gemma = architecture.startswith("gemma")
    if activation not in (("gelu_pytorch_tanh", "gelu", None) if gemma else ("silu",)):
        yield f"hidden_act {activation}"
    if architecture in ("gemma2", "gemma3"):
        # llama.cpp recognises the 27B models by their number of layers; their scale differs.
        large = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]
        scale = config.get("query_pre_attn_scalar", 256)
        of_large = config["hidden_size"] // config["num_attention_heads"]
        if scale != (of_large if large else config["head_dim"]):
            yield f"query_pre_attn_scalar {scale}"
    if source.architecture in _ALWAYS_TIED and not source.tied:
        yield "a head of its own"


def _ropes(source: GgufSource) -> dict[str, Json]:
    """The settings of RoPE: {"full_attention": ..., and for Gemma 3 "sliding_attention": ...}"""
    ropes = source.config["rope_parameters"]
    return ropes if "full_attention" in ropes else {"full_attention": ropes}


def write_model(
    folder: Path, file: Path, kind: Kind, *, untie: bool = False, tokenizer: Processor = None
) -> None:
    """Write a model folder (config.json, safetensors, tokenizer) as one GGUF.

    Weights are read and converted one by one; those with one dimension stay float32, as llama.cpp
    requires.

    Args:
        kind: q8_0 stores blocks of 32 values with one scale; rows whose length is not a multiple of
            32 are stored as f16, which is reported on stderr.
        untie: also write the head of a tied model, so that an adapter can change only the
            embeddings or only the head.
        tokenizer: instead of the folder's, for instance a run's with its own chat template.

    Raises:
        UserError: see `open_source`; the architecture has no such tensor, or values exceed float16;
            llama.cpp would split text differently than the tokenizer.
    """
    import gguf
    import numpy as np

    source = open_source(folder)
    tensors = _tensors(source, untie and source.tied)
    rows = tensors["token_embd.weight"].shape[0]
    writer = gguf.GGUFWriter(file, source.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_string(WRITTEN_BY, version("lora-kit"))
    writer.add_name(file.stem)
    _add_settings(writer, source)
    tokenizer = tokenizer or load_tokenizer(folder)
    add_tokenizer(writer, tokenizer, rows, generation(folder, tokenizer)["eos_token_id"])
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {name: _kind_of(tensor.shape, kind) for name, tensor in tensors.items()}
    if kind == "q8_0" and (others := [n for n, k in kinds.items() if k == "f16"]):
        print(f"{file.name}: {len(others)} tensors as f16, not q8_0: their rows do not divide by "
              f"{_Q8_BLOCK} ({others[0]}, ...)", file=sys.stderr)  # fmt: skip
    described = {name: (tensor.shape, kinds[name]) for name, tensor in tensors.items()}
    if (factors := _rope_factors(source)) is not None:
        described["rope_freqs.weight"] = (factors.shape, "f32")
    for name, (shape, each) in described.items():
        stored_as = gguf.GGMLQuantizationType[each.upper()]
        block, size = gguf.GGML_QUANT_SIZES[stored_as]  # values and bytes of a block
        n_bytes = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype("float32"), n_bytes, stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_values(source, name, tensor, kinds[name]))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def _tensors(source: GgufSource, untie: bool) -> dict[str, Stored]:
    """{name in GGUF: tensor} of the text model, without a tied head."""
    found = {}
    for name, tensor in stored_in(source.folder).items():
        if "vision_tower." in name or "multi_modal_projector." in name or "inv_freq" in name:
            continue
        if (gguf_name := source.name(name)) is None:
            where = f"llama.cpp's {source.architecture}: export it with --to merged"
            raise UserError(f"{source.folder}: {name} has no place in {where}")
        if gguf_name != "output.weight" or not source.tied:
            found[gguf_name] = tensor
    if untie:
        found["output.weight"] = found["token_embd.weight"]
    return found


def _kind_of(shape: tuple[int, ...], kind: Kind) -> Kind:
    """The type that a tensor of this shape is stored in."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _Q8_BLOCK else kind


def _values(source: GgufSource, name: str, tensor: Stored, kind: Kind) -> np.ndarray:
    """A tensor's values as GGUF stores them."""
    import gguf
    import numpy as np

    values = tensor.read().float().numpy()
    if heads := source.heads_permuted(name):
        values = permuted(values, heads)
    if source.architecture.startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1  # Gemma stores the norms minus 1
    with np.errstate(over="ignore"):
        converted = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    if kind == "f16" and not np.isfinite(converted).all():
        raise UserError(
            f"{tensor.file}: {tensor.name} has values that float16 does not hold: use bf16"
        )
    return converted


def _add_settings(writer: GGUFWriter, source: GgufSource) -> None:
    """The architecture's metadata."""
    import gguf

    config, architecture = source.config, source.architecture
    if architecture in ("gemma2", "gemma3") and (window := config.get("sliding_window")):
        writer.add_sliding_window(window)
        kinds = config["layer_types"]
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    elif source.context < config["max_position_embeddings"]:
        print(f"{source.folder.name}: {source.context:,} tokens of context, its sliding window: "
              f"llama.cpp has none for {architecture}", file=sys.stderr)  # fmt: skip
    ropes = _ropes(source)
    rope, local = ropes["full_attention"], ropes.get("sliding_attention", {})
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for add, value in (
        (writer.add_context_length, source.context),
        (writer.add_embedding_length, config["hidden_size"]),
        (writer.add_feed_forward_length, config["intermediate_size"]),
        (writer.add_block_count, config["num_hidden_layers"]),
        (writer.add_head_count, config["num_attention_heads"]),
        (writer.add_head_count_kv, config["num_key_value_heads"]),
        (writer.add_key_length, config["head_dim"]),
        (writer.add_value_length, config["head_dim"]),
        (writer.add_layer_norm_rms_eps, config.get("rms_norm_eps", 1e-6)),
        (writer.add_attn_logit_softcapping, config.get("attn_logit_softcapping")),
        (writer.add_final_logit_softcapping, config.get("final_logit_softcapping")),
        (writer.add_rope_freq_base, rope["rope_theta"]),
        (writer.add_rope_freq_base_swa, local.get("rope_theta")),
    ):
        if value is not None:
            add(value)


def _rope_factors(source: GgufSource) -> np.ndarray | None:
    """Llama 3.1's divisor of each frequency, (head_dim / 2,) float32; None for other models.

    Wavelengths beyond the original context are stretched by `factor`, short ones are not, and those
    between are interpolated (https://arxiv.org/abs/2407.21783, and transformers' `llama3`)."""
    import numpy as np

    rope, size = _ropes(source)["full_attention"], source.config["head_dim"]
    if rope["rope_type"] != "llama3":
        return None
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def needs_untied(adapter: Adapter, source: GgufSource) -> bool:
    """Whether the adapter changes embeddings or head of a tied model: each needs its own matrix.

    Raises:
        UserError: it does, and llama.cpp has no separate head for this architecture.
    """
    places = {source.name(f"{module}.weight") for module in adapter.factors}
    parted = source.tied and bool(places & {"token_embd.weight", "output.weight"})
    if parted and source.architecture in _ALWAYS_TIED:
        raise UserError(
            f"{adapter.folder}: changes embeddings or head alone, which are one matrix in "
            f"llama.cpp's {source.architecture}: serve it with transformers or vllm"
        )
    return parted


def write_adapter(adapter: Adapter, base_folder: Path, file: Path) -> None:
    """Write a LoRA adapter as GGUF in float32, which llama.cpp applies to its base's GGUF.

    llama.cpp has one alpha for all modules, here 1, and scales by alpha / rank of each module: the
    rest of the scale is folded into B. If the adapter `needs_untied`, it only fits a base that was
    written with `untie`.

    Raises:
        UserError: A and B alone do not express the adapter (see `check_portable`) or are not
            finite, or it does not fit the base.
    """
    import gguf
    import numpy as np

    check_portable(adapter)
    source = open_source(base_folder)
    needs_untied(adapter, source)
    shapes = {source.name(name): t.shape for name, t in stored_in(source.folder).items()}
    if source.tied:
        shapes["output.weight"] = shapes.get("token_embd.weight", ())
    writer = gguf.GGUFWriter(file, source.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(WRITTEN_BY, version("lora-kit"))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
    for module in adapter.factors:
        name, update = source.name(f"{module}.weight"), adapter.update(module)
        down, up = update.a[0].float(), update.b[0].float()
        size = (len(up), down.shape[1])  # of B A; an embedding's is the transpose of its weight
        if name is None or shapes.get(name) != (size[::-1] if "token_embd" in name else size):
            raise UserError(
                f"{adapter.folder}: {module} is {size[0]} x {size[1]}, which {source.folder} has "
                "no weight for: name the base that it was trained on"
            )
        a, b = down.numpy(), (up * (update.scale * up.shape[1])).numpy()
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{adapter.folder}: {module} is not finite: NaN, or more than float32")
        if heads := source.heads_permuted(name):
            b = permuted(b, heads)
        if name == "token_embd.weight":
            a = a.T  # rows are looked up, not multiplied
        for half, values in (("a", a), ("b", b)):
            writer.add_tensor(f"{name}.lora_{half}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_gguf(run: FinishedRun, out: Path, kind: Kind, what: What, into: Into = "base") -> Path:
    """Write NAME.gguf, with the run's name, into an existing folder.

    Args:
        what: only the `adapter`, the `merged` model, or the `base` as the adapter needs it.
        into: the weights to merge into; see `merge`.

    Raises:
        UserError: see `write_model`, `write_adapter` and `merge`.
    """
    adapter, folder, file = run.adapter, Path(run.pinned.folder), out / f"{run.name}.gguf"
    untie = needs_untied(adapter, open_source(folder))
    if what == "adapter":
        write_adapter(adapter, folder, file)
    elif what == "base":
        write_model(folder, file, kind, untie=untie, tokenizer=run.processor)
    else:
        merged = out / ".merged"
        # In bfloat16 rounding the sum loses small updates.
        merge(run, merged, dtype="bfloat16" if kind == "bf16" else "float32", into=into)
        write_model(merged, file, kind)
        shutil.rmtree(merged)
    return file
