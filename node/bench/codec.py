"""`resbm-node bench codec`: how fast latents and gradients become bytes and numbers again, on one thread.

Rates are of dense-equivalent bytes: what the activations would have taken in bf16, B x T x D x 2, per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from node.bench.common import JsonLines, OutFile, Quick, Report, Spread, Table, Watcher, watching

if TYPE_CHECKING:
    from node.bench.codec_timing import Measured

OPERATIONS = ("pack", "unpack", "encode", "decode")
"""Tensor to bytes and back; bytes to a serialised frame and back (zstandard, checksum, protobuf, all checks)."""

GROWTH_CALLS = 500
_COLUMNS = ("encoding", *OPERATIONS)


def codec(*, quick: Quick = False, json_lines: JsonLines = False, out: OutFile = None) -> None:
    """Measure packing, unpacking and serialising of latents and their gradients on one thread.

    Example: resbm-node bench codec --quick
    """
    with watching(json_lines=json_lines) as watcher:
        report = Report("codec", watcher, quick=quick, out=out)
        plan = Plan(repeats=7, seconds_per_repeat=0.05) if quick else Plan(repeats=25, seconds_per_repeat=0.2)
        results = measure(plan, watcher)
        measurements = {"plan": asdict(plan), "cases": [asdict(result) for result in results]}
        report.finish(measurements, tables_of(results), summary_of(results))


@dataclass(frozen=True, slots=True)
class Shape:
    """A microbatch at a boundary: B sequences of T tokens, model width D, latent width h."""

    name: str
    batch: int
    tokens: int
    hidden: int
    width: int

    @property
    def dense_bytes(self) -> int:
        return self.batch * self.tokens * self.hidden * 2


SHAPES = (
    Shape("demo", 2, 256, 384, 12),
    Shape("wide batch", 8, 256, 512, 16),
    Shape("H=4096", 4, 1024, 4096, 120),
    Shape("H=4096 narrow", 4, 1024, 4096, 28),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    repeats: int
    seconds_per_repeat: float  # each repeat is as many calls as fill this


@dataclass(frozen=True, slots=True)
class Result:
    """One shape in one encoding."""

    shape: Shape
    direction: str  # forward: latents; backward: their gradients
    encoding: str
    operations: dict[str, Measured]  # by OPERATIONS

    def gb_per_second(self, operation: str) -> Spread:
        seconds = self.operations[operation].seconds_per_call.repeats
        return Spread.of([self.shape.dense_bytes / second / 1e9 for second in seconds])

    @property
    def four_bits(self) -> bool:
        return self.encoding.startswith("INT4")


def measure(plan: Plan, watcher: Watcher) -> list[Result]:
    """Every shape at 4 bits both ways; the other encodings at the first shape."""
    from node.bench.codec_timing import Subject, one_thread
    from stage_server.codec import Encoding

    four_bits = (("forward", Encoding.INT4_FIXED), ("backward", Encoding.INT4_TOKEN))
    others = (
        ("forward", Encoding.INT8_FIXED),
        ("backward", Encoding.INT8_TOKEN),
        ("forward", Encoding.BF16),
        ("forward", Encoding.FP32),
    )
    cases = [(shape, *case) for shape in SHAPES for case in four_bits] + [(SHAPES[0], *case) for case in others]
    results = []
    with one_thread():
        for number, (shape, direction, encoding) in enumerate(cases):
            watcher.doing(f"{shape.name} {direction} {encoding.name}", number / len(cases))
            subject = Subject(shape, direction, encoding)
            result = Result(shape, direction, encoding.name, subject.measure(plan))
            results.append(result)
            rates = {name: result.gb_per_second(name).median for name in result.operations}
            watcher.note({"event": "case", "shape": shape.name, "encoding": encoding.name, "gb_per_second": rates})
    return results


def summary_of(results: Sequence[Result]) -> dict[str, Any]:
    """The slowest of the 4-bit shapes, forward and backward, and the most memory that any call took."""
    narrow = [result for result in results if result.four_bits]
    worst = {f"{name}_gb_per_second": min(r.gb_per_second(name).median for r in narrow) for name in OPERATIONS}
    memory = [m.memory for r in results for m in r.operations.values() if m.memory is not None]
    return {
        **worst,
        "most_bytes_held": max((use.peak_bytes for use in memory), default=None),
        "most_bytes_held_over_input": max((use.peak_bytes / use.input_bytes for use in memory), default=None),
        "most_bytes_grown": max((use.growth_bytes for use in memory), default=None),
    }


def tables_of(results: Sequence[Result]) -> list[Table]:
    rows, memory_rows = [], []
    for r in results:
        s = r.shape
        name = f"{s.name}: [{s.batch}, {s.tokens}, {s.width}] of {s.hidden}"
        rows.append([name, r.encoding, *(f"{r.gb_per_second(operation).median:.1f}" for operation in OPERATIONS)])
        memory = [r.operations[operation].memory for operation in OPERATIONS]
        cells = ["-" if use is None else f"{use.peak_bytes / 1e6:.2f} / {use.growth_bytes / 1e6:.2f}" for use in memory]
        memory_rows.append([name, r.encoding, f"{s.batch * s.tokens * s.width * 4 / 1e6:.2f}", *cells])
    return [
        Table("GB/s of dense-equivalent bf16 on one thread", ["", *_COLUMNS], rows),
        Table(
            f"memory, MB: held at most during a call / grown after {GROWTH_CALLS} calls",
            ["", "encoding", "input as float32", *OPERATIONS],
            memory_rows,
        ),
    ]
