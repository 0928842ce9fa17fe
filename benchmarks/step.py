"""Time, memory and share of the peak of a training step, over the kernels and savings it may use.

  python benchmarks/step.py experiment=kairos_small [KEY=VALUE ...] [--batch 4] [--rows ROW ...] [--steps 10]

A row is ATTENTION,DELTA,BLOCKS,CHECKPOINTING[,BATCH]: folded or flex; chunked or fused (flash-linear-attention); eager
or compiled; none, selective or full. Sizes are changed as in train.py (synthesis.denoiser.repeats=3 and
policy.expert.layers=12 make a slice). `--forward` leaves out gradients and the optimiser. A row that cannot run says
why.

A step is that of the phase: stage 1, both transformers, loss, backward, clipping, AdamW and moving average. Batches are
random, of the shapes of `data.spec`. Left out: reading data, logging, and the two frozen networks whose answers a cache
can hold: latents are drawn instead of encoded, and instructions are read once, by a random model of two layers.
`--tokeniser` times the encoding by itself. Learning rates are 0, so that every row has the same weights and its loss
can be held against the first row's.

FLOPs are those the model needs, whatever a row computes besides, counted as `python -m worldmodel.plan` does: products
and attention of the forward and backward pass by torch's formulas; windowed attention 4 d per pair of tokens that see
each other and the gated delta rule 6 dk dv per token, for each head, and twice that backward; nothing that
checkpointing computes again. MFU is their rate over that of one large matrix product in the same run.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from step_bench import Bench, Row, compose, timed

sys.path.insert(0, str(Path(__file__).parent.parent))

ROWS = (
    "folded,chunked,eager,none",
    "folded,fused,eager,none",
    "flex,fused,eager,none",
    "folded,fused,compiled,none",
    "flex,fused,compiled,none",
    "flex,fused,compiled,selective",
    "flex,fused,compiled,full",
)
CHOICES = (
    ("folded", "flex", "dense"),
    ("chunked", "fused"),
    ("eager", "compiled"),
    ("none", "selective", "full"),
)
GIB = 2**30


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="experiment=NAME and other settings, as for train.py")
    parser.add_argument("--phase", help="phase whose step it is (default: the last of objective world)")
    parser.add_argument("--mode", default="joint", help="mode of the batch (default: joint)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, of which the median is taken")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--forward", action="store_true", help="no gradients, no optimiser")
    parser.add_argument("--tokeniser", action="store_true", help="also time the encoding of one sample's pictures")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--product", type=int, default=8192, help="size of the matrix product that is the peak")
    parser.add_argument("--profile", type=Path, help="writes what the first row's kernels take to this file")
    parser.add_argument("--json", type=Path, help="writes all figures to this file, after each row")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measures the rows in turn and prints a Markdown table."""
    given = arguments().parse_intermixed_args(argv)
    rows = [parse(row, given.batch) for row in given.rows]
    import torch

    from worldmodel.errors import ConfigError

    torch.set_num_threads(given.threads)
    config = compose(given.overrides)
    bench = Bench(config, given)
    peak = product_rate(given.device, given.product)
    flops = bench.flops()
    found: list[dict[str, Any]] = []
    report = {"peak": peak, "flops_per_sample": flops, "tokens_per_sample": bench.tokens, "sizes": bench.sizes()}
    report |= {"arguments": sys.argv[1:] if argv is None else argv, "torch": torch.__version__, "rows": found}
    if given.tokeniser:
        report["tokeniser_seconds"] = bench.tokeniser()
    for row in rows:
        try:
            found.append(row._asdict() | bench.measure(row, None if found else given.profile))
        except (RuntimeError, ConfigError) as error:  # out of memory is one; the rows after it may run
            found.append(row._asdict() | {"failed": str(error).strip().splitlines()[0][:120]})
        print(f"{found[-1]}", file=sys.stderr, flush=True)
        if given.json:
            given.json.write_text(json.dumps(report, indent=1))
    print(table(report, given))


def parse(text: str, batch: int) -> Row:
    """A row from its text; leaves with a message where it is none."""
    parts = text.split(",")
    if len(parts) not in (4, 5) or any(part not in known for part, known in zip(parts, CHOICES, strict=False)):
        sys.exit(f"row {text!r}: expected {', '.join('|'.join(known) for known in CHOICES)} and perhaps a batch size")
    return Row(parts[0], parts[1], parts[2], parts[3], int(parts[4]) if len(parts) == 5 else batch)


def product_rate(device: str, size: int) -> float:
    """FLOP/s of a large matrix product of random numbers, in bfloat16 on a GPU: the peak that MFU is a share of."""
    import torch

    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if device != "cpu":
        a, b = a.bfloat16(), b.bfloat16()
    for _ in range(3):
        torch.matmul(a, b)
    seconds = statistics.median(timed(lambda: float((a @ b)[0, 0])) for _ in range(20))
    return 2 * size**3 / seconds


def table(report: dict[str, Any], given: argparse.Namespace) -> str:
    """The Markdown table, under a line of sizes."""
    sizes, flops = report["sizes"], report["flops_per_sample"]
    parameters = ", ".join(f"{name} {sizes[name] / 1e6:.0f} M" for name in ("denoiser", "expert", "trained"))
    lines = [
        f"{' '.join(given.overrides)}: {parameters} parameters, {sizes['layers']} layers, "
        f"{report['tokens_per_sample']} tokens and {flops / 1e12:.3g} TFLOP a sample{' forward' * given.forward}; "
        f"matrix product of {given.product}: {report['peak'] / 1e12:.4g} TFLOP/s; mode {given.mode}; "
        f"{given.steps} steps after {given.warmup}; torch {report['torch']}"
    ]
    if given.tokeniser:
        lines.append(
            f"Encoding the pictures of one sample: {1e3 * report['tokeniser_seconds']:.0f} ms, not in the step"
        )
    lines += [
        "",
        "| attention | delta | blocks | checkpointing | batch | ms/step | min-max | tokens/s | samples/s | peak GiB "
        "| MFU % | loss | first step s |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        cells = [row[name] for name in Row._fields]
        if "failed" in row:
            cells += [row["failed"], *[""] * 7]
        else:
            rate = row["batch"] / row["seconds"]
            cells += [f"{1e3 * row['seconds']:.1f}", "-".join(f"{1e3 * s:.1f}" for s in row["spread"])]
            cells += [f"{rate * report['tokens_per_sample']:.0f}", f"{rate:.2f}", f"{row['peak'] / GIB:.1f}"]
            cells += [f"{100 * rate * flops / report['peak']:.1f}", f"{row['loss']:.5f}", f"{row['first']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
