"""Evaluation: a trained model, held-out rows, `prove:` of the run file -> report.json and .html.

`evaluate.evaluate` compares the adapted model with contenders (the base, a prompted base,
baselines) by paired intervals. `evaluate.prove` is the last step of a recipe and checks the gate;
`compare.compare` does the same for a finished run. `scores` has the entries of report.json that
other modules read, and the gate; `report` (with `charts`) and `show` present them. Also here: tasks
of lm-evaluation-harness (`harness`), and the self-test of the loss (`self_test`, `doctor --loss`).
What a score is, each task defines.
"""
