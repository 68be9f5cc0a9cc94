"""The base model: found, verified and loaded, frozen.

In: `base:` of the run file. `pin` finds the folder, downloads it if it is on the Hub, and records
revision, hashes and licence; `load` returns tokenizer and model, optionally quantized; `head` adds
a head for classes or numbers; `templates` has the chat templates; `tensors` reads and writes
safetensors files. Out: a `Pinned` for the lock file, and a model in which nothing trains.
"""
