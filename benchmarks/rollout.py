"""Time and memory of a streamed rollout against full attention with a growing cache, over the length of the rollout.

  python benchmarks/rollout.py [--frames 64 128 256 512 1024] [--width 128] [--layers 4] [--latent 8] [--threads 2]

Both are the video transformer with random weights on the same sizes, and generate the same way: a chunk of latent
frames is denoised in a few passes after the memory, then read into the memory in one pass at noise level 0. The hybrid
has the layers [swa, swa, dswa, gated] and keeps a bounded memory; full attention keeps keys and values of every frame
in every layer, and needs no mask. On a CPU every length runs in a process of its own; on a GPU blocks run in bfloat16.
Prints a Markdown table:

  ms/frame   median over all chunks, and over the last quarter of them; on a CPU the time that processors spent on this
             process, all threads together, which other work on the machine hardly changes; on a GPU that of the clock
  memory     what the model keeps from chunk to chunk
  peak       highest resident memory of the process, above what it was before the first chunk
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

KINDS = {"hybrid": "streamed hybrid", "full": "full attention"}
CHANNELS = 16


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="lengths, in frames")
    parser.add_argument("--width", type=int, default=128, help="width of the transformer (default: 128, kairos_tiny)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4, help="a multiple of 4")
    parser.add_argument("--latent", type=int, default=8, help="height and width of a latent frame; patches are 2 x 2")
    parser.add_argument("--chunk", type=int, default=2, help="latent frames generated at once")
    parser.add_argument("--steps", type=int, default=2, help="denoising passes per chunk")
    parser.add_argument("--dilation", type=int, default=4, help="of the dswa layers; the window is 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on cuda the peak is that of its allocator")
    parser.add_argument("--one", choices=sorted(KINDS), help="run one kind and length in this process, print JSON")
    return parser


def main() -> None:
    """Measures each kind and length in its own process and prints the table."""
    given = arguments().parse_args()
    if given.layers % 4 or min(given.frames) < given.chunk or any(n % given.chunk for n in given.frames):
        sys.exit("--layers is a multiple of 4, and --frames are multiples of --chunk")
    if given.one:
        print(json.dumps(measure(given)))
        return
    rows: dict[int, dict[str, dict[str, float]]] = {}
    for frames in given.frames:
        for kind in KINDS:
            rows.setdefault(frames, {})[kind] = run(given, kind, frames)
            print(f"{kind}, {frames} frames: {rows[frames][kind]}", file=sys.stderr)
    print(table(rows, given))


def run(given: argparse.Namespace, kind: str, frames: int) -> dict[str, float]:
    """One kind and length: in its own process on a CPU, whose peak memory only ever grows within one."""
    if given.device != "cpu":
        return measure(argparse.Namespace(**(vars(given) | {"one": kind, "frames": [frames]})))
    command = [sys.executable, __file__, *sys.argv[1:], "--frames", str(frames), "--one", kind]
    # Threads that spin for long while they wait make a busy machine many times slower.
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"GOMP_SPINCOUNT": "20000"})
    if done.returncode:
        sys.exit(f"{kind}, {frames} frames: {done.stderr.strip()}")
    return json.loads(done.stdout)


def everything(q: Any, keys: Any, *, window: int, dilation: int, extra: Any = None, blocks: Any = None) -> Any:
    """Windowed attention where every query sees every key."""
    from worldmodel.nn import attend

    out = attend(q.flatten(1, 2), keys.k.flatten(1, 2), keys.v.flatten(1, 2))
    return out.unflatten(1, q.shape[1:3])


def build(given: argparse.Namespace, kind: str, frames: int) -> Any:
    """The video transformer, random but for its zero-initialised output."""
    import torch

    from worldmodel.synthesis import temporal
    from worldmodel.synthesis.denoiser import Denoiser

    temporal.FORMS["everything"] = everything
    torch.manual_seed(0)
    full = kind == "full"
    model = Denoiser(
        width=given.width,
        heads=given.heads,
        hidden=4 * given.width,
        context=given.width,
        pattern=["swa"] if full else ["swa", "swa", "dswa", "gated"],
        repeats=given.layers if full else given.layers // 4,
        window=frames + given.chunk if full else 3,
        dilation=given.dilation,
        latent_channels=CHANNELS,
        latent_size=(given.latent, given.latent),
        patch=2,
        views=1,
        points=1,
        sensors=1,
        anchored=[],
        streams=["video"],
        rays=False,
        attention="everything" if full else "folded",
    )
    return model.eval().to(given.device)


def measure(given: argparse.Namespace) -> dict[str, float]:
    """One rollout: seconds per frame, bytes of the memory, and the peak in bytes."""
    import time

    import numpy as np
    import torch

    torch.set_num_threads(given.threads)
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    frames = given.frames[0]
    model = build(given, given.one, frames)
    half = torch.autocast("cuda", torch.bfloat16, enabled=given.device != "cpu")
    with torch.inference_mode(), half:
        state = None
        for _ in range(8):
            state = generate(model, given, state)
        state, seconds, before = None, [], start_peak(given.device)
        for _ in range(frames // given.chunk):
            started = clock()
            state = generate(model, given, state)
            if given.device != "cpu":
                torch.cuda.synchronize()
            seconds.append((clock() - started) / given.chunk)
    assert state is not None and state.frames == frames
    late = seconds[-max(len(seconds) // 4, 1) :]
    return {
        "seconds": float(np.median(seconds)),
        "late_seconds": float(np.median(late)),
        "memory": state.nbytes,
        "peak": peak(given.device) - before,
    }


def generate(model: Any, given: argparse.Namespace, state: Any) -> Any:
    """Denoises one chunk after the memory and reads it into the memory."""
    import torch

    from worldmodel.contracts import Fused, WorldState

    text = torch.zeros(1, 4, given.width, device=given.device)
    mask = torch.ones(1, 4, dtype=torch.bool, device=given.device)
    context = Fused(text, mask, text.mean(1), text, mask)
    present = {"video": torch.ones(1, 1, dtype=torch.bool, device=given.device)}
    none = torch.zeros((), device=given.device)
    video = torch.randn(1, given.chunk, 1, CHANNELS, given.latent, given.latent, device=given.device)
    for step in range(given.steps, 0, -1):
        tokens = model.embed(WorldState(video, none, none, none), {}, none, present, ["video"])
        level = torch.full((1, 4), step / given.steps, device=given.device)
        embedding, vectors = model.vectors(level, tokens.stream)
        x, rope = tokens.x, model.rope(tokens, 0 if state is None else state.frames)
        past = [None] * len(model.blocks) if state is None else state.layers
        for block, before in zip(model.blocks, past, strict=True):
            x, _ = block(x, tokens.mask, vectors, rope, context, before, None)
        video = video - model.decode(x, embedding, ["video"])["video"] / given.steps
    tokens = model.embed(WorldState(video, none, none, none), {}, none, present, ["video"])
    return model.remember(tokens, context, state)


def start_peak(device: str) -> int:
    """Starts measuring the peak anew; returns the bytes held now."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size, see proc(5)
    return peak(device)


def peak(device: str) -> int:
    """Highest resident bytes of this process; on a GPU those of its allocator."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(rows: dict[int, dict[str, dict[str, float]]], given: argparse.Namespace) -> str:
    """A Markdown table, and how flat the streamed columns are."""
    import torch

    device = given.device if given.device == "cpu" else torch.cuda.get_device_name()
    tokens = (given.latent // 2) ** 2
    heads = " | ".join(f"{name}: ms/frame | at the end | memory MB | peak MB" for name in KINDS.values())
    lines = [
        f"width {given.width}, {given.layers} layers, {tokens} tokens a frame, chunks of {given.chunk}, {given.steps} "
        f"denoising passes and one that remembers, {device}, {given.threads} threads",
        "",
        f"| frames | {heads} |",
        "| ---: |" + " ---: |" * (4 * len(KINDS)),
    ]
    for frames, kinds in rows.items():
        cells = [
            f"{1e3 * row['seconds']:.2f} | {1e3 * row['late_seconds']:.2f} | "
            f"{row['memory'] / 1e6:.2f} | {row['peak'] / 1e6:.1f}"
            for row in (kinds[kind] for kind in KINDS)
        ]
        lines.append(f"| {frames} | {' | '.join(cells)} |")
    flat = {name: [kinds["hybrid"][name] for kinds in rows.values()] for name in ("seconds", "memory")}
    time, memory = (max(values) / min(values) for values in flat.values())
    lines += ["", f"Streamed, largest over smallest of all lengths: time per frame {time:.3f}, memory {memory:.3f}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
