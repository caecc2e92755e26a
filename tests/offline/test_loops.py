"""Loops over tokens in Python are refused by name, loops over chunks are planned, with what they launch."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from memo_runtime.cli.app import app
from memo_runtime.cli.exits import ExitCode
from memo_runtime.errors import ProfileError
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import subject_of
from memo_runtime.profiling.growth import fit_counts

H100 = find_machine("h100-80gb")
MAMBA = {"model_type": "mamba", "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64}
RWKV = {"model_type": "rwkv", "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


class Scan(nn.Module):
    """Sums of all tokens before, ``chunk`` at a time."""

    def __init__(self, chunk):
        super().__init__()
        self.chunk = chunk
        self.mix = nn.Linear(16, 16)

    def forward(self, hidden):
        state, sums = torch.zeros_like(hidden[:, :1]), []
        for part in self.mix(hidden).split(self.chunk, dim=1):
            sums.append(state + part)
            state = state + part.sum(1, keepdim=True)
        return hidden + torch.cat(sums, dim=1)


class Scans(nn.Module):
    def __init__(self, chunk):
        super().__init__()
        self.layers = nn.ModuleList(Scan(chunk) for _ in range(2))
        self.head = nn.Linear(16, 8)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def study(chunk):
    return study_model(subject_of("scans", Scans(chunk), ((torch.empty(1, 64, 16),), {})), H100)


def test_a_loop_over_tokens_is_refused_by_name():
    # Three operators for each token: two sums, and the one along its dimension.
    with pytest.raises(ProfileError, match=r"layers\.0 \(Scan\) goes .* so 393,216 for .* What works: on the GPU"):
        study(chunk=1)


def test_a_loop_over_chunks_is_planned_and_its_launches_are_said():
    at = study(chunk=512).at(1 << 20)
    (note,) = (note for note in at.profile.notes if "loop over chunks" in note)
    assert note.startswith("2 of 2 blocks")
    # What is said is what runs: the operators of longer runs are on the line through those of shorter ones.
    of_kinds = {name: [(run.tokens, _operators(run)) for run in kind.runs] for name, kind in at.study.examples.items()}
    each = sum(fit_counts(of_kinds[kind]).linear for kind in at.study.kinds.values())
    assert each > 0
    assert f"some {round(each * (1 << 20)):,} operators" in note


def _operators(run):
    return run.forward.operators + run.backward.operators


def test_a_block_without_a_loop_has_no_such_note():
    assert not any("loop" in note for note in study(chunk=1 << 20).at(1 << 16).profile.notes)


@pytest.mark.parametrize(
    ("verb", "config", "block"),
    [
        (["fit"], MAMBA, "backbone.layers.0 (MambaBlock)"),
        pytest.param(["plan", "--seq-len", "1M"], RWKV, "rwkv.blocks.0 (RwkvBlock)", marks=pytest.mark.slow),
    ],
)
def test_scans_of_transformers_without_their_kernels_end_with_one_message(tmp_path, verb, config, block):
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(app, [*verb, "--model", str(path)])
    assert result.exit_code == ExitCode.USAGE, result.output
    assert f"{block} goes through its tokens one by one" in result.output


class Remembers(Scan):
    """Keeps what it made, with its graph."""

    def forward(self, hidden):
        self.last = super().forward(hidden)
        return self.last


def test_a_block_that_keeps_results_of_its_forward_is_named_with_them():
    model = nn.Sequential(Remembers(1 << 20), Remembers(1 << 20), nn.Linear(16, 8))
    subject = subject_of("remembers", model, ((torch.empty(1, 64, 16),), {}))
    with pytest.raises(ProfileError, match=r"a Remembers cannot be copied.* it keeps results of its forward \(last\)"):
        study_model(subject, H100)
