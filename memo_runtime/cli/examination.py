"""What ``memo doctor`` looks at, and how it says it.

Nothing here needs torch to load: that it does not is one of the things to find out.
"""

from __future__ import annotations

import ctypes

from memo_runtime import __version__
from memo_runtime.cli.findings import Device, Findings, HostMemory, Native, SelfTests
from memo_runtime.reporting.environment import packages, system
from memo_runtime.reporting.text_table import table
from memo_runtime.units import format_bytes


def examine() -> Findings:
    """Looks at everything, which takes seconds: packages are imported, links measured, steps trained."""
    found = packages()
    torch_loads = any(package.name == "torch" and package.loads for package in found)
    tests = _selftest() if torch_loads else SelfTests(ok=False, devices=())
    host, devices = _hardware() if torch_loads else (None, ())
    return Findings(
        ok=tests.ok and all(package.loads for package in found if package.needed),
        version=__version__,
        system=system(),
        packages=found,
        cuda_driver=_cuda_driver(),
        host=host,
        devices=devices,
        native=(_native_search(), _native_core(), _allocator()),
        selftest=tests,
    )


def _hardware() -> tuple[HostMemory, tuple[Device, ...]]:
    from memo_runtime.cli.devices import all_devices, describe, host_memory

    return host_memory(), tuple(describe(device) for device in all_devices())


def _selftest() -> SelfTests:
    from memo_runtime.cli.devices import all_devices
    from memo_runtime.cli.selftest import run_selftest

    tests = tuple(run_selftest(device) for device in all_devices())
    return SelfTests(ok=all(test.ok for test in tests), devices=tests)


def _cuda_driver() -> str | None:
    """The newest CUDA version that the installed driver serves; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _native_search() -> Native:
    name = "solver search"
    try:
        from memo_solver.native import native_status

        status = native_status()
    except Exception as error:  # a solver that does not load is a finding
        return Native(name=name, state="unavailable", detail=f"{type(error).__name__}: {error}")
    return Native(name=name, state="ok" if status.available else "unavailable", detail=status.reason)


def _native_core() -> Native:
    name = "pinned memory, copies"
    try:
        from memo_runtime.config import NativeMode, native_mode
        from memo_runtime.native.library import native_status

        mode, status = native_mode(), native_status()
    except Exception as error:  # a mode that is none is a finding
        return Native(name=name, state="unavailable", detail=f"{type(error).__name__}: {error}")
    if mode is NativeMode.OFF:
        return Native(name=name, state="unavailable", detail="switched off: MEMO_NATIVE=off")
    without = "" if status.available else "; copies go through PyTorch"
    if mode is NativeMode.ON and not status.available:
        without = "; MEMO_NATIVE=on asks for it, so wrapping fails"
    return Native(name=name, state="ok" if status.available else "unavailable", detail=f"{status.reason}{without}")


def _allocator() -> Native:
    name = "planned allocator"
    try:
        from memo_runtime.allocator.library import allocator_status

        status = allocator_status()
    except Exception as error:  # a torch that does not load is a finding
        return Native(name=name, state="unavailable", detail=f"{type(error).__name__}: {error}")
    without = "" if status.available else "; memory is left to PyTorch's allocator"
    return Native(name=name, state="ok" if status.available else "unavailable", detail=f"{status.reason}{without}")


def examination_text(found: Findings) -> str:
    """``found`` as sections of plain text."""
    rows = [
        ("memo-runtime", found.version),
        ("python", found.system.python),
        ("platform", found.system.platform),
        ("processors", str(found.system.processors)),
        ("CUDA driver", found.cuda_driver or "none found"),
        ("host memory", _host(found.host)),
        *((native.name, f"{native.state}  {native.detail}".rstrip()) for native in found.native),
    ]
    width = max(len(name) for name, _ in rows)
    facts = "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
    verdict = "everything needed works" if found.ok else "something needed does NOT work, see above"
    return "\n\n".join([facts, _packages(found), _devices(found), _selftests(found), f"doctor: {verdict}"])


def _packages(found: Findings) -> str:
    rows = [
        (package.name, package.version or "-", "yes" if package.loads else "no", package.detail)
        for package in found.packages
    ]
    return table(("package", "version", "loads", "remarks"), rows, text_columns=(0, 1, 2, 3))


def _devices(found: Findings) -> str:
    rows = [
        (
            device.name,
            device.kind,
            "" if device.memory_bytes is None else format_bytes(device.memory_bytes),
            _rate(device.to_host),
            _rate(device.to_device),
            _rate(device.both),
            _rate(device.pinning),
            "" if device.submit_seconds is None else f"{device.submit_seconds * 1e6:.1f} us",
            "" if device.peak_flops is None else f"{device.peak_flops / 1e12:.1f} TFLOP/s",
            device.error,
        )
        for device in found.devices
    ]
    header = ("device", "kind", "memory", "to host", "to device", "both", "pinning", "a copy", "bf16 peak", "error")
    who = [f"{device.name}: copies by {device.copies}" for device in found.devices if device.copies]
    return "\n".join([table(header, rows, text_columns=(0, 1, 9)), *who])


def _host(host: HostMemory | None) -> str:
    return "unknown without torch" if host is None else f"{format_bytes(host.limit_bytes)} ({host.source})"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.1f} GB/s"


def _selftests(found: Findings) -> str:
    rows = [
        (
            test.device,
            "ok" if test.ok else "FAILED",
            "-" if test.gradient_error is None else f"{test.gradient_error:.1e}",
            format_bytes(test.bytes_to_host),
            test.error,
        )
        for test in found.selftest.devices
    ]
    if not rows:
        return "self-test: not run, torch does not load"
    header = ("self-test", "result", "gradient error", "swapped", "error")
    return table(header, rows, text_columns=(0, 1, 4))
