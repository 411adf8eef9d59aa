"""Postgrad next to other libraries: one script a benchmark, run by `python -m benchmarks.run`."""
