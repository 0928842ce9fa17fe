"""Random numbers of a batch, row by row, so that they are the same however many processes share the batch."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Draws:
    """Random numbers for the rows of a batch, each from a generator of the row's own.

    What a row draws depends on `seed` and on its number in the whole batch alone, not on the rows beside it: a process
    that has some of the rows draws for these what one process with all of them would, and no more than it needs.

    Args:
        seed: of the batch.
        rows: number in the whole batch of each row at hand.
    """

    def __init__(self, seed: int | str, rows: Sequence[int]) -> None:
        self.rows = rows
        self._generators = [
            torch.Generator().manual_seed(random.Random(f"{seed} {row}").getrandbits(63)) for row in rows
        ]

    def pick(self, chosen: Sequence[int]) -> "Draws":
        """Some of the rows at hand, in the order of `chosen`; they go on where they are."""
        part = Draws(0, [])
        part.rows = [self.rows[i] for i in chosen]
        part._generators = [self._generators[i] for i in chosen]
        return part

    def rand(self, *size: int) -> Tensor:
        """Uniform in [0, 1), of size (n B, ...) for B rows: n for each row, one after the other."""
        return self._draw(size, lambda shape, generator: torch.rand(shape, generator=generator))

    def randn(self, *size: int) -> Tensor:
        """Standard normal, sizes as in `rand`."""
        return self._draw(size, lambda shape, generator: torch.randn(shape, generator=generator))

    def randint(self, high: int, *size: int) -> Tensor:
        """Integers below `high`, sizes as in `rand`."""
        return self._draw(size, lambda shape, generator: torch.randint(high, shape, generator=generator))

    def categorical(self, weights: Tensor, count: int | None = None) -> Tensor:
        """A number (count,) for each row, n for each if `count` is n B, by weights (B, K) of its own or (K,) of all."""
        many = self._many(len(self.rows) if count is None else count)
        each = weights.expand(len(self.rows), -1)
        return torch.cat(
            [
                torch.multinomial(own, many, replacement=True, generator=generator)
                for own, generator in zip(each, self._generators, strict=True)
            ]
        )

    def _draw(self, size: Sequence[int], draw: Callable[[tuple[int, ...], torch.Generator], Tensor]) -> Tensor:
        shape = (self._many(size[0]), *size[1:])
        return torch.cat([draw(shape, generator) for generator in self._generators])

    def _many(self, count: int) -> int:
        many, rest = divmod(count, len(self.rows))
        assert not rest, f"{count} numbers for {len(self.rows)} rows"
        return many
