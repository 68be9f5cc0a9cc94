"""How fast an adapter is merged, beside `cp` and fsync of the same files, and in how much memory.

    python scripts/bench/ship.py merge --shape 1b            # A B A B
    python scripts/bench/ship.py merge --shape 8b            # 16 GB in bf16; 36 GB of disk
    python scripts/bench/ship.py merge --shape 1b --peft     # PEFT's merge_and_unload as well
    python scripts/bench/ship.py tokens --run runs/demo/sft  # 200 greedy tokens in llama.cpp, F32

Random weights of a Llama's shape in 4 shards, a random adapter of r = 16 on all linear layers, and
a lock file with the hashes of the base, so that these are checked on the way. Each round starts
cold: the files are put out of the page cache. Prints size, seconds, MB/s of the base, and the peak
RSS of the process that merged.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "vocab_size": 4096,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
}
RANK, SHARDS = 16, 4
PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def make(folder: Path, shape: dict[str, Any]) -> Path:
    """A base and a run of it; returns the run."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from lora_kit import nano
    from lora_kit.base.tensors import INDEX, write_file
    from lora_kit.hashes import file_hash

    base, run = folder / "base", folder / "run"
    adapter = run / "adapter"
    base.mkdir()
    adapter.mkdir(parents=True)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": max(1, width // 512)}
    narrow = heads["num_key_value_heads"] * 128
    linear = {
        **{"self_attn.q_proj": (width, width), "self_attn.o_proj": (width, width)},
        **{"self_attn.k_proj": (narrow, width), "self_attn.v_proj": (narrow, width)},
        **{"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)},
        "mlp.down_proj": (width, inner),
    }
    vocabulary: tuple[int, ...] = (shape["vocab_size"], width)
    entries = {"model.embed_tokens.weight": vocabulary}
    halves: list[tuple[str, Any]] = []
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, (rows, columns) in linear.items():
            entries[f"{at}.{name}.weight"] = (rows, columns)
            where = f"base_model.model.{at}.{name}"
            halves.append((f"{where}.lora_A.weight", torch.randn(RANK, columns) / columns**0.5))
            halves.append((f"{where}.lora_B.weight", torch.randn(rows, RANK) / 100))
        entries[f"{at}.input_layernorm.weight"] = entries[
            f"{at}.post_attention_layernorm.weight"
        ] = (width,)
    entries["model.norm.weight"] = (width,)
    entries["lm_head.weight"] = vocabulary
    random = np.random.default_rng(0)
    names = list(entries)
    each = -(-len(names) // SHARDS)
    index: dict[str, str] = {}

    def random_weights(name: str) -> Iterator[torch.Tensor]:
        left = int(np.prod(entries[name]))
        while left:
            part = random.integers(0, 2**16, min(left, 2**23), np.uint16)
            part = (part & 0x80FF) | 0x3C00  # of either sign, about 0.01 to 0.03
            yield torch.from_numpy(part).view(torch.bfloat16)
            left -= len(part)

    for number in range(SHARDS):
        own = names[number * each : (number + 1) * each]
        file = base / f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        index |= dict.fromkeys(own, file.name)
        write_file(file, {name: ("BF16", entries[name]) for name in own}, random_weights)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in nano.MODEL.glob("token*"):
        shutil.copy(file, base)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
    }
    config |= {**shape, **heads, "head_dim": 128, "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    save_file(dict(halves), adapter / "adapter_model.safetensors")
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "task_type": "CAUSAL_LM",
    }
    settings |= {"base_model_name_or_path": str(base)}
    settings["target_modules"] = [name.split(".")[1] for name in linear]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for file in base.glob("token*"):
        shutil.copy(file, adapter)
    (run / "run.yaml").write_text(
        f"recipe: cpt\nname: bench\nbase: {{model: {base}}}\ndata: {{train: {base}}}\n"
    )
    hashed = [*base.glob("*.safetensors"), base / "config.json", *base.glob("token*")]
    pinned = {"model": str(base), "hashes": {file.name: file_hash(file) for file in hashed}}
    (run / "run.lock.json").write_text(json.dumps({"base": pinned}))
    return run


def cold(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for file in folder.glob("*"):
        opened = os.open(file, os.O_RDONLY)
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def cpu() -> float:
    """Seconds of processor time of all children so far: on a busy machine they tell more."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def copy_seconds(base: Path, out: Path) -> float:
    """`cp` of the weights, and fsync."""
    out.mkdir()
    started = time.perf_counter()
    subprocess.run(["cp", *base.glob("*.safetensors"), out], check=True)
    for file in out.iterdir():
        opened = os.open(file, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)
    return time.perf_counter() - started


def measured(command: list[Any]) -> tuple[str, float, float]:
    """Standard output, seconds from start to end, and peak RSS in MiB."""
    started = time.perf_counter()
    child = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return text, time.perf_counter() - started, usage.ru_maxrss / 1024


def merge(shape: str, rounds: int, where: Path, peft: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench", dir=where))
    program = Path(sys.executable).parent / "lora-kit"
    try:
        run = make(folder, SHAPES[shape])
        base, out = folder / "base", folder / "out"
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        print(f"{shape}: {size / 1e9:.2f} GB in {SHARDS} shards", flush=True)
        for _ in range(rounds):
            cold(base)
            busy = cpu()
            seconds = copy_seconds(base, out)
            shutil.rmtree(out)
            print(
                f"cp     {seconds:7.1f} s  {size / seconds / 1e6:7.0f} MB/s"
                f"  CPU {cpu() - busy:.1f} s",
                flush=True,
            )
            cold(base)
            busy = cpu()
            text, whole, peak = measured([program, "merge", run, "--out", out, "--json"])
            busy = cpu() - busy
            shutil.rmtree(out)
            inside = json.loads(text)["seconds"]
            print(
                f"merge  {whole:7.1f} s  {size / whole / 1e6:7.0f} MB/s  {seconds / whole:.2f} of "
                f"cp  ({inside:.1f} s without the start)  CPU {busy:.1f} s  peak {peak:.0f} MiB",
                flush=True,
            )
        if peft:
            _, whole, peak = measured([sys.executable, "-c", PEFT, base, run / "adapter", out])
            print(f"PEFT   {whole:7.1f} s  {size / whole / 1e6:7.0f} MB/s  peak {peak:.0f} MiB")
    finally:
        shutil.rmtree(folder)


def tokens(run: Path, count: int = 200) -> None:
    """Greedy tokens of base and adapter in llama.cpp, apart and merged, beside transformers'."""
    import torch

    import lora_kit
    from lora_kit.adapter.finished import FinishedRun
    from lora_kit.ship import llama_cpp
    from lora_kit.ship.gguf import export_gguf

    model, tokenizer = lora_kit.load(run, dtype="float32", quantize="none")
    texts = ["Once upon a time there was a little", "The first of them is called"]
    prompts = [tokenizer(text).input_ids for text in texts]
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    try:
        files = {}
        for what in ("base", "adapter", "merged"):
            (folder / what).mkdir()
            files[what] = export_gguf(FinishedRun(run), folder / what, "f32", what)
        for name, of, adapters in (
            ("base + adapter", "base", [files["adapter"]]),
            ("merged", "merged", []),
        ):
            got = llama_cpp.run(files[of], adapters, prompts=prompts, tokens=count, top=20)
            for prompt, answer in zip(prompts, got["answers"], strict=True):
                said = answer["tokens"]
                with torch.inference_mode():
                    ids = torch.tensor([prompt])
                    out = model.generate(ids, max_new_tokens=count, do_sample=False)
                    whole = torch.tensor([[*prompt, *said]])
                    rows = model(whole).logits[0, len(prompt) - 1 :].log_softmax(-1)
                    with model.disable_adapter():
                        without = model(whole).logits[0, len(prompt) - 1 :].log_softmax(-1)
                wanted = out[0, len(prompt) :].tolist()
                apart = max(
                    abs(float(rows[n, int(token)]) - value)
                    for n, top in enumerate(answer["top"])
                    for token, value in top.items()
                )
                equal, effect = wanted[: len(said)] == said, (rows - without).abs().max()
                print(
                    f"{name:<15} {len(said)} tokens, equal: {equal}; log-probabilities differ by "
                    f"{apart:.2g} at most (the adapter's effect: {effect:.2g})"
                )
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["merge", "tokens"])
    parser.add_argument("--shape", choices=[*SHAPES], default="1b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--where", type=Path, default=Path.cwd(), help="a folder on the disk")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--run", type=Path, help="of tokens: a finished run")
    arguments = parser.parse_args()
    if arguments.what == "tokens":
        return tokens(arguments.run)
    merge(arguments.shape, arguments.rounds, arguments.where, arguments.peft)


if __name__ == "__main__":
    main()
