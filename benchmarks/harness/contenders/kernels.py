"""Kernels alone: the blocks' matrix products and attention as whole-length calls, forward and backward.

Nothing else runs, nothing is repeated, nothing is saved, and attention uses the fastest kernel that the device has:
the time that no manager of memory can beat without doing less arithmetic.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.contenders.packages import SkippedError
from benchmarks.harness.geometry import Linear
from benchmarks.harness.job import Job
from benchmarks.harness.subject import BACKENDS, OnGradients, Subject
from memo_runtime.rehearsal.cpu_peak import storage_bytes

#: Length at which kernels of attention are compared; their order does not change with it.
_TRIAL_TOKENS = 8192
_TRIALS = 3
_FUSED = ("cudnn", "flash", "efficient")


class Kernels(Contender):
    """Products write into buffers that they share, so that even the longest step needs little memory."""

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self.device = torch.device(settings.device)
        self._dtype = getattr(torch, settings.dtype)
        # The model that others train, without its numbers: what is refused for them is refused here.
        found = Subject(replace(settings, device="meta"), longest=job.model_length).shape
        # Blocks alone in either scope: head and loss are no part of the definition.
        self.shape = replace(found, vocabulary=0)
        if self.shape.experts > 1:
            raise SkippedError("kernels are those of attention and one MLP, and this geometry has experts")
        if min(self.shape.windows, default=job.model_length) < job.model_length:
            raise SkippedError(
                f"kernels are those of attention to all tokens before, and blocks of this geometry have a window of "
                f"{min(self.shape.windows):,} tokens"
            )
        torch.manual_seed(settings.seed)
        self._weights = {linear: self._random(linear.outputs, linear.inputs) for linear in self.shape.linears}
        self._weight_gradient = torch.empty_like(max(self._weights.values(), key=torch.Tensor.numel)).flatten()
        self._heads: tuple[torch.Tensor, ...] = ()
        self._choose_attention(min(_TRIAL_TOKENS, min(job.lengths)))

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self._dtype)

    def _choose_attention(self, tokens: int) -> None:
        self._make_heads(tokens)
        # The unfused kernel makes whole matrices of weights: only where there is no other.
        for names in (_FUSED, ("math",)):
            self._trial = {name: seconds for name in names if (seconds := self._try(name)) is not None}
            if self._trial:
                break
        self.backend = min(self._trial, key=lambda name: self._trial[name])
        self.finish()

    def _try(self, name: str) -> float | None:
        """Seconds of attention with kernel ``name``; None: not on this device, or not for these shapes."""
        self.backend = name
        try:
            self._attention()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None
        self._finish()
        started = time.perf_counter()
        for _ in range(_TRIALS):
            self._attention()
        self._finish()
        return (time.perf_counter() - started) / _TRIALS

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _make_heads(self, tokens: int) -> None:
        heads = {"query": self.shape.heads, "key": self.shape.kv_heads, "value": self.shape.kv_heads}
        # Token-major in memory, as projections leave them.
        made = {n: self._random(1, tokens, c, self.shape.head_dim).transpose(1, 2) for n, c in heads.items()}
        self._heads = tuple(tensor.detach().requires_grad_() for tensor in made.values())
        self._output_gradient = self._random(1, tokens, self.shape.heads, self.shape.head_dim).transpose(1, 2)

    def start(self, tokens: int) -> None:
        """Buffers for ``tokens``, filled with random numbers: zeros would let the chip run faster."""
        self._tokens = tokens
        widest = max(max(linear.inputs, linear.outputs) for linear in self.shape.linears)
        self._inputs, self._outputs = self._random(tokens * widest), self._random(tokens * widest)
        self._input_gradient = torch.empty_like(self._inputs)
        self._make_heads(tokens)

    def finish(self) -> None:
        """Drop the buffers."""
        self._inputs = self._outputs = self._input_gradient = self._output_gradient = torch.empty(0)
        self._heads = ()

    def step(self, on_gradients: OnGradients | None = None) -> None:
        """Every kernel of every block once."""
        for _ in range(self.shape.blocks):
            for linear, weight in self._weights.items():
                self._product(linear, weight)
            self._attention()

    def _product(self, linear: Linear, weight: torch.Tensor) -> None:
        inputs = self._inputs[: self._tokens * linear.inputs].view(self._tokens, linear.inputs)
        outputs = self._outputs[: self._tokens * linear.outputs].view(self._tokens, linear.outputs)
        torch.mm(inputs, weight.t(), out=outputs)
        # The output stands for its own gradient: numbers of the same size.
        gradient = self._input_gradient[: self._tokens * linear.inputs].view(self._tokens, linear.inputs)
        torch.mm(outputs, weight, out=gradient)
        torch.mm(outputs.t(), inputs, out=self._weight_gradient[: linear.size].view(linear.outputs, linear.inputs))

    def _attention(self) -> None:
        query, key, value = self._heads
        with sdpa_kernel([BACKENDS[self.backend]]):
            output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            torch.autograd.grad(output, self._heads, self._output_gradient)

    def model_flops(self, tokens: int) -> int:
        """FLOPs of the blocks."""
        return self.shape.model_flops(tokens)

    def resident_bytes(self) -> int:
        """Weights and buffers."""
        buffers = (self._inputs, self._outputs, self._input_gradient, self._output_gradient, self._weight_gradient)
        return storage_bytes([*self._weights.values(), *self._heads, *buffers])

    def details(self) -> dict[str, object]:
        """The kernel that was chosen, and the seconds of each at the trial length."""
        return {"attention": self.backend, "attention_trial_seconds": self._trial}
