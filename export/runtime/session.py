"""Opens a graph with onnxruntime, in the one way that everything here runs graphs."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

CPU = "CPUExecutionProvider"
SLOWER = ["MatMulAddFusion"]
"""Optimisations that cost these graphs time: it puts two reshapes around every linear layer of three dimensions."""


def open_session(
    file: Path, threads: int = 1, providers: Sequence[str] = (CPU,), profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A graph ready to run; with `profile`, onnxruntime notes there which provider computes each node."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(file), options, providers=list(providers), disabled_optimizers=SLOWER)
