"""Every other agent: evolution, optuna's samplers, published reinforcement learners."""
