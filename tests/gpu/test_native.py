"""The native core on a GPU: right bytes under delays, errors, pinning, rates, host time. Needs the core to be built."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.links import awkward_overhead, host_times, pin, rates, raw_rates
from memo_runtime.errors import CopyUseError
from memo_runtime.native.backend import choose_backend
from memo_runtime.native.library import native_status
from memo_runtime.native.pool import HostPool
from memo_runtime.units import GiB, MiB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native_status().available, reason=f"the native core is {native_status().reason}"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def big():
    """16 GiB pinned by the core, its seconds, and an engine."""
    backend = choose_backend(CUDA, "on")
    slab, seconds = pin(backend, 16 * GiB)
    engine = backend.engine()
    yield slab, seconds, engine
    engine.close()
    slab.close()


def report(capsys, text):
    with capsys.disabled():
        print(f"\n    {text}", end=" ")


def test_pinning_is_fast_and_pinned(quiet_machine, big, capsys):
    slab, seconds, _ = big
    report(capsys, f"16 GiB pinned in {seconds:.2f} s, on the GPU's NUMA node: {slab.on_node}")
    assert slab.memory[:1].is_pinned()
    assert slab.memory[-1:].is_pinned()
    assert slab.mapped == 16 * GiB
    assert seconds <= 6


def test_links(quiet_machine, big, capsys):
    slab, _, engine = big
    found = {name: rate / 1e9 for name, rate in rates(engine, slab).items()}
    raw = {name: rate / 1e9 for name, rate in raw_rates(slab, engine.device).items()}
    report(capsys, ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in found.items()))
    report(capsys, ", ".join(f"raw {name} {rate:.1f} GB/s" for name, rate in raw.items()))
    assert found["to_host"] >= 52
    assert found["to_device"] >= 52
    assert found["both"] >= 85
    assert found["slices_to_host"] >= 45


def test_host_time_per_copy(quiet_machine, big, capsys):
    slab, _, engine = big
    found = {name: seconds * 1e6 for name, seconds in host_times(engine, slab).items()}
    report(capsys, ", ".join(f"{name} {us:.1f} us" for name, us in found.items()))
    assert found["submit"] <= 10
    assert found["batched"] <= 10


def test_awkward_sizes(capsys):
    overhead = awkward_overhead(choose_backend(CUDA, "on"))
    report(capsys, f"{overhead:.4%} above what was asked")
    assert overhead <= 0.01


@pytest.mark.parametrize("mode", ["on", "off"])
def test_two_hundred_steps_with_delays_on_every_stream(mode):
    """Freed and landing buffers are poisoned; the compute stream is the default one, then another."""
    backend = choose_backend(CUDA, mode)
    engine = backend.engine()
    pool = HostPool(64 * MiB, backend)
    draw = random.Random(5)
    side = torch.cuda.Stream(CUDA)
    copying = [torch.cuda.ExternalStream(engine.stream_handle(to_host=out), device=CUDA) for out in (True, False)]

    def delay(stream):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(draw.randrange(400_000))

    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    torch.cuda.synchronize()
    for step in range(200):
        compute = torch.cuda.default_stream(CUDA) if step < 100 else side
        if step == 100:
            torch.cuda.synchronize()
        with torch.cuda.stream(compute):
            outer, rows, keep = draw.choice([(1, 4096, 3000), (8, 512, 500), (64, 64, 33)])
            x = torch.empty(outer, rows, 64, dtype=torch.bfloat16, device=CUDA)
            y = torch.full_like(x, float("nan"))
            delay(compute)
            x.fill_(step + 1)
            slot = pool.take(outer * keep * 64 * 2)
            host = slot.typed(torch.bfloat16).view(outer, keep, 64)
            delay(copying[0])
            engine.to_host(x[:, :keep], host, name="x").wait()
            x.fill_(float("nan"))
            delay(copying[1])
            ticket = engine.to_device(host, y[:, rows - keep :], name="x")
            delay(compute)
            ticket.wait()
            wrong += (y[:, rows - keep :] != step + 1).sum() + (~y[:, : rows - keep].isnan()).sum()
            del x, slot, host
    torch.cuda.synchronize()
    assert wrong.item() == 0
    assert engine.open_copies == 0
    engine.close()
    pool.trim()


def test_twin_and_core_copy_the_same_bytes():
    backends = [choose_backend(CUDA, mode) for mode in ("on", "off")]
    engines = [backend.engine() for backend in backends]
    slabs = [backend.slab(3 * 2**21 + 12_345) for backend in backends]
    draw = random.Random(1)
    for _ in range(60):
        outer, rows, inner = draw.choice([1, 2, 7, 200]), draw.randint(1, 300), draw.randint(1, 70)
        start, stop = sorted((draw.randint(0, rows), draw.randint(0, rows)))
        source = torch.randint(0, 255, (outer, rows, inner), dtype=torch.uint8, device=CUDA)
        size = outer * (stop - start) * inner
        offset = draw.randint(0, slabs[0].size - size)
        found = []
        for engine, slab in zip(engines, slabs, strict=True):
            host = slab.memory[offset : offset + size].view(outer, stop - start, inner)
            back = torch.zeros_like(source)
            engine.to_host(source[:, start:stop], host).wait()
            engine.many_to_device([(host, back[:, start:stop])]).wait()
            engine.drain()
            found.append((host.clone(), back))
        assert torch.equal(found[0][0], source[:, start:stop].cpu())
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    for engine, slab in zip(engines, slabs, strict=True):
        engine.close()
        slab.close()


def test_copies_cross_the_borders_of_registrations(big):
    slab, _, engine = big
    size = 8 * MiB
    source = torch.randint(0, 255, (4, 1024, 2048), dtype=torch.uint8, device=CUDA)
    for rows in (source, source[:, :777]):
        host = slab.memory[GiB - size // 2 - 3 :][: rows.numel()].view(rows.shape)
        back = torch.zeros_like(source)[:, : rows.shape[1]]
        engine.to_host(rows, host).wait()
        engine.to_device(host, back).wait()
        assert torch.equal(back, rows)
        assert torch.equal(host, rows.cpu())


def test_wrong_use_is_an_exception_and_the_device_goes_on(big):
    slab, _, engine = big
    x = torch.ones(1024, device=CUDA)
    host = slab.memory[:4096].view(torch.float32)
    with pytest.raises(CopyUseError, match="on cpu"):
        engine.to_host(x.cpu(), host)
    with pytest.raises(CopyUseError, match="lies in no slab"):
        engine.to_host(x, torch.empty(1024, pin_memory=True))
    ticket = engine.to_host(x, host, name="layers.0")
    ticket.wait()
    with pytest.raises(CopyUseError, match=r"layers\.0"):
        ticket.wait()
    small = choose_backend(CUDA, "on").slab(4096)
    freed = small.memory.view(torch.float32)
    small.close()
    with pytest.raises(CopyUseError, match="freed"):
        engine.to_host(x, freed)
    assert not freed.is_pinned()
    engine.to_host(x * 2, host).wait()
    torch.cuda.synchronize()
    assert host.sum() == 2048


def test_nothing_in_a_step_waits_for_the_device(big):
    slab, _, engine = big
    x, host = torch.ones(1024, device=CUDA), slab.memory[:4096].view(torch.float32)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    ticket = engine.to_host(x, host)
    assert not ticket.done()
    ticket.wait()
    engine.to_device(host, x).wait()
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
