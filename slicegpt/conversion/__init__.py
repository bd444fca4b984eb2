"""A dense checkpoint becomes the canonical network: folding, the form at full width, the plan of a narrower one."""
