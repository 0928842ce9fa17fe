"""Proves that an artefact computes what the eager model computes, on real held-out observations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.evidence import VARIANTS, hidden
from export.wrappers import SENSES, ActionPath, Path, StepPath, flat_cache, split
from worldmodel.contracts import Observation
from worldmodel.errors import ExportError
from worldmodel.policy.realtime import Decided

TOLERANCE = 1e-4
"""Largest allowed difference of any number; but for actions over the size of its output where that is above 1."""
FLAGS = 0.005
"""Largest allowed share of flags that differ: a command that only just meets a limit may be said to or not."""

Runner = Callable[[Sequence[Tensor]], Sequence[np.ndarray]]
"""The inputs of a path to its outputs, both in order."""


class Example(NamedTuple):
    """Consecutive ticks to compare on; one, unless the path has a cache, whose tensors are not among the inputs."""

    key: str
    ticks: list[tuple[Tensor, ...]]


@dataclass
class ParityResult:
    """What one artefact was compared on and how far it was off."""

    tolerance: float
    examples: int
    ticks: int
    batches: tuple[int, ...]
    variants: tuple[str, ...] = tuple(VARIANTS)
    max_error: dict[str, float] = field(default_factory=dict)  # by output, see `TOLERANCE`
    flags_that_differ: float = 0.0  # share


def make_examples(path: Path, moments: Iterable[tuple[str, Sequence[Observation]]]) -> list[Example]:
    """Each moment in every variant of `VARIANTS`, with what else the path reads, the same in every run.

    Only a path with a cache takes more than the last tick. Before every second tick there are two commands; of three
    ticks, two have decided actions, a quarter and half of a chunk.
    """
    generator, examples = torch.Generator().manual_seed(0), []
    rest = [row for row in path.inputs[SENSES:] if not row.name.startswith("cache_")]
    stepwise = isinstance(path, StepPath)
    for key, ticks in moments:
        for variant, cleared in VARIANTS.items():
            made = []
            for number, observation in enumerate(ticks if stepwise else ticks[-1:]):
                now = shortened(hidden(observation, cleared), path)
                more = [torch.randn((1, *row.shape), generator=generator) for row in rest]
                place = number + len(examples)
                known, count = place % 2 == 1, place % 3 * path.spec.chunk // 4
                flags = {"has_previous": torch.full((1, 2), known)}
                flags["is_decided"] = (torch.arange(path.spec.chunk) < count)[None]
                more = [
                    flags[row.name] if row.name in flags else x * (1 if row.name.startswith("noise") else 0.3)
                    for row, x in zip(rest, more, strict=True)
                ]
                made.append((*(tensor.contiguous() for tensor in now), *more))
            examples.append(Example(f"{key} ({variant})", made))
    return examples


def shortened(observation: Observation, path: Path) -> Observation:
    """The newest frames of an observation, as many as the path reads."""
    sizes = {row.name: row.shape for row in path.inputs[:SENSES]}
    return observation.newest(sizes["proprio"][0])._replace(rgb=observation.rgb[:, -sizes["rgb"][0] :])


def eager_answers(path: Path, example: Example) -> list[list[np.ndarray]]:
    """What the model itself answers, tick by tick: a path with a cache is held against the model's own memory."""
    memory, answers = None, []
    with torch.no_grad():
        for inputs in example.ticks:
            if not isinstance(path, StepPath):
                answers.append([x.numpy() for x in path(*inputs)])
                continue
            now, noise, decided, before = split(inputs)
            decision = path.model.decide(now, noise, decided, past=memory, fresh=1)
            memory = decision.memory
            answers.append([x.numpy() for x in path.answer(decision, now, decided, *before)])
    return answers


def run_ticks(path: Path, runner: Runner, example: Example) -> list[Sequence[np.ndarray]]:
    """What an artefact answers, its own cache handed back to it; caches are not among the answers."""
    answers: list[Sequence[np.ndarray]] = []
    batch = example.ticks[0][0].shape[0]
    cache: tuple[Tensor, ...] = path.empty(batch) if isinstance(path, StepPath) else ()
    for inputs in example.ticks:
        answer = runner((*inputs, *cache))
        shown = len(answer) - len(path.caches) if isinstance(path, ActionPath) else len(answer)
        if isinstance(path, StepPath):
            cache = tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in answer[shown:])
        answers.append(answer[:shown])
    return answers


def joined(examples: Sequence[Example]) -> Example:
    """Several examples as one of a larger batch, as long as the shortest."""
    together = zip(*(example.ticks for example in examples), strict=False)
    ticks = [tuple(torch.cat(parts) for parts in zip(*rows, strict=True)) for rows in together]
    return Example(" and ".join(example.key for example in examples), ticks)


def check_parity(
    path: Path,
    artefacts: Mapping[str, Runner],
    examples: Sequence[Example],
    *,
    tolerance: float = TOLERANCE,
    batches: Sequence[int] = (1,),
) -> dict[str, ParityResult]:
    """Runs every example through the eager model and every artefact.

    Args:
        path: the path, in eval mode.
        artefacts: what to hold against it, by file name.
        examples: from `make_examples`.
        tolerance: largest allowed difference.
        batches: sizes of batches to compare at; 1 takes every example, others join as many of them.

    Raises:
        ExportError: no examples; or a difference above the tolerance, with artefact, output, observation and error.
    """
    if not examples:
        raise ExportError("parity: no held-out observations to compare on")
    results = {name: ParityResult(tolerance, 0, 0, tuple(batches)) for name in artefacts}
    flags: dict[str, tuple[int, int]] = {name: (0, 0) for name in artefacts}
    for batch in batches:
        for start in range(0, len(examples) - batch + 1, batch):
            example = joined(examples[start : start + batch]) if batch > 1 else examples[start]
            expected = eager_answers(path, example)
            if any(not np.isfinite(x).all() for answer in expected for x in answer):
                raise ExportError(f"parity: the eager model answers non-finite values for {example.key}")
            for name, runner in artefacts.items():
                result = results[name]
                result.examples += 1
                for number, (right, answer) in enumerate(zip(expected, run_ticks(path, runner, example), strict=True)):
                    result.ticks += 1
                    errors, wrong, count = compare(path, right, answer)
                    flags[name] = (flags[name][0] + wrong, flags[name][1] + count)
                    for output, error in errors.items():
                        # Written so that a NaN, which compares false with everything, fails too.
                        if not error <= tolerance:
                            raise ExportError(
                                f"{name}: output {output!r} differs from the eager model by {error:.3g} on "
                                f"{example.key}, tick {number}; at most {tolerance:g} is allowed"
                            )
                        result.max_error[output] = max(result.max_error.get(output, 0.0), error)
    for name, (wrong, count) in flags.items():
        results[name].flags_that_differ = wrong / max(1, count)
        if results[name].flags_that_differ > FLAGS:
            raise ExportError(f"{name}: {wrong} of {count} flags differ from the eager model's")
    return results


def compare(path: Path, right: Sequence[np.ndarray], answer: Sequence[np.ndarray]) -> tuple[dict[str, float], int, int]:
    """The largest error of each output that has numbers, and how many of how many flags differ."""
    errors: dict[str, float] = {}
    wrong = count = 0
    for row, a, b in zip(path.outputs, right, answer, strict=False):
        if a.dtype == bool:
            wrong, count = wrong + int((a != b).sum()), count + a.size
        else:
            size = 1.0 if row.name == "actions" else max(1.0, float(np.abs(a).max(initial=0)))
            errors[row.name] = float(np.abs(b.astype(np.float64) - a).max(initial=0)) / size
    return errors, wrong, count


def check_handover(path: ActionPath, step: StepPath, moments: Iterable[tuple[str, Sequence[Observation]]]) -> float:
    """The largest difference of actions between the model's own memory and the steps after `policy` filled the cache.

    In eager mode: what the artefacts do with a cache is settled by `check_parity`.
    """
    generator, worst, spec = torch.Generator().manual_seed(1), 0.0, path.spec
    before = (torch.zeros(1, 2, spec.action), torch.zeros(1, 2, dtype=torch.bool))
    free = Decided(torch.zeros(1, spec.chunk, spec.action), torch.zeros(1, spec.chunk, dtype=torch.bool))
    with torch.no_grad():
        for _, ticks in moments:
            noise = torch.randn((len(ticks), 1, spec.chunk, spec.action), generator=generator)
            first = path.model.decide(ticks[0], noise[0], free)
            memory, cache = first.memory, flat_cache(path.model, first.memory.kept)
            for now, start in zip(ticks[1:], noise[1:], strict=True):
                decision = path.model.decide(now, start, free, past=memory, fresh=1)
                memory = decision.memory
                answer = step(*shortened(now, step), start, *before, *free, *cache)
                expected = path.answer(decision, now, free, *before)[0]
                worst, cache = max(worst, float((answer[0] - expected).abs().max())), list(answer[-len(step.caches) :])
    return worst


def write_golden(file: FilePath, path: Path, examples: Sequence[Example]) -> None:
    """Bundles examples and the eager answers as one .npz: every input and output by name, and `key`.

    Arrays are stacked over examples and, where the path has a cache, over ticks: as many as the shortest has.
    """
    arrays: dict[str, Any] = {"key": np.array([example.key for example in examples])}
    ticks = min(len(example.ticks) for example in examples)
    answers = [eager_answers(path, example) for example in examples]
    stepwise = isinstance(path, StepPath)

    def stack(rows: list[list[np.ndarray]]) -> np.ndarray:
        stacked = np.stack([np.concatenate(row[:ticks]) for row in rows])
        return stacked if stepwise else stacked[:, 0]

    for i, row in enumerate(path.inputs[: len(examples[0].ticks[0])]):
        arrays[row.name] = stack([[tick[i].numpy() for tick in example.ticks] for example in examples])
    for i, row in enumerate(path.outputs[: len(answers[0][0])]):
        if isinstance(path, ActionPath) and row.name.startswith("next_"):
            break
        arrays[row.name] = stack([[tick[i] for tick in answer] for answer in answers])
    np.savez_compressed(file, allow_pickle=False, **arrays)
