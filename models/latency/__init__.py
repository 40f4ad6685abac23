"""Measured latency: timing, tables of blocks, and how well a table predicts whole models."""
