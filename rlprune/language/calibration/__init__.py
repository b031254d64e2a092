"""What is measured of a language model's attention and feed-forward parts, and closed forms over it."""
