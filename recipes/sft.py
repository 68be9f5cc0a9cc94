"""Supervised fine-tuning: a base model learns to answer from prompts and answers or conversations.

    lora-kit train run.yaml train.max_steps=200
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py run.yaml
    python -c 'import lora_kit; lora_kit.train("run.yaml")'

Only the assistant's words and the marker that ends them are learned from. The tokenizer's own chat
template is used; a base without one learns prompt, answer and end-of-text as they are, or is given
`data.chat_template`. A conversation over `train.max_length` tokens is cut after the last answer
that fits, or left out; both are counted.
LoRA: Hu et al. 2021 (arXiv:2106.09685); QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from typing import Any

from lora_kit.launch import recipe_main
from lora_kit.run import read_lock
from lora_kit.schema import Run


def main(run: Run, resume: bool = False) -> dict[str, Any]:
    """Run the whole journey; returns what report.json holds."""
    from lora_kit.adapter.attach import attach, describe
    from lora_kit.base.load import load_base, load_tokenizer
    from lora_kit.base.pin import pin
    from lora_kit.base.templates import set_template
    from lora_kit.data.prepare import prepare
    from lora_kit.plan import plan_training
    from lora_kit.prove.compare import HeldOut, check_prove
    from lora_kit.prove.finish import prove
    from lora_kit.train.arguments import check_installed
    from lora_kit.train.directory import run_directory
    from lora_kit.train.interrupt import StopSignal
    from lora_kit.train.save import save_run
    from lora_kit.train.trainer import fit, make_trainer

    with StopSignal().listening() as stop:
        # 1. The base's files, and what is learned from: read, checked, split, tokenized, labelled.
        check_installed(run)
        lock = read_lock(run.directory) if resume else None
        pinned = pin(run.base, lock)
        tokenizer = load_tokenizer(pinned)
        set_template(tokenizer, run.data.chat_template)
        data = prepare(run.data, "chat", tokenizer, run.train.max_length, run.seed, lock=lock)
        judged = HeldOut.of(data)
        check_prove(run.prove, judged, tokenizer, run.data.supervise)

        with run_directory(run, pinned, data, resume) as directory:
            # 2. What was found, before anything large is loaded.
            directory.say("\n".join(data.summary()))
            directory.say(f"sample: {tokenizer.decode(data.train[0]['input_ids'][:48])!r}")

            # 3. What it will need, and the batch and recomputation that fit.
            plan = plan_training(run, pinned.folder, data, directory.say)

            # 4. The base, frozen, in its type or quantized.
            model = load_base(run.base, pinned)

            # 5. The adapter, the only part that trains.
            model = attach(model, run.adapter, run.seed)
            directory.say(str(describe(model)))

            # 6. Train.
            trainer = make_trainer(run, directory, stop, model, tokenizer, data, plan)
            fit(trainer, resume)

            # 7. Save, then judge against the base.
            save_run(trainer, tokenizer, pinned)
            return prove(run, trainer, tokenizer, judged)


if __name__ == "__main__":
    raise SystemExit(recipe_main(main))
