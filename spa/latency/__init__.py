"""Latency as a cost: what the operators that really run take at other widths, measured once and interpolated."""
