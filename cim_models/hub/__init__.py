"""Weights in and out: a name → a verified file → a model."""
