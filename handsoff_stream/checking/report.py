"""The result of a check: numbers, the sentences that follow from them, and what was done.

Knows findings and JSON. Does not know files or pages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from handsoff_stream.checking.findings import ClassFinding, Findings, ImageFinding, Summary
from handsoff_stream.checking.words import advice, class_sentence, image_sentence, verdict


@dataclass(frozen=True)
class CheckReport:
    """What a check found."""

    findings: Findings
    """All numbers."""
    about: Mapping[str, Any]
    """JSON-able: source files with their SHA-256, settings, folds, versions."""

    @property
    def summary(self) -> Summary:
        """Means over the compared classes."""
        return self.findings.summary

    @property
    def classes(self) -> tuple[ClassFinding, ...]:
        """In the order of their ids."""
        return self.findings.classes

    @property
    def images(self) -> tuple[ImageFinding, ...]:
        """In the order of their names."""
        return self.findings.images

    @property
    def verdict(self) -> tuple[str, ...]:
        """Sentences, the most important one first."""
        return verdict(self.findings)

    @property
    def advice(self) -> tuple[str, ...]:
        """One sentence for each class on what more labels would do, the most promising class first."""
        return advice(self.findings)

    @property
    def class_sentences(self) -> tuple[str, ...]:
        """What happens to each class, in the order of `classes`."""
        return tuple(class_sentence(found, self.summary) for found in self.classes)

    @property
    def image_sentences(self) -> tuple[str, ...]:
        """Why each image does not invert, in the order of `images`; empty for those that do."""
        return tuple(image_sentence(found) for found in self.images)

    def worst_images(self, most: int) -> tuple[str, ...]:
        """Why some images do not invert: those whose reconstruction the network labels worst."""
        pairs = zip(self.images, self.image_sentences, strict=True)
        broken = [(found.network_on_reconstruction or 0.0, sentence) for found, sentence in pairs if sentence]
        return tuple(sentence for _, sentence in sorted(broken)[:most])

    def record(self) -> dict[str, Any]:
        """All of it, JSON-able; numbers that do not exist are None."""
        classes = zip(self.classes, self.class_sentences, strict=True)
        images = zip(self.images, self.image_sentences, strict=True)
        record: dict[str, Any] = _without_nan(
            {
                "verdict": self.verdict,
                "summary": asdict(self.summary),
                "classes": [{**asdict(found), "sentence": sentence} for found, sentence in classes],
                "advice": self.advice,
                "images": [{**asdict(found), "sentence": sentence} for found, sentence in images],
                **self.about,
            }
        )
        return record


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(child) for key, child in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
