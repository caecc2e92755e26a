"""A plan made for something else is refused, field by field."""

from dataclasses import fields, replace

import pytest

from memo_runtime.config import make_settings
from memo_runtime.errors import PlanMismatchError
from memo_runtime.planning.compare import check_fingerprint
from memo_runtime.planning.planner import make_plan
from memo_runtime.records import Fingerprint
from tests.planning.builders import FINGERPRINT, llama_profile

PLAN = make_plan(llama_profile(2, tokens=4096), make_settings(policy="swap"))


def test_the_same_fingerprint_passes():
    check_fingerprint(PLAN, replace(FINGERPRINT))


@pytest.mark.parametrize("field", [field.name for field in fields(Fingerprint)])
def test_a_field_that_differs_is_named_with_both_values(field):
    with pytest.raises(PlanMismatchError, match=field) as error:
        check_fingerprint(PLAN, replace(FINGERPRINT, **{field: "something-else"}))
    assert getattr(FINGERPRINT, field) in str(error.value)
    assert "something-else" in str(error.value)


def test_every_field_that_differs_is_named():
    with pytest.raises(PlanMismatchError, match="what differs: torch, device"):
        check_fingerprint(PLAN, replace(FINGERPRINT, torch="2.14", device="cpu"))
