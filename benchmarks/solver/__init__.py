"""Benchmarks of memo_solver: `python -m benchmarks.solver.table`, rows under benchmarks/results."""
