"""Parts of ``bench_nodes.py``: what the ranks do, what steers them, what is made of the numbers."""
