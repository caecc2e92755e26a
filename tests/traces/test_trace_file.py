"""trace.json: there and back, and files that are none."""

import gzip
import json
from dataclasses import replace

import pytest

from memo_runtime.errors import OutputError, TraceFileError
from memo_runtime.traces.trace import Measured
from memo_runtime.traces.trace_file import load_trace, save_trace
from tests.traces.samples import random_trace, small_trace


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_there_and_back(tmp_path, name):
    measured = Measured(allocated_peak=1, reserved_peak=2, retries=3, num_segments=4)
    full = replace(small_trace(), measured=measured, releases=(3,), segments=((2, 8), (0, 1)))
    for trace in (small_trace(), random_trace(1), full):
        save_trace(trace, tmp_path / name)
        assert load_trace(tmp_path / name) == trace


def test_the_same_trace_is_the_same_file(tmp_path):
    save_trace(small_trace(), tmp_path / "a.json.gz")
    save_trace(small_trace(), tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        save_trace(small_trace(), tmp_path / "none" / "trace.json")


def changed(path, change):
    save_trace(small_trace(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("ticks"), "field 'ticks' is missing"),
        (lambda c: c.update(more=1), "field 'more' is unknown"),
        (lambda c: c.update(schema_version=7), "field 'schema_version' is 7"),
        (lambda c: c.update(memo_runtime="plan"), "field 'memo_runtime'"),
        (lambda c: c.update(ticks=2), "there are 2 ticks"),
        (lambda c: c["requests"]["size"].pop(), "different lengths"),
        (lambda c: c["requests"]["size"].__setitem__(1, "big"), r"field 'requests.size\[1\]' is 'big'"),
        (lambda c: c["requests"].pop("stream"), "field 'requests.stream' is missing"),
        (lambda c: c["spans"][0].update(phase="pause"), r"field 'spans\[0\]'"),
        (lambda c: c["spans"][0].update(upper=-1), r"field 'spans\[0\].upper' is -1"),
        (lambda c: c.update(measured={"allocated_peak": 1}), "field 'measured.reserved_peak' is missing"),
        (lambda c: c.update(provenance={"a": 1}), "field 'provenance'"),
        (lambda c: c.update(releases=[99]), r"releases\[0\] is 99"),
        (lambda c: c.update(segments={"address": [1], "size": []}), "field 'segments' have different lengths"),
        (lambda c: c.update(segments={"address": [1], "size": [0]}), r"segments\[0\] has address 1 and size 0"),
        (lambda c: c.update(expandable=1), "field 'expandable'"),
    ],
)
def test_the_field_is_named(tmp_path, change, said):
    changed(tmp_path / "trace.json", change)
    with pytest.raises(TraceFileError, match=said) as raised:
        load_trace(tmp_path / "trace.json")
    assert "trace.json" in str(raised.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not a trace"),
        (b"\xff\xfe\x00", "is not JSON"),
        (gzip.compress(b"{}" * 50)[:-9], "is not whole"),
    ],
    ids=["half an object", "a list", "no text", "half a gzip file"],
)
def test_other_files_are_refused(tmp_path, data, said):
    (tmp_path / "trace.json").write_bytes(data)
    with pytest.raises(TraceFileError, match=said):
        load_trace(tmp_path / "trace.json")


def test_no_file_at_all(tmp_path):
    with pytest.raises(TraceFileError, match="cannot read"):
        load_trace(tmp_path / "trace.json")
