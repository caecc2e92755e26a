"""The recording of traces, on tiny shapes on the CPU."""

import pytest
import torch

from benchmarks.traces.__main__ import main
from benchmarks.traces.cases import MANAGERS, all_cases, shrunk
from benchmarks.traces.recording import record
from memo_runtime.traces.trace import Phase
from memo_runtime.traces.trace_file import load_trace


def test_the_cases_are_those_that_are_wanted():
    names = [case.name for case in all_cases()]
    models = {name.removesuffix(f"-{manager}") for name in names for manager in MANAGERS if name.endswith(manager)}
    assert models == {"llama-8b-2", "llama-8b-4", "llama-8b-32", "qwen3-moe-4", "vit-l"}
    assert len(names) == len(set(names)) == 15


@pytest.mark.parametrize("name", ["llama-8b-4-unwrapped", "qwen3-moe-4-replay", "vit-l-recompute"])
def test_every_kind_of_case_is_recorded_with_its_blocks(name):
    (case,) = (case for case in all_cases() if case.name == name)
    trace = record(shrunk(case), torch.device("cpu"), {"commit": "abc"})
    assert trace.fault() is None
    assert trace.provenance["manager"] == case.manager
    first, last = trace.steps()
    assert [s.phase for s in trace.inside(first)] == [Phase.OPTIMIZER]
    phases = [(s.phase, s.block[-1]) for s in trace.inside(last) if s.block]
    assert phases == [
        (Phase.FORWARD, "0"), (Phase.FORWARD, "1"), (Phase.BACKWARD, "1"), (Phase.BACKWARD, "0"),
    ]  # fmt: skip


def test_a_rerun_makes_memory_in_backward():
    def made_in_backward(manager):
        (case,) = (case for case in all_cases() if case.name == f"vit-l-{manager}")
        trace = record(shrunk(case), torch.device("cpu"), {})
        backward = [span for span in trace.spans if span.phase is Phase.BACKWARD]
        return sum(s.lower <= r.lower < s.upper for s in backward for r in trace.requests)

    assert made_in_backward("recompute") > made_in_backward("unwrapped")


def test_the_command_writes_files_and_goes_on(tmp_path, capfd):
    arguments = ["--out", str(tmp_path), "--commit", "abc", "--device", "cpu", "--only", "llama-8b-2-unwrapped"]
    assert main(arguments) == 0
    trace = load_trace(tmp_path / "llama-8b-2-unwrapped.json.gz")
    assert trace.provenance["commit"] == "abc"
    assert main(arguments) == 0  # nothing is left to do
    assert capfd.readouterr().out.count("requests") == 1
