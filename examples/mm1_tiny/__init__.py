"""The data that mm1-tiny is trained on: a generator, no files."""
