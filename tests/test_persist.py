import json
import os
import re
from dataclasses import fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memo_runtime import persist
from memo_runtime.errors import MemoError, OutputError, PlanFileError
from memo_runtime.records import SCHEMA_VERSION, Growth
from tests.reporting.samples import PLAN, PROFILE


def written(tmp_path, value=PLAN, name="plan.json"):
    path = tmp_path / name
    persist.save(value, path)
    return path


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def refused(path, load=persist.load_plan):
    with pytest.raises(PlanFileError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def same_types(one, other):
    """Equality that tells 1 from 1.0 and a StrEnum from a str."""
    assert type(one) is type(other)
    if is_dataclass(one):
        for field in fields(one):
            same_types(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            same_types(a, b)
    else:
        assert one == other


def test_plan_and_profile_come_back_as_they_were(tmp_path):
    same_types(persist.load_plan(written(tmp_path)), PLAN)
    same_types(persist.load_profile(written(tmp_path, PROFILE)), PROFILE)


def test_load_tells_which_of_the_two_it_is(tmp_path):
    assert persist.load(written(tmp_path)) == PLAN
    assert persist.load(written(tmp_path, PROFILE, "profile.json")) == PROFILE


@given(number=st.floats(min_value=0, max_value=1e290) | st.integers(0, 2**80))
def test_every_number_is_exact(number, tmp_path_factory):
    value = replace(PROFILE, shared=Growth(linear=number))
    again = persist.load_profile(written(tmp_path_factory.mktemp("numbers"), value))
    same_types(again.shared.linear, number)


def test_a_file_in_use_is_replaced_in_one_move(tmp_path):
    path = written(tmp_path, replace(PLAN, alpha=0.25))
    persist.save(PLAN, path)
    assert persist.load_plan(path) == PLAN
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    umask = os.umask(0o022)
    try:
        assert written(tmp_path).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(umask)


def test_unwritable_output_names_the_file_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"no/such/plan\.json.*No such file or directory"):
        persist.save(PLAN, tmp_path / "no" / "such" / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        persist.save(PLAN, tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert issubclass(OutputError, OSError)
    assert issubclass(OutputError, MemoError)


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in refused(tmp_path / "none.json")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = written(tmp_path)
    text = path.read_text()
    path.write_text(text[: int(len(text.rstrip()) * share)])
    assert "line" in refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends too early"),
        (b"\x80\x81\x82", "it is no text"),
        (b"hello", "is not JSON"),
        (b"[1, 2]", "a list instead of an object"),
        (b"{}", "field 'memo_runtime' is missing"),
        (b'{"memo_runtime": "recipe"}', "\"recipe\"; expected 'plan' or 'profile'"),
        (b'{"memo_runtime": ["plan"]}', "a list; expected 'plan' or 'profile'"),
        (b'{"memo_runtime": "plan"}', "field 'schema_version' is null"),
        (b'{"memo_runtime": "plan", "alpha": NaN}', "NaN"),
        (b'{"memo_runtime": "plan", "alpha": 1, "alpha": 2}', "field 'alpha' is there twice"),
        (b"[" * 100_000, "is not a profile or plan"),
    ],
)
def test_foreign_and_corrupt_files_say_what_differs(tmp_path, content, says):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert says in refused(path)


def test_a_profile_is_no_plan(tmp_path):
    assert "holds a profile, not a plan" in refused(written(tmp_path, PROFILE))
    assert "holds a plan, not a profile" in refused(written(tmp_path), persist.load_profile)


def test_another_schema_version_is_refused_before_anything_else(tmp_path):
    def change(content):
        content["schema_version"] = 99
        del content["policy"]

    message = refused(edited(written(tmp_path), change))
    assert f"field 'schema_version' is 99, and this release reads {SCHEMA_VERSION}" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("policy"), "field 'policy' is missing"),
        (lambda c: c.update(tile=4), "field 'tile' is unknown to this release"),
        (lambda c: c.update(alpha="half"), "field 'alpha' is \"half\"; expected number"),
        (lambda c: c.update(alpha=True), "field 'alpha' is true; expected number"),
        (lambda c: c.update(policy=None), "field 'policy' is null; expected str"),
        (lambda c: c.update(blocks={}), "field 'blocks' is an object; expected list"),
        (lambda c: c["blocks"][1].update(prefix=1.5), "field 'blocks[1].prefix' is 1.5; expected int"),
        (lambda c: c["blocks"][1].update(prefix=True), "field 'blocks[1].prefix' is true; expected int"),
        (
            lambda c: c["blocks"][2].update(executor="magic"),
            "'blocks[2].executor' is \"magic\"; expected one of keep",
        ),
        (lambda c: c["blocks"][0]["actions"].append(3), "field 'blocks[0].actions[2]' is 3; expected one of"),
        (lambda c: c["profile"]["blocks"][0]["groups"][1].pop("role"), "[0].groups[1].role' is missing"),
        (lambda c: c["profile"].update(link=[]), "field 'profile.link' is a list; expected object"),
        (lambda c: c["profile"]["blocks"].append(7), "field 'profile.blocks[3]' is 7; expected object"),
    ],
)
def test_each_wrong_field_is_named(tmp_path, change, says):
    assert says in refused(edited(written(tmp_path), change))


def test_a_file_that_is_cut_in_a_word_or_number_ends_too_early(tmp_path):
    path = written(tmp_path)
    text = path.read_text()
    cuts = {}
    for found in re.finditer(r"true|false|null|-?\d[\d.eE+-]*", text):
        for end in range(found.start(), found.end()):
            cuts.setdefault(re.sub(r"\d", "0", text[found.start() : end]), end)
    assert {"fa", "nul", "0.", "0e", "0e-"} <= set(cuts)
    for end in cuts.values():
        path.write_text(text[:end])
        assert "ends too early" in refused(path)
