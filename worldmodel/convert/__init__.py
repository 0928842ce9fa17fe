"""Weights in the form of other projects."""
