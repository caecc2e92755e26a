"""The nouns: what is measured (Profile), what is decided (Plan); what happened (Report) is in reports.py.

All are frozen, torch-free values. A stage takes only the value of the stage before:

    profiling --- Profile ---> planning --- Plan ---> execution --- Report

Numbers that depend on the sequence length are a ``Growth``: a polynomial in the tokens of one
sequence, with the batch size folded into its coefficients. Row intervals are half-open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from memo_runtime.moments import Moment as Moment
from memo_runtime.moments import Stretch as Stretch
from memo_runtime.moments import TileAt as TileAt
from memo_runtime.moments import TiledProfile as TiledProfile
from memo_runtime.moments import attention_text as attention_text
from memo_runtime.placement import PlacedRequest
from memo_runtime.sizes import Bundle as Bundle
from memo_runtime.sizes import Growth as Growth
from memo_runtime.sizes import LongEnd as LongEnd
from memo_runtime.sizes import Storage as Storage

SCHEMA_VERSION = 17

#: The fetch of the block below waits until one part in so many is left of a block in backward, if it is no larger.
FETCH_PARTS = 4


class Role(StrEnum):
    """Why a group of bytes is needed by a block's backward."""

    PARAMETER = "parameter"  # weights, buffers and what is cast from them: returned as they are
    SHARED = "shared"  # block arguments other than the input (masks, rotary tables): kept once
    INPUT = "input"  # the block's input hidden state
    MIXER = "mixer"  # output of an operator that mixes tokens
    RANDOM = "random"  # dropout masks and other random numbers, routing choices, positions
    TOKEN = "token"  # token-wise: a prefix is swapped, the rest can be rebuilt
    WHOLE = "whole"  # two token dimensions or a size that depends on data: never split
    FIXED = "fixed"  # made inside the block, same size at any length: rebuilt by any rerun


#: Roles whose bytes belong to the model or to all blocks: never moved, never counted for a block.
RESIDENT_ROLES = (Role.PARAMETER, Role.SHARED)


class Action(StrEnum):
    """What execution does with a group of bytes between forward and backward."""

    KEEP = "keep"  # the tensor stays on the device as it is
    HOST = "host"  # all of it goes to the host
    PREFIX = "prefix"  # rows [0, prefix) are stashed (device rows first, then host rows), the rest rebuilt
    TAIL = "tail"  # rows [prefix, tokens) go to the host, as input of the rerun
    REBUILD = "rebuild"  # dropped; the rerun makes it


class Executor(StrEnum):
    """How one block runs."""

    KEEP = "keep"  # untouched: everything it saves stays on the device
    REPLAY = "replay"  # token prefix swapped, the rest rebuilt from the token slice, mixers replaced
    RECOMPUTE = "recompute"  # input swapped, the whole block run again in backward
    TILED = "tiled"  # tile by tile; inputs and results of attention swapped, the rest made again tile by tile
    NATIVE = "native"  # not managed in this step, for the reason given


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAxis:
    """Dimension ``dim`` has ``outer * tokens * inner`` elements, tokens in the middle of the three."""

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """The ``index``-th tensor that a block saves for backward, in order of saving.

    ``group`` indexes ``BlockProfile.groups``; ``axis`` is None where no single dimension grows with tokens.
    """

    index: int
    group: int
    axis: TokenAxis | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Bytes needed by backward that live in one storage and are therefore kept or moved once.

    Attributes:
        role: why they are needed.
        size: bytes by tokens. For ``TOKEN``, ``INPUT`` and ``MIXER`` with one token dimension it is linear.
        saved: autograd reads them in backward; False: only the rerun does (an input or a replaced output).
        splits: the token rows can be separated (one token dimension).
        estimated: the size depends on data and is only an estimate at other lengths.
        bundle: it stands for many storages, which are found at every call; None: it is one.
        storage: what it lies in and leaves there where it stays as it is (a fused projection); None: it is all of it.
    """

    role: Role
    size: Growth
    saved: bool = True
    splits: bool = True
    estimated: bool = False
    bundle: Bundle | None = None
    storage: Storage | None = None


class PinKind(StrEnum):
    """Why an operator's result is replaced by the saved one when the block is run again."""

    MIXER = "mixer"
    RANDOM = "random"
    POSITION = "position"
    ROUTING = "routing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Output ``output`` of the ``call``-th use of operator ``op`` is replaced, never recomputed.

    Attributes:
        op: qualified overload name, such as ``aten._scaled_dot_product_flash_attention.default``.
        group: index of the group that holds the value; None: nothing to hold (an empty or None output, a number).
        number: the output is this number. empty: the output is a tensor without elements.
        saved: index of the saved tensor with the same value; None: captured while the forward runs.
        axis: where the tokens are; None: the whole value is used, cut along ``dims`` if there are any.
        dims: the two token dimensions of a value that has two (a dropout mask of attention weights).
    """

    op: str
    call: int
    output: int
    kind: PinKind
    group: int | None = None
    saved: int | None = None
    axis: TokenAxis | None = None
    dims: tuple[int, ...] = ()
    number: int | None = None
    empty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentAxes:
    """Leaf ``leaf`` of the flattened (args, kwargs) of a block call has tokens along ``dims``."""

    leaf: int
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProfile:
    """What one block saves, what a rerun needs, and what both cost.

    Attributes:
        name: qualified module name. kind: class name. stack: index of its stack.
        tokens: length of one sequence at which the block will be planned (seen in the profiled call).
        token_dim: token dimension of the input hidden state.
        input_leaf: which leaf of the flattened (args, kwargs) is the input hidden state.
        way: how it was called (``BlockCall.way``): called with a mask it saves other tensors than without one. Empty:
            not known, and then no call counts as another.
        arguments: leaves that are cut along tokens for a rerun on a slice.
        sliceable: a rerun on a token slice rebuilds every token-wise tensor (checked numerically).
        replayable: a rerun at full length with pins rebuilds them (checked numerically).
        rerunnable: run again as a whole, as it was, it makes the same tensors; False: nothing of it is run again.
        reason: why not, where one of the three is False.
        dynamic: how many tensors it saves, or their sizes, depends on data; it is never sliced.
        random: the block draws random numbers of PyTorch's. draws: of Python's or NumPy's.
        stateful: its forward writes to its buffers (running statistics), or to other tensors that it holds.
        inner_autograd: its forward goes backward itself (torch.autograd.grad, backward).
        forward_seconds, backward_seconds: the block alone. rerun_seconds: by tokens rebuilt.
            write_seconds: of writing those behind a prefix, where there is one.
        forward_flops: all operators. rerun_flops: of a rerun with pins, by tokens rebuilt.
        recompute_flops: of a rerun of the whole block without pins.
        forward_peak, backward_peak: transient device bytes beyond what is saved; backward's contain the gradients of
            the block's own parameters as they come. rerun_peak: of a rerun with pins whose tensors are dropped, when
            all tokens are rebuilt. output: bytes of its results, whose gradient is there in backward.
        gradients: bytes of the gradients of its own parameters; those that two blocks share count for the one that
            goes backward first, those that are also used outside the blocks for neither.
        timed_tokens: longest length timed; seconds at other lengths are extrapolated from it.
        tiled: what it takes by tiles; None: it does not run so, for ``tiled_reason``, or nobody asked.
    """

    name: str
    kind: str
    stack: int
    tokens: int
    token_dim: int
    input_leaf: int
    way: str = ""
    arguments: tuple[ArgumentAxes, ...] = ()
    saved: tuple[SavedTensor, ...] = ()
    groups: tuple[TensorGroup, ...] = ()
    pins: tuple[Pin, ...] = ()
    sliceable: bool = False
    replayable: bool = False
    rerunnable: bool = True
    reason: str = ""
    dynamic: bool = False
    random: bool = False
    draws: bool = False
    stateful: bool = False
    inner_autograd: bool = False
    forward_seconds: Growth = field(default_factory=Growth)
    backward_seconds: Growth = field(default_factory=Growth)
    rerun_seconds: Growth = field(default_factory=Growth)
    write_seconds: Growth = field(default_factory=Growth)
    forward_flops: Growth = field(default_factory=Growth)
    rerun_flops: Growth = field(default_factory=Growth)
    recompute_flops: Growth = field(default_factory=Growth)
    forward_peak: Growth = field(default_factory=Growth)
    backward_peak: Growth = field(default_factory=Growth)
    rerun_peak: Growth = field(default_factory=Growth)
    output: Growth = field(default_factory=Growth)
    gradients: int = 0
    timed_tokens: int = 0
    tiled: TiledProfile | None = None
    tiled_reason: str = ""

    def rebuild_seconds(self, tokens: int, *, written: bool) -> float:
        """Seconds to make ``tokens`` tokens again, and, if they are ``written``, to put them behind a prefix."""
        return self.rerun_seconds.exact(tokens) + (self.write_seconds.exact(tokens) if written else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demotion:
    """What training found out about a block that its profile does not say: a rerun made something else.

    ``rerunnable``: a rerun of the whole block, as it was, is still trusted. ``tiles_only``: only tiles are not.
    ``unchained``: all is, but its input is not the result of the block below.
    """

    reason: str
    rerunnable: bool
    tiles_only: bool = False
    unchained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a profile or plan was made for; every field must agree before it is used.

    The first three are words, and after a # the hash of what they leave out.
    """

    model: str  # the parameters; hash over their names, shapes, dtypes and requires_grad
    blocks: str  # how many, first and last; hash over their names
    batch: str  # dtypes and numbers of dimensions, without sizes
    torch: str  # major.minor
    device: str  # device type and name


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Measured copy rates between device and host in bytes per second."""

    to_host: float
    to_device: float
    measured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStates:
    """Bytes of the model itself, present or still to come.

    ``optimizer`` is the state in total; ``optimizer_present`` and ``gradients_present`` are what existed when
    profiled. ``gradients_last``: of ``gradients``, those that come when all blocks have gone backward (of embeddings
    that are no head), as far as that is known. ``gradients_tied``: of embeddings that are a head as well, whose two
    gradients are summed then. ``stepping``: temporaries of the optimizer's step. ``optimizer_name``
    says whose state it is, ``assumed`` that nobody named one.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    gradients_present: int = 0
    gradients_last: int = 0
    gradients_tied: int = 0
    optimizer_present: int = 0
    stepping: int = 0
    optimizer_name: str = "AdamW"
    assumed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything planning needs, measured on one model and batch.

    Attributes:
        rows: sequences in the batch. device_bytes: usable device memory; host_bytes: usable host memory, and
            host_source says which limit that is. allocated_bytes: device bytes in use where the profile was taken
            (parameters and whatever else is alive, libraries' workspaces included), 0 on CPU.
        expandable: the device's allocator joins its free memory (expandable segments), so that it does not splinter.
        shared: bytes of block arguments that all blocks share (masks, rotary tables).
        outside_forward: device bytes alive across the stacks that belong to no block (embedding output, targets).
            entry: of these, what the first block is given, where nobody holds it once the forward is over.
        outside_peak: device bytes that the head and loss need on top, after the last block, once their gradients are
            there. loss_peak: that they need before, where the loss runs by tiles. long_end: both from a length on.
        result: device bytes of what the model returns, which its caller may hold while blocks go backward.
        outside_seconds: embedding, head and loss, forward and backward.
        norm_behind: a norm follows the blocks: its backward makes the gradient that the last one gets, and lets it go.
    """

    fingerprint: Fingerprint
    device_type: str
    device_name: str
    device_bytes: int
    host_bytes: int
    host_source: str
    link: Link
    states: ModelStates
    rows: int
    blocks: tuple[BlockProfile, ...]
    allocated_bytes: int = 0
    expandable: bool = False
    shared: Growth = field(default_factory=Growth)
    outside_forward: Growth = field(default_factory=Growth)
    entry: Growth = field(default_factory=Growth)
    outside_peak: Growth = field(default_factory=Growth)
    loss_peak: Growth = field(default_factory=Growth)
    long_end: LongEnd | None = None
    result: Growth = field(default_factory=Growth)
    outside_seconds: Growth = field(default_factory=Growth)
    norm_behind: bool = False
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def end(self, tokens: int, *, by_tiles: bool = False) -> tuple[int, int]:
        """Bytes of ``outside_peak`` and of ``loss_peak``; ``by_tiles``: where the norm runs so at any length."""
        one = self if self.long_end is None or not (by_tiles or tokens >= self.long_end.tokens) else self.long_end
        return one.outside_peak.at(tokens), one.loss_peak.at(tokens)

    def __str__(self) -> str:
        from memo_runtime.reporting.profile_table import profile_table

        return profile_table(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """What happens to one block.

    Attributes:
        tokens: sequence length planned for. prefix: rows [0, prefix) of token-wise tensors are stashed, of which
            rows [0, device_rows) stay on the device; rows [prefix, tokens) are rebuilt. By tiles, products of rows
            [0, prefix) are kept, and with device_rows = tokens the stash stays on the device.
        sent: by tiles, products of rows [prefix - sent, prefix) go to the host, and the others stay on the device.
        groups: by tiles, of heads, which go through attention one after another.
        mixer_inputs: by tiles, what its mixers are given (queries, keys, values) stays on the device, and is not made
            again.
        from_below: by tiles, its input is not stashed, but made again from the stash of the block below, which is
            for_above then.
        late: by tiles, what it has in host memory comes when it goes backward and not before, and inputs of a run of
            blocks are made again one after another. passes: how many of them are made by way of its result.
        actions: one per group of the block's profile. resident: what its rerun starts from stays on the device.
        bytes_to_host, bytes_to_device: copied in one step. bytes_kept: stashed on the device.
        host_bytes: host memory occupied, with the alignment of every slot.
        recomputed_flops: spent again in backward. reason: why the executor is not the policy's. tile: its tokens.
    """

    name: str
    executor: Executor
    tokens: int
    prefix: int
    actions: tuple[Action, ...]
    device_rows: int = 0
    bytes_to_host: int = 0
    bytes_to_device: int = 0
    bytes_kept: int = 0
    host_bytes: int = 0
    recomputed_flops: int = 0
    reason: str = ""
    tile: int = 0
    resident: bool = False
    sent: int = 0
    groups: int = 1
    from_below: bool = False
    for_above: bool = False
    late: bool = False
    passes: int = 0
    mixer_inputs: bool = False

    @property
    def alpha(self) -> float:
        """Share of tokens that are not rebuilt; by tiles, of those whose matrix products are not."""
        return self.prefix / self.tokens if self.tokens else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Predicted totals of one steady step; the names are those of ``Totals``.

    ``mfu``: model FLOPs as a share of the devices' peak, 0 where that was not asked for. Of offline plans:
    ``collective_bytes``: what one of several GPUs sends, ``collective_seconds``: what that takes alone, hidden or not.
    """

    step_seconds: float = 0.0
    peak_bytes: int = 0
    host_bytes: int = 0
    bytes_to_host: int = 0
    bytes_to_device: int = 0
    bytes_kept: int = 0
    recomputed_flops: int = 0
    stash_peak_bytes: int = 0
    mfu: float = 0.0
    collective_bytes: int = 0
    collective_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The budgets a plan obeys, and where they come from."""

    device_bytes: int
    device_source: str
    host_bytes: int
    host_source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What happens to each byte of a training step. ``print(plan)`` is a table.

    ``policy`` and ``alpha`` are what was asked; ``profile`` is what the plan was made from, so that execution
    needs nothing else. ``strict``: what cannot be carried out of it in a step is an error. ``accumulating``: for steps
    that start with gradients already there; False: they come as backward walks down. ``norm_by_tiles``: so runs the
    norm behind the blocks at any length. ``seq_len``: tokens of one whole sequence, of which each of ``gpus`` devices
    holds a part; all else is of one device. ``placement``: where each request of the step lives, where that was
    planned too.
    """

    policy: str
    alpha: float | None
    profile: Profile
    limits: Limits
    blocks: tuple[BlockPlan, ...]
    forecast: Forecast
    floor_bytes: int = 0
    strict: bool = False
    accumulating: bool = False
    norm_by_tiles: bool = False
    seq_len: int = 0
    gpus: int = 1
    placement: tuple[PlacedRequest, ...] = ()
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __str__(self) -> str:
        from memo_runtime.reporting.plan_table import plan_table

        return plan_table(self)
