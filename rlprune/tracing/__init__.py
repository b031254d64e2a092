"""From a network to the groups of units that are cut together."""
