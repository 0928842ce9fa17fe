"""Speed and memory of training: blocks compiled, or their activations computed again instead of kept.

Both replace the `forward` of blocks in place and for a while. Modules, parameters and their names stay as they are, so
checkpoints, averages and sharding know nothing of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from worldmodel.contracts import Fused
from worldmodel.errors import ConfigError
from worldmodel.joint import JointTransformer
from worldmodel.policy.action_expert import ActionBlock
from worldmodel.synthesis.delta import GatedDelta

PERIODS = {"none": 0, "selective": 2, "full": 1}
"""Video blocks whose activations are computed again in the backward pass: none, every second one, all of them."""
CHECKPOINTING = tuple(PERIODS)
VARIANTS = 64
"""Graphs that one block may be compiled to: its kinds, history and future, and the batch sizes of a mixture."""


@contextmanager
def accelerated(model: JointTransformer, *, compiled: bool, checkpointing: str) -> Iterator[None]:
    """Compiles the blocks of both transformers and checkpoints those of the video transformer, until it is left.

    What is computed does not change. Each block is a graph of its own (torchtitan, Liang et al. 2024, arXiv
    2410.06511), compiled once for all blocks alike; the loops of the gated delta rule stay outside of it. Action blocks
    hold too few tokens to be worth computing twice. Raises `ConfigError` for an unknown `checkpointing`.
    """
    if checkpointing not in CHECKPOINTING:
        raise ConfigError(f"trainer.checkpointing: unknown {checkpointing!r}; one of {', '.join(CHECKPOINTING)}")
    every = PERIODS[checkpointing]
    replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        replaced.append((module, name, vars(module).get(name)))
        vars(module)[name] = function

    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        try:
            for number, block in enumerate(model.denoiser.blocks):
                forward = block.forward
                if compiled:
                    mix = block.mix
                    if isinstance(mix, GatedDelta):
                        replace(mix, "rule", torch.compiler.disable(mix.rule))
                    forward = compile_block(forward)
                if every and number % every == 0:
                    # Nothing in a block is random, so there is no state of a generator to restore.
                    forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
                if forward is not block.forward:
                    replace(block, "forward", forward)
            if compiled:
                for block in model.expert.blocks:
                    assert isinstance(block, ActionBlock)
                    replace(block, "project", compile_block(block.project))
                    replace(block, "forward", compile_block(block.forward))
            yield
        finally:
            for module, name, before in replaced:
                if before is None:  # it was the method of the class
                    del vars(module)[name]
                else:
                    vars(module)[name] = before


def compile_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for the shapes it meets, each on its own, but for the length of the context.

    That length follows from the longest sentence of a batch; a graph for each would never end.
    """
    graph = torch.compile(function, dynamic=False)

    @wraps(function)
    def run(*args: Any) -> Any:
        for context in args:
            if isinstance(context, Fused):
                for tensor in (context.tokens, context.mask):
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return graph(*args)

    return run
