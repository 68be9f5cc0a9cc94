"""Speed: faster arithmetic for any model, and what a training step will cost.

In comes a model with its adapter. fast.py installs the fast layers, attention and loss and removes
each that does not give the same loss and gradients; prefix.py runs the frozen layers without
gradients and caches their output; memory.py counts the memory and time of a step and chooses the
micro-batch. Nothing here knows a task or a file of the user's.
"""
