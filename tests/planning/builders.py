"""Profiles as literals: a Llama-like block, blocks that cannot be sliced, and models of them."""

from dataclasses import replace

from memo_runtime.records import (
    BlockProfile,
    Fingerprint,
    Growth,
    Link,
    ModelStates,
    Profile,
    Role,
    TensorGroup,
)
from memo_runtime.units import GiB

FINGERPRINT = Fingerprint(model="a1b2", blocks="c3d4", batch="input_ids:int64[1]", torch="2.13", device="cuda H100")


def group(role, linear=0, *, constant=0, quadratic=0, saved=True, splits=None, estimated=False, multiple=1):
    """A group of bytes; groups with token rows split unless told otherwise."""
    token_wise = role in (Role.TOKEN, Role.INPUT, Role.MIXER, Role.RANDOM) and multiple == 1
    return TensorGroup(
        role=role,
        size=Growth(constant=constant, linear=linear, quadratic=quadratic, multiple=multiple),
        saved=saved,
        splits=token_wise if splits is None else splits,
        estimated=estimated,
    )


def llama_groups(hidden=2048, kv=1024, mlp=8192, element=2):
    """What one Llama layer saves, bytes per token: norms, q, k, v, attention, gate, up and product."""
    row = hidden * element
    return (
        group(Role.PARAMETER, constant=hidden * element),
        group(Role.PARAMETER, constant=hidden * mlp * element),
        group(Role.SHARED, 2 * 128 * element),
        group(Role.INPUT, row),
        group(Role.TOKEN, row),  # normed input
        group(Role.TOKEN, 4),  # its reciprocal deviation
        group(Role.TOKEN, row),  # q
        group(Role.TOKEN, kv * element),  # k
        group(Role.TOKEN, kv * element),  # v
        group(Role.MIXER, row),  # attention output
        group(Role.MIXER, 4 * 16),  # log-sum-exp
        group(Role.TOKEN, row),  # residual
        group(Role.TOKEN, row),  # normed residual
        group(Role.TOKEN, mlp * element),  # gate
        group(Role.TOKEN, mlp * element),  # up
        group(Role.TOKEN, mlp * element),  # activation
        group(Role.TOKEN, mlp * element),  # product
        group(Role.FIXED, constant=64),
    )


def llama_block(number=0, *, stack=0, tokens=131072, groups=None, hidden=2048, mlp=8192, **changes):
    """One layer on an H100-like device: 600 TFLOP/s dense, attention at the same rate."""
    groups = llama_groups(hidden=hidden, mlp=mlp) if groups is None else groups
    dense = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * mlp)
    rate = 6e14
    block = BlockProfile(
        name=f"model.layers.{number}",
        kind="LlamaDecoderLayer",
        stack=stack,
        tokens=tokens,
        token_dim=1,
        input_leaf=0,
        groups=groups,
        sliceable=True,
        replayable=True,
        forward_seconds=Growth(linear=dense / rate, quadratic=2 * hidden / rate),
        backward_seconds=Growth(linear=2 * dense / rate, quadratic=5 * hidden / rate),
        rerun_seconds=Growth(constant=1e-5, linear=dense * 0.75 / rate),
        forward_flops=Growth(linear=dense, quadratic=2 * hidden),
        rerun_flops=Growth(linear=dense * 3 // 4),
        recompute_flops=Growth(linear=dense, quadratic=2 * hidden),
        forward_peak=Growth(linear=2 * hidden * 2),
        backward_peak=Growth(linear=4 * hidden * 2),
        rerun_peak=Growth(linear=(4 * mlp + hidden) * 2),
        output=Growth(linear=hidden * 2),
        gradients=120 * 10**6,
        timed_tokens=tokens,
    )
    return replace(block, **changes)


def opaque(block, reason="it saves other tensors when it is run on a slice", *, replayable=False):
    """``block`` as one that cannot be run on a slice."""
    return replace(block, sliceable=False, replayable=replayable, reason=reason)


def profile_of(blocks, **changes):
    """A profile of ``blocks`` on an 80 GB device with plenty of host memory."""
    parameters = 2 * 10**9
    profile = Profile(
        fingerprint=FINGERPRINT,
        device_type="cuda",
        device_name="H100",
        device_bytes=79 * GiB,
        host_bytes=500 * GiB,
        host_source="cgroup v2",
        link=Link(to_host=50e9, to_device=50e9),
        states=ModelStates(parameters=parameters, buffers=1024, gradients=parameters, optimizer=2 * parameters),
        rows=1,
        blocks=tuple(blocks),
        allocated_bytes=parameters + 1024,
        shared=Growth(linear=512),
        outside_forward=Growth(linear=2 * 4096 + 8),
        outside_peak=Growth(linear=4096 * 3, constant=2**30),
        outside_seconds=Growth(linear=2e-6),
    )
    return replace(profile, **changes)


def llama_profile(count=16, *, tokens=131072, **changes):
    """``count`` equal Llama layers."""
    return profile_of([llama_block(number, tokens=tokens) for number in range(count)], **changes)


def on_cpu(profile, **changes):
    """``profile`` as the CPU backend measures it: no allocator that counts, slow copies."""
    return replace(
        profile,
        **{
            "device_type": "cpu",
            "device_name": "cpu",
            "allocated_bytes": 0,
            "link": Link(to_host=5e9, to_device=5e9),
            **changes,
        },
    )
