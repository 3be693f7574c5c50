"""How good a checkpoint is: perplexity, and how far it is from the model it was made of."""
