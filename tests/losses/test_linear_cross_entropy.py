"""``linear_cross_entropy`` against ``torch.nn.functional.cross_entropy`` on a full logits tensor."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memo_runtime.errors import ArgumentError, ArgumentTypeError, LossBackendError
from memo_runtime.losses import head_loss, linear_cross_entropy, tiles

HIDDEN, VOCABULARY = 12, 37


def operands(*, shape: tuple[int, ...] = (3, 11), dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, VOCABULARY, shape, generator=generator)
    target.view(-1)[::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target


def reference(hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **how: Any) -> Tensor:
    """The same loss by PyTorch's own operators."""
    scale, cap = how.pop("logit_scale", 1.0), how.pop("softcap", None)
    num_items = how.pop("num_items", None)
    logits = functional.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32)) * scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if num_items is not None:
        how["reduction"] = "sum"
    loss = functional.cross_entropy(logits.flatten(0, -2), target.flatten(), **how)
    if num_items is not None:
        loss = loss / num_items
    return loss.reshape(target.shape) if how.get("reduction") == "none" else loss


def gradients(loss: Tensor, inputs: list[Tensor], *, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, grad_outputs=upstream)


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max()) / max(float(want.abs().max()), 1e-300)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) <= tolerance


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"num_items": 17},
    {"num_items": torch.tensor(17)},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.3, "reduction": "none"},
    {"logit_scale": 0.0625},
    {"softcap": 3.0},
    {"softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.2, "reduction": "sum"},
    {"ignore_index": 5},
]


@pytest.mark.parametrize("tile", [None, 1, 4, 33, 100])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_cross_entropy_in_float64(options: dict[str, Any], tile: int | None, monkeypatch: Any) -> None:
    monkeypatch.setitem(tiles.ROWS_BYTES, "cpu", 3 * VOCABULARY * 8)
    hidden, weight, bias, target = operands()
    if options.get("ignore_index") is not None:
        target = target.clamp(min=0)
    upstream = (
        torch.randn(3, 11, dtype=torch.float64)
        if options.get("reduction") == "none"
        else torch.tensor(0.7, dtype=torch.float64)
    )
    inputs = [hidden, weight, bias]
    got = linear_cross_entropy(hidden, weight, target, bias=bias, tile=tile, **options)
    want = reference(hidden, weight, target, bias=bias, **options)
    assert relative_error(got, want) <= 1e-12
    assert_close(gradients(got, inputs, upstream=upstream), gradients(want, inputs, upstream=upstream), 1e-12)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)), ids=str)
def test_frozen_operands_get_no_gradient(frozen: tuple[bool, bool, bool]) -> None:
    *inputs, target = operands()
    for tensor, freeze in zip(inputs, frozen, strict=True):
        tensor.requires_grad_(not freeze)
    hidden, weight, bias = inputs
    got = linear_cross_entropy(hidden, weight, target, bias=bias, tile=5)
    want = reference(hidden, weight, target, bias=bias)
    live = [tensor for tensor in inputs if tensor.requires_grad]
    assert got.requires_grad == bool(live)
    if live:
        assert_close(gradients(got, live), gradients(want, live), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", *(pytest.param(one, marks=pytest.mark.slow) for one in ("sum", "none"))])
def test_gradcheck(reduction: str) -> None:
    hidden, weight, bias, target = operands(shape=(5,))

    def loss(*inputs: Tensor) -> Tensor:
        return linear_cross_entropy(
            inputs[0], inputs[1], target, bias=inputs[2], reduction=reduction, softcap=4.0, tile=2
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_all_targets_ignored_is_what_pytorch_says(reduction: str, dtype: torch.dtype) -> None:
    hidden, weight, _, target = operands(dtype=dtype)
    target.fill_(-100)
    got = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    want = reference(hidden, weight, target, reduction=reduction)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    for gradient in gradients(got.sum(), [hidden, weight]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_tokens_is_what_pytorch_says() -> None:
    hidden, weight, _, target = operands(shape=(0,))
    assert linear_cross_entropy(hidden, weight, target).isnan()
    assert linear_cross_entropy(hidden, weight, target, reduction="sum") == 0
    assert linear_cross_entropy(hidden, weight, target, reduction="none").shape == (0,)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("scale", [1.0, 65536.0, 1 / 3])
def test_low_precision_and_any_scale(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    *inputs, target = operands(dtype=dtype, shape=(64,))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got = linear_cross_entropy(inputs[0], inputs[1], target, bias=inputs[2], tile=16)
    want = reference(exact[0], exact[1], target, bias=exact[2])
    assert got.dtype is torch.float32
    assert relative_error(got.double(), want) <= tolerance
    made = torch.autograd.grad(got * scale, inputs)
    for gradient, other, tensor in zip(made, torch.autograd.grad(want * scale, exact), inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert relative_error(gradient.double(), other) <= tolerance


def test_bf16_weight_gradient_over_many_tiles_is_as_good_as_one_matmul() -> None:
    *inputs, target = operands(dtype=torch.bfloat16, shape=(4096,))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
    want = torch.autograd.grad(reference(exact[0], exact[1], target), exact[1])[0]
    tiled = torch.autograd.grad(linear_cross_entropy(inputs[0], inputs[1], target, tile=8), inputs[1])[0]
    native = torch.autograd.grad(linear_cross_entropy(inputs[0], inputs[1], target, backend="native"), inputs[1])[0]
    error = [float((gradient.double() - want).norm() / want.norm()) for gradient in (tiled, native)]
    assert error[0] <= 1.1 * error[1]


def test_autocast_forward_and_backward() -> None:
    hidden, weight, bias, target = operands(dtype=torch.float32)
    inputs = [hidden, weight, bias]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, target, bias=bias, tile=7)
        made = torch.autograd.grad(got, inputs)
    want = reference(exact[0], exact[1], target, bias=exact[2])
    assert 1e-7 < relative_error(got.double(), want) <= 1e-2
    for gradient, other in zip(made, torch.autograd.grad(want, exact), strict=True):
        assert gradient.dtype is torch.float32
        assert relative_error(gradient.double(), other) <= 2e-2


def test_tied_weight_and_two_uses_in_one_graph() -> None:
    _, weight, _, target = operands()
    ids = target.clamp(min=0)

    def total(loss: Any) -> Tensor:
        hidden = functional.embedding(ids, weight)
        return loss(hidden, weight, target) + 0.5 * loss(hidden * 2, weight, target, reduction="sum")

    assert_close(gradients(total(linear_cross_entropy), [weight]), gradients(total(reference), [weight]), 1e-12)


def test_backward_twice_gives_the_same_twice() -> None:
    hidden, weight, _, target = operands()
    loss = linear_cross_entropy(hidden, weight, target, tile=5)
    first = torch.autograd.grad(loss * 3, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss * 3, [hidden, weight])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_accumulation_over_two_batches_equals_one_batch() -> None:
    hidden, weight, _, target = operands(shape=(8,))
    count = (target != -100).sum()
    for part in (slice(0, 3), slice(3, 8)):
        linear_cross_entropy(hidden[part], weight, target[part], num_items=count).backward()
    want = torch.autograd.grad(reference(hidden, weight, target), weight)[0]
    assert relative_error(weight.grad, want) <= 1e-12


def test_second_derivative_is_refused() -> None:
    hidden, weight, _, target = operands()
    loss = linear_cross_entropy(hidden, weight, target)
    with pytest.raises(LossBackendError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_num_items_gives_the_loss_its_shape() -> None:
    hidden, weight, _, target = operands()
    assert linear_cross_entropy(hidden, weight, target, num_items=torch.tensor([9])).shape == (1,)


def test_works_where_torch_compile_traces() -> None:
    hidden, weight, _, target = operands()

    @torch.compile(backend="eager")
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, target) + 1

    want = reference(hidden * 2, weight, target) + 1
    assert_close(gradients(loss(hidden, weight), [hidden, weight]), gradients(want, [hidden, weight]), 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, "there are: none, sum, mean"),
        ({"backend": "fast"}, "there are: auto, liger, tiled, native"),
        ({"tile": 0}, "give 1 or more"),
        ({"softcap": 0.0}, "divides by zero"),
        ({"label_smoothing": 1.5}, r"not in \[0, 1\]"),
        ({"reduction": "none", "num_items": 3}, "divide the losses yourself"),
        ({"num_items": torch.ones(2)}, "has 2 elements"),
        ({"target": torch.zeros(3, 12, dtype=torch.int64)}, r"give target \(3, 11\)"),
        ({"target": torch.zeros(3, 11)}, "torch.int64"),
        ({"weight": torch.zeros(7, 5)}, "do not go together"),
        ({"bias": torch.zeros(5)}, r"does not go with weight \(37, 12\): give \(37,\)"),
        ({"weight": torch.zeros(HIDDEN, VOCABULARY)}, r"weight\.t\(\) would go with this hidden"),
        ({"weight": torch.zeros(0, HIDDEN)}, "has no class"),
        ({"weight": torch.zeros(VOCABULARY, HIDDEN, dtype=torch.int8)}, r"torch\.int8.* takes torch\.float16"),
        ({"weight": torch.zeros(VOCABULARY, HIDDEN, device="meta")}, r"weight on meta: .*weight\.to\('cpu'\)"),
        ({"target": torch.zeros(3, 11, dtype=torch.int64, device="meta")}, "target on meta"),
        ({"weight": torch.zeros(VOCABULARY, HIDDEN), "backend": "native"}, r"torch\.float32 and torch\.float64"),
        ({"reduction": ["mean"]}, "there are: none, sum, mean"),
        ({"softcap": float("inf")}, "not a finite number"),
        ({"logit_scale": float("nan")}, "not a finite number"),
    ],
)
def test_bad_input_says_what_would_work(change: dict[str, Any], message: str) -> None:
    hidden, weight, _, target = operands()
    with pytest.raises(ArgumentError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "target": target} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": [[1.0]]}, "hidden=.*is no tensor: give the hidden states"),
        ({"target": [0, 1]}, r"target=\[0, 1\] \(list\) is no tensor"),
        ({"bias": 0.5}, "bias=0.5"),
        ({"ignore_index": 0.5}, "ignore_index=0.5 is no class index"),
        ({"ignore_index": None}, "ignore_index=None"),
        ({"label_smoothing": "some"}, "label_smoothing='some' is not a finite number"),
        ({"num_items": True}, "num_items=True"),
        ({"tile": 2.5}, "tile=2.5 is not a number of tokens"),
    ],
)
def test_what_is_of_another_type_says_what_is_taken(change: dict[str, Any], message: str) -> None:
    hidden, weight, _, target = operands()
    with pytest.raises(ArgumentTypeError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "target": target} | change))


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_a_target_that_is_no_class_is_named(backend: str, wrong: int) -> None:
    hidden, weight, _, target = operands()
    target.clamp_(min=0)[1, 2] = wrong
    said = rf"target holds {wrong} \(token 13\): a weight of 37 rows has classes 0 to 36, and ignore_index=-100"
    with pytest.raises(ArgumentError, match=said):
        linear_cross_entropy(hidden, weight, target, backend=backend)
    assert torch.isfinite(linear_cross_entropy(hidden, weight, target, backend=backend, ignore_index=wrong).detach())


def test_liger_fails_loudly_and_auto_says_why_once(caplog: Any) -> None:
    hidden, weight, _, target = operands()
    with pytest.raises(LossBackendError, match=r"backend='liger' cannot compute this loss: .*'tiled' can"):
        linear_cross_entropy(hidden, weight, target, backend="liger")
    head_loss._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        for _ in range(3):
            linear_cross_entropy(hidden, weight, target)
    assert [record.message for record in caplog.records if "not by liger" in record.message] == [
        "head and loss run by this package's own tiles, not by liger: "
        "the hidden states are on cpu, its kernels need CUDA"
    ]


def test_tile_fits_its_bytes_and_is_even() -> None:
    cuda = torch.device("cuda")
    tile = tiles.tile_tokens(131_072, 128_256, torch.bfloat16, cuda)
    assert tile * 128_256 * 2 <= tiles.TILE_BYTES["cuda"]
    assert tile % tiles.TILE_MULTIPLE == 0
    assert tiles.tile_tokens(100, 128_256, torch.bfloat16, cuda) == 100
    assert tiles.tile_tokens(0, 128_256, torch.bfloat16, cuda) == 1
    assert tiles.tile_tokens(10, 1 << 40, torch.bfloat16, cuda) == 1
