"""worldmodel: training, evaluation and export of robot world models."""

__version__ = "0.1.0"
