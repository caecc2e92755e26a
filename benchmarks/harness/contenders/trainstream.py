"""TrainStream's activation offload alone: all that autograd saves in blocks goes to the host, none is recomputed."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.contenders.base import Training
from benchmarks.harness.contenders.packages import TRAINSTREAM, need, need_gpu

#: Every block; the other options are the defaults of ``trainstream.wrap``, said so that a row has them.
_OPTIONS = {"offload": 1.0, "min_bytes": 1 << 20, "prefetch_depth": 1, "max_inflight_bytes": 1 << 30}


class TrainStream(Training):
    """Activations of all blocks in host memory. Its first import compiles its extension."""

    def install(self) -> None:
        """Its hooks on the model and its blocks; optimizer, gradients and weights stay everybody's.

        Raises:
            SkippedError: TrainStream is not installed, or there is no GPU.
        """
        need("trainstream", [TRAINSTREAM])
        need_gpu("trainstream", self.device, "its core is compiled for CUDA")
        super().install()
        import trainstream

        self._offloader = trainstream.ActivationOffloader(self.subject.model, self.subject.layers, **_OPTIONS)
        self.settings["ActivationOffloader"] = _OPTIONS

    def details(self) -> dict[str, Any]:
        """With what it says of its own pinned memory, which PyTorch's pool does not know."""
        import trainstream

        return {**super().details(), "pinned": trainstream.pinned_stats()}
