"""Attention under spans against attention under the mask of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.blocks import spans as spans_module
from memo_runtime.blocks.operators import operator_flops, pin_kind
from memo_runtime.blocks.spans import dense_mask, spans_tensor
from memo_runtime.execution.mixers import masked, varlen
from memo_runtime.execution.mixers.masked import masked_attention
from memo_runtime.records import PinKind
from tests.blocks.test_spans import CASES, TOKENS

OPERATOR = torch.ops.memo_runtime.masked_attention.default


def tensors(rows: int = 3, *, depth: int = 8, wide: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((rows, TOKENS, 4, depth), (rows, TOKENS, 2, depth), (rows, TOKENS, 2, wide))
    made = [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]
    return [one.requires_grad_() for one in made]


def compare(spans: Tensor, given: list[Tensor], scale: float | None = None) -> float:
    grad = torch.randn(*given[0].shape[:3], given[2].shape[-1], generator=torch.Generator().manual_seed(5)).to(given[0])
    found = []
    for run in (
        masked_attention(*given, spans, scale),
        scaled_dot_product_attention(*given, attn_mask=dense_mask(spans, TOKENS), scale=scale, enable_gqa=True),
    ):
        found.append([run, *torch.autograd.grad(run, given, grad)])
    together = sum(b.detach().norm().item() ** 2 for b in found[1]) ** 0.5
    return max((a - b).detach().norm().item() for a, b in zip(*found, strict=True)) / max(together, 1.0)


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_under_that_mask(name):
    first, end = CASES[name]
    assert compare(spans_tensor(first[None], end[None]), tensors()) < 1e-13


def test_every_row_may_have_spans_of_its_own():
    names = ("documents", "window", "padding behind", "padding in front")
    spans = spans_tensor(torch.stack([CASES[one][0] for one in names]), torch.stack([CASES[one][1] for one in names]))
    assert compare(spans, tensors(4), scale=0.3) < 1e-13


@pytest.mark.parametrize("name", ["window", "documents"])
def test_values_may_have_another_width(name):
    first, end = CASES[name]
    assert compare(spans_tensor(first[None], end[None]), tensors(wide=6)) < 1e-13


def test_no_tensor_of_all_pairs_is_made(monkeypatch):
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in (out if isinstance(out, tuple) else (out,)) if isinstance(one, Tensor))
            return out

    monkeypatch.setattr(spans_module, "_CHUNK", (4, 4))
    query, key, value = (one.detach() for one in tensors(1))
    spans = spans_tensor(*(one[None] for one in CASES["window"]))
    with Watch():
        output, lse = masked._forward(query, key, value, spans, 1.0)
        masked._backward(output, query, key, value, spans, output, lse, 1.0)
    assert max(sizes) == query.numel() < TOKENS * TOKENS


def test_arguments_take_the_precision_of_autocast():
    given = [one.detach().float().requires_grad_() for one in tensors()]
    spans = spans_tensor(*(one[None] for one in CASES["window"]))
    with torch.autocast("cpu", torch.bfloat16):
        output = masked_attention(*given, spans)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in given)


def test_it_runs_on_meta_and_its_results_are_token_major_there_too():
    given = [one.detach().to("meta").requires_grad_() for one in tensors()]
    spans = spans_tensor(*(one[None].to("meta") for one in CASES["window"]))
    output = masked_attention(*given, spans)
    real = masked_attention(*tensors(), spans_tensor(*(one[None] for one in CASES["window"])))
    assert output.stride() == real.stride()
    assert output.shape == real.shape
    assert [one.shape for one in torch.autograd.grad(output.sum(), given)] == [one.shape for one in given]


def test_it_is_pinned_as_a_mixer_and_counts_the_pairs_that_are_seen():
    assert pin_kind(str(OPERATOR)) is PinKind.MIXER
    given = [one.detach() for one in tensors()]
    spans = spans_tensor(*(one[None] for one in CASES["window"]))
    seen = 3 * 4 * int(dense_mask(spans, TOKENS).sum())
    assert operator_flops(OPERATOR, (*given, spans, 1.0), {}, None) == 2 * seen * 16
    full = spans_tensor(*(one[None] for one in CASES["full"]))
    plain = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert operator_flops(OPERATOR, (*given, full, 1.0), {}, None) == operator_flops(plain, given, {}, None)


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
def test_what_a_kernel_left_is_made_again_in_its_own_shape(kernel):
    lse = torch.randn(2, 3, 10)
    piece = next(iter(masked.layout_of(spans_tensor(*(one[None, :10] for one in CASES["causal"])), 10).pieces))
    saved = masked._saved_again(kernel, lse, piece)
    assert torch.equal(masked._rows_of(saved, piece), lse)


# ---- the varlen kernel's part, with the kernel itself by plain attention


def by_document(*given, **settings):
    """What flash attention's varlen kernel yields, from its arguments; and its gradients."""
    query, key, value, begins, _, longest, _, dropout, causal, _ = given
    assert causal
    assert not dropout
    groups = query.shape[1] // key.shape[1]
    output, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    lengths = begins.diff()
    assert lengths.min() > 0
    assert longest == lengths.max()
    assert begins[-1] == len(query)
    window = settings.get("window_size_left", len(query))
    for start, stop in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        places = torch.arange(stop - start)
        seen = (places <= places[:, None]) & (places >= places[:, None] - window)
        keys, values = (one[start:stop].repeat_interleave(groups, dim=1) for one in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], keys) * settings["scale"]
        scores = scores.masked_fill(~seen, float("-inf"))
        output[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        lse[:, start:stop] = scores.logsumexp(-1)
    return output, lse, None, None, None


def backward_by_document(grad, *saved, scale, **window):
    query, key, value, _, lse, begins, begins_k, longest, longest_k, dropout, causal, *_ = saved
    given = [one.detach().requires_grad_() for one in (query, key, value)]
    with torch.enable_grad():
        again = by_document(*given, begins, begins_k, longest, longest_k, dropout, causal, False, scale=scale, **window)
        found = torch.autograd.grad(again[0], given, grad)
    assert lse.shape == (query.shape[1], len(query))
    return found


@pytest.mark.parametrize("long", [1000, 25, 1])
@pytest.mark.parametrize(
    "names", [("documents", "padding in front", "documents"), ("window",), ("window in documents",), ("causal",)]
)
def test_sections_of_documents_are_the_whole(names, long, monkeypatch):
    first, end = (torch.stack([CASES[one][at] for one in names]) for at in (0, 1))
    spans = spans_tensor(first, end)
    monkeypatch.setattr(varlen, "_LONG", long)

    def sections_of(layout, query, key, value):
        return tuple(varlen.make_sections(layout.documents, TOKENS, query.device))

    class Kernels:
        _flash_attention_forward = staticmethod(by_document)
        _flash_attention_backward = staticmethod(backward_by_document)

    monkeypatch.setattr(masked, "sections_of", sections_of)
    monkeypatch.setattr(varlen, "aten", Kernels)
    rows = 3 if len(names) == 1 else len(names)
    assert compare(spans, tensors(rows)) < 1e-13


def test_sections_hold_short_documents_together_and_long_ones_alone(monkeypatch):
    monkeypatch.setattr(varlen, "_LONG", 20)
    first, end = CASES["documents"]
    layout = masked.layout_of(spans_tensor(first.expand(2, -1), end.expand(2, -1)), TOKENS)
    found = list(varlen.make_sections(layout.documents, TOKENS, torch.device("cpu")))
    assert [(one.start, one.stop, one.piece is None, one.longest) for one in found] == [
        (0, 20, False, 0), (20, 22, True, 1), (22, 60, False, 0), (60, 80, False, 0), (80, 82, True, 1),
        (82, 120, False, 0),
    ]  # fmt: skip
    assert found[1].begins.tolist() == [0, 1, 2]
