"""Timing, and the latency tables that budgets in milliseconds are met by."""
