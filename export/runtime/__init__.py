"""Runs an exported policy on a robot: numpy, onnxruntime and the standard library, nothing else of this repository.

A copy of this folder lies in every artefact, so that the artefact alone is enough:

    policy = OnnxPolicy("artefact", instruction="Press the red button.")
    policy.reset()
    while running:
        policy.observe(observation)          # every control step; see `OnnxPolicy.observe` for the names
        if step % policy.stride == 0:
            chunk = policy.act()             # (A, D) actions in the robot's own units, chunk[0] is executed now
        execute(chunk[step % policy.stride]) # policy.report: which limits acted, confidence, out of distribution

`StepPolicy` is used in the same way and reads every picture once.
"""

from .controller import Controller, Question
from .guard import Guard
from .manifest import MANIFEST_SCHEMA, SENSES, RuntimeContractError, find_graph, load_manifest
from .observation import encode_instruction
from .policy import OnnxPolicy, Report
from .step import StepPolicy

__all__ = [
    "MANIFEST_SCHEMA",
    "SENSES",
    "Controller",
    "Guard",
    "OnnxPolicy",
    "Question",
    "Report",
    "RuntimeContractError",
    "StepPolicy",
    "encode_instruction",
    "find_graph",
    "load_manifest",
]
