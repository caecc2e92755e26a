"""The planned allocator: PyTorch's CUDA allocator with an arena in front (csrc/torch_allocator), as Python calls.

It is built for one minor of torch by ``python -m memo_runtime.allocator``; without it everything else works, on
PyTorch's own allocator.
"""
