"""Training: a base with an adapter, and encoded rows -> the trained adapter in its run directory.

In come the run file, the pinned base, the rows of `tasks.encode` and a model with its adapter; out
go runs/<name>/adapter, the completed lock file, and the trainer with what the guards observed. A
recipe calls, in this order, `Journey` (journey.py), `choose` (strategies.py), `make_trainer` and
`fit` (trainer.py), `save_run` (save.py). guards.py adds the safety checks to any Trainer class.
"""
