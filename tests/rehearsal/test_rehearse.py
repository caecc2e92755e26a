"""A rehearsed step takes the memory of a real one, copies as much, and leaves no trace."""

import contextlib
import json
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import memo_runtime as memo
from benchmarks.harness.contenders.selective import save_attention
from memo_runtime.errors import ArgumentError, ArgumentTypeError, NotBuiltError, RehearsalError
from memo_runtime.rehearsal.positions import positions_name
from memo_runtime.rehearsal.record import Rehearsal
from memo_runtime.rehearsal.stand_ins import StandIns
from tests.api.towers import tower
from tests.execution.alive import Alive

CPU = torch.device("cpu")
WRAPPED = {
    "memo": {"policy": "memo", "alpha": 0.4},
    "recompute": {"policy": "recompute"},
    "swap": {"policy": "swap"},
    "tiled": {"policy": "tiled", "alpha": 0.5, "tile": 32},
}


def mean_square(output):
    return output.square().mean()


def batch(tokens=192):
    return torch.randn(2, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def made(way):
    """A tower under one memory manager."""
    model = tower()
    if way in WRAPPED:
        return memo.wrap(model, keep_last=0, **WRAPPED[way])
    options = {"use_reentrant": False}
    if way == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, save_attention)
    for layer in model.layers if way != "unwrapped" else ():
        layer.forward = partial(checkpoint, layer.forward, **options)
    return model


def live_bytes(model, inputs, *, rehearsed):
    """Most bytes alive in a step."""
    model.zero_grad(set_to_none=True)
    with StandIns(CPU) if rehearsed else contextlib.nullcontext(), Alive() as alive:
        mean_square(model(inputs)).backward()
    model.zero_grad(set_to_none=True)
    return alive.peaks[""]


@pytest.mark.parametrize(
    "way", ["unwrapped", "selective", pytest.param("checkpoint", marks=pytest.mark.slow), *WRAPPED]
)
def test_bytes_and_copies_of_a_step_are_those_of_a_real_one(way):
    model, inputs = made(way), batch()
    with StandIns(CPU) as stand_ins:
        mean_square(model(inputs)).backward()
    # In the first step of a wrapped model attention runs many times: profiles and captures see the real kernel.
    assert stand_ins.calls["cpu"].forward == (6 if way == "checkpoint" else 3)
    assert stand_ins.calls["cpu"].backward == 3
    model.zero_grad(set_to_none=True)
    found = memo.rehearse(model, inputs, loss=mean_square)
    assert found.fits
    assert (found.replaced[0].name, found.replaced[0].backward) == ("cpu", 3)
    real, rehearsed = (live_bytes(model, inputs, rehearsed=how) for how in (False, True))
    assert rehearsed == pytest.approx(real, rel=0.01)
    # The profiler counts beside them what was there before, and buffers inside kernels.
    there = sum(one.numel() for one in (*model.parameters(), inputs)) * 8
    assert found.peak_bytes == pytest.approx(real + there, rel=0.03)
    if way in WRAPPED:
        assert {one.executor for one in memo.report(model).blocks} <= {"tiled", "replay", "recompute"}
        mean_square(model(inputs)).backward()
        totals = memo.report(model).totals
        assert totals.bytes_to_host == found.bytes_to_host == found.forecast.bytes_to_host > 0
        assert totals.bytes_to_device == found.bytes_to_device == found.forecast.bytes_to_device
        assert totals.host_bytes == found.host_bytes == found.forecast.host_bytes


def everything(model, optimizer):
    """All that a rehearsal might change, copied."""
    states = [value for one in optimizer.state.values() for value in one.values()]
    grads = [one.grad for one in model.parameters()]
    tensors = [*model.state_dict().values(), *states, *grads, torch.get_rng_state()]
    return [one if one is None else one.clone() for one in tensors], random.getstate()


class Restless(nn.Module):
    """Draws, counts its calls, and has running statistics."""

    def __init__(self):
        super().__init__()
        self.tower, self.norm, self.calls = tower(), nn.BatchNorm1d(8, dtype=torch.float64), 0

    def forward(self, x):
        self.calls += 1
        x = nn.functional.dropout(x * (1 + random.random()), 0.1)
        return self.tower(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_rehearsal_leaves_no_trace(steps, with_gradients):
    model, inputs = Restless(), batch(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        mean_square(model(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if with_gradients:
        mean_square(model(inputs)).backward()
    before, calls = everything(model, optimizer), model.calls
    held = {id(one.grad) for one in model.parameters()}
    found = memo.rehearse(model, inputs, loss=mean_square, optimizer=optimizer)
    assert found.fits
    assert not found.notes
    after = everything(model, optimizer)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert model.calls == calls
    assert {id(one.grad) for one in model.parameters()} == held
    assert bool(optimizer.state) == bool(steps)


def test_states_of_the_optimizer_are_in_the_peak_and_its_own_step_is_not_undone_where_that_is_not_asked():
    model, inputs = tower(), batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    without = memo.rehearse(model, inputs, loss=mean_square)
    assert "no optimizer= was given" in without.notes[0]
    weights = [one.detach().clone() for one in model.parameters()]
    found = memo.rehearse(model, inputs, loss=mean_square, optimizer=optimizer, restore=False)
    states = 2 * sum(one.numel() for one in model.parameters()) * 8
    assert found.peak_bytes - without.peak_bytes >= states
    assert any(not torch.equal(one, before) for one, before in zip(model.parameters(), weights, strict=True))
    assert not optimizer.state


def test_a_model_without_attention_says_that_nothing_was_replaced():
    found = memo.rehearse(nn.Linear(8, 8).double(), batch(8), loss=mean_square)
    assert found.fits
    assert found.calls == 0
    assert "no fused kernel of attention ran" in str(found)


def test_a_wrapped_model_counts_training_steps_only():
    model, inputs = made("memo"), batch()
    mean_square(model(inputs)).backward()
    before = memo.report(model)
    found = memo.rehearse(model, inputs, loss=mean_square)
    assert memo.report(model) == before
    text = str(found)
    assert text.startswith("rehearsal  fits, rehearsed in ")
    assert "cpu: 3 forward, 3 backward" in text
    assert "(forecast " in text
    assert found.calls == 6
    assert Rehearsal.from_dict(json.loads(json.dumps(found.to_dict()))) == found


class Short(torch.autograd.Function):
    """Has no memory when it is asked."""

    asked = ""

    @staticmethod
    def forward(ctx, x):
        Short.fail("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        Short.fail("backward")
        return grad

    @staticmethod
    def fail(where):
        if Short.asked == where:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore")


class Narrow(nn.Module):
    """A part that memory may be short for."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(Short.apply(x))


@pytest.mark.parametrize("way", ["unwrapped", "recompute"])
@pytest.mark.parametrize("phase", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_memory_that_is_short_is_a_result_and_the_model_goes_on(monkeypatch, phase, way):
    model, inputs = tower(), batch(64)
    model.layers[1].mlp = Narrow(model.layers[1].mlp)
    model = memo.wrap(model, keep_last=0, policy=way) if way != "unwrapped" else model
    mean_square(model(inputs)).backward()
    want = [one.grad.clone() for one in model.parameters()]
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(Short, "asked", phase)
    found = memo.rehearse(model, inputs, loss=mean_square)
    assert not found.fits
    assert (found.phase, found.seconds) == (phase, 0.0)
    assert found.where == ("in 'layers.1.mlp' after 2 attentions" if phase == "forward" else "after 1 of 3 attentions")
    assert found.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
    assert "does NOT fit: " + phase in str(found)
    assert all(one.grad is None for one in model.parameters())
    monkeypatch.setattr(Short, "asked", "")
    mean_square(model(inputs)).backward()
    assert all(torch.equal(one.grad, other) for one, other in zip(model.parameters(), want, strict=True))


def test_a_plan_that_does_not_fit_is_a_result():
    model = memo.wrap(tower(), policy="recompute", budget="40KiB")
    found = memo.rehearse(model, batch(), loss=mean_square)
    assert (found.fits, found.phase) == (False, "plan")
    assert found.error.startswith("PlanInfeasibleError")


def test_wrong_input_is_refused_by_name():
    model = tower()
    with pytest.raises(ArgumentTypeError, match=r"memo.rehearse takes an nn.Module"):
        memo.rehearse("model", batch())
    with pytest.raises(ArgumentTypeError, match="no function from the model's output to the loss"):
        memo.rehearse(model, batch(), loss=3)
    with pytest.raises(RehearsalError, match=r"Tower yields no scalar with a gradient \(a tensor of shape"):
        memo.rehearse(model, batch())
    with pytest.raises(RehearsalError, match=r"loss= yields no scalar with a gradient \(a tensor of shape \["):
        memo.rehearse(model, batch(), loss=lambda output: output.detach().sum())
    with pytest.raises(RehearsalError, match=r"Tower does not train on this batch \(\[0\]: float32 \[3, 5\] on cpu\)"):
        memo.rehearse(model, torch.zeros(3, 5), loss=mean_square)
    with pytest.raises(NotBuiltError, match="on the meta device"):
        memo.rehearse(tower().to("meta"), batch(), loss=mean_square)
    with pytest.raises(ArgumentTypeError, match=r"is not a torch\.optim\.Optimizer"):
        memo.rehearse(model, batch(), loss=mean_square, optimizer="adam")


def test_inference_mode_is_refused_by_name_and_no_grad_does_not_matter():
    model = tower(1)
    with torch.inference_mode(), pytest.raises(RehearsalError, match=r"torch\.inference_mode is on"):
        memo.rehearse(model, batch(), loss=mean_square)
    with torch.no_grad():
        assert memo.rehearse(model, batch(), loss=mean_square).fits


def test_an_optimizer_of_another_model_is_refused():
    other = torch.optim.SGD(tower().parameters())
    with pytest.raises(ArgumentError, match="steps no parameter of this"):
        memo.rehearse(tower(), batch(), loss=mean_square, optimizer=other)


def test_what_takes_two_real_steps_says_so_before_it_does(caplog):
    said = []

    class Plain(nn.Module):
        """Says at which point it was asked for a gradient."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, hidden):
            result = self.layer(hidden)
            result.register_hook(lambda _: said.append(len(caplog.records)))
            return result

    found = memo.rehearse(Plain(), torch.randn(1, 4, 8), loss=mean_square)
    assert said == [1, 1]  # before the first backward, and once
    assert "two whole steps" in caplog.text
    assert any("no fused kernel" in note for note in found.notes)
    caplog.clear()
    memo.rehearse(tower(), batch(), loss=mean_square)
    assert "two whole steps" not in caplog.text


def test_an_optimizer_that_steps_in_hooks_does_not_step():
    model = made("memo")
    before = {name: one.detach().clone() for name, one in model.named_parameters()}

    def step(one):
        one.data.sub_(one.grad)

    for one in model.parameters():
        one.register_post_accumulate_grad_hook(step)
    found = memo.rehearse(model, batch(), loss=mean_square)
    assert any("hooks on parameters were left out" in note for note in found.notes)
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    model(batch()).square().mean().backward()
    assert not any(torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_a_rehearsal_that_does_not_begin_loses_no_hook(monkeypatch):
    model, seen = made("memo"), []
    for one in model.parameters():
        one.register_hook(lambda _: seen.append(1))

    def refuses(_):
        raise RuntimeError("not now")

    monkeypatch.setattr("memo_runtime.rehearsal.run.StandIns.__enter__", refuses)
    with pytest.raises(RuntimeError, match="not now"):
        memo.rehearse(model, batch(), loss=mean_square)
    model(batch()).square().mean().backward()
    assert len(seen) == len(list(model.parameters()))


def test_a_loss_that_raises_is_named_and_not_the_batch():
    expected = r"^loss= raised AttributeError: .*nothing.*It is called with what \w+ returns, Tensor here"
    with pytest.raises(RehearsalError, match=expected):
        memo.rehearse(made("memo"), batch(), loss=lambda output: output.nothing)


def test_positions_are_called_what_the_config_calls_them():
    transformers = pytest.importorskip("transformers")
    assert positions_name(transformers.GPT2Config()) == "n_positions"
    assert positions_name(transformers.LlamaConfig()) == positions_name(None) == "max_position_embeddings"


def test_a_batch_beyond_the_positions_of_its_model_is_said():
    class Config:
        max_position_embeddings = 16

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.table = nn.Embedding(32, 8)

        def forward(self, input_ids, most=32):
            return self.table(input_ids[:, :most] + torch.arange(input_ids.shape[1]))

    def asked(tokens, **more):
        ids = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), **more}
        return memo.rehearse(Model(), ids, loss=mean_square)

    assert any("20 tokens are beyond the 16 positions that Model" in note for note in asked(20).notes)
    assert not any("positions" in note for note in asked(16).notes)
    with pytest.raises(RehearsalError, match=r"IndexError.*40 tokens are beyond the 16"):
        asked(40, most=40)
