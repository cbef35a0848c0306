"""Parts of the benchmarks, whose docstrings define what is measured."""
