"""What Hugging Face collects by hooks (hidden states, attentions, router logits), in the first step and later."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.exactness.compare import MEMO, RECOMPUTE, SWAP, Way, assert_same, run_step, weighted
from tests.exactness.models import FAMILIES, pairs, text

#: With attention weights only where they are made.
EAGER = {"attn_implementation": "eager"}
ASKED: dict[str, dict[str, Any]] = {
    "llama": {"output_hidden_states": True, "output_attentions": True},
    "gpt2": {"output_hidden_states": True, "output_attentions": True},
    "bert": {"output_hidden_states": True, "output_attentions": True},
    "t5": {"output_hidden_states": True, "output_attentions": True},
    "mixtral": {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True},
    "qwen3-moe": {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True},
}
_KINDS = ("hidden_states", "attentions", "router_logits")


def _collected(output: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Every collection of the output by name: those of encoder and decoder too."""
    return {key: list(value) for key, value in output.items() if key.endswith(_KINDS)}


#: Of the two ways that CI takes, memo runs tokens again as recompute does: both where a family has all kinds.
BOTH = ("llama", "mixtral")


@pytest.mark.parametrize(("family", "way"), [
    *((family, MEMO) for family in ASKED),
    *(pytest.param(family, RECOMPUTE, marks=() if family in BOTH else pytest.mark.slow) for family in ASKED),
    *(pytest.param(family, SWAP, marks=pytest.mark.slow) for family in ASKED),
], ids=str)  # fmt: skip
def test_what_is_collected_is_the_unwrapped_models(family: str, way: Way) -> None:
    """The loss of mixture-of-experts models has the auxiliary loss of all router logits in it."""
    seen: list[dict[str, list[Tensor]]] = []

    def loss_of(model: nn.Module, inputs: Any) -> Tensor:
        output = model(**inputs, **ASKED[family])
        seen.append({key: [t.detach().clone() for t in value] for key, value in _collected(output).items()})
        return weighted([output.loss, *_collected(output).values()])

    plain = FAMILIES[family].make(**EAGER)
    wrapped = way.wrap(copy.deepcopy(plain))
    inputs = (pairs if family == "t5" else text)(rows=2, tokens=21)
    want = run_step(plain, inputs, loss_of)
    kinds = {kind for kind in _KINDS for key in seen[0] if key.endswith(kind)}
    assert kinds == {name.removeprefix("output_") for name in ASKED[family]}
    for _ in range(2):
        assert_same(run_step(wrapped, inputs, loss_of), want, way)
        got = seen.pop()
        assert {key: len(value) for key, value in got.items()} == {key: len(value) for key, value in seen[0].items()}
        assert all(torch.equal(a, b) for key in got for a, b in zip(got[key], seen[0][key], strict=True))
