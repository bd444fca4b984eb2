"""Facts about devices: their rates, their free memory, and models that are larger than it."""
