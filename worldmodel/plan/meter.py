"""Counts what a step does while it runs, on tensors without memory or real ones: products, and bytes that are alive."""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Products of queries (B, E, N, d) with keys (B, E, M, d), and of their scores with values."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (k.shape[-1] + v.shape[-1])


OPERANDS = {
    aten.mm: slice(0, 2),
    aten.bmm: slice(0, 2),
    aten.addmm: slice(1, 3),
    aten.baddbmm: slice(1, 3),
    aten.convolution: slice(0, 2),
    aten._scaled_dot_product_flash_attention_for_cpu: slice(0, 3),
}
"""Products that are counted and where their operands stand; torch has formulas for all but the last."""


class Storage(NamedTuple):
    """Bytes that are alive."""

    size: int
    copy: bool  # of a parameter, in the type that products take
    watch: weakref.ref[Any]


class Call(NamedTuple):
    """One forward pass of a block; storages by their numbers, with sizes."""

    block: int
    made: range
    taken: dict[int, int]
    given: dict[int, int]
    saved: set[int]  # what its own operations save for the backward pass
    most: int  # bytes at a time while it ran
    flops: float
    trained: bool


class Meter(TorchDispatchMode):
    """Keeps books while it is entered; `before` are tensors that were there before and cost nothing.

    A product's backward pass takes its FLOPs again for each operand that needs a gradient, attention twice its own:
    flash attention multiplies its scores anew, which is not counted, as nothing is that is computed twice. Products of
    the backward pass itself are therefore not looked at (`forward` is false then), its memory is.
    """

    def __init__(self, before: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.before = self.parameters | {x.untyped_storage()._cdata for x in before}
        self.numbers: dict[int, int] = {}  # address of a storage -> its number
        self.alive: dict[int, Storage] = {}
        self.made, self.activations, self.copies, self.peak = 0, 0, 0, 0
        self.flops: Counter[tuple[str, str]] = Counter()  # (what runs, "forward" or "backward")
        self.stage, self.share, self.forward = "rest", 1.0, True
        self.calls: list[Call] = []
        self.saved: set[int] = set()  # storages that operations outside of blocks save for the backward pass
        self.surges: list[tuple[int, int]] = []  # of making pictures: storages made until then, most bytes alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and books it."""
        out = func(*args, **(kwargs or {}))
        kind = func._overloadpacket
        if self.forward and kind in OPERANDS:
            operands = args[OPERANDS[kind]]
            flops = self.share * flop_registry.get(kind, attention_flops)(*args, **(kwargs or {}), out_val=out)
            needed = sum(x.requires_grad for x in operands)
            self.add(flops, flops * (min(2 * needed, 2) if len(operands) == 3 else needed))
        if kind is not aten.detach:
            copy = kind is aten._to_copy and args[0].untyped_storage()._cdata in self.parameters
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self.book(x, copy)
        return out

    def add(self, forward: float, backward: float) -> None:
        """Counts FLOPs of what runs, those of its backward pass if gradients are asked for."""
        self.flops[self.stage, "forward"] += int(forward)
        self.flops[self.stage, "backward"] += int(backward) * torch.is_grad_enabled()

    def book(self, x: Tensor, copy: bool) -> None:
        """Counts the storage of a tensor unless it is known."""
        storage = x.untyped_storage()
        key, number, size = storage._cdata, self.made, storage.nbytes()
        if key in self.before or key in self.numbers:
            return

        def gone(_: Any) -> None:
            del self.alive[number]
            if self.numbers.get(key) == number:
                del self.numbers[key]
            self.change(-size, copy)

        self.made += 1
        self.numbers[key] = number
        self.alive[number] = Storage(size, copy, weakref.ref(storage, gone))
        self.change(size, copy)

    def change(self, size: int, copy: bool) -> None:
        """Adds bytes to those alive."""
        if copy:
            self.copies += size
        else:
            self.activations += size
            self.peak = max(self.peak, self.activations)

    @contextmanager
    def surge(self) -> Iterator[None]:
        """Keeps the most bytes alive until it is left apart from `peak`: checkpointing changes what lies below them."""
        before, self.peak = self.peak, self.activations
        yield
        self.surges.append((self.made, self.peak))
        self.peak = before

    def save(self, x: Tensor) -> Tensor:
        """Notes what an operation saves for the backward pass; a hook of `saved_tensors_hooks`."""
        self.saved |= self.numbered(x).keys()
        return x.detach()

    def numbered(self, values: Any) -> dict[int, int]:
        """The storages in a tree of tensors that are in the books, with their sizes."""
        keys = [x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, Tensor)]
        return {self.numbers[key]: self.alive[self.numbers[key]].size for key in keys if key in self.numbers}

    def inside(self, call: Call, *, copies: bool = False) -> int:
        """Bytes that a block made, that it did not return and that are alive: what its backward pass needs."""
        kept = (self.alive[n] for n in call.made if n not in call.given and n in self.alive)
        return sum(storage.size for storage in kept if storage.copy == copies)
