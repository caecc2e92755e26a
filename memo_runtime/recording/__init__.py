"""Turns a training step into a trace: from the CUDA allocator's history, or operator by operator on CPU and meta."""
