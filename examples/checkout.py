"""Importing this lets an example run from a checkout that is not installed.

Python puts the folder of the script on its path, not the one above it, where the packages of a checkout
are. An installed memo_runtime is left alone.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("memo_runtime") is None:
    _ROOT = Path(__file__).resolve().parent.parent
    sys.path += [str(_ROOT), str(_ROOT / "solver")]
