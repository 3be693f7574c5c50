"""Number formats and, later, quantizers: NumPy code that specifies what every byte means."""
