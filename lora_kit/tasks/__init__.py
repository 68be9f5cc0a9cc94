"""Tasks: what a row is, what is trained on, and how the result is scored.

In come examples (text and columns), the tokenizer and a model; out go rows of numbers, batches,
losses and scores. task.py is the contract; causal.py, sequence.py and preference.py are the tasks;
encode.py applies one to all examples. The other files are their parts: supervised tokens of
conversations, collators, generation, metrics, baselines and confidence intervals.
"""
