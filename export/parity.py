"""Proves that an artefact computes what the eager model computes, on real held-out observations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.wrappers import INPUT_NAMES
from worldmodel.contracts import Observation
from worldmodel.errors import ExportError

TOLERANCE = 1e-4
"""Largest allowed difference of any action value, in the robot's units."""

Runner = Callable[[Sequence[Tensor]], np.ndarray]
"""Flat inputs of `wrappers.ActionPath` to actions (B, A, D)."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "all senses": (),
    "images and proprioception": ("has_camera", "has_points", "has_wrench", "has_taxels"),
    "no images": ("has_rgb",),
    "no touch": ("has_wrench", "has_taxels"),
    "no proprioception": ("has_proprio",),
    "no instruction": ("has_text",),
}
"""Presence masks that are cleared, by name of the variant."""


class Example(NamedTuple):
    """One observation to compare on."""

    key: str
    inputs: tuple[Tensor, ...]  # flat, batch 1, with the noise


@dataclass(frozen=True)
class ParityResult:
    """What was compared and how far each artefact was off."""

    tolerance: float
    observations: int
    comparisons: int
    variants: tuple[str, ...]
    max_abs_error: dict[str, float]


def make_examples(observations: Iterable[tuple[str, Observation]], noise_shape: tuple[int, int]) -> list[Example]:
    """Each observation (batch 1) in every variant of `VARIANTS`, with noise of its own, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    examples: list[Example] = []
    for key, observation in observations:
        for variant, cleared in VARIANTS.items():
            masks = {name: torch.zeros_like(getattr(observation, name)) for name in cleared}
            noise = torch.randn((1, *noise_shape), generator=generator)
            flat = tuple(tensor.contiguous() for tensor in observation._replace(**masks))
            examples.append(Example(f"{key} ({variant})", (*flat, noise)))
    return examples


def check_parity(
    eager: Runner, artefacts: Mapping[str, Runner], examples: Sequence[Example], tolerance: float = TOLERANCE
) -> ParityResult:
    """Runs every example through the eager model and every artefact.

    Args:
        eager: the reference.
        artefacts: what to hold against it, by file name.
        examples: from `make_examples`.
        tolerance: largest allowed absolute difference.

    Raises:
        ExportError: no examples; or a difference above the tolerance, with artefact, output, observation and error.
    """
    if not examples:
        raise ExportError("parity: no held-out observations to compare on")
    worst = dict.fromkeys(artefacts, 0.0)
    for example in examples:
        expected = eager(example.inputs)
        if not np.isfinite(expected).all():
            raise ExportError(f"parity: the eager model answers non-finite actions for {example.key}")
        for name, artefact in artefacts.items():
            error = float(np.abs(artefact(example.inputs) - expected).max())
            # Written so that a NaN, which compares false with everything, fails too.
            if not error <= tolerance:
                raise ExportError(
                    f"{name}: output 'actions' differs from the eager model by {error:.3g} on {example.key}; "
                    f"at most {tolerance:g} is allowed"
                )
            worst[name] = max(worst[name], error)
    return ParityResult(tolerance, len(examples) // len(VARIANTS), len(examples), tuple(VARIANTS), worst)


def write_golden(path: Path, eager: Runner, examples: Sequence[Example]) -> None:
    """Bundles examples and the eager answers as one .npz: every input, `actions` and `key`, stacked over examples."""
    arrays = {
        name: np.concatenate([example.inputs[index].numpy() for example in examples])
        for index, name in enumerate(INPUT_NAMES)
    }
    arrays["actions"] = np.concatenate([eager(example.inputs) for example in examples])
    np.savez_compressed(path, allow_pickle=False, key=np.array([example.key for example in examples]), **arrays)
