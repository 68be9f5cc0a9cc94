"""One file a kind of work: examples to features, batches, loss and scores."""
