"""What `ds4 bench` and `ds4 compare` measure and print."""
