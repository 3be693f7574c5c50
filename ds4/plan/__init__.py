"""What a model needs and what a machine has: sizes, fits and estimated speeds. Runs nothing."""
