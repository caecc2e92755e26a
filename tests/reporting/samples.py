"""A plan, its profile and a report as literals, for tests of files and tables."""

from dataclasses import replace

from memo_runtime.records import (
    Action,
    ArgumentAxes,
    BlockPlan,
    BlockProfile,
    Executor,
    Fingerprint,
    Forecast,
    Growth,
    Limits,
    Link,
    ModelStates,
    Pin,
    PinKind,
    Plan,
    Profile,
    Role,
    SavedTensor,
    TensorGroup,
    TokenAxis,
)
from memo_runtime.reports import BlockReport, Report, Totals

BLOCK = BlockProfile(
    name="model.layers.0",
    kind="LlamaDecoderLayer",
    stack=0,
    tokens=4096,
    token_dim=1,
    input_leaf=0,
    arguments=(ArgumentAxes(leaf=0, dims=(1,)), ArgumentAxes(leaf=2, dims=(2, 3))),
    saved=(
        SavedTensor(index=0, group=0, axis=TokenAxis(dim=1, outer=3, inner=64)),
        SavedTensor(index=1, group=1),
    ),
    groups=(
        TensorGroup(role=Role.INPUT, size=Growth(linear=0.1 + 0.2)),
        TensorGroup(
            role=Role.WHOLE, size=Growth(quadratic=1e-300, multiple=16), splits=False, estimated=True
        ),
    ),
    pins=(Pin(op="aten.mm.default", call=0, output=0, kind=PinKind.MIXER, group=0, axis=TokenAxis(dim=1)),),
    sliceable=True,
    replayable=True,
    forward_seconds=Growth(constant=1e-4, linear=1 / 3),
)

PROFILE = Profile(
    fingerprint=Fingerprint(model="a1b2", blocks="c3d4", batch="ids:int64[3]", torch="2.13", device="cpu"),
    device_type="cpu",
    device_name="cpu",
    device_bytes=16 * 1024**3,
    host_bytes=16 * 1024**3,
    host_source="machine",
    link=Link(to_host=5.5e9, to_device=float("inf"), measured=False),
    states=ModelStates(parameters=1000, buffers=8, gradients=1000, optimizer=2000),
    rows=3,
    blocks=(BLOCK, replace(BLOCK, name="model.layers.1"), replace(BLOCK, name="model.layers.2")),
    notes=("seconds at 4,096 tokens are extrapolated from 1,024",),
)


def block_plan(
    index: int, executor: Executor = Executor.REPLAY, reason: str = "", kept: int = 0
) -> BlockPlan:
    """One block of the plan below."""
    swapped = executor is Executor.REPLAY
    return BlockPlan(
        name=f"model.layers.{index}",
        executor=executor,
        tokens=4096,
        prefix=1536 if swapped else 0,
        actions=(Action.HOST, Action.PREFIX),
        bytes_to_host=48 * 1024**2 if swapped else 0,
        bytes_to_device=48 * 1024**2 if swapped else 0,
        bytes_kept=kept,
        host_bytes=48 * 1024**2 if swapped else 0,
        recomputed_flops=12 * 10**9 if swapped else 0,
        reason=reason,
    )


FORECAST = Forecast(
    step_seconds=1.25,
    peak_bytes=3 * 1024**3,
    host_bytes=96 * 1024**2,
    bytes_to_host=96 * 1024**2,
    bytes_to_device=96 * 1024**2,
    bytes_kept=200 * 1024**2,
    recomputed_flops=24 * 10**9,
    stash_peak_bytes=200 * 1024**2,
)

PLAN = Plan(
    policy="memo",
    alpha=0.375,
    profile=PROFILE,
    limits=Limits(
        device_bytes=4 * 1024**3, device_source="budget", host_bytes=2 * 1024**3, host_source="cgroup v2"
    ),
    blocks=(block_plan(0), block_plan(1), block_plan(2, Executor.KEEP, kept=200 * 1024**2)),
    forecast=FORECAST,
    floor_bytes=2 * 1024**3,
    notes=("optimizer state is assumed: AdamW in the parameters' dtype",),
)


def block_report(index: int, executor: Executor = Executor.REPLAY, reason: str = "") -> BlockReport:
    """What one block of the report below did."""
    plan = block_plan(index, executor)
    return BlockReport(
        name=plan.name,
        executor=executor,
        reason=reason,
        alpha=plan.alpha,
        bytes_to_host=plan.bytes_to_host,
        bytes_to_device=plan.bytes_to_device,
        bytes_kept=200 * 1024**2 if executor is Executor.KEEP else 0,
        recomputed_flops=plan.recomputed_flops,
    )


REPORT = Report(
    policy="memo",
    blocks=(block_report(0), block_report(1), block_report(2, Executor.KEEP)),
    totals=Totals(
        bytes_to_host=96 * 1024**2,
        bytes_to_device=96 * 1024**2,
        bytes_kept=200 * 1024**2,
        recomputed_flops=24 * 10**9,
        peak_bytes=3 * 1024**3 + 32 * 1024**2,
        stash_peak_bytes=200 * 1024**2,
        stash_bytes=0,
        host_bytes=96 * 1024**2,
        host_bytes_in_use=0,
        open_copies=0,
        step_seconds=1.5,
        steps=7,
        forecast=FORECAST,
    ),
    states=PROFILE.states,
    notes=("key/value cache is off in training",),
)
