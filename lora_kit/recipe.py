"""The building blocks of your own recipe: `import lora_kit.recipe as kit`.

recipes/README.md explains the contract, with an example. The steps, in order:
`Journey`, `pin`, `prepare`, `encode`, `check_prove`, `plan_training`, `choose`, `attach`,
`make_trainer`, `fit`, `save_run`, `prove`; and `recipe_main`, the entry point under accelerate.
"""

# ruff: noqa: F401 - imported for recipes to take from here

from __future__ import annotations

from lora_kit.adapter.attach import attach, describe
from lora_kit.base.pin import pin
from lora_kit.data.prepare import prepare
from lora_kit.launch import recipe_main
from lora_kit.plan import plan_training
from lora_kit.prove.evaluate import check_prove, prove
from lora_kit.tasks.encode import encode
from lora_kit.tasks.task import Contender, Dropped, Score, Shown, Task
from lora_kit.train.journey import Journey
from lora_kit.train.save import save_run
from lora_kit.train.strategies import choose
from lora_kit.train.trainer import fit, make_trainer
