"""The search space: its variables, what a point means, and where a search begins."""
