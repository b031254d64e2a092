"""The command line: thin, the work is done elsewhere."""
