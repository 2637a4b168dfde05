"""What a training step costs, read from its jaxpr and its compiled program without running it.

XLA's own `cost_analysis` counts the body of a loop once, so for a model scanned over its layers it
reports one layer; the two counts here multiply by the loops' lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from pathme_jax.errors import UserError

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


# ---------------------------------------------------------------------------- arithmetic, from the jaxpr


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Floating-point operations of every matrix product and convolution in one call, over all devices.

    A product of (m, k) and (k, n) is 2 m n k. Scans count their length, conditionals their dearest
    branch, and what rematerialisation computes again is counted again, so this is the work of the
    hardware. Elementwise work is left out, and so is a kernel that hides its products (cuDNN attention).

    Args:
        function: anything `jax.make_jaxpr` traces; not run.
        arguments: arrays or `jax.ShapeDtypeStruct`s, of the global shapes.

    Raises:
        UserError: a `while_loop`, whose length is unknown before it runs, multiplies matrices.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * (kernel.size // features)
    inner = [_flops(jaxpr) for jaxpr in _jaxprs(params.values())]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise UserError(
            "a while_loop multiplies matrices, and how often is not known before it runs",
            "Use jax.lax.scan, or fori_loop with constant bounds",
        )
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(values: Iterable[Any]) -> list[Jaxpr]:
    """The jaxprs among an equation's parameters: of pjit, remat, custom_vjp, scan, cond, …"""
    leaves = jax.tree.leaves(list(values), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    opened = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in leaves]
    return [x for x in opened if isinstance(x, Jaxpr)]


# ------------------------------------------------------------------- communication, from the HLO text

_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%\S+ = (?P<type>.*?) (?P<op>[a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|(?:branch|true|false)_computations?)=\{?([^{}=]*%[^,}\s]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"(pred|[a-z]+\d\w*)\[([\d,]*)\]")


def collectives(compiled: Any) -> dict[str, dict[str, int]]:
    """How often one device takes part in each kind of collective in one call, and the bytes.

    Bytes are those of the *result on one device*: the whole array for an all-gather or an all-reduce,
    one shard for a reduce-scatter. A ring moves (g - 1) / g of them over the wire in a group of g
    devices for an all-gather, twice that for an all-reduce, g - 1 times them for a reduce-scatter.
    What a loop contains counts once a turn (once, where XLA does not know the number of turns), and
    every branch of a conditional counts.

    Args:
        compiled: what `jax.jit(f).lower(...).compile()` returns.

    Returns:
        {kind: {"count": int, "bytes": int}} for the kinds that occur, named as in HLO.
    """
    found: dict[str, list[tuple[str, int]]] = {}  # computation -> its own (kind, bytes)
    called: dict[str, list[tuple[str, int]]] = {}  # computation -> (another, how often)
    entry = here = ""
    for line in compiled.as_text().splitlines():
        if start := _COMPUTATION.match(line):
            here = start[2]
            found[here], called[here] = [], []
            entry = here if start[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            # An asynchronous collective counts where it is done: that type is the result alone.
            kind = instruction["op"].removesuffix("-done")
            if kind in COLLECTIVES:
                found[here].append((kind, _bytes(instruction["type"])))
            turns = _TRIPS.search(line)
            times = int(turns[1]) if turns else 1
            for names in _CALLED.findall(line):
                called[here] += [(name.strip(" %"), times) for name in names.split(",")]

    totals: dict[str, dict[str, int]] = {}

    def visit(computation: str, times: int) -> None:
        for kind, size in found[computation]:
            total = totals.setdefault(kind, {"count": 0, "bytes": 0})
            total["count"] += times
            total["bytes"] += times * size
        for other, turns in called[computation]:
            visit(other, times * turns)

    visit(entry, 1)
    return totals


def _bytes(hlo_type: str) -> int:
    """'(f32[2,3]{1,0}, bf16[4])' to 32. A type's name holds its bits; pred is a byte."""
    bits = 0
    for name, shape in _ARRAY.findall(hlo_type):
        width = 8 if name == "pred" else int(re.findall(r"\d+", name)[0])
        bits += width * math.prod(int(n) for n in shape.split(",") if n)
    return bits // 8


# ------------------------------------------------------------------------------------------- memory


def memory(compiled: Any) -> dict[str, int]:
    """Bytes on one device, as the compiler planned them: argument, output, alias, temp.

    Aliased bytes (a donated state) are in both argument and output but exist once, so the program
    needs argument + output - alias + temp. Temporaries are this backend's: a CPU fuses less than a GPU.
    """
    planned = compiled.memory_analysis()
    parts = ("argument", "output", "alias", "temp")
    return {part: getattr(planned, f"{part}_size_in_bytes") for part in parts}


def state_bytes(state: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on one device of each part of a state ("trained", "ema", "opt", …), from its shardings.

    state: arrays or `jax.ShapeDtypeStruct`s with a `sharding`.
    """

    def local(x: Any) -> int:
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return {part: sum(map(local, jax.tree.leaves(tree))) for part, tree in state.items()}


# ------------------------------------------------------------------------------------------- the table


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every parameter on a line of its own, in aligned columns, and the total.

    rows: of path, shape, role, sharding and, where the optimiser moves it, lr and decay (multipliers;
        a stack of layers may have one each) and frozen_until (the step it first moves at).
    """
    columns = ("path", "shape", "role", "lr", "decay", "frozen_until", "sharding")
    cells = [[_cell(row.get(name, "-")) for name in columns] for row in rows]
    cells = [[name.replace("_", " ") for name in columns], *cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    total = sum(math.prod(row["shape"]) for row in rows)
    return "\n".join([*lines, f"{len(rows)} arrays, {total:,} parameters"])


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    low, high = np.min(value), np.max(value)
    return f"{low:.6g}" if low == high else f"{low:.3g} to {high:.3g}"
