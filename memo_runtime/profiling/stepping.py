"""What an optimizer's step takes, seen by letting its class step on tensors without data.

``torch.optim`` steps in three ways: ``fused`` by kernels that need no room; ``foreach``, its default on a GPU, on all
parameters at once, with temporaries as large as they are (AdamW: the square roots of its second state); or one by one,
with temporaries of one or two parameters. How large they are is read off the class that is installed and its options.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Of a group: which parameters, and what its class does not take.
_NOT_OPTIONS = ("params", "param_names", "initial_lr")
#: Whose default on a GPU is one parameter after another (its documentation).
_ONE_BY_ONE = (torch.optim.Adafactor,)
_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Stepping:
    """Bytes of ``states`` that stay, of ``temporaries`` at the highest point of a step, and those that it reads and
    writes (``moved``).
    """

    states: int
    temporaries: int
    moved: int


def fused_bytes(parameters: int, gradients: int, states: int) -> int:
    """What a step by one kernel reads and writes: parameters and states both ways, gradients once."""
    return 2 * parameters + gradients + 2 * states


def state_bytes(state: Any, device_type: str) -> int:
    """Bytes of all tensors in an optimizer's per-parameter state that live on the device."""
    if isinstance(state, torch.Tensor):
        local = getattr(state, "_local_tensor", state)
        return local.nbytes if local.device.type in (device_type, "meta") else 0
    if isinstance(state, dict):
        return sum(state_bytes(value, device_type) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(value, device_type) for value in state)
    return 0


#: What optimizers took when they were last asked, and of what: hundreds of adapters take seconds.
_asked: weakref.WeakKeyDictionary[Any, tuple[Any, Stepping | None]] = weakref.WeakKeyDictionary()


def stepping_of(optimizer: torch.optim.Optimizer, device_type: str) -> Stepping | None:
    """What ``optimizer`` takes on a device of ``device_type``; None: its class does not step without data."""
    of = device_type, tuple(_description(group) for group in optimizer.param_groups)
    known = _asked.get(optimizer)
    if known is None or known[0] != of:
        known = _asked[optimizer] = of, _stepping(optimizer, device_type)
    return known[1]


def _description(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a step of ``group`` depends on; rates, which schedules change, are none of it."""
    parameters = tuple((id(p), p.requires_grad, p.shape, p.dtype) for p in group["params"])
    named = sorted((key, value) for key, value in group.items() if key not in (*_NOT_OPTIONS, "lr"))
    options = tuple((key, value if isinstance(value, (bool, int, float, str)) else id(value)) for key, value in named)
    return parameters, isinstance(group.get("lr"), torch.Tensor), options


def _stepping(optimizer: torch.optim.Optimizer, device_type: str) -> Stepping | None:
    states = temporaries = moved = 0
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        if not trained:
            continue
        try:
            found = _tried(type(optimizer), group, trained, at_once=_at_once(optimizer, group, trained, device_type))
        except Exception:  # any third-party optimizer may need data; the caller says so
            return None
        states += found.states
        # A fused step has no temporaries, whatever the twin that stands for it takes.
        temporaries = max(temporaries, 0 if group.get("fused") else found.temporaries)
        size = sum(getattr(p, "_local_tensor", p).nbytes for p in trained)
        moved += fused_bytes(size, size, found.states) if group.get("fused") else found.moved
    return Stepping(states, temporaries, moved)


def _at_once(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameters: Sequence[torch.Tensor], device_type: str
) -> bool:
    """Whether a step goes over all ``parameters`` together, as ``torch.optim`` decides it where nobody says."""
    if group.get("fused") or "foreach" not in group:
        return False
    if group["foreach"] is not None:
        return bool(group["foreach"])
    plain = all(type(p) in (torch.Tensor, torch.nn.Parameter) for p in parameters)
    counted = isinstance(group.get("lr"), torch.Tensor) and not group.get("capturable")
    by_default = not isinstance(optimizer, _ONE_BY_ONE) and not group.get("differentiable") and not counted
    return device_type == "cuda" and plain and by_default


def _tried(
    kind: Callable[..., torch.optim.Optimizer], group: Mapping[str, Any], parameters: Sequence[torch.Tensor], *,
    at_once: bool,
) -> Stepping:  # fmt: skip
    options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
    # Fused and capturable steps need a device; the states are the same.
    options.update({key: False for key in ("fused", "capturable") if key in options})
    options.update({"foreach": at_once} if "foreach" in options else {})
    options.update({"lr": _RATE} if isinstance(options.get("lr"), torch.Tensor) else {})
    stand_ins = [
        torch.empty_like(getattr(p, "_local_tensor", p), device="meta").requires_grad_() for p in parameters
    ]
    twin = kind([{"params": stand_ins, **options}])
    for stand_in in stand_ins:
        stand_in.grad = torch.empty_like(stand_in)
    most = 0
    with _Alive() as alive:
        # The first makes states, some classes only in part; others go on from what the first has left.
        for _ in range(2):
            alive.peak, alive.moved = alive.now, 0
            twin.step()
            most = max(most, alive.peak - alive.now)
    return Stepping(sum(state_bytes(twin.state[one], "meta") for one in stand_ins), most, alive.moved)


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors on meta that operators make, for as long as somebody holds them, and those that
    operators read and write.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.moved = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``; a number that is read off a tensor on meta is 1."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        result = func(*args, **(kwargs or {}))
        given = {_key(one): one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        self.moved += _moved(func, args, given, result)
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.is_meta and (_key(one) in self._holders or _key(one) not in given):
                self._hold(one)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key not in self._holders:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size


def _moved(func: Any, args: tuple[Any, ...], given: Mapping[int, torch.Tensor], result: Any) -> int:
    """Bytes that ``func`` reads and writes; a view does neither."""
    named = zip(func._schema.arguments, args, strict=False)
    into = [value for argument, value in named if argument.alias_info is not None and argument.alias_info.is_write]
    made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor) and _key(one) not in given]
    if not into and not made:
        return 0
    written = [one for one in tree_leaves(into) if isinstance(one, torch.Tensor)]
    return sum(one.nbytes for one in (*given.values(), *written, *made))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
