"""Findings, plots, tables and pages of a run: they know the analysis and measure nothing."""
