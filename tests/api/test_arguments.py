"""Arguments that are not taken: each says what was asked, what there is and what works, and the model is untouched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import (
    AllocatorUnavailableError,
    AlreadyWrappedError,
    ArgumentError,
    ArgumentTypeError,
    NotBuiltError,
    PlanInfeasibleError,
    ProfileError,
)
from memo_runtime.planning.sheet import PlanRequestError
from tests.api.subjects import acted, assert_trains_as, refused, step
from tests.api.towers import POLICIES, Tower, signal, tower

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown policy": ({"policy": "offload"}, "policy='offload' is unknown; there are: auto, none, memo"),
    "a policy misspelt": ({"policy": "recompile"}, "(did you mean 'recompute'?)"),
    "a policy in capitals": ({"policy": "Swap"}, "(did you mean 'swap'?)"),
    "alpha above one": ({"policy": "memo", "alpha": 1.5}, "alpha=1.5 is not a fraction"),
    "alpha below zero": ({"policy": "memo", "alpha": -0.1}, "alpha=-0.1 is not a fraction"),
    "alpha not a number": ({"policy": "memo", "alpha": float("nan")}, "alpha=nan is not a fraction"),
    "alpha with swap": ({"policy": "swap", "alpha": 0.5}, "alpha=0.5 goes with policy memo, replay, tiled; policy"),
    "alpha with auto": ({"alpha": 0.5}, "policy is 'auto'"),
    "negative keep_last": ({"keep_last": -1}, "keep_last=-1 is not a number of blocks"),
    "keep_last beyond the stack": ({"keep_last": 4}, "(layers.0 to layers.2) has 3 blocks: give 0 to 3"),
    "a size that is none": ({"budget": "plenty"}, "budget='plenty' is not a size: write a number and a unit"),
    "a unit that is none": ({"host_budget": "70 Gb/s"}, "host_budget='70 Gb/s' is not a size"),
    "a negative size": ({"budget": -5}, "budget=-5 is not a number of bytes"),
    "a negative size in words": ({"budget": "-5GiB"}, "budget='-5GiB' is not a size"),
    "half a byte": ({"budget": 1.5}, "budget=1.5 would be 1.5 bytes: did you mean budget='1.5GiB'?"),
    "a size without a unit": ({"budget": 70}, "budget=70 would be 70 bytes: did you mean budget='70GiB'?"),
    "the same in words": ({"host_budget": "70"}, "host_budget='70' would be 70 bytes: did you mean host_budget='"),
    "part of a byte": ({"budget": 8e9 + 0.5}, "is not a number of bytes"),
    "infinitely much": ({"budget": float("inf")}, "budget=inf is not a number of bytes"),
    "no number of bytes": ({"host_budget": float("nan")}, "host_budget=nan is not a number of bytes"),
    "nothing": ({"budget": 0}, "budget=0 leaves no memory for the model itself"),
    "nothing in words": ({"budget": "0GiB"}, "budget='0GiB' leaves no memory"),
    "budgets without a policy": (
        {"policy": "none", "budget": "1MiB", "host_budget": 0},
        "budget=1.00 MiB and host_budget=0 B would not be kept to: leave budget and host_budget out, or give policy='a",
    ),
    "a tile for another policy": ({"tile": 8192}, "tile=8192 goes with policy tiled; policy is 'auto'"),
    "a tile below one": ({"policy": "tiled", "tile": 0}, "tile=0 is not a number of tokens: give 1 or more"),
    "unknown loss": ({"loss": "fused"}, "loss='fused' is unknown; there are: auto, tiled, native"),
    "unknown layout": ({"layout": "stacked"}, "layout='stacked' is unknown; there are: auto, planned, native"),
    "tiled loss without a head": ({"loss": "tiled"}, "loss='tiled' is not possible for this model"),
}

OF_A_WRONG_TYPE: dict[str, tuple[dict[str, Any], str]] = {
    "a policy by number": ({"policy": 5}, "policy=5 is unknown"),
    "alpha in words": ({"policy": "memo", "alpha": "0.5"}, "alpha='0.5' (str) is not a number: give a fraction from 0"),
    "alpha as a yes": ({"policy": "memo", "alpha": True}, "alpha=True (bool) is not a number"),
    "keep_last in words": ({"keep_last": "a"}, "keep_last='a' is not a number of blocks: give a whole number"),
    "half a block": ({"keep_last": 1.5}, "keep_last=1.5 is not a number of blocks"),
    "keep_last as a yes": ({"keep_last": True}, "keep_last=True is not a number of blocks"),
    "a tile in words": ({"policy": "tiled", "tile": "x"}, "tile='x' is not a number of tokens"),
    "a tile as a yes": ({"policy": "tiled", "tile": True}, "tile=True is not a number of tokens"),
    "strict in words": ({"strict": "no"}, "strict='no' is not a yes or no"),
    "a list of sizes": ({"budget": [1, 2]}, "budget=[1, 2] is not a number of bytes"),
    "a yes to a size": ({"host_budget": True}, "host_budget=True is not a number of bytes"),
    "a number for an optimizer": ({"optimizer": 5}, "optimizer=5 (int) is not a torch.optim.Optimizer"),
    "the class of an optimizer": ({"optimizer": torch.optim.AdamW}, "optimizer=the class AdamW"),
    "a number for a plan": ({"plan": 5}, "plan= is 5 (int), neither a plan nor a file"),
    "a mapping for a plan": ({"plan": {}}, "plan= is {} (dict), neither a plan nor a file"),
    "bytes for a plan": ({"plan": b"plan.json"}, "neither a plan nor a file"),
}  # fmt: skip

NOT_BUILT: dict[str, tuple[dict[str, Any], str]] = {
    "disk": ({"disk": "/scratch"}, "disk='/scratch' is not built yet"),
}  # fmt: skip


def assert_refused(error: type[Exception], arguments: dict[str, Any], says: str) -> None:
    model, plain = tower(), tower()
    keys = [list(vars(module)) for module in model.modules()]
    assert says in refused(error, memo.wrap, model, **arguments)
    assert [list(vars(module)) for module in model.modules()] == keys
    assert_trains_as(model, plain, signal(), bound=0)


@pytest.mark.parametrize("case", WRONG)
def test_a_value_that_is_not_taken(case: str) -> None:
    assert_refused(ArgumentError, *WRONG[case])


@pytest.mark.parametrize("case", OF_A_WRONG_TYPE)
def test_a_type_that_is_not_taken(case: str) -> None:
    assert_refused(ArgumentError if "policy by" in case else ArgumentTypeError, *OF_A_WRONG_TYPE[case])


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_planned_memory_without_cuda() -> None:
    says = f"the planned allocator cannot be used: torch {torch.__version__} is built without CUDA"
    assert_refused(AllocatorUnavailableError, {"layout": "planned"}, says)


@pytest.mark.parametrize("case", NOT_BUILT)
def test_what_is_not_built_yet_says_so(case: str) -> None:
    assert_refused(NotBuiltError, *NOT_BUILT[case])


def test_arguments_are_value_errors_and_types_are_type_errors() -> None:
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(ArgumentTypeError, ArgumentError)
    assert issubclass(NotBuiltError, NotImplementedError)


@pytest.mark.parametrize("how", [
    {"policy": "memo", "alpha": numpy.float32(0.5), "keep_last": numpy.int64(0)},
    {"policy": "replay", "alpha": 1, "keep_last": 0, "budget": 8e9, "host_budget": numpy.int64(10**9)},
    {"policy": "memo", "alpha": 0.5, "keep_last": 0, "budget": " 8 gib ", "host_budget": "0.5TB"},
])  # fmt: skip
def test_numbers_of_any_kind_are_taken(how: dict[str, Any]) -> None:
    model = memo.wrap(tower(), **how)
    assert_trains_as(model, tower(), signal())
    acted(model)


def test_without_a_policy_a_check_takes_no_budget_and_a_plan_keeps_to_it() -> None:
    model = tower()
    assert "leave budget out" in refused(ArgumentError, memo.check, model, signal(), policy="none", budget="1GiB")
    plan = memo.plan(memo.profile(model, signal()), policy="none", budget="1GiB")
    assert_trains_as(memo.wrap(model, plan=plan), tower(), signal())
    assert memo.report(model).totals.forecast.peak_bytes <= plan.limits.device_bytes == 1 << 30


def test_no_host_memory_is_a_budget_too() -> None:
    model = memo.wrap(tower(), host_budget=0, budget="8GiB")
    assert_trains_as(model, tower(), signal())
    assert memo.report(model).totals.host_bytes == 0
    refused(PlanInfeasibleError.__subclasses__()[0], step, memo.wrap(tower(), host_budget=0, policy="swap"), signal())


CALLS: dict[str, Callable[[Any], Any]] = {
    "wrap": memo.wrap,
    "unwrap": memo.unwrap,
    "report": memo.report,
    "profile": lambda model: memo.profile(model, signal()),
    "check": lambda model: memo.check(model, signal()),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model(call: str) -> None:
    assert f"memo.{call} takes an nn.Module and got 5 (int)" in refused(ArgumentTypeError, CALLS[call], 5)
    assert f"memo.{call} takes a model and got the class Tower" in refused(ArgumentTypeError, CALLS[call], Tower)


def test_what_is_no_profile() -> None:
    model = tower()
    assert "memo.profile(model, batch) makes one" in refused(ArgumentTypeError, memo.plan, model)
    assert "load_profile(path)" in refused(ArgumentTypeError, memo.plan, "profile.json")
    assert "got 5 (int)" in refused(ArgumentTypeError, memo.plan, 5)
    profile = memo.profile(model, signal())
    assert "memo.plan(profile) makes a plan" in refused(ArgumentTypeError, memo.wrap, model, plan=profile)
    for length in ("many", 0, -4, 2.5, "2.5", True):
        assert "is not a token count" in refused(ArgumentError, memo.plan, profile, seq_len=length)
    assert refused(ArgumentError, memo.plan, profile, budget=1.5).endswith("did you mean budget='1.5GiB'?")
    assert "memo.profile(model, batch, tiles=True)" in refused(PlanRequestError, memo.plan, profile, policy="tiled")


def test_an_optimizer_inside_another_is_taken() -> None:
    class Around:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = tower()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    profile = memo.profile(model, signal(), optimizer=Around(inner))  # type: ignore[arg-type]
    assert profile.states.optimizer_name == "SGD"


def test_profiling_a_wrapped_model_takes_its_arguments_too() -> None:
    model = memo.wrap(tower(), **POLICIES["memo"])
    profile = memo.profile(model, signal(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert profile.states.optimizer_name == "SGD"
    assert memo.profile(model, signal()).states.optimizer_name == "AdamW"
    assert "blocks= names 1" in refused(AlreadyWrappedError, memo.profile, model, signal(), blocks=[model.layers[0]])
    assert len(memo.profile(model, signal(), blocks="layers").blocks) == 3
    assert_trains_as(model, tower(), signal())


# Batches that the model does not take.


@pytest.mark.parametrize("call", [memo.profile, memo.check])
@pytest.mark.parametrize("batch", [signal()[..., :3], {"y": signal()}, (), None, (signal(), signal())], ids=str)
def test_a_batch_that_the_model_does_not_take(call: Any, batch: Any) -> None:
    model = tower()
    keys = [list(vars(module)) for module in model.modules()]
    with pytest.raises(ProfileError, match="Tower does not ") as caught:
        call(model, batch)
    cause = caught.value.__cause__
    assert type(cause) in (RuntimeError, TypeError)
    assert str(cause) in str(caught.value)
    assert "keyword arguments as a dict" in str(caught.value)
    assert [list(vars(module)) for module in model.modules()] == keys
    assert_trains_as(model, tower(), signal(), bound=0)


def test_a_batch_is_named_by_its_parts() -> None:
    message = refused(ProfileError, memo.profile, tower(), {"x": signal()[..., :3], "flag": "yes", "more": [signal()]})
    assert "(x: float64 [2, 24, 3] on cpu, flag: 'yes', more: list with tensors)" in message


def test_the_models_own_error_comes_out_of_a_training_step() -> None:
    model = memo.wrap(tower(), **POLICIES["memo"])
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        model(signal()[..., :3])
    assert not isinstance(caught.value, memo.MemoError)
    assert_trains_as(model, tower(), signal())


# Models without weights.


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Tower()
    keys = [list(vars(module)) for module in model.modules()]
    for call in (memo.wrap, lambda m: memo.profile(m, signal()), lambda m: memo.check(m, signal())):
        message = refused(NotBuiltError, call, model)
        assert re.search(r"(\d+) of \1 parameters of Tower are on the meta device \(first: 'first.weight'\)", message)
        assert "to_empty" in message
    assert [list(vars(module)) for module in model.modules()] == keys
    real = model.to_empty(device="cpu").double()
    real.load_state_dict(tower().state_dict())
    assert_trains_as(memo.wrap(real, **POLICIES["memo"]), tower(), signal())
    acted(real)


def test_a_model_that_is_partly_on_the_meta_device() -> None:
    model = tower()
    model.layers[1].to("meta")
    assert "parameters of Tower are on the meta device (first: 'layers.1" in refused(NotBuiltError, memo.wrap, model)


def test_a_model_whose_shapes_the_first_forward_decides() -> None:
    model = tower()
    model.layers[2].out = nn.LazyLinear(32).double()
    for call in (memo.wrap, lambda m: memo.profile(m, signal()), lambda m: memo.check(m, signal())):
        assert "(first: 'layers.2.out.weight'): run one forward" in refused(ProfileError, call, model)
    model(signal())
    memo.wrap(model, **POLICIES["memo"])
    step(model, signal())
    acted(model)
