"""Layers that families share: attention of any widths, bottleneck convolutions, token merging."""
