"""Shared by tests and benchmarks: cases with seeded inputs, worlds of threads or processes, the conformance checks."""

from .cases import BACKENDS, Case, Inputs, make_inputs, make_rows
from .worlds import WorldError, run_processes, run_threads

__all__ = ["BACKENDS", "Case", "Inputs", "WorldError", "make_inputs", "make_rows", "run_processes", "run_threads"]
