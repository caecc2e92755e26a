"""Importing PuLP keeps nothing of the caller alive; in a process that has not imported it yet."""

import subprocess
import sys
import textwrap

PROGRAM = """
    import gc, sys, weakref
    from memo_runtime.planning.modelling import load_pulp

    class Batch:
        pass

    def first_step():
        batch = Batch()
        load_pulp()
        return weakref.ref(batch)

    assert "pulp" not in sys.modules
    alive = first_step()
    gc.collect()
    print(alive() is None, load_pulp().LpMinimize)
"""


def test_the_batch_of_the_first_step_is_freed():
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.split() == ["True", "1"]
