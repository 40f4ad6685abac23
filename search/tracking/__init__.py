"""Show a search in the tools that people watch already: MLflow, Weights & Biases, and Prometheus through Ray."""

from .backends import check_backends
from .tracker import Tracker, tracking

__all__ = ["Tracker", "check_backends", "tracking"]
