"""Of ``POLICIES`` what every test of the front door is tried with: ``memo`` copies, and runs again too."""

import pytest

from tests.api.towers import POLICIES

#: The others are slow tests where a step does not depend on the policy much.
MAIN_POLICIES = [pytest.param(name, marks=() if name == "memo" else pytest.mark.slow) for name in POLICIES]
