"""The model folder on disk: found, checked, read, written."""
