"""Counts what a step does while it runs on tensors without memory: FLOPs by part and pass, bytes by kind."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = ("activations", "copies", "gradients")
"""What is allocated in a step: tensors of the forward and backward pass, parameters in the type that products take,
and gradients of parameters."""


def convolution_backward(
    out: Any,
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    padded: Any,
    groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """A forward pass for each of input and weight; torch's own formula takes all channels of all groups together."""
    return 2 * math.prod((x if transposed else out).shape) * math.prod(w.shape[1:]) * sum(wanted[:2])


FORMULAS = {**flop_registry, torch.ops.aten.convolution_backward: convolution_backward}


class Ledger(TorchDispatchMode):
    """Keeps the books of one step of `module`: enter it inside a `FakeTensorMode`, or around a real step.

    Bytes are those of storages from the first operation that returns them until nothing holds them any more. What is
    there before (parameters, buffers, the batch) is not counted; `hold` names it. FLOPs are those of torch's formulas
    and what `add` is told of kernels that have none; every one belongs to the part whose module runs, or whose backward
    pass does.

    After a step `flops` has (part, "forward", "backward" or "again") -> FLOPs, `kept` the bytes by kind between both
    passes, and `peak` the most bytes at a time of activations, of these and copies, and of all kinds.
    """

    def __init__(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.module = module
        self.owner = {inner: name for name, part in parts.items() for inner in part.modules()}
        self.stack = ["other"]
        self.made: dict[int, str] = {}  # number of a node of the graph -> part that made it
        self.forward = True
        self.flops: Counter[tuple[str, str]] = Counter()
        self.live: Counter[str] = Counter()
        self.peak = dict.fromkeys(KINDS, 0)
        self.kept: dict[str, int] = {}
        self.kind: dict[int, tuple[str, int, StorageWeakRef]] = {}
        self.given: set[int] = set()
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.hold([*module.parameters(), *module.buffers()])
        self.handles: list[Any] = []

    def hold(self, values: Any) -> None:
        """Leaves out the tensors in `values`, a tree."""
        self.given |= {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, Tensor)}

    @property
    def part(self) -> str:
        """The part that runs, forward or backward."""
        if self.forward:
            return self.stack[-1]
        node = torch._C._current_autograd_node()
        return "other" if node is None else self.made.get(node._sequence_nr(), "other")

    def add(self, flops: float, part: str | None = None) -> None:
        """Counts FLOPs for a part, by default the one that runs."""
        # Modules run in the backward pass where checkpointing computes them again.
        way = "forward" if self.forward else "backward" if len(self.stack) == 1 else "again"
        self.flops[part or self.part, way] += int(flops)

    def between(self) -> None:
        """Notes what the forward pass leaves; call it before the backward pass."""
        self.sweep()
        self.kept = {kind: self.live[kind] for kind in KINDS}
        self.forward = False

    def __enter__(self) -> Any:
        def enter(module: nn.Module, *_: Any) -> None:
            self.stack.append(self.owner.get(module, self.stack[-1]))

        def leave(*_: Any) -> None:
            self.stack.pop()

        self.handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                self.handles.append(parameter.register_post_accumulate_grad_hook(self.graded))
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and books it."""
        kwargs = kwargs or {}
        if self.forward:  # a node is made before its operation runs; what makes none may not rename the last one
            self.made.setdefault(torch.autograd._get_sequence_nr() - 1, self.stack[-1])
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.add(formula(*args, **kwargs, out_val=out))
        copied = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.book(tensor, "copies" if copied else "activations")
        return out

    def book(self, tensor: Tensor, kind: str) -> None:
        """Counts the storage of a tensor unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.kind or key in self.given:
            return
        # A weak reference keeps the address, so no other storage can take it while it is in the books.
        self.kind[key] = (kind, storage.nbytes(), StorageWeakRef(storage))
        self.live[kind] += storage.nbytes()
        self.note()

    def sweep(self) -> None:
        """Takes storages that are gone out of the books."""
        for key, (kind, size, reference) in list(self.kind.items()):
            if reference.expired():
                del self.kind[key]
                self.live[kind] -= size

    def surge(self, size: int) -> None:
        """Notes that `size` bytes of activations come and go at once."""
        self.live["activations"] += size
        self.note()
        self.live["activations"] -= size

    def graded(self, parameter: Tensor) -> None:
        """Calls the gradient of a parameter what it is."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self.kind:
            kind, size, reference = self.kind[key]
            self.live[kind] -= size
            self.live["gradients"] += size
            self.kind[key] = ("gradients", size, reference)

    def note(self) -> None:
        """Compares this moment with the fullest so far; what is gone only matters where it may be fuller."""
        if any(now > self.peak[name] for name, now in self.totals().items()):
            self.sweep()
            self.peak = {name: max(now, self.peak[name]) for name, now in self.totals().items()}

    def totals(self) -> dict[str, int]:
        """Bytes of activations, of these and copies, and of all kinds."""
        found, total = {}, 0
        for kind in KINDS:
            total += self.live[kind]
            found[kind] = total
        return found
