"""Rehearsing a step: everything real but the kernels that mix tokens, which take far less time and the same memory."""
