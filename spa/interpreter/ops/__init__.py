"""Builders of operators, by family."""
