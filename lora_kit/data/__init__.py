"""Sources -> examples, divided into training and held-out ones.

In: the `data:` section of a run file, and which row formats the task reads. Out: `prepare.Split`:
examples on disk, masks of which are trained on and which are held out, and the census, which counts
every row that was read, kept, dropped or leaked. `rows` has the container of encoded rows.
This room knows files, columns and text; no tokenizer, no model and no task by name.
"""
