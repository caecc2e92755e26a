"""Modules and parameters are those that PyTorch yields, in its order."""

import torch
from torch import nn

from memo_runtime.blocks.members import have_gradients, modules_of, parameters_of


def model():
    shared, inner = nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3, bias=False))
    made = nn.ModuleDict({"first": shared, "rest": nn.ModuleList([inner, shared, nn.Sequential(inner, nn.Tanh())])})
    made.rest[2].tied = inner[1].weight
    made.missing = None
    made.register_module("none", None)
    return made


def test_modules_and_parameters_are_those_of_pytorch():
    made = model()
    assert [id(one) for one in modules_of(made)] == [id(one) for one in made.modules()]
    assert [id(one) for one in parameters_of(modules_of(made))] == [id(one) for one in made.parameters()]


def test_of_compiled_and_scripted_models_too():
    for made in (torch.compile(model()), torch.jit.script(nn.Sequential(nn.Linear(2, 2)))):
        assert [id(one) for one in parameters_of(modules_of(made))] == [id(one) for one in made.parameters()]


def test_gradients_that_are_there():
    made = model()
    assert not have_gradients(parameters_of(modules_of(made)))
    made.first.weight.grad = torch.zeros(3, 2)
    assert have_gradients(parameters_of(modules_of(made)))
    made.first.weight.requires_grad_(False)
    assert not have_gradients(parameters_of(modules_of(made)))
