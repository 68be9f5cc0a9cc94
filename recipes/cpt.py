"""Continued pre-training: a base model reads the raw text of a field.

    lora-kit train run.yaml train.max_steps=200
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/cpt.py run.yaml
    python -c 'import lora_kit; lora_kit.train("run.yaml")'

All documents stand one after the other, each closed by the end-of-text token, and are cut into
chunks of `train.max_length` tokens; every token is learned from. What is held out is judged
document by document.
LoRA: Hu et al. 2021 (arXiv:2106.09685); QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from typing import Any

from lora_kit.launch import recipe_main
from lora_kit.run import Run, read_lock


def main(run: Run, resume: bool = False) -> dict[str, Any]:
    """Run the whole journey; returns what report.json holds."""
    from lora_kit.adapter.attach import attach, describe
    from lora_kit.base.load import load_base, load_tokenizer
    from lora_kit.base.pin import pin
    from lora_kit.data.splits import load_splits
    from lora_kit.data.text import running_text
    from lora_kit.prove.compare import held_out
    from lora_kit.prove.finish import prove
    from lora_kit.train.arguments import check_installed
    from lora_kit.train.directory import run_directory
    from lora_kit.train.interrupt import StopSignal
    from lora_kit.train.save import save_run
    from lora_kit.train.trainer import fit, make_trainer

    with StopSignal().listening() as stop:
        # 1. Which rows and which base, before anything large is loaded.
        check_installed(run)
        splits = load_splits(run.data, "text", run.seed)
        pinned = pin(run.base, read_lock(run.directory) if resume else None)

        with run_directory(run, pinned, splits, resume) as directory:
            directory.say(f"data: {splits.summary()}")

            # 2. Rows to labelled tokens.
            tokenizer = load_tokenizer(pinned)
            train = running_text(splits.train, tokenizer, run.train.max_length)
            judged = held_out(run, splits, tokenizer)
            directory.say(f"tokens: {train.summary()}")
            directory.say(f"sample: {tokenizer.decode(train.input_ids[0][:48])!r}")

            # 3. The base, frozen, in its type or quantized.
            model = load_base(run.base, pinned)

            # 4. The adapter, the only part that trains.
            model = attach(model, run.adapter, run.seed)
            directory.say(str(describe(model)))

            # 5. Train.
            trainer = make_trainer(run, directory, stop, model, tokenizer, train, judged.domain)
            fit(trainer, resume)

            # 6. Save, then judge against the base.
            save_run(trainer, tokenizer, pinned)
            return prove(run, trainer, tokenizer, judged)


if __name__ == "__main__":
    raise SystemExit(recipe_main(main))
