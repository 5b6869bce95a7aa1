"""Pruning as a query: the smallest model that keeps to a metric, and families of models to choose from."""
