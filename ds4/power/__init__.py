"""Where watts and joules come from, and windows over them."""
