"""Evaluation: a trained model and held-out rows -> report.json, report.html, the gate's verdict.

`evaluate` compares the adapted model with contenders (the base, a prompted base, baselines) by
paired intervals; `prove` is the last step of a recipe, `compare` the same for a finished run. Also
here: tasks of lm-evaluation-harness, and the self-test of the loss (`doctor --loss`). In come a
model, rows and `prove:` of the run file; out goes the report. Nothing here knows a loss or PEFT.
"""
