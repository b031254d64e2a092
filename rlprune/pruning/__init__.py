"""The mathematics of pruning: groups, widths, costs, budgets, cuts."""
