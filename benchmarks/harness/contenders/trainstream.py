"""TrainStream's activation offload alone: all that autograd saves in blocks goes to the host, none is recomputed.

Its fraction 1 leaves the last block's on the device, since backward begins there.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness.contenders.base import Training
from benchmarks.harness.contenders.packages import TRAINSTREAM, imported, need, need_gpu

#: As much as it offers; the other options are the defaults of ``trainstream.wrap``, said so that a row has them.
_OPTIONS = {"offload": 1.0, "min_bytes": 1 << 20, "prefetch_depth": 1, "max_inflight_bytes": 1 << 30}


class TrainStream(Training):
    """Activations of all blocks but the last in host memory. Its first import compiles its extension."""

    def install(self) -> None:
        """Its hooks on the model and its blocks; optimizer, gradients and weights stay everybody's.

        Raises:
            SkippedError: TrainStream is not installed or cannot be compiled, or there is no GPU.
        """
        need("trainstream", [TRAINSTREAM])
        need_gpu("trainstream", self.device, "its core is compiled for CUDA")
        self._trainstream = imported("trainstream", TRAINSTREAM, "trainstream")
        super().install()
        self._offloader = self._trainstream.ActivationOffloader(self.subject.model, self.subject.layers, **_OPTIONS)
        self.settings["ActivationOffloader"] = _OPTIONS

    def pinned_bytes(self) -> int:
        """Its own pinned memory, which PyTorch's pool does not know."""
        return int(self._trainstream.pinned_stats()["reserved_bytes"])

    def details(self) -> dict[str, Any]:
        """With what it says of its own pinned memory."""
        return {**super().details(), "pinned": self._trainstream.pinned_stats()}
