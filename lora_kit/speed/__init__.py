"""Speed: fast paths for any model, and the memory and time that a training step will need.

In comes a model with its adapter. fast.py installs the fast paths (linear.py, norm.py,
attention.py, loss.py) and removes each that does not give the same loss and gradients; prefix.py
runs the frozen layers without gradients and caches their output; memory.py counts the memory and
time of a step and chooses the micro-batch. Nothing here knows a task or a file of the user's.
"""
