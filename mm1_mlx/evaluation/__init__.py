"""Benchmarks: tasks, their metrics, and the run that answers and scores them."""
