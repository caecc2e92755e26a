"""Whether a block by tiles is right at a length at which nothing can be compared whole; appends one row.

    python -m benchmarks.sampled_rows --geometry llama-1b-d128 --length 1M --out FILE --commit HASH

One block of the geometry runs forward and backward by tiles, as it does in a step, and everything that it makes is
compared with a wider dtype (``chunked_reference.py``). Exit code 1: something is farther away than rounding explains.

    attention     of some heads: result and log-sum-exp of all queries, dq, dk, dv of 256 rows
    token-wise    q, k, v, do, y, dx of all tokens, and dW of all parameters, with attention's own results given

Each row of numbers has an error, relative to its size, or to the usual size of rows where it is smaller. The root of
their mean square may be 1.5 times, and the worst 3 times, what rounding alone gives: that of the
textbook's formulas on the first tokens of the same numbers, every operand rounded once to the block's dtype. Rounding
errors have random signs, and so has what is summed, so their ratio does not grow with length. A log-sum-exp may be off
by 2^-10: a missing key that has a thousandth of the weight is seen.

A query likes its own key and those beside it, the next one too, which it must not see.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.chunked_reference import Head, Reference, TokenWise, chunks, rounded_attention
from benchmarks.harness.geometry import Scope, UnknownGeometryError, check_geometry
from benchmarks.harness.job import Settings
from benchmarks.harness.provenance import machine, now, versions
from benchmarks.harness.subject import BlockStack, Subject
from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import MemoError
from memo_runtime.execution import tiled_mixing
from memo_runtime.execution.mixers.attention import Inputs, Kernel, Saved
from memo_runtime.execution.mixers.attention import Settings as AttentionSettings
from memo_runtime.execution.tiled import TiledBlock, Way
from memo_runtime.execution.tiled_block import new_programs
from memo_runtime.output import check_writable
from memo_runtime.units import parse_tokens

Tensor = torch.Tensor
USUAL, WORST, LOG_SUM = 1.5, 3.0, 2.0**-10
#: Below this nothing is an error: what the reference itself rounds.
FLOOR = {torch.bfloat16: 0.0, torch.float16: 0.0, torch.float32: 2e-5, torch.float64: 1e-11}
ROWS = 256
#: Tokens beside a token that are like it.
_ALIKE = 8


@dataclass(slots=True)
class Seen:
    """What attention was given and made, group of heads by group, in the order of heads; [1, H, T, D] each."""

    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    lses: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    grads: list[tuple[Tensor, ...]] = field(default_factory=list)
    again: list[bool] = field(default_factory=list)

    @contextmanager
    def looking(self) -> Iterator[Seen]:
        """Every attention of tiles is seen."""
        forward, backward = tiled_mixing.attention_forward, tiled_mixing.attention_backward

        def ahead(inputs: Inputs, settings: AttentionSettings, **how: Any) -> tuple[Tensor, Saved]:
            output, saved = forward(inputs, settings, **how)
            lse = saved.tensors[0]
            assert lse is not None, "a fused kernel yields it first"
            self.inputs.append(tuple(one.clone() for one in (inputs.query, inputs.key, inputs.value)))
            self.outputs.append(output.clone())
            self.lses.append(lse.clone())
            return output, saved

        def back(
            grad: Tensor, inputs: Inputs, output: Tensor, saved: Saved, settings: AttentionSettings
        ) -> tuple[Tensor | None, ...]:
            before = self.inputs[len(self.given)]
            made = (inputs.query, inputs.key, inputs.value)
            self.again.append(all(torch.equal(a, b) for a, b in zip(made, before, strict=True)))
            self.given.append(grad.clone())
            grads = backward(grad, inputs, output, saved, settings)
            self.grads.append(tuple(one.clone() for one in grads[:3] if one is not None))
            return grads

        tiled_mixing.attention_forward, tiled_mixing.attention_backward = ahead, back
        try:
            yield self
        finally:
            tiled_mixing.attention_forward, tiled_mixing.attention_backward = forward, backward

    def head(self, number: int, shared: int) -> tuple[Head, Tensor, Tensor]:
        """(head ``number`` of queries, its result, its log-sum-exp)."""
        group, place = divmod(number, self.outputs[0].shape[1])
        query, key, value = self.inputs[group]
        own = Head(query[0, place], key[0, place // shared], value[0, place // shared], self.given[group][0, place])
        tokens = query.shape[2]
        return own, self.outputs[group][0, place], self.lses[group].reshape(query.shape[1], -1)[place, :tokens]

    def some(self, which: Callable[[Seen], list[Tensor]], tokens: slice) -> Tensor:
        """Of all heads the ``tokens``."""
        return torch.cat([one[:, :, tokens] for one in which(self)], 1)


@dataclass(slots=True)
class Gap:
    """Errors of rows of numbers: what was found against the reference."""

    differences: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)

    def see(self, found: Tensor, expected: Tensor) -> None:
        """Rows [..., D]."""
        wide = expected.double()
        self.differences.append((found.double() - wide).norm(dim=-1).flatten())
        self.sizes.append(wide.norm(dim=-1).flatten())

    def errors(self) -> tuple[float, float]:
        """(root of the mean square, worst) of relative errors; infinite where a number is none."""
        difference, size = torch.cat(self.differences), torch.cat(self.sizes)
        errors = difference / size.clamp(min=float(size.square().mean().sqrt()) + 1e-300)
        usual, worst = float(errors.square().mean().sqrt()), float(errors.max())
        return (usual, worst) if usual == usual else (float("inf"), float("inf"))


Gaps = dict[str, Gap]


def see(gaps: Gaps, name: str, found: Tensor, expected: Tensor) -> None:
    """Note the errors of ``found``."""
    gaps.setdefault(name, Gap()).see(found, expected)


class Trial:
    """One block by tiles over ``tokens``, and what is known of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.tokens = options, options.tokens
        dtype = "bfloat16" if options.dtype == "auto" else options.dtype
        settings = Settings(
            geometry=options.geometry, scope=Scope.BLOCKS, blocks=1, device=options.device, dtype=dtype,
            attention="auto",
        )  # fmt: skip
        self.subject = Subject(settings, longest=self.tokens)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.wide = torch.promote_types(self.dtype, torch.float64 if self.dtype.itemsize > 2 else torch.float32)
        self.layer, shape = self.subject.layers[0], self.subject.shape
        self.shared, self.depth, self.key_heads = shape.heads // shape.kv_heads, shape.head_dim, shape.kv_heads
        self.scale = float(self.layer.self_attn.scaling)  # type: ignore[union-attr, arg-type]
        beyond = [number for number in options.key_heads if not -self.key_heads <= number < self.key_heads]
        if beyond:
            what = f"--key-heads {beyond[0]}: {options.geometry} has {self.key_heads} heads of keys"
            raise UnknownGeometryError(what)
        options.key_heads = sorted({number % self.key_heads for number in options.key_heads})
        self.seen = Seen()
        self.seconds: dict[str, float] = {}
        self._make_alike()

    def _make_alike(self) -> None:
        """Queries like their own keys: a query's product with the key of its token is large."""
        attention: Any = self.layer.self_attn
        width = attention.k_proj.weight.shape[1]
        with torch.no_grad():
            keys = torch.randn_like(attention.k_proj.weight) / width**0.5
            attention.k_proj.weight.copy_(keys)
            same = keys.unflatten(0, (self.key_heads, -1)).repeat_interleave(self.shared, 0).flatten(0, 1)
            liking = 1.3 * (128 / self.depth) ** 0.5
            attention.q_proj.weight.copy_(liking * same + torch.randn_like(same) / width**0.5)

    def run(self) -> None:
        """Forward and backward; everything that is made stays."""
        device, width = self.subject.device, self.subject.shape.hidden
        x = torch.empty(1, self.tokens, width, device=device, dtype=self.dtype)
        self.grad = torch.empty_like(x)
        tail = torch.randn(1, _ALIKE - 1, width, device=device)
        for some in chunks(self.tokens, 8192):
            new = torch.cat([tail, torch.randn(1, some.stop - some.start, width, device=device)], 1)
            x[:, some] = new.unfold(1, _ALIKE, 1).sum(-1) / _ALIKE**0.5
            self.grad[:, some] = torch.randn_like(new[:, _ALIKE - 1 :])
            tail = new[:, 1 - _ALIKE :]
        self.x = x.requires_grad_()
        stack = self.subject.model
        assert isinstance(stack, BlockStack), "the scope is blocks"
        self.tables = stack.rotary_emb(self.x, torch.arange(self.tokens, device=device)[None])
        tiled = TiledBlock(self.layer, tile=self.options.tile, programs=new_programs(device))
        call = BlockCall.of((self.x,), {"attention_mask": None, "position_embeddings": self.tables})
        with self._timed("capture"):
            captured = tiled.captured(call)
        kernel = Kernel(self.options.kernel, self.options.queries)
        for node in captured.attentions:
            tiled.programs.kernels[captured.signature, node.name] = kernel
        way = Way(tile=min(self.options.tile, self.tokens), groups=self.options.groups)
        with self.seen.looking(), self._timed("block"):
            self.y = tiled.run(captured, call, way)
            self.y = self.y[0] if isinstance(self.y, tuple) else self.y
            wanted = dict(self.layer.named_parameters())
            self.dx, *found = torch.autograd.grad(self.y, [self.x, *wanted.values()], self.grad)
        self.weights = dict(zip(wanted, found, strict=True))
        self.kernels = tiled.kernels
        asked = kernel.text(self.options.groups)
        if self.kernels != [asked]:
            raise SystemExit(f"asked for attention by {asked}, and it ran by {', '.join(self.kernels)}")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - started

    # ---- against the reference

    def attention(self, gaps: Gaps, rounding: Gaps) -> float:
        """Errors of the sampled heads and what rounding makes of the first tokens; the largest of log-sum-exps."""
        rows, short, off = self._rows(), min(self.tokens, self.options.short), 0.0
        with self._timed("reference of attention"), torch.no_grad():
            for key_head in self.options.key_heads:
                sums: list[tuple[Tensor, Tensor]] = []
                alone: list[tuple[Tensor, ...]] = []
                for number in range(key_head * self.shared, (key_head + 1) * self.shared):
                    head, output, lse = self.seen.head(number, self.shared)
                    reference = Reference(head, self.scale, self.wide)
                    want, want_lse = reference.forward()
                    off = max(off, float((lse - want_lse).abs().nan_to_num(float("inf")).max()))
                    see(gaps, "o", output, want)
                    see(gaps, "dq", self._grads(0, number)[rows], reference.query_gradients(rows, want, want_lse))
                    sums.append(reference.key_gradients(rows, want, want_lse))
                    alone.append(self._rounded(head.first(short), rounding))
                for place, name in ((1, "dk"), (2, "dv")):
                    see(gaps, name, self._grads(place, key_head)[rows], sum(one[place - 1] for one in sums))
                    exact, rough = (sum(one[2 * place - 2 + way] for one in alone) for way in (0, 1))
                    see(rounding, name, rough, exact)
        return off

    def _grads(self, which: int, number: int) -> Tensor:
        group, place = divmod(number, self.seen.grads[0][which].shape[1])
        return self.seen.grads[group][which][0, place]

    def _rounded(self, head: Head, rounding: Gaps) -> tuple[Tensor, ...]:
        """Errors of rounding alone; (dk, rounded dk, dv, rounded dv) of this head of queries."""
        reference = Reference(head, self.scale, self.wide)
        every = torch.arange(reference.tokens, device=head.query.device)
        want, lse = reference.forward()
        output, dq, dk, dv = rounded_attention(head, self.scale)
        see(rounding, "o", output, want)
        see(rounding, "dq", dq, reference.query_gradients(every, want, lse))
        exact = reference.key_gradients(every, want, lse)
        return exact[0], dk, exact[1], dv

    def _rows(self) -> Tensor:
        """The first and last, both sides of powers of two (tiles, chunks of queries), and random ones."""
        edges = [0, 1, self.tokens - 2, self.tokens - 1]
        edges += [at + side for power in range(7, 31) if (at := 1 << power) < self.tokens for side in (-1, 0)]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(self.tokens, generator=generator)[: max(0, ROWS - len(edges))]
        return torch.cat([torch.tensor(edges), drawn]).unique().to(self.subject.device)

    def token_wise(self, gaps: Gaps, rounding: Gaps) -> None:
        """Errors of everything but attention, at all tokens, and what rounding makes of the first ones."""
        found = {"y": self.y, "dx": self.dx}
        exact = TokenWise(self.layer, self.wide)
        with self._timed("reference of the rest"):
            for some in chunks(self.tokens, self.options.short):
                want = self._chunk(exact, some)
                with torch.no_grad():
                    for name, whole in found.items():
                        see(gaps, name, whole[:, some], want[name])
                    for name, which in self._of_attention():
                        see(gaps, name, self.seen.some(which, some), want[name])
                if some.start == 0:
                    rough = TokenWise(self.layer, self.dtype)
                    for name, one in self._chunk(rough, some).items():
                        see(rounding, name, one, want[name])
                    for name, one in rough.weights.items():
                        see(rounding, f"dW {name}", one.to(self.dtype), exact.weights[name])
        for name, one in self.weights.items():
            see(gaps, f"dW {name}", one, exact.weights[name])

    def _chunk(self, block: TokenWise, some: slice) -> dict[str, Tensor]:
        tables = (self.tables[0][:, some], self.tables[1][:, some])
        grads = tuple(
            self.seen.some(lambda seen, at=at: [one[at] for one in seen.grads], some)
            for at in range(3)  # type: ignore[misc]
        )
        output = self.seen.some(lambda seen: seen.outputs, some)
        return block.run(self.x[:, some], self.grad[:, some], tables, output, grads)

    def _of_attention(self) -> list[tuple[str, Callable[[Seen], list[Tensor]]]]:
        return [
            ("q", lambda seen: [one[0] for one in seen.inputs]),
            ("k", lambda seen: [one[1] for one in seen.inputs]),
            ("v", lambda seen: [one[2] for one in seen.inputs]),
            ("do", lambda seen: seen.given),
        ]


def verdicts(gaps: Gaps, rounding: Gaps, floor: float) -> dict[str, dict[str, Any]]:
    """By name: usual and worst error, both bounds, and whether they hold."""
    found = {}
    for name, gap in gaps.items():
        (usual, worst), (alone, alone_worst) = gap.errors(), rounding[name].errors()
        bounds = max(USUAL * alone, floor), max(WORST * alone_worst, 10 * floor)
        holds = usual <= bounds[0] and worst <= bounds[1]
        found[name] = {"usual": usual, "bound": bounds[0], "worst": worst, "worst_bound": bounds[1], "holds": holds}
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row of one trial."""
    # Products of the reference are float32's, not of fewer bits.
    torch.set_float32_matmul_precision("highest")
    trial = Trial(options)
    trial.run()
    gaps: Gaps = {}
    rounding: Gaps = {}
    off = trial.attention(gaps, rounding)
    trial.token_wise(gaps, rounding)
    quantities = verdicts(gaps, rounding, FLOOR[trial.dtype])
    bound = LOG_SUM if trial.dtype.itemsize < 8 else 1e-11
    quantities["lse"] = {"worst": off, "worst_bound": bound, "holds": off <= bound}
    cuda = trial.subject.device.type == "cuda"
    return {
        "run": "sampled_rows", "geometry": options.geometry, "seq_len": options.tokens,
        "dtype": str(trial.dtype).removeprefix("torch."), "reference": str(trial.wide).removeprefix("torch."),
        "attention": trial.kernels, "tile": options.tile, "key_heads": options.key_heads,
        "rows": len(trial._rows()), "log_sum_exps": "the reference's own, of all queries",
        "made_again_bit_for_bit": all(trial.seen.again),
        "ok": all(one["holds"] for one in quantities.values()), "quantities": quantities, "seconds": trial.seconds,
        "peak_allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "commit": options.commit, "date": now(), "versions": versions(), **machine(cuda=cuda),
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--out", type=Path, help="JSON-lines file to append to")
    add("--commit", required=True, help="commit of the tree that runs")
    add("--geometry", default="llama-1b-d128")
    add("--length", dest="tokens", default="1M", type=_tokens)
    add("--tile", default=8192, type=_count)
    add("--groups", default=2, type=_count, help="groups of heads")
    add("--kernel", default="cudnn" if cuda else "cpu")
    add("--queries", default=0, type=lambda text: 0 if text == "0" else _count(text),
        help="of a chunk in forward; 0: all at once")  # fmt: skip
    add("--key-heads", default=[0, -1], type=_numbers,
        help="heads of keys whose attention is compared, all queries of each; default: first and last")  # fmt: skip
    add("--short", default=4096, type=_tokens, help="tokens whose rounding is the measure, and of a reference's chunk")
    add("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32", "float64"])
    options = parser.parse_args(arguments)
    try:
        check_geometry(options.geometry)
        if options.out is not None:
            check_writable(options.out)
    except (UnknownGeometryError, MemoError) as error:
        parser.error(str(error))
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: there is no GPU here; leave it out")
    return options


def _tokens(text: str) -> int:
    try:
        return parse_tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of heads, such as 0,-1") from None


def main(arguments: list[str] | None = None) -> int:
    """Measure, append and say; 1 where something is over its bound, 2 where it cannot be measured."""
    options = parse(arguments)
    try:
        row = measure(options)
    except UnknownGeometryError as error:
        print(f"sampled_rows.py: error: {error}", file=sys.stderr)
        return 2
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    for name, one in row["quantities"].items():
        figures = "  ".join(f"{key} {value:.2e}" for key, value in one.items() if key != "holds")
        print(f"{'ok  ' if one['holds'] else 'OVER'} {name:<34} {figures}")
    print(row["attention"], row["seconds"])
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
