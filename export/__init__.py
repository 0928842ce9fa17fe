"""Artefacts of a trained policy: written and proved equal here, run on the robot by `export.runtime` alone."""
