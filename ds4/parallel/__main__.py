"""What rank 0 starts on its host: a follower."""

from .follow import main

main()
