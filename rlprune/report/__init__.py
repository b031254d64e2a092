"""What a run recorded, as tables, plots and pages."""
