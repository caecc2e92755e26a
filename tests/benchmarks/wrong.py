"""A contender that is fast and wrong."""

from benchmarks.harness.contenders import Unwrapped


class WrongGradients(Unwrapped):
    """Its gradient of the input is one per cent too large."""

    def step(self, on_gradients=None):
        if on_gradients is None:
            return super().step()
        return super().step(lambda given: on_gradients(given | {"input": given["input"] * 1.01}))
