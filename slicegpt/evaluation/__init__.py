"""What a model is worth: perplexity, zero-shot tasks, and the frontier of quality over size."""
