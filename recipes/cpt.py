"""Continued pre-training: the model is trained on raw text of a domain.

    lora-kit train run.yaml train.max_steps=200
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/cpt.py run.yaml
    python -c 'import lora_kit; lora_kit.train("run.yaml")'

All documents are concatenated, each closed by the end-of-text token, and cut into chunks of
`train.max_length` tokens; loss is computed on every token. Held-out text is evaluated document by
document.
LoRA: Hu et al. 2021 (arXiv:2106.09685); QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from lora_kit.launch import recipe_main
from lora_kit.schema import Json, Run
from lora_kit.tasks.causal import Text

TASK = Text()


def main(run: Run, resume: bool = False) -> Json:
    """Run all steps; returns the content of report.json."""
    from lora_kit.adapter.attach import attach, describe
    from lora_kit.base.pin import pin
    from lora_kit.data.prepare import prepare
    from lora_kit.plan import plan_training
    from lora_kit.prove.evaluate import check_prove, prove
    from lora_kit.tasks.encode import encode
    from lora_kit.train.journey import Journey
    from lora_kit.train.save import save_run
    from lora_kit.train.strategies import choose
    from lora_kit.train.trainer import fit, make_trainer

    with Journey(run, TASK, resume) as journey:
        # 1. The base's files, and the data: read, checked, split, encoded.
        pinned = pin(run.base, journey.lock)
        processor = TASK.processor(pinned, run.data)
        split = prepare(run.data, TASK, run.seed, journey.lock)
        facts = TASK.facts(split.train, run.data)
        data = encode(TASK, split, processor, facts, run)
        check_prove(TASK, data, processor, run)

        # 2. The run directory; the census (rows read, dropped and kept) and a sample are printed.
        journey.begin(pinned, data, processor)

        # 3. Memory and time; the micro-batch and gradient checkpointing that fit.
        plan = plan_training(run, TASK, pinned, processor, data, journey.say)

        # 4. The frozen base, in `base.dtype` or quantized.
        base, fresh = TASK.model(pinned, facts, run)

        # 5. The adapter: what trains.
        strategy = choose(run.train, run.adapter, base, fresh)
        model = attach(base, strategy.adapter, fresh, run.seed)
        journey.say(describe(model))

        # 6. Train.
        trainer = make_trainer(journey, model, fresh, processor, data, strategy, plan)
        fit(trainer, resume)

        # 7. Save, then compare with the base.
        save_run(trainer, processor, pinned)
        return prove(trainer, data, processor, fresh)


if __name__ == "__main__":
    raise SystemExit(recipe_main(main))
