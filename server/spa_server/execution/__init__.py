"""Jobs at work: claimed from the queue, done by the executor, published or failed with a reason."""
