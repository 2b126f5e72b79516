"""One module per source: a table of names, a reader of its config.json, its ENTRY.

A reader takes the hub's dictionary in the spelling of transformers 4 or 5 and gives our
configuration. What it cannot represent is a CheckpointError, never a silent default;
where a file leaves a value out, the family's class default (transformers 5.23) is used
and stands in the module. A new module with an ENTRY is found by itself (source.py).
"""
