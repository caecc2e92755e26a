"""Errors that say by how much a plan does not fit, where, and what would: see ``suggest``.

this step does not fit in 76.00 GiB on H100 (budget): it needs 83.20 GiB, short by 7.20 GiB
  at         model.layers.31, backward
  floor      83.20 GiB with every activation sent away or rebuilt: optimizer 48.20 GiB, parameters ...
  would fit  98,304 tokens instead of 131,072 (device ..., host ...)
             budget='83.20GiB' (device ..., host ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memo_runtime.config import Policy, Settings
from memo_runtime.errors import HostLimitError, PlanInfeasibleError
from memo_runtime.planning import suggest
from memo_runtime.planning.executors import chooses_executors
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.notes import note_on_pairs
from memo_runtime.planning.policies import strategy_for
from memo_runtime.planning.sheet import Sheet
from memo_runtime.planning.strategy import Choices
from memo_runtime.planning.tiles import floor, tiles_seen
from memo_runtime.planning.words import PYTHON, PythonWords
from memo_runtime.units import format_bytes

_STEP = "optimizer's step"
#: Phases of a step that are in no block.
_OUTSIDE = ("head and loss", "end of backward", _STEP)
#: Share of the parameters from which on something is worth making smaller.
_WORTH_NAMING = 0.1


def infeasible(sheet: Sheet, settings: Settings, words: PythonWords = PYTHON) -> PlanInfeasibleError:
    """The error for a request of which no stand-by fits: about the device first, then about the host.

    Args:
        words: how suggestions are put.
    """
    budgets = Budgets.of(sheet, settings)
    strategy, _ = strategy_for(settings, budgets)
    tried = list(strategy.stand_bys(sheet))
    on_device = [choices for choices in tried if not budgets.over_device(sheet.peak_bytes(choices))]
    if not on_device:
        return _device_error(sheet, settings, tried, words)
    return _host_error(sheet, settings, tried, words)


def _device_error(
    sheet: Sheet, settings: Settings, tried: Sequence[Choices], words: PythonWords
) -> PlanInfeasibleError:
    budgets = Budgets.of(sheet, settings)
    choices = min(tried, key=sheet.peak_bytes)
    unbounded = replace(settings, host_budget=max(1, *map(sheet.host_bytes, tried)))
    needed = suggest.least_budget(sheet, unbounded, "budget", sheet.peak_bytes(choices))
    course = sheet.course(choices)
    name = sheet.blocks[course.index].name if sheet.blocks else "the model"
    where = course.phase if course.phase in _OUTSIDE else f"{name}, {course.phase}"
    device = sheet.profile.device_name or sheet.profile.device_type
    allowed = f"{format_bytes(budgets.device or 0)} on {device} ({budgets.device_source})"
    lines = [
        f"this step does not fit in {allowed}: it needs {format_bytes(needed)}, "
        f"short by {format_bytes(budgets.over_device(needed))}",
        f"  at         {where}, policy '{settings.policy}'{f', tile={settings.tile}' if settings.tile else ''}",
        _floor_line(sheet, settings),
        *_replay_line(sheet, settings, words),
        *_accumulation_line(sheet, settings),
        *([_stepping_line(sheet)] if course.phase == _STEP else []),
        *(f"  note       {note}" for note in note_on_pairs(sheet)),
        *_suggestions(suggest.for_device(sheet, settings, tried, words), _no_length(sheet)),
        *_footing_line(words),
    ]
    return PlanInfeasibleError("\n".join(lines))


def _host_error(sheet: Sheet, settings: Settings, tried: Sequence[Choices], words: PythonWords) -> HostLimitError:
    budgets = Budgets.of(sheet, settings)
    enough = min(sheet.host_bytes(choices) for choices in tried if not budgets.over_device(sheet.peak_bytes(choices)))
    needed = suggest.least_budget(sheet, settings, "host_budget", enough)
    room = ""
    if budgets.device is not None:
        room = f" to fit in {format_bytes(budgets.device)} on the device ({budgets.device_source})"
    lines = [
        f"this step needs {format_bytes(needed)} of host memory with policy '{settings.policy}'{room}, and "
        f"{format_bytes(budgets.host)} are allowed ({budgets.host_source}): "
        f"short by {format_bytes(budgets.over_host(needed))}",
        *_replay_line(sheet, settings, words),
        *_suggestions(suggest.for_host(sheet, settings, tried, words, needed), "nothing that was tried"),
        *_footing_line(words),
    ]
    return HostLimitError("\n".join(lines))


def _replay_line(sheet: Sheet, settings: Settings, words: PythonWords) -> list[str]:
    """Where ``auto`` knows nothing of tiles: a run captures no blocks that cannot fit any budget near the asked one."""
    if tiles_seen(sheet) or not chooses_executors(settings, Budgets.of(sheet, settings)):
        return []
    tiled = words.setting("policy", Policy.TILED.value)
    return [f"  tried      replay alone: by tiles ({tiled}) less may be enough"]


def _footing_line(words: PythonWords) -> list[str]:
    footing = words.footing()
    return [f"  of         {footing}"] if footing else []


def _accumulation_line(sheet: Sheet, settings: Settings) -> list[str]:
    """The cure for what only gradients that are there already make too large."""
    if not sheet.accumulating or not suggest.is_feasible(sheet.where(accumulating=False), settings):
        return []
    gradients = format_bytes(sheet.profile.states.gradients)
    return [
        f"  since      this step starts with gradients ({gradients} of them at every point), and without them it fits: "
        "zero_grad(set_to_none=True) before each forward, so no accumulation"
    ]


def _stepping_line(sheet: Sheet) -> str:
    """The cure for what only the optimizer's step makes too large."""
    states = sheet.profile.states
    return (
        f"  since      the step of {states.optimizer_name} makes temporaries of {format_bytes(states.stepping)}: with "
        "fused=True, where its class has that, it makes none, and with foreach=False those of one parameter at a time"
    )


def _suggestions(found: Sequence[suggest.Suggestion], otherwise: str) -> list[str]:
    texts = [str(suggestion) for suggestion in found] or [otherwise]
    return [f"  {'would fit' if not number else '':9}  {text}" for number, text in enumerate(texts)]


def _no_length(sheet: Sheet) -> str:
    states = sheet.profile.states
    there = f"{format_bytes(sheet.around.base_bytes)} are there before any activation"
    if sheet.around.gradual:
        there += f", and {format_bytes(states.gradients)} of gradients come with backward"
    cures = ["a smaller model"]
    if states.gradients > _WORTH_NAMING * states.parameters:
        cures.append("fewer trained weights")
    if states.optimizer > _WORTH_NAMING * states.parameters:
        cures.append("a smaller optimizer state")
    return f"no length: {there}; {' or '.join(cures)} would"


def _floor_line(sheet: Sheet, settings: Settings) -> str:
    choices = floor(sheet, settings)
    total = sheet.peak_bytes(choices)
    parts = sorted(_floor_parts(sheet, choices, total).items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
    return f"  floor      {format_bytes(total)} with every activation sent away or rebuilt: {listed}"


def _floor_parts(sheet: Sheet, choices: Choices, total: int) -> dict[str, int]:
    """What the floor consists of; bytes that add up to ``total``."""
    profile, states = sheet.profile, sheet.profile.states
    gradients = sheet.course(choices).gradients if sheet.around.gradual else states.gradients
    parts = {
        "parameters": states.parameters,
        "buffers": states.buffers,
        "gradients": gradients,
        f"optimizer ({states.optimizer_name}{', assumed' if states.assumed else ''})": states.optimizer,
    }
    if sheet.around.asynchronous:
        tokens = sheet.lengths[-1] if sheet.lengths else 0
        parts["shared arguments"] = profile.shared.at(tokens)
        parts["around the blocks"] = profile.outside_forward.at(tokens)
        # What else was alive in the profiled process; what the profile calls present is part of it.
        there = sheet.around.base_bytes + (gradients if sheet.around.gradual else 0)
        parts["other tensors"] = max(0, there - sum(parts.values()))
    if sheet.course(choices).phase == _STEP:
        parts["temporaries of its step"] = states.stepping
    parts["activations and workspace there"] = max(0, total - sum(parts.values()))
    return parts
