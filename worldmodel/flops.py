"""What a training step costs: the FLOPs that the model needs, the tokens that it reads, and the peak of the device."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worldmodel.contracts import STREAMS
from worldmodel.joint import JointTransformer
from worldmodel.synthesis import temporal
from worldmodel.synthesis.delta import GatedDelta
from worldmodel.synthesis.denoiser import Tokens


class Cost(NamedTuple):
    """What a step costs."""

    flops: float  # forward and backward
    tokens: Mapping[str, float]  # that both transformers read, history and future, by stream and for `actions`


class Meter(FlopCounterMode):
    """Counts every product once, and once more for each of its two factors that wants a gradient.

    The backward pass of a product is one product of the same size for each such factor: three times the forward pass
    where both are trained, twice at an input or behind a frozen weight, once without gradients.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.total = 0

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if func_packet in self.flop_registry:
            tensors = [x for x in args if isinstance(x, Tensor)]  # of a convolution the factors come before the bias
            factors = tensors[:2] if func_packet is torch.ops.aten.convolution else tensors[-2:]
            self.add(self.flop_registry[func_packet](*args, **kwargs, out_val=out), *factors)
        return out

    def add(self, flops: int, *factors: Tensor) -> None:
        """Adds the FLOPs of a product of these factors."""
        self.total += flops * (1 + torch.is_grad_enabled() * sum(x.requires_grad for x in factors))


def measure_cost(module: nn.Module, model: JointTransformer, run: Callable[[], Any]) -> Cost:
    """What `run` costs, which computes a loss with `model` and whatever else is in `module`.

    Counted are the FLOPs that the model needs, whatever it computes besides: matrix products and attention as torch
    counts them, windowed attention 4 d per pair of tokens that see each other, and the gated delta rule 6 dk dv per
    token, for each head; nothing for what checkpointing computes again. `run` is called twice, since its first call may
    fill caches that later ones read.
    """
    meter, tokens = Meter(), Counter[str]()

    def window(q: Tensor, keys: Any, *, window: int, dilation: int, extra: Any = None, blocks: Any = None) -> Tensor:
        b, tq, n, heads, width = q.shape
        tk, m = keys.k.shape[1:3]
        seen = int(temporal.dense_window_mask(tq, tk, tk - tq, window, dilation, blocks).sum()) * n * m
        seen += 0 if extra is None else tq * n * extra[0].shape[1]
        meter.add(4 * b * heads * width * seen, q, q)
        return q

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Any) -> tuple[Tensor, Any]:
        meter.add(6 * q.numel() * v.shape[3], q, q)
        return v, state

    def embed_streams(*args: Any, **kwargs: Any) -> Tokens:
        read = streams(*args, **kwargs)
        tokens.update({STREAMS[i]: n * read.x.shape[0] * read.x.shape[1] for i, n in Counter(read.stream).items()})
        return read

    def embed_actions(*args: Any, **kwargs: Any) -> Tensor:
        read = actions(*args, **kwargs)
        tokens["actions"] += read.shape[0] * read.shape[1]
        return read

    with torch.compiler.set_stance("force_eager"):
        with torch.no_grad():
            run()
        streams, actions = model.denoiser.embed, model.expert.embed
        with contextlib.ExitStack() as stack, torch.enable_grad():
            stack.enter_context(patch.dict(temporal.FORMS, dict.fromkeys(temporal.FORMS, window)))
            for part in module.modules():
                if isinstance(part, GatedDelta):
                    stack.enter_context(patch.object(part, "rule", rule))
            stack.enter_context(patch.object(model.denoiser, "embed", embed_streams))
            stack.enter_context(patch.object(model.expert, "embed", embed_actions))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # not every kernel is known to the counter
            stack.enter_context(meter)
            run()
    return Cost(meter.total, dict(tokens))


@lru_cache
def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the fastest of some large matrix products of random numbers: the peak that MFU is a share of.

    `size` is that of the square factors: 8192 unless said, and 1024 on a CPU.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    seconds = [timed(lambda: float((a @ b)[0, 0])) for _ in range(4 if device.type == "cpu" else 23)]
    return 2 * size**3 / min(seconds)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call that ends with a value read from the device."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
