"""Experiments: what the parts of the model are worth, measured."""
