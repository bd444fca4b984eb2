"""Models on disk and on the hub: loading dense ones, saving sliced ones, their records and model cards."""
