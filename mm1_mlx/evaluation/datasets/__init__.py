"""Readers of benchmarks in the formats in which they are published.

A reader is called with a source (a folder, or "owner/name" on the hub) and a split, and
gives samples. Most benchmarks have two forms: parquet files with the columns of the
hub's datasets (lmms-lab-encoder's above all), and the original files. What is wrong
with a file is said before the first sample: the first five places and how many there
are. Pictures are opened when they are used, not before.
"""
