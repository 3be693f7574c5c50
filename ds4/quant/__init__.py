"""Number formats, specified in NumPy, and the quantizers that write them."""
