"""What a forward asks of values that meta tensors do not have.

Models look at their inputs: are all tokens real, is any position packed? On meta tensors there is nothing to look at,
so such a question gets the answer of the plain case: ``all`` is True, ``any`` is False, and a sum that is compared with
the number of its elements is one of ones (how transformers asks for ``all``). Any other number that is asked for is an
error that says so, since shapes may depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from memo_runtime.errors import TraceError


class PlainAnswers(TorchDispatchMode):
    """While it is entered, yes-or-no questions to meta tensors are answered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answers: Any = WeakTensorKeyDictionary()
        self._sums: Any = WeakTensorKeyDictionary()
        self.assumed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or answer."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self._answer(args[0])
        result = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if packet in (torch.ops.aten.all, torch.ops.aten.any) and isinstance(result, torch.Tensor):
            self._answers[result] = packet is torch.ops.aten.all
        elif func is torch.ops.aten.sum.default and args[0].device.type == "meta":
            self._sums[result] = args[0].numel()
        elif func is torch.ops.aten.eq.Scalar and self._sums.get(args[0]) == args[1]:
            self._answers[result] = True
        return result

    def _answer(self, tensor: torch.Tensor) -> bool:
        if tensor not in self._answers:
            raise TraceError(
                f"the model reads a number ({tensor.dtype}) out of a tensor, and on the meta device there are no "
                "values: what it does next depends on data. Record it on a real device"
            )
        self.assumed += 1
        return bool(self._answers[tensor])
