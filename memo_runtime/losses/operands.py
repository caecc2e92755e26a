"""What ``linear_cross_entropy`` is given: what does not go together is refused before anything is computed."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from memo_runtime.errors import ArgumentError, ArgumentTypeError
from memo_runtime.losses.tiles import Criterion, Head
from memo_runtime.units import show_value

REDUCTIONS = ("none", "sum", "mean")
#: Dtypes that the head's matmul takes on every device.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_operands(hidden: object, weight: object, target: object, bias: object) -> None:
    """Refuse operands of other types, shapes, dtypes or devices than the loss takes.

    Raises:
        ArgumentTypeError: one is no tensor. ArgumentError: they do not go together.
    """
    hidden = _tensor("hidden", hidden, "the hidden states that the head is applied to, [..., D]")
    weight = _tensor("weight", weight, "the head's weight, [V, D]")
    target = _tensor("target", target, "a class index per token, torch.int64")
    bias = None if bias is None else _tensor("bias", bias, "the head's bias, [V], or None")
    _check_shapes(hidden, weight, target, bias)
    if target.dtype is not torch.int64:
        raise ArgumentError(
            f"target is {target.dtype}, and class indices are torch.int64: give target.long() if it holds indices "
            "(probabilities of classes are not taken)"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            taken = ", ".join(str(dtype) for dtype in _DTYPES)
            raise ArgumentError(f"{name} is {tensor.dtype}, and the head's matmul takes {taken}: convert it first")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ArgumentError(
                f"hidden is on {hidden.device} and {name} on {tensor.device}: give all of them on one device, "
                f"such as {name}.to({str(hidden.device)!r})"
            )


def _tensor(name: str, value: object, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise ArgumentTypeError(f"{name}={show_value(value)} ({type(value).__name__}) is no tensor: give {what}")


def _check_shapes(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        turned = weight.dim() == 2 and hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[0]
        hint = " (weight.t() would go with this hidden)" if turned else ""
        raise ArgumentError(f"{shapes} do not go together: give hidden [..., D] and weight [V, D]{hint}")
    if weight.shape[0] == 0:
        raise ArgumentError(f"weight {tuple(weight.shape)} has no class: give [V, D] with V of 1 or more")
    if target.shape != hidden.shape[:-1]:
        raise ArgumentError(
            f"target {tuple(target.shape)} has not one class per token of hidden {tuple(hidden.shape)}: "
            f"give target {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(
            f"bias {tuple(bias.shape)} does not go with weight {tuple(weight.shape)}: give {tuple(weight.shape[:1])}"
        )


def check_options(criterion: Criterion, reduction: object, num_items: object, tile: object) -> None:
    """Refuse options that are none, or that exclude each other.

    Raises:
        ArgumentTypeError: one is of another type. ArgumentError: one has a value that is not taken.
    """
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction={show_value(reduction)} is unknown; there are: {', '.join(REDUCTIONS)}")
    if not isinstance(criterion.ignore_index, Integral) or isinstance(criterion.ignore_index, bool):
        raise ArgumentTypeError(
            f"ignore_index={show_value(criterion.ignore_index)} is no class index: give a whole number, such as -100"
        )
    if num_items is not None:
        _check_num_items(num_items, reduction)
    _number("logit_scale", criterion.logit_scale, "a factor on the logits, or leave it out")
    if criterion.softcap is not None:
        _number("softcap", criterion.softcap, "the c of c * tanh(logits / c), or None for no cap")
        if criterion.softcap == 0.0:
            raise ArgumentError("softcap=0 divides by zero; give None for no cap")
    smoothing = criterion.label_smoothing
    _number("label_smoothing", smoothing, "a share in [0, 1]")
    if not 0.0 <= smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing={smoothing} is not in [0, 1]: give 0 for none")
    if tile is not None:
        said = f"tile={show_value(tile)} is not a number of tokens: give 1 or more, or None"
        if not isinstance(tile, Integral) or isinstance(tile, bool):
            raise ArgumentTypeError(said)
        if tile < 1:
            raise ArgumentError(said)


def _check_num_items(num_items: object, reduction: object) -> None:
    if reduction == "none":
        raise ArgumentError("num_items divides a sum; with reduction='none' divide the losses yourself")
    if not isinstance(num_items, Tensor):
        _number("num_items", num_items, "how many targets the sum is divided by: a number, or a tensor of one")
    elif num_items.numel() != 1:
        raise ArgumentError(f"num_items has {num_items.numel()} elements; give a number or a tensor of one")


def _number(name: str, value: object, what: str) -> None:
    said = f"{name}={show_value(value)} is not a finite number: give {what}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(said)
    if not math.isfinite(value):
        raise ArgumentError(said)


def check_classes(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse a target that is no class, where looking costs nothing: on CUDA it would wait for the device.

    Raises:
        ArgumentError: names the value and its place.
    """
    if type(target) is not Tensor or target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bool(wrong.any()):
        place = int(wrong.int().argmax())
        raise ArgumentError(
            f"target holds {int(target[place])} (token {place}): a weight of {vocabulary} rows has classes 0 to "
            f"{vocabulary - 1}, and ignore_index={ignore_index} stands for no class"
        )


def check_one_dtype(head: Head) -> None:
    """Refuse operands of several dtypes where PyTorch's own matmul is to take them as they are.

    Raises:
        ArgumentError: they differ, and autocast is off.
    """
    given = {str(tensor.dtype) for tensor in (head.hidden, head.weight, head.bias) if tensor is not None}
    if len(given) > 1 and not torch.is_autocast_enabled(head.hidden.device.type):
        raise ArgumentError(
            f"backend='native' multiplies what it is given, and that is {' and '.join(sorted(given))}: give one dtype, "
            "call it under autocast, or use backend='tiled', which computes in hidden's dtype"
        )
