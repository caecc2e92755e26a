"""Addresses on disk: what is read is what was written, and anything else is refused with its reason."""

import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from memo_runtime.arena.lengths import Sample, pair_of
from memo_runtime.arena.placing import Placement
from memo_runtime.arena.solving import Solved
from memo_runtime.arena.steps_file import _digest, load_steps, save_steps
from memo_runtime.errors import AllocatorPlanError, OutputError
from memo_runtime.planning.layout import plan_layout
from memo_runtime.traces.trace import Phase, Span, Trace, TraceRequest

STEP = Trace(
    ticks=9,
    requests=(
        TraceRequest(0, 3, 1000, 0), TraceRequest(1, 5, 600, 1), TraceRequest(2, 9, 50, 0), TraceRequest(4, 6, 1000, 0),
        TraceRequest(7, 8, 7, 0),
    ),
    spans=(Span(Phase.STEP, "", 0, 9),),
)  # fmt: skip


def longer(times):
    return replace(STEP, requests=tuple(replace(r, size=r.size * times) for r in STEP.requests))


def placed(trace, tokens, sample, pair):
    layout = plan_layout(trace, seconds=0.5, threads=1)
    solved = Solved(
        rows=layout.rows, placed=layout.placed, peak=layout.peak, lower_bound=layout.lower_bound,
        resident_bytes=layout.resident_bytes, seconds=layout.seconds,
    )  # fmt: skip
    return Placement(tokens, sample, pair, solved)


@pytest.fixture
def kinds():
    short, long = (Sample(tokens=100 * times, trace=longer(times), handles=(0, 77)) for times in (1, 2))
    pair = pair_of(short, long)
    return {"one": [placed(short.trace, 100, short, None)], "all": [placed(pair.at(400), 400, long, pair)]}


OF = {"model": "abc", "device": "card"}


def test_what_is_read_is_what_was_written(tmp_path, kinds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="card"))
    for path in (tmp_path / "steps.json", tmp_path / "steps.json.gz"):
        assert load_steps(path, **OF) == {}
        save_steps(path, kinds, **OF)
        found = load_steps(path, **OF)
        assert list(found) == ["one", "all"]
        for name, (one,) in found.items():
            before = kinds[name][0]
            assert one.solved == before.solved
            assert (one.pair is None) == (before.pair is None)
            lengths = (100,) if one.pair is None else (400, 150)
            for tokens in lengths:
                plan, expected = one.plan(tokens, 0), before.plan(tokens, 0)
                assert plan.rows == expected.rows
                # The default stream is the same in every process; another one's handle is nobody's.
                assert set(zip(expected.streams, plan.streams, strict=True)) == {(0, 0), (77, 2**64 - 3)}
                assert replace(plan, streams=expected.streams, residents=expected.residents) == expected
    assert (tmp_path / "steps.json.gz").read_bytes()[:2] == b"\x1f\x8b"


def changed(change, *, sealed=True):
    """A file whose content went through ``change``; ``sealed`` again, as somebody who wrote it on purpose would."""

    def write(path):
        content = json.loads(path.read_text())
        change(content)
        if sealed:
            content["sha256"] = _digest(content["kinds"])
        path.write_text(json.dumps(content))

    return write


def first(content):
    return content["kinds"]["one"][0]


REFUSED = {
    "another torch": (changed(lambda c: c.update(torch="2.0.1")), r"torch is '2\.0\.1', and the torch that is running"),
    "another device": (changed(lambda c: c.update(device="other")), "device is 'other', and this device is 'card'"),
    "another model": (changed(lambda c: c.update(model="xyz")), "model is 'xyz', and this model"),
    "another schema": (changed(lambda c: c.update(schema_version=99)), "schema_version is 99"),
    "something else": (changed(lambda c: c.update(memo_runtime="plan")), "holds no steps"),
    "changed": (changed(lambda c: first(c)["offsets"].__setitem__(0, 512), sealed=False), "was changed after"),
    "two at one place": (changed(lambda c: first(c).update(offsets=[0] * 4)), "share no address"),
    "below": (changed(lambda c: first(c)["offsets"].__setitem__(0, -512)), "no offset is below zero"),
    "outside": (changed(lambda c: first(c).update(peak=512)), "above the capacity"),
    "no request": (changed(lambda c: first(c)["placed"].__setitem__(0, 99)), "IndexError"),
    "one that outlives": (changed(lambda c: first(c)["placed"].__setitem__(0, 2)), "not one that the step makes"),
    "rows are missing": (changed(lambda c: first(c)["offsets"].pop()), "ValueError"),
    "a field is missing": (changed(lambda c: first(c).pop("peak")), "KeyError: 'peak'"),
    "no number": (changed(lambda c: first(c).update(peak="large")), "cannot be"),
    "a stream is missing": (changed(lambda c: first(c)["samples"][0].update(default=[True])), "has 1 streams"),
    "no trace": (changed(lambda c: first(c)["samples"][0].update(trace={})), "field 'memo_runtime' is missing"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is not whole"),
    "half a gzip file": (lambda path: path.write_bytes(gzip.compress(path.read_bytes())[:-40]), "is not whole"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused(tmp_path, kinds, case):
    path = tmp_path / "steps.json"
    save_steps(path, kinds, **OF)
    change, says = REFUSED[case]
    change(path)
    with pytest.raises(AllocatorPlanError, match=says):
        load_steps(path, **OF)


def test_where_nothing_can_be_written_it_says_so(tmp_path, kinds):
    with pytest.raises(OutputError):
        save_steps(tmp_path / "none" / "steps.json", kinds, **OF)


@pytest.fixture
def learned(kinds):
    """Placed as steps of other lengths said, which then said more."""
    pair = kinds["all"][0].pair
    pair.learn(150, {0: 1600})
    again = placed(pair.at(400), 400, pair.long, pair)
    pair.learn(250, {3: 2700})
    return {"all": [again]}


def test_what_other_lengths_said_is_kept(tmp_path, learned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="card"))
    path = tmp_path / "steps.json"
    save_steps(path, learned, **OF)
    before, (found,) = learned["all"][0], load_steps(path, **OF)["all"]
    assert found.solved == before.solved
    assert found.pair.seen == before.pair.seen == {0: {150: 1600}, 3: {250: 2700}}
    for tokens in (120, 150, 250, 300, 400):
        plan, expected = found.plan(tokens, 0), before.plan(tokens, 0)
        assert (plan.rows, plan.bounds) == (expected.rows, expected.bounds)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda row: row.update(seen={"99": {"150": 1}}), "request 99, of which it knows other sizes"),
        (lambda row: row.update(seen={"-1": {"150": 1}}), "request -1, of which"),
        (lambda row: row.update(seen={"0": {"150": -1}}), "no positive number"),
        (lambda row: row.update(seen={"0": {"150": "1"}}), "no positive number"),
        (lambda row: row.update(seen={"0": {"long": 1}}), "ValueError"),
        (lambda row: row.update(seen=[1]), "cannot be"),
        (lambda row: row.pop("seen"), "KeyError: 'seen'"),
        (lambda row: row["sizes"].pop(), "ValueError"),
        (lambda row: row["sizes"].__setitem__(0, 1 << 30), "above the capacity"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, learned, change, says):
    path = tmp_path / "steps.json"
    save_steps(path, learned, **OF)
    changed(lambda content: change(content["kinds"]["all"][0]))(path)
    with pytest.raises(AllocatorPlanError, match=says):
        load_steps(path, **OF)
