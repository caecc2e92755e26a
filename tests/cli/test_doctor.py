import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from memo_runtime.cli import examination
from memo_runtime.cli.app import app
from memo_runtime.cli.findings import SelfTest, SelfTests
from memo_runtime.cli.selftest import BOUND, run_selftest
from memo_runtime.native import library
from memo_runtime.native.library import NativeStatus


@pytest.fixture(scope="module")
def found():
    return examination.examine()


def doctor(monkeypatch, found, *arguments):
    monkeypatch.setattr(examination, "examine", lambda: found)
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_json_has_everything_that_is_promised(monkeypatch, found):
    result = doctor(monkeypatch, found, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["selftest"]["ok"] is True
    assert told["host"]["limit_bytes"] > 0
    assert told["host"]["source"]
    assert {package["name"] for package in told["packages"]} >= {"torch", "pulp", "ortools", "transformers"}
    cpu = told["devices"][0]
    assert cpu["name"] == "cpu"
    assert cpu["to_host"] > 0
    assert 0 < cpu["submit_seconds"] < 1
    assert cpu["copies"].startswith(("the native core (MEMO_NATIVE=", "PyTorch ("))
    assert told["native"][0]["state"] in ("ok", "unavailable")
    assert told["native"][0]["detail"]


#: What scripts may rely on, by path; a change of these is a change of the contract (docs/cli.md).
KEYS = {
    "": "ok version system packages cuda_driver host devices native selftest",
    "system": "python platform processors",
    "packages": "name version loads needed detail",
    "host": "limit_bytes source",
    "devices": "name kind memory_bytes capability peak_flops "
    "to_host to_device both pinning submit_seconds copies error",
    "native": "name state detail",
    "selftest": "ok devices",
    "selftest.devices": "device ok loss_difference gradient_error bytes_to_host recomputed_flops error",
}


@pytest.mark.parametrize("path", KEYS)
def test_the_keys_of_the_json_stay(path, monkeypatch, found):
    told = json.loads(doctor(monkeypatch, found, "--json").stdout)
    for part in path.split(".") if path else []:
        told = told[part]
    for one in told if isinstance(told, list) else [told]:
        assert list(one) == KEYS[path].split()


def test_text_says_the_same(monkeypatch, found):
    result = doctor(monkeypatch, found)
    assert "doctor: everything needed works" in result.stdout
    assert "host memory" in result.stdout
    assert "cpu: copies by " in result.stdout
    assert "self-test" in result.stdout


def test_the_self_test_swaps_and_rebuilds_and_is_exact(found):
    test = found.selftest.devices[0]
    assert test.bytes_to_host > 0
    assert test.recomputed_flops > 0
    assert test.gradient_error <= BOUND
    assert test.error == ""


def test_a_failed_self_test_exits_with_one(monkeypatch, found):
    failed = SelfTests(ok=False, devices=(SelfTest(device="cpu", ok=False, error="RuntimeError: broken"),))
    result = doctor(monkeypatch, replace(found, ok=False, selftest=failed))
    assert result.exit_code == 1
    assert "RuntimeError: broken" in result.stdout
    assert "does NOT work" in result.stdout


def test_a_self_test_that_raises_is_a_finding(monkeypatch):
    from memo_runtime import api

    def broken(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(api, "wrap", broken)
    test = run_selftest(torch.device("cpu"))
    assert not test.ok
    assert test.error == "RuntimeError: no such luck"


def test_without_torch_the_rest_is_still_said(monkeypatch, found):
    broken = tuple(replace(package, loads=package.name != "torch") for package in found.packages)
    monkeypatch.setattr(examination, "packages", lambda: broken)
    told = examination.examine()
    assert not told.ok
    assert told.devices == ()
    text = examination.examination_text(told)
    assert "not run, torch does not load" in text
    assert "unknown without torch" in text


@pytest.mark.parametrize(
    ("mode", "available", "state", "detail"),
    [
        ("auto", True, "ok", "in use"),
        ("auto", False, "unavailable", "not built here; copies go through PyTorch"),
        ("on", False, "unavailable", "not built here; MEMO_NATIVE=on asks for it, so wrapping fails"),
        ("off", True, "unavailable", "switched off: MEMO_NATIVE=off"),
        ("of", True, "unavailable", "ArgumentError: MEMO_NATIVE='of' is unknown; there are: auto, on, off"),
    ],
)
def test_the_native_core_is_a_finding(monkeypatch, mode, available, state, detail):
    reason = "in use" if available else "not built here"
    monkeypatch.setattr(library, "native_status", lambda: NativeStatus(available=available, reason=reason))
    monkeypatch.setenv("MEMO_NATIVE", mode)
    found = examination._native_core()
    assert (found.state, found.detail) == (state, detail)


@pytest.mark.gpu
def test_every_gpu_passes_the_self_test(found):
    assert len(found.selftest.devices) == 1 + torch.cuda.device_count()
    assert found.selftest.ok
