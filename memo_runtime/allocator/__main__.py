"""``python -m memo_runtime.allocator``: builds the allocator for the torch that is running."""

from __future__ import annotations

import sys

from memo_runtime.allocator.building import build
from memo_runtime.errors import AllocatorUnavailableError


def main() -> int:
    """Builds; 1 where that cannot be, with the reason."""
    try:
        sys.stdout.write(f"{build()}\n")
    except AllocatorUnavailableError as error:
        sys.stderr.write(f"memo-runtime: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
