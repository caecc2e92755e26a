"""Benchmarks of memo_solver: one script per claim, rows under benchmarks/results."""
