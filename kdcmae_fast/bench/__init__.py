"""Benchmark results as tables and plots: what `kdcmae bench report` runs. Needs no torch."""
