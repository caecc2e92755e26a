"""Plan files that cannot be used: what is wrong is named, and the model trains on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import ArgumentError, BlockFallbackError, OutputError, PlanFileError, PlanMismatchError
from memo_runtime.persist import load_plan, save
from memo_runtime.records import SCHEMA_VERSION, Plan
from tests.api.subjects import acted, assert_close, assert_trains_as, llama, loss_of, refused, step
from tests.api.towers import POLICIES, Tower, signal, tower


def planned(model: nn.Module | None = None, tokens: int = 24) -> Plan:
    return memo.plan(memo.profile(model or tower(), signal(tokens=tokens)), **POLICIES["memo"])


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text of a plan that fits ``tower()``."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    save(planned(), path)
    return path.read_text()


Edit = Callable[[dict[str, Any]], object]

BROKEN: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "truncated": (lambda text: text[: len(text) // 2], ["ends too early", "line"]),
    "empty": (lambda text: "", ["ends too early"]),
    "no JSON": (lambda text: "plan: memo", ["is not JSON"]),
    "a list": (lambda text: "[]", ["a list instead of an object"]),
    "something else": (lambda text: "{}", ["field 'memo_runtime' is missing"]),
    "another schema": (
        lambda text: text.replace(f'"schema_version": {SCHEMA_VERSION}\n}}', '"schema_version": 99\n}'),
        ["field 'schema_version' is 99", f"reads {SCHEMA_VERSION}"],
    ),
    "a field too few": (lambda text: edited(text, lambda plan: plan.pop("floor_bytes")), ["'floor_bytes' is missing"]),
    "a field too many": (
        lambda text: edited(text, lambda plan: plan["limits"].update(disk=1)),
        ["'limits.disk' is unknown"],
    ),
    "a wrong type": (
        lambda text: edited(text, lambda plan: plan["blocks"][1].update(prefix="8")),
        ["'blocks[1].prefix' is \"8\"", "expected int"],
    ),
    "an unknown executor": (
        lambda text: edited(text, lambda plan: plan["blocks"][0].update(executor="magic")),
        ["'blocks[0].executor'", "replay"],
    ),
    "a profile": (lambda text: profile_text(text), ["holds a profile, not a plan"]),
}


def edited(text: str, edit: Edit) -> str:
    plan = json.loads(text)
    edit(plan)
    return json.dumps(plan)


def profile_text(text: str) -> str:
    return json.dumps({"memo_runtime": "profile"} | json.loads(text)["profile"])


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_broken(case: str, content: str, tmp_path: Path) -> None:
    change, parts = BROKEN[case]
    path = tmp_path / "plan.json"
    path.write_text(change(content))
    model, plain = tower(), tower()
    keys = [list(vars(module)) for module in model.modules()]
    message = refused(PlanFileError, memo.wrap, model, plan=path)
    assert str(path) in message
    for part in parts:
        assert part in message
    assert [list(vars(module)) for module in model.modules()] == keys
    assert_trains_as(model, plain, signal(), bound=0)
    path.write_text(content)
    assert_trains_as(memo.wrap(model, plan=path), plain, signal())
    acted(model)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    model = tower()
    message = refused(PlanFileError, memo.wrap, model, plan=tmp_path / "none.json")
    assert "none.json: No such file" in message
    assert "Is a directory" in refused(PlanFileError, memo.wrap, model, plan=str(tmp_path))
    assert_trains_as(model, tower(), signal(), bound=0)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    torch.save(tower().state_dict(), path)
    assert "it is no text" in refused(PlanFileError, memo.wrap, tower(), plan=path)


# Files that are sound and made for something else.


def assert_mismatch(model: nn.Module, plan: Plan | Path, field: str, inputs: Any, plain: nn.Module) -> str:
    """The first step names ``field`` alone; every later one does too, until the model is unwrapped."""
    memo.wrap(model, plan=plan)
    for _ in range(2):
        message = refused(PlanMismatchError, step, model, inputs)
        assert f"what differs: {field}\n" in message
        assert "profile and plan again" in message
    assert memo.report(model).totals.bytes_to_host == 0
    assert_trains_as(memo.unwrap(model), plain, inputs, bound=0)
    memo.wrap(model, **POLICIES["memo"])
    assert_trains_as(model, plain, inputs)
    acted(model)
    return message


def other_width() -> tuple[nn.Module, nn.Module]:
    models = tower(), tower()
    for model in models:
        torch.manual_seed(7)
        model.last = nn.Linear(32, 5).double()
    return models


def frozen() -> tuple[nn.Module, nn.Module]:
    models = tower(), tower()
    for model in models:
        model.first.requires_grad_(False)
    return models


@pytest.mark.parametrize("made", [other_width, frozen])
def test_a_plan_of_another_model(made: Callable[[], tuple[nn.Module, nn.Module]], content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    model, plain = made()
    assert "parameters" in assert_mismatch(model, path, "model", signal(), plain)


SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97,
}  # fmt: skip


def decoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    made: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return made


@pytest.mark.parametrize("name", ["Mistral", "Granite"])
def test_a_plan_of_a_library_s_other_model_with_the_same_parameters(name: str) -> None:
    ids = torch.randint(3, 97, (2, 24))
    batch = {"input_ids": ids, "labels": ids}
    plan = memo.plan(memo.profile(decoder("Llama"), batch), **POLICIES["memo"])
    model, same = decoder(name), decoder("Llama")
    memo.wrap(model, plan=plan)
    message = refused(PlanMismatchError, model, **batch)
    assert "what differs: classes\n" in message
    assert "LlamaDecoderLayer" in message
    assert f"{name}DecoderLayer for 'model.layers.0' and 1 more" in message
    memo.wrap(same, plan=plan)
    same(**batch).loss.backward()
    assert not {block.reason for block in memo.report(same).blocks} - {""}


def test_a_class_of_the_user_s_own_may_have_another_name_or_derive_from_the_planned_one() -> None:
    ids = torch.randint(3, 97, (2, 24))
    batch = {"input_ids": ids, "labels": ids}
    plan = memo.plan(memo.profile(decoder("Llama"), batch), **POLICIES["memo"])
    model = decoder("Llama")
    for layer in model.get_submodule("model.layers").children():
        layer.__class__ = type("FSDPLlamaDecoderLayer", (type(layer),), {})
    memo.wrap(model, plan=plan)
    model(**batch).loss.backward()
    assert not {block.reason for block in memo.report(model).blocks} - {""}
    renamed = tower()
    for layer in renamed.get_submodule("layers").children():
        layer.__class__ = type("Renamed", (type(layer),), {})
    memo.wrap(renamed, plan=planned())
    step(renamed, signal())
    acted(renamed)


def test_a_plan_of_another_dtype(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    model, plain = tower(dtype=torch.float32), tower(dtype=torch.float32)
    memo.wrap(model, plan=tmp_path / "plan.json")
    message = refused(PlanMismatchError, step, model, signal(dtype=torch.float32))
    assert "what differs: model, batch\n" in message
    assert_trains_as(memo.unwrap(model), plain, signal(dtype=torch.float32), bound=0)


FIELDS = {
    "torch": "2.3",
    "device": "cuda:NVIDIA H100 80GB HBM3",
    "model": "0" * 16,
    "batch": "0" * 16,
    "blocks": "1" * 16,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_stale_or_foreign_plan_names_the_field(field: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(edited(content, lambda plan: plan["profile"]["fingerprint"].update({field: FIELDS[field]})))
    message = assert_mismatch(tower(), path, field, signal(), tower())
    assert f"{field}: the plan has {FIELDS[field]!r}" in message
    if field == "torch":
        assert repr(".".join(torch.__version__.split(".")[:2])) in message


def test_a_plan_with_blocks_that_the_model_does_not_have() -> None:
    plan = planned(tower(5))
    model, plain = tower(), tower()
    message = refused(PlanMismatchError, memo.wrap, model, plan=plan)
    assert "'layers.3' (and 1 more)" in message
    assert "Tower does not have" in message
    refused(PlanMismatchError, memo.wrap, llama(), plan=plan)
    assert_trains_as(model, plain, signal(), bound=0)


def test_a_plan_of_fewer_blocks_than_the_model_has() -> None:
    """The names are all there; the parameters are not those of the plan."""
    assert_mismatch(tower(5), planned(tower(3)), "model", signal(), tower(5))


@pytest.mark.parametrize("blocks", [["layers.0"], ["layers.0.mlp", "layers.1.mlp"]])
def test_a_plan_with_other_blocks_than_those_given(blocks: list[str]) -> None:
    model, plain = tower(), tower()
    message = refused(PlanMismatchError, memo.wrap, model, plan=planned(), blocks=blocks)
    assert "layers.0" in message
    assert "leave blocks= out" in message
    assert_trains_as(model, plain, signal(), bound=0)
    memo.wrap(model, plan=planned(), blocks="layers")
    assert_trains_as(model, plain, signal())
    acted(model)


def test_a_plan_with_its_blocks_in_another_order() -> None:
    """The order is that of their calls, whatever they are named in."""
    model = memo.wrap(tower(), plan=planned(), blocks=["layers.2", "layers.1", "layers.0"])
    assert_trains_as(model, tower(), signal())
    acted(model)


class TwoInputs(Tower):
    """A tower that may be given a second input."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if y is None else x + y)


def test_a_batch_of_another_kind_later_is_named_too() -> None:
    models = [TwoInputs(3).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    model, plain = models
    memo.wrap(model, plan=planned(model))
    assert_trains_as(model, plain, signal())
    message = refused(PlanMismatchError, model, signal(), signal())
    assert "what differs: batch\n" in message
    assert_trains_as(model, plain, signal())
    acted(model)
    model.float()
    assert "model" in refused(PlanMismatchError, step, model, signal(dtype=torch.float32))


def test_a_plan_and_knobs_together(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    model = tower()
    knobs: list[dict[str, Any]] = [{"policy": "swap"}, {"budget": "1GiB"}, {"host_budget": "1MiB"}, {"keep_last": 0}]
    for knob in [*knobs, {"strict": True}, {"policy": "memo", "alpha": 0.37}]:
        message = refused(ArgumentError, memo.wrap, model, plan=path, **knob)
        assert "give the plan or those, not both" in message
    assert_trains_as(model, tower(), signal(), bound=0)
    assert_trains_as(memo.wrap(model, plan=path, loss="native"), tower(), signal())


def test_another_plan_than_the_one_in_force(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    plan = load_plan(tmp_path / "plan.json")
    model, plain = memo.wrap(tower(), plan=plan), tower()
    assert memo.wrap(model, plan=tmp_path / "plan.json") is model
    other = memo.plan(plan.profile, **POLICIES["swap"])
    message = refused(memo.errors.AlreadyWrappedError, memo.wrap, model, plan=other)
    assert "policy 'memo'" in message
    assert "memo.unwrap(model)" in message
    refused(memo.errors.AlreadyWrappedError, memo.wrap, model, **POLICIES["memo"])
    assert_trains_as(model, plain, signal())
    assert acted(model).policy == "memo"


def test_a_plan_can_be_used_at_other_lengths_than_its_own() -> None:
    model, plain = memo.wrap(tower(), plan=planned()), tower()
    for tokens in (24, 31, 12, 24):
        assert_trains_as(model, plain, signal(tokens=tokens))
        assert memo.report(model).totals.bytes_to_host > 0
    acted(model)


def of_rows(model: nn.Module) -> list[str]:
    return [note for note in memo.report(model).notes if "sequences where its plan is for" in note]


@pytest.mark.parametrize("policy", POLICIES)
def test_another_batch_size_than_the_plans_is_said(policy: str) -> None:
    profile = memo.profile(tower(), signal(rows=2))
    model, plain = memo.wrap(tower(), plan=memo.plan(profile, **POLICIES[policy])), tower()
    assert_trains_as(model, plain, signal(rows=2))
    assert of_rows(model) == []
    for rows in (3, 1):
        assert_trains_as(model, plain, signal(rows=rows))
        said = of_rows(model)
        assert said[0].startswith("'layers.0' was given 3 sequences where its plan is for 2, so plan, budget and fore")
        assert "Would work: batches of 2 (drop_last=True where only the last differs)" in said[0]
        report = memo.report(model)
        assert "other tensors than when it was profiled" not in " ".join([*said, *(b.reason for b in report.blocks)])
        word = "sequence" if rows == 1 else "sequences"
        why = f"its batch has {rows} {word} where its plan is for 2, and all that it saves is swapped whole"
        assert [block.reason for block in report.blocks] == [why] * 3
    assert_trains_as(model, plain, signal(rows=2))
    assert [block.reason for block in acted(model).blocks] == [""] * 3


@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_strict_plan_refuses_another_batch_size_before_a_block_runs(through_a_file: bool, tmp_path: Path) -> None:
    profile = memo.profile(tower(), signal(rows=2))
    plan: Any = memo.plan(profile, strict=True, **POLICIES["memo"])
    if through_a_file:
        save(plan, tmp_path / "plan.json")
        plan = tmp_path / "plan.json"
    model, plain = memo.wrap(tower(), plan=plan), tower()
    ran: list[nn.Module] = []
    handle = next(model.layers[0].children()).register_forward_pre_hook(lambda module, _: ran.append(module))
    message = refused(BlockFallbackError, step, model, signal(rows=3))
    handle.remove()
    assert message.startswith("strict=True and 'layers.0' was given 3 sequences where its plan is for 2")
    assert ran == []
    assert_trains_as(model, plain, signal(rows=2))
    acted(model)


def test_an_uneven_last_batch_of_a_run_without_a_given_plan_has_a_plan_of_its_own() -> None:
    model, plain = memo.wrap(tower(), strict=True, **POLICIES["memo"]), tower()
    for rows in (3, 3, 1, 3, 2):
        for one in (model, plain):
            loss_of(one, signal(rows=rows)).backward()
        report = memo.report(model)
        assert of_rows(model) == []
        assert report.totals.peak_bytes == report.totals.forecast.peak_bytes
        assert report.totals.host_bytes_in_use == 0
    wanted = {name: one.grad for name, one in plain.named_parameters() if one.grad is not None}
    assert_close({name: one.grad for name, one in model.named_parameters() if one.grad is not None}, wanted)


# Output.


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    plan = planned()
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "no" / "plan.json", tmp_path, tmp_path / "file" / "plan.json"):
        message = refused(OutputError, save, plan, target)
        assert message.startswith(f"cannot write {target}: ")
        assert "a folder that exists and is writable" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
    assert_trains_as(memo.wrap(tower(), plan=plan), tower(), signal())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refused(OutputError, save, planned(), tmp_path / "plan.json")
    finally:
        tmp_path.chmod(0o700)
