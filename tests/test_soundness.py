"""Plan and profile files whose fields have the right type and cannot be true: the file and the field are named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import memo_runtime as memo
from memo_runtime.errors import ArgumentError, PlanFileError, PlanMismatchError
from memo_runtime.persist import load_plan, load_profile, save
from memo_runtime.placement import PlacedRequest
from memo_runtime.records import Plan
from memo_runtime.soundness import find_deviation, find_fault
from tests.api.subjects import acted, assert_trains_as, refused
from tests.api.towers import POLICIES, signal, tower

Path_ = tuple[str | int, ...]
#: Coefficients may be negative as long as the polynomial is not, and so may what an operator gives.
ANY_SIGN = {"constant", "linear", "quadratic", "number"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return memo.plan(memo.profile(tower(), signal()), **POLICIES["memo"])


@pytest.fixture(scope="module")
def text(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    save(plan, path)
    return path.read_text()


def numbers(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Where the numbers of a file are."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item, (*at, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*at, index))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield at


def named(at: Path_) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")


def with_value(text: str, at: Path_, value: Any) -> str:
    content = json.loads(text)
    *outer, last = at
    place = content
    for part in outer:
        place = place[part]
    place[last] = value
    return json.dumps(content)


def answer(path: Path, text: str) -> str | None:
    """The refusal of a plan file with ``text``; None if it is taken."""
    path.write_text(text)
    try:
        load_plan(path)
    except PlanFileError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "value", ["three", "nan", None, [], {}, True, -1, -0.5, "-inf", 10**400], ids=lambda value: repr(value)[:8]
)
def test_every_number_of_a_file_is_looked_at(value: Any, text: str, tmp_path: Path) -> None:
    content = json.loads(text)
    for many in (content["blocks"], content["profile"]["blocks"]):
        del many[1:]  # one block has every field
    text, path, seen = json.dumps(content), tmp_path / "plan.json", 0
    assert answer(path, text) is None
    optional = {"alpha", "group", "saved", "number"}
    for at in numbers(content):
        if at[-1] == "schema_version" or (value is None and at[-1] in optional):
            continue
        found = answer(path, with_value(text, at, value))
        if found is None and value in (-1, -0.5) and at[-1] in ANY_SIGN:
            continue
        assert found, (at, value)
        assert str(path) in found
        # A coefficient that makes the polynomial negative is named by the polynomial.
        assert named(at) in found or (at[-1] in ANY_SIGN and named(at[:-1]) in found)
        assert "expected" in found
        seen += 1
    assert seen > 100


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a prefix beyond the length": (
        lambda plan: plan["blocks"][1].update(prefix=25), "'blocks[1].prefix' is 25; expected at most 24, its tokens"
    ),
    "more device rows than prefix": (
        lambda plan: plan["blocks"][0].update(device_rows=20), "'blocks[0].device_rows' is 20; expected at most"
    ),
    "an unknown action": (
        lambda plan: plan["blocks"][0]["actions"].__setitem__(2, "teleport"),
        "'blocks[0].actions[2]' is \"teleport\"; expected one of keep, host",
    ),
    "an action too many": (
        lambda plan: plan["blocks"][0]["actions"].append("keep"), "as many as profile.blocks[0].groups"
    ),
    "another name": (
        lambda plan: plan["blocks"][2].update(name="layers.7"),
        "'blocks[2].name' is \"layers.7\"; expected \"layers.2\", as profile.blocks[2].name",
    ),
    "a block too few": (lambda plan: plan["blocks"].pop(), "'blocks' is \"a list of 2\"; expected 3"),
    "a profiled block too few": (lambda plan: plan["profile"]["blocks"].pop(), "expected 2, as many as profile.blocks"),
    "no block": (lambda plan: plan["profile"].update(blocks=[]), "'profile.blocks' is a list; expected at least one"),
    "a name twice": (
        lambda plan: plan["profile"]["blocks"][1].update(name="layers.0"), "'profile.blocks[1].name' is \"layers.0\""
    ),
    "no tokens": (lambda plan: plan["blocks"][0].update(tokens=0), "'blocks[0].tokens' is 0; expected 1 or more"),
    "an unknown policy": (lambda plan: plan.update(policy="magic"), "'policy' is \"magic\"; expected one of auto"),
    "alpha above one": (lambda plan: plan.update(alpha=1.5), "'alpha' is 1.5; expected a fraction from 0 to 1"),
    "a group that is not there": (
        lambda plan: plan["profile"]["blocks"][0]["saved"][3].update(group=99),
        "'profile.blocks[0].saved[3].group' is 99; expected less than",
    ),
    "a link without a rate": (
        lambda plan: plan["profile"]["link"].update(to_host=0), "'profile.link.to_host' is 0; expected a rate above 0"
    ),
    "a size below zero at this length": (
        lambda plan: plan["profile"]["blocks"][0]["groups"][0]["size"].update(constant=-1e9), "expected 0 or more at 24"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_plan_that_cannot_be_true(case: str, text: str, tmp_path: Path) -> None:
    change, says = BROKEN[case]
    content = json.loads(text)
    change(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    model = tower()
    for call in (lambda: load_plan(path), lambda: memo.wrap(model, plan=path)):
        message = refused(PlanFileError, call)
        assert message.startswith(f"{path}: field ")
        assert says in message
    assert_trains_as(model, tower(), signal(), bound=0)


@pytest.mark.parametrize(
    "field",
    ["prefix", "bytes_to_host", "bytes_to_device", "bytes_kept", "host_bytes", "recomputed_flops", "tokens"],
)
def test_a_number_that_does_not_follow_from_the_profile(field: str, text: str, plan: Plan, tmp_path: Path) -> None:
    """A plan that was edited would run with budgets that it does not keep."""
    assert find_deviation(plan) is None
    before = getattr(plan.blocks[1], field)
    path = tmp_path / "plan.json"
    path.write_text(with_value(text, ("blocks", 1, field), before + 1))
    model = tower()
    message = refused(PlanFileError, memo.wrap, model, plan=path)
    assert f"{path}: field 'blocks[1]." in message
    assert "which follows from the profile" in message
    if field not in ("prefix", "tokens"):
        assert f"{field}' is {before + 1}; expected {before}, " in message
    other = replace(plan, blocks=(plan.blocks[0], replace(plan.blocks[1], **{field: before + 1}), *plan.blocks[2:]))
    assert "plan= cannot be carried out: field 'blocks[1]." in refused(ArgumentError, memo.wrap, model, plan=other)
    assert_trains_as(memo.wrap(model, plan=plan), tower(), signal())
    acted(model)


def test_another_action_does_not_follow_from_the_profile(text: str, plan: Plan, tmp_path: Path) -> None:
    index = next(i for i, action in enumerate(plan.blocks[0].actions) if action.value == "prefix")
    (tmp_path / "plan.json").write_text(with_value(text, ("blocks", 0, "actions", index), "rebuild"))
    message = refused(PlanFileError, memo.wrap, tower(), plan=tmp_path / "plan.json")
    assert f"field 'blocks[0].actions[{index}]' is 'rebuild'; expected prefix, which follows" in message


@pytest.mark.parametrize("settings", [*POLICIES.values(), {}, {"policy": "none"}, {"budget": "1GiB"}], ids=str)
def test_what_memo_plans_is_sound(settings: dict[str, Any], tmp_path: Path) -> None:
    profile = memo.profile(tower(), signal(tokens=40))
    assert find_fault(profile) is None
    for length in (8, 40, 4096):
        made = memo.plan(profile, seq_len=length, **settings)
        assert find_fault(made) is None
        assert find_deviation(made) is None
        save(made, tmp_path / "plan.json")
        assert load_plan(tmp_path / "plan.json") == made
    save(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile


# What differs, in words.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 0}, "field 'placement[1].size' is 0; expected 1 or more"),
        ({"upper": 2}, "field 'placement[1].upper' is 2; expected more than 2, its lower"),
        ({"offset": 63}, "expected another byte than those of placement[0]"),
        ({"offset": 0, "size": 500}, "expected another byte than those of placement["),
    ],
)
def test_rows_that_cannot_be_placed_so(change: dict[str, Any], said: str, plan: Plan, tmp_path: Path) -> None:
    rows = [
        PlacedRequest(id="a", lower=0, upper=5, size=64, offset=0),
        PlacedRequest(id="b", lower=2, upper=6, size=64, offset=64),
        PlacedRequest(id="c", lower=5, upper=7, size=64, offset=0),
    ]
    path = tmp_path / "placed.json"
    save(replace(plan, placement=tuple(rows)), path)
    assert load_plan(path).placement == tuple(rows)
    rows[1] = replace(rows[1], **change)
    save(replace(plan, placement=tuple(rows)), path)
    with pytest.raises(PlanFileError) as caught:
        load_plan(path)
    assert "placed.json" in str(caught.value)
    assert said in str(caught.value)


def test_another_number_of_blocks_in_words(plan: Plan) -> None:
    message = refused(PlanMismatchError, memo.wrap, tower(2), plan=plan)
    assert "blocks: the plan has 3, Tower has 2 (layers.0 to layers.1)" in message


def test_another_dtype_in_words(plan: Plan) -> None:
    import torch

    model = memo.wrap(tower(dtype=torch.float32), plan=plan)
    message = refused(PlanMismatchError, model, signal(dtype=torch.float32))
    count = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    assert f"model: the plan has '{count:,} parameters in {tensors} tensors of float64, all trained #" in message
    assert f"here it is '{count:,} parameters in {tensors} tensors of float32, all trained #" in message
    assert "batch: the plan has '[0] float64[3d] #" in message
    assert "here it is '[0] float32[3d] #" in message


def test_frozen_parameters_in_words(plan: Plan) -> None:
    model = memo.wrap(tower(), plan=plan)
    model.first.requires_grad_(False)
    message = refused(PlanMismatchError, model, signal())
    assert "2 of them frozen #" in message
    assert "batch:" not in message
