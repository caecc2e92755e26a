"""What PyTorch's reductions keep between thread blocks (ATen/native/cuda/Reduce.cuh), with 132 multiprocessors."""

from __future__ import annotations

_MULTIPROCESSORS, _THREADS, _VECTOR = 132, 128, 4
_ROWS = _THREADS // 32


def scratch(tokens: int, columns: int) -> int:
    """Bytes of float32 for the sum over ``tokens`` rows, such as of a norm's weight's gradient; 0 where it takes none.

    What an H200 asked for, to the byte: 9 of these and 8 bytes at 1,025, 1,780 and 1,999 tokens of 512 columns.
    """
    values = -(-tokens // _ROWS)
    if values < 256:
        return 0
    grid = -(-columns // (32 * _VECTOR))
    blocks = max(min(-(-_MULTIPROCESSORS * (2048 // _THREADS) // grid), -(-values // 16)), -(-values // 256))
    return 4 * columns * blocks * 32 * _VECTOR
