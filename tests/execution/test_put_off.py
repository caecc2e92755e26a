"""The fetch of the block below: put off until little of the block in backward is left, where the plan counts on it."""

from __future__ import annotations

import pytest
import torch

import memo_runtime as memo
from memo_runtime.execution.piece import Piece
from tests.exactness.models import FAMILIES, text


@pytest.mark.parametrize(("policy", "waits"), [("recompute", True), ("swap", False)])
def test_what_lands_for_the_block_below_waits_for_room_where_it_is_little(monkeypatch, policy, waits):
    """Bytes held at each landing, of the block that is in backward then."""
    model, data = FAMILIES["llama"].make(num_hidden_layers=3, intermediate_size=256), text(rows=2, tokens=21)
    memo.wrap(model, policy=policy, keep_last=0)
    model(**data).loss.backward()
    ledger, seen = model._memo.session.tools.ledger, []
    land = Piece.land

    def landing(piece: Piece, device: torch.device):
        seen.append(ledger.current)
        return land(piece, device)

    monkeypatch.setattr(Piece, "land", landing)
    model(**data).loss.backward()
    totals = memo.report(model).totals
    assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes
    # The last landings are for the lowest block, while the one above it goes backward.
    first_of_lowest = seen[-len(seen) // 3]
    assert (first_of_lowest <= totals.stash_peak_bytes // 2) == waits
