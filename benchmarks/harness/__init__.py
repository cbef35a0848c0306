"""Parts of bench_dispatch_combine.py, which defines what is measured."""
