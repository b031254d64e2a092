"""Models of the score, and what they propose to evaluate next."""
