"""The figures of an evaluation, and the interval in which an accuracy lies; nothing here loads torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["NAMES", "Z95", "EvalMetrics", "quality_name", "wilson_interval"]

Z95 = 1.959964  # of the standard normal distribution: 95 % lie within
NAMES = {"knn": "k-NN top-1 (%)", "probe": "linear probe top-1 (%)"}  # of measures by labels, for people


def quality_name(spec: str) -> str:
    """Return what people are shown of ``knn``, ``probe`` or ``python:MODULE:FUNCTION``; nothing is imported."""
    return NAMES.get(spec) or spec.rpartition(":")[2]


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """Return the interval in which the true share lies with 95 % confidence, where a share was seen in a sample.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)        z = 1.96

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Args:
        share: p in [0, 1].
        number: size n of the sample, at least 1.
    """
    square = Z95**2 / number
    middle = share + square / 2
    spread = Z95 * math.sqrt(share * (1 - share) / number + square / (4 * number))
    return max((middle - spread) / (1 + square), 0.0), min((middle + spread) / (1 + square), 1.0)


class EvalMetrics(NamedTuple):
    """The figures of an evaluation that are kept.

    ``top1`` and ``balanced`` (the mean of the classes' recalls) in percent, a language model's perplexity ``ppl``,
    ``agreement`` with the source's answers in percent and the divergence ``kl`` from it in nats; of features,
    ``cosine`` and ``relative_error``; ``loss``, the mean cross-entropy in nats, and ``images``, the number of images
    (words of a text) that all of them were measured on; what a measure of one's own gave (``training.quality``) as
    ``quality`` or, where lower is better, as ``error``; None where it was not measured.
    """

    top1: float | None
    ppl: float | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    relative_error: float | None = None
    loss: float | None = None
    images: int | None = None
    balanced: float | None = None
    quality: float | None = None
    error: float | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> EvalMetrics:
        """Read the figures from ``evaluate``'s result, or from a saved model's provenance."""
        return cls(*(found.get(name) for name in cls._fields))

    def as_dict(self) -> dict[str, float]:
        """Return the figures that were measured."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def with_interval(self) -> dict[str, float]:
        """Return the figures that were measured, and the ends of ``interval`` as ``top1_low`` and ``top1_high``.

        They are ``agreement_low`` and ``agreement_high`` where there is no top-1.
        """
        name, ends = "agreement" if self.top1 is None else "top1", self.interval
        return {**self.as_dict(), **({} if ends is None else {f"{name}_low": ends[0], f"{name}_high": ends[1]})}

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the top-1, or of the agreement where there is no top-1, in percent (Wilson 1927).

        None for a perplexity, where the number of images is not known, and where the accuracy is NaN.
        """
        share = self.agreement if self.top1 is None else self.top1
        if share is None or not math.isfinite(share) or not self.images or self.ppl is not None:
            return None
        low, high = wilson_interval(share / 100, self.images)
        return 100 * low, 100 * high

    def __str__(self) -> str:
        if self.cosine is not None:
            return f"cosine {self.cosine:.4f}, relative error {self.relative_error:.4g}"
        if self.ppl is not None:
            return f"ppl {self.ppl:.2f}"
        if self.top1 is not None:
            return f"top-1 {self.top1:.2f} %"
        if self.agreement is None:  # of features, without a source
            return ""
        divergence = "" if self.kl is None else f", KL {self.kl:.4g}"
        return f"agreement {self.agreement:.2f} %{divergence}"

    def brief(self, measure: str | None = None) -> str:
        """Return the main figure in words: that of a measure of one's own, by its name, where there is one."""
        own = self.error if self.quality is None else self.quality
        return str(self) if measure is None or own is None else f"{measure} {own:.4g}"

    def told(self, measure: str | None = None) -> str:
        """Return ``full``, after the figure of a measure of one's own, by its name, where there is one."""
        own = self.brief(measure)
        return self.full if own == str(self) else ", ".join(filter(None, (own, self.full)))

    @property
    def uneven(self) -> bool:
        """Whether the balanced accuracy is not what the top-1 says already, to two digits."""
        if self.top1 is None or self.balanced is None:
            return False
        return abs(self.top1 - self.balanced) >= 0.005

    @property
    def full(self) -> str:
        """All figures in words, and the interval of the accuracy: for where there is room for them."""
        between = "" if self.interval is None else " ({:.2f} to {:.2f})".format(*self.interval)
        compared = self.top1 is not None or self.ppl is not None
        parts = [
            f"{self._replace(kl=None)}{between}",
            "" if self.balanced is None or not self.uneven else f"balanced {self.balanced:.2f} %",
            "" if self.loss is None else f"loss {self.loss:.4g}",
            "" if self.kl is None else f"KL {self.kl:.4g}",
            f"agreement {self.agreement:.2f} %" if compared and self.agreement is not None else "",
            "" if self.images is None else f"{self.images:,} {'images' if self.ppl is None else 'words'}",
        ]
        return ", ".join(part for part in parts if part)
