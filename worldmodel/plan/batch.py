"""Batches of random numbers in the shapes of a spec: for steps that are counted or timed, where no data is read."""

import torch

from worldmodel.contracts import Batch, ClipSpec, Future, Masks, Observation

WORDS = "put the red block into the drawer and close it"
"""The instruction of every row."""


def random_batch(
    spec: ClipSpec, rows: int, *, history: int | None = None, frames: int | None = None, masks: bool = False
) -> Batch:
    """A batch of `rows` clips with every sense, the same each time.

    Pictures are those of the newest `history` observed and of the first `frames` future ones, all by default.
    """
    g = torch.Generator().manual_seed(0)
    b, h, f, v, k, s = rows, spec.history, spec.future, len(spec.cameras), spec.points, len(spec.sensors)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(b, *shape, generator=g)

    def yes(*shape: int) -> torch.Tensor:
        return torch.ones(b, *shape, dtype=torch.bool)

    def images(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (b, n, v, 3, spec.height, spec.width), generator=g, dtype=torch.uint8)

    lens = torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1 / spec.height]]) * spec.height
    words = torch.tensor(list(WORDS.encode()[: spec.text]))
    text = torch.zeros(b, spec.text, dtype=torch.int64)
    text[:, : len(words)] = words + 1
    observation = Observation(
        images(h if history is None else history), lens.expand(b, h, v, 3, 3), torch.eye(4).expand(b, h, v, 4, 4),
        draw(h, k, 3), yes(h, k),
        draw(h, spec.stride, s, 6), draw(h, s, *spec.taxels), draw(h, spec.proprio), text,
        torch.zeros(b, dtype=torch.int64), yes(v), yes(v), yes(k), yes(s), yes(s), yes(), yes(),
    )  # fmt: skip
    future = Future(
        images(spec.window if frames is None else frames), torch.eye(4).expand(b, f, v, 4, 4), draw(f, k, 3),
        yes(f, k), draw(f, s, 6), draw(spec.chunk, spec.action),
        draw(spec.chunk, spec.proprio), yes(f), yes(spec.chunk), yes(spec.action),
    )  # fmt: skip
    found = None
    if masks:
        size = (v, spec.height, spec.width)
        past, later = (torch.zeros(b, n, *size, dtype=torch.uint8) for n in (h, spec.window))
        found = Masks(past, later, draw(h + f, 3, 3), yes(3), ("gripper", "object", "object2"))
    return Batch(observation, future, torch.arange(b * h).unflatten(0, (b, h)), ["random"] * b, found)
