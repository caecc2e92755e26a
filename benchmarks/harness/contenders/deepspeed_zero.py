"""DeepSpeed's set for long contexts with ZeRO-Offload: its engine keeps master weights, gradients and optimizer states
in host memory, and its AdamW updates them there.

One process, ZeRO stage 2, as its tutorial has it for one GPU. Master weights and states are in float32, as its bf16
training has them, where everybody else's states are in the parameters' dtype.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from benchmarks.harness.contenders.deepspeed import DeepSpeed
from benchmarks.harness.contenders.packages import DEEPSPEED, SkippedError, imported, need
from benchmarks.harness.geometry import Scope
from benchmarks.harness.subject import OnGradients, attention_kernel
from memo_runtime.rehearsal.cpu_peak import storage_bytes

#: Of its tutorial on ZeRO-Offload; pinning is its default, said so that a row has it.
_ZERO = {
    "stage": 2,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "contiguous_gradients": True,
    "overlap_comm": True,
}
#: Dtypes that it trains without scaling the loss -> what its configuration says of them.
_PRECISION: dict[str, dict[str, Any]] = {"bfloat16": {"bf16": {"enabled": True}}, "float32": {}}
_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_RANK = "LOCAL_RANK"


class DeepSpeedZeroOffload(DeepSpeed):
    """``deepspeed`` in DeepSpeed's engine, with its optimizer on the host."""

    _engine: Any = None
    _optimizer: Any = None

    def install(self) -> None:
        """The set for long contexts, then the engine around the model.

        Raises:
            SkippedError: there is no optimizer, DeepSpeed does not train this dtype on this device, is not installed,
                or its optimizer cannot be compiled.
        """
        self._check()
        super().install()
        config = self._config()
        try:
            self._engine, self._optimizer = self._initialized(config)
        except BaseException:
            self.close()
            raise
        self.settings |= {"deepspeed.initialize": config, "optimizer": "DeepSpeedCPUAdam, states in float32"}

    def _check(self) -> None:
        name, settings = self.job.contender, self.subject.settings
        if settings.scope != Scope.STEP:
            raise SkippedError(f"{name} is deepspeed where there is no optimizer: use --scope step")
        if settings.dtype not in _PRECISION:
            raise SkippedError(f"{name} trains {' and '.join(_PRECISION)} only, not {settings.dtype}")
        need(name, [DEEPSPEED])
        found = imported(name, DEEPSPEED, "deepspeed.accelerator").get_accelerator().device_name()
        if found != self.device.type:
            raise SkippedError(f"{name} is on {found} here: use --device {found}, or set DS_ACCELERATOR")
        builders = imported(name, DEEPSPEED, "deepspeed.ops.op_builder")
        try:
            builders.CPUAdamBuilder().load()
        except Exception as error:  # of compilers, of what looks for them, and its own
            raise SkippedError(
                f"{name} needs DeepSpeed's optimizer for CPUs, which cannot be compiled here ({error}): it takes "
                "a C++ compiler and ninja"
            ) from error

    def _config(self) -> dict[str, Any]:
        defaults = self.subject.optimizer.defaults
        wanted = {name: defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {**wanted, "betas": list(wanted["betas"])}},
            "zero_optimization": _ZERO,
            **_PRECISION[self.subject.settings.dtype],
        }

    def _initialized(self, config: dict[str, Any]) -> tuple[Any, Any]:
        import deepspeed

        backend, model = _BACKENDS[self.device.type], self.subject.model
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
        with _local_rank():
            engine, optimizer, *_ = deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=config
            )
        return engine, optimizer

    def step(self, on_gradients: OnGradients | None = None) -> None:
        """One step of the engine, inside the manager of inputs."""
        assert self._batch is not None, "start comes first"
        inputs, target = self._batch
        with self._manager, attention_kernel(self.subject.settings.attention):
            self._engine.backward(self._engine(input_ids=inputs, labels=target, use_cache=False).loss)
        if on_gradients is not None:
            on_gradients(_HostGradients(self.subject.model))
        self._engine.step()

    def resident_bytes(self) -> int:
        """With master weights, their gradients and states, which are in the same memory on the CPU."""
        held = super().resident_bytes()
        masters = [one for group in self._optimizer.param_groups for one in group["params"]]
        states = (v for s in self._optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        return held + storage_bytes([*masters, *(one.grad for one in masters if one.grad is not None), *states])

    def close(self) -> None:
        """Let go of the engine and its group."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self._optimizer = None
        if distributed.is_initialized():
            from deepspeed import comm

            # PyTorch's alone would leave it with groups that are no more.
            comm.destroy_process_group()


class _HostGradients(Mapping[str, torch.Tensor]):
    """The gradients that the engine has in host memory, on the device one at a time: it may have no room for all."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    def __getitem__(self, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        gradient: torch.Tensor = safe_get_full_grad(self._parameters[name])
        return gradient

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@contextmanager
def _local_rank() -> Iterator[None]:
    """What its engine asks the environment for, and a launcher would say."""
    before = os.environ.get(_RANK)
    os.environ[_RANK] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_RANK]
        else:
            os.environ[_RANK] = before
