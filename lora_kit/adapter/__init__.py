"""LoRA adapters: attached to a base for training, or opened from their files.

In: a frozen base and `adapter:` of the run file. `attach` returns a PEFT model in which only the
adapter and new modules train, and `audit` checks that this is so. For finished runs, `files` and
`finished` open adapter and lock file, and `load` puts the adapter onto its base; `inspect`,
`combine`, `extract`, `portable` and `names` (the merge plan) need only the files, no model.
"""
