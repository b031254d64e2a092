"""Models of images, and every model of a user's that is no causal language model."""
