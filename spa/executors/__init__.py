"""Forward passes that measure: parts of a model, and what is reduced from their activations."""
