"""Everything the runtime raises at its users.

Each message says what was asked, what there is, and what would work. ``MemoError`` is the common base;
each class is also the built-in exception that callers of ordinary libraries expect. Nothing here
imports anything else of the project.
"""

from __future__ import annotations


class MemoError(Exception):
    """Base of every error of the runtime."""


class ArgumentError(MemoError, ValueError):
    """An argument has a value that is not taken, or does not go with another one."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of another type than what is taken."""


class NotBuiltError(MemoError, NotImplementedError):
    """Something that is announced and not built yet; names what there is instead."""


class PlanInfeasibleError(MemoError, RuntimeError):
    """No plan fits the budgets; says by how much, which length would fit, and which knob buys it."""


class HostLimitError(PlanInfeasibleError):
    """The plan, or a step that deviates from it, needs more host memory than is allowed."""


class PlanMismatchError(MemoError, ValueError):
    """A plan was made for something else; names the field that differs."""


class PlanFileError(MemoError, ValueError):
    """A profile or plan file cannot be read: missing, corrupt, or of another schema version."""


class TraceError(MemoError, RuntimeError):
    """A training step could not be turned into a trace, or a trace has not what was asked of it."""


class TraceFileError(MemoError, ValueError):
    """A trace file cannot be read: missing, corrupt, or of another schema version."""


class CheckoutMissingError(MemoError, FileNotFoundError):
    """``memo bench`` was asked for where there is no checkout with the benchmarks."""


class OutputError(MemoError, OSError):
    """A file that was asked for cannot be written."""


class NoBlocksError(MemoError, ValueError):
    """The model has no stack of repeated blocks that can be found."""


class BlockListError(MemoError, ValueError):
    """``blocks=`` is not a list of modules of this model that are called one after another."""


class AlreadyWrappedError(MemoError, RuntimeError):
    """The model is wrapped already, with another plan or other settings."""


class NotWrappedError(MemoError, RuntimeError):
    """The model is not wrapped, and what was asked needs a wrapped one."""


class OffloaderActiveError(MemoError, RuntimeError):
    """Another memory optimiser (gradient checkpointing, an offloader) is active in the same step."""


class DeviceUnavailableError(MemoError, RuntimeError):
    """CUDA was asked for and there is none."""


class BlockFallbackError(MemoError, RuntimeError):
    """``strict=True`` and a block cannot take the policy."""


class ReplayMismatchError(MemoError, RuntimeError):
    """A block saved other tensors when it was run again than in its forward; no gradient was produced."""


class StateChangedError(ReplayMismatchError):
    """A parameter or another tensor that a block has to be run again from was written to since its forward."""


class StepGivenUpError(MemoError, RuntimeError):
    """Backward through a step that an exception ended, and whose memory another step has taken since."""


class PinningError(HostLimitError):
    """The system gives no more host memory, or does not pin it.

    Attributes:
        granted: bytes that it gave and that are kept, where that was asked for (``on_refusal='go_on'``); else None.
    """

    def __init__(self, message: str, granted: int | None = None) -> None:
        super().__init__(message)
        self.granted = granted


class CopyError(MemoError, RuntimeError):
    """A copy between device and host failed; names the tensor. The next step can go on."""


class CopyUseError(MemoError, ValueError):
    """A copy that makes no sense: wrong device, freed or foreign memory, out of range, a ticket used twice."""


class NativeUnavailableError(MemoError, RuntimeError):
    """The native core was asked for (``MEMO_NATIVE=on``) and cannot be used; says why."""


class AllocatorUnavailableError(MemoError, RuntimeError):
    """The planned allocator was asked for (``layout='planned'``) and cannot be used; says why, and how to build it."""


class AllocatorPlanError(MemoError, ValueError):
    """Addresses for a step that cannot be, are another's, or need more memory than there is; nothing was enabled."""


class LossBackendError(MemoError, RuntimeError):
    """A loss was asked of a backend that cannot compute it; says why, and which one can."""


class ProfileError(MemoError, RuntimeError):
    """The model could not be profiled on the given batch."""


class RehearsalError(MemoError, RuntimeError):
    """A step could not be rehearsed: the model does not train on this batch, has no loss, or another rehearsal runs."""


class CaptureRefusedError(MemoError, RuntimeError):
    """A block cannot be executed by tiles: which operator or object stands against it, and why."""

    def __init__(self, operator: str, reason: str) -> None:
        super().__init__(f"{operator}: {reason}")
        self.operator = operator
        self.reason = reason
