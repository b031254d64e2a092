"""Steps that mend a cut model: the closed form and the training loop."""
