"""What a contender's process is asked to do: the value between runner and worker. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from benchmarks.harness.geometry import Scope

#: Dtype of a run -> that of its reference; there is none for the widest.
WIDER = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Conditions that all contenders of a run share; a row's ``config``.

    Attributes:
        dtype, device, attention, loss: names. attention ``auto`` leaves the kernel to PyTorch.
        memory: bytes that a contender may allocate, to see who needs more; None: what there is.
        host_memory: bytes that may be in use on the whole machine; beyond that a contender is ended. None: no limit.
        steps: cap on steady and on warm-up steps; None: as many as the length asks for.
        learning_rate: of AdamW, in scope ``step``.
        lora: rank of adapters beside every linear module of the blocks, which alone are trained; None: all is trained.
        rehearse: attention is replaced, and what counts is memory.
    """

    geometry: str
    scope: Scope
    blocks: int | None
    device: str
    dtype: str
    attention: str
    loss: str = "auto"
    memory: int | None = None
    host_memory: int | None = None
    steps: int | None = None
    seed: int = 0
    learning_rate: float = 1e-5
    lora: int | None = None
    rehearse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One contender and the lengths that are missing, shortest first.

    Attributes:
        budgets: device budget by length, for contenders that take one; a length without is unlimited.
        own_budgets: they are another contender's peaks, so that one that is too small says nothing of longer lengths.
        host_budget: the same for host memory, at all lengths.
        sketch_at: length at which gradients are sketched; None: nowhere.
        longest: of the whole run, which the model has positions for; None: of ``lengths``.
        wider, plain: what a reference is: gradients in a wider dtype where that is affordable, or else those of plain
            PyTorch in the run's own; with neither there is none.
        deadline: Unix time at which nothing may be running any more; None: none.
        traces: path of the Chrome traces of one more step per length, without ``-TOKENS.json.gz``; None: no traces.
        plans: path of memo's plans, without ``-TOKENS.json``: carried out where they are, else written; None: none.
    """

    contender: str
    settings: Settings
    lengths: tuple[int, ...]
    budgets: Mapping[int, int] = field(default_factory=dict)
    own_budgets: bool = False
    host_budget: int | None = None
    sketch_at: int | None = None
    longest: int | None = None
    wider: bool = True
    plain: bool = False
    deadline: float | None = None
    traces: str | None = None
    plans: str | None = None

    @property
    def model_length(self) -> int:
        """Tokens that the model has positions for: the same in all processes of a run."""
        return max(self.longest or 0, *self.lengths)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job of ``to_json``; JSON's keys are text."""
        values = json.loads(text)
        settings = values.pop("settings")
        settings["scope"] = Scope(settings["scope"])
        values["budgets"] = {int(tokens): size for tokens, size in values["budgets"].items()}
        values["lengths"] = tuple(values["lengths"])
        return cls(settings=Settings(**settings), **values)
