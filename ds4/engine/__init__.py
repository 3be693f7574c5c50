"""Many requests at once on one model: scheduler, prefix cache, and the loop."""
