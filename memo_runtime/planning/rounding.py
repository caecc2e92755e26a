"""Granules: token counts are rounded down to them before any budget or forecast is stated."""

from __future__ import annotations

#: Tokens of a granule at any length that matters: a multiple of every tile size that kernels use.
GRANULE_TOKENS = 128

#: From this length on a granule is ``GRANULE_TOKENS``; below, it is an eighth of the length at most.
_LONG = 1024


def granule(tokens: int) -> int:
    """Tokens by which a prefix of a sequence of ``tokens`` moves: 128, or less for short sequences."""
    if tokens >= _LONG:
        return GRANULE_TOKENS
    return 1 << (max(1, tokens // 8).bit_length() - 1)


def whole_granules(rows: float, tokens: int) -> int:
    """``rows`` rounded down to whole granules of a sequence of ``tokens``."""
    step = granule(tokens)
    # A product such as 0.3 * 1280 may fall a hair below the whole number that was meant.
    return int(rows + 1e-6) // step * step


def round_prefix(rows: float, tokens: int) -> int:
    """The prefix to plan for ``rows`` of ``tokens``: all of them, or whole granules that leave a tail of two
    or more.

    A tail of a single token is avoided because attention backends treat one query in another way than many.
    """
    if rows >= tokens:
        return tokens
    prefix = whole_granules(rows, tokens)
    if tokens - prefix == 1:
        prefix = max(0, prefix - granule(tokens))
    return prefix


def prefix_of(alpha: float, tokens: int) -> int:
    """The prefix for swap fraction ``alpha`` of ``tokens``; alpha = 1 is ``tokens`` itself."""
    return tokens if alpha >= 1.0 else round_prefix(alpha * tokens, tokens)
