"""The modules beside an example are found as they are when it runs: from its own folder."""

import sys
from pathlib import Path

from tests.tiny import few_samples, one_thread

__all__ = ["EXAMPLES", "few_samples", "one_thread"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))
