"""Filters of annotations: what is empty, cut off, looping or not about its image is left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.clip import ClipTeacher

MOST = 2 / 3  # share of a text's words
PUNCTUATION = ".,;:!?\"'()[]*_#-–—…。，、！？；：“”‘’«»"


def is_empty(record: Record) -> bool:
    """No letter and no digit in any script."""
    return not any(c.isalnum() for c in record.text)


def is_cut_off(record: Record) -> bool:
    """It ran into the token limit or a content filter."""
    return not record.finished


def is_looping(record: Record) -> bool:
    """Most of it is made of four words in a row that occur three times or more."""
    words = [word.strip(PUNCTUATION) for word in record.text.lower().split()]
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    times = Counter(runs)
    looping = {i + j for i, run in enumerate(runs) if times[run] >= 3 for j in range(4)}
    return len(looping) > MOST * len(words)


FILTERS = {"empty": is_empty, "cut-off": is_cut_off, "looping": is_looping}


@dataclass(frozen=True)
class Filtered:
    """What passed, and what each filter took (the first that objects counts)."""

    kept: list[Record]
    dropped: dict[str, list[Record]]

    @property
    def counts(self) -> dict[str, int]:
        """How many records were kept, and how many each filter took."""
        return {"kept": len(self.kept)} | {reason: len(records) for reason, records in self.dropped.items()}

    def warning(self) -> str:
        """A sentence if more than half of the texts were dropped, with the rule and an example; else empty."""
        reason, records = max(self.dropped.items(), key=lambda item: len(item[1]))
        lost = sum(map(len, self.dropped.values()))
        if lost <= len(self.kept):
            return ""
        rule = (FILTERS[reason].__doc__ or "").strip() if reason in FILTERS else "CLIP finds it unlike its image."
        example = f"{records[0].text[:120]!r} about {records[0].id!r}"
        return f"{lost} of {lost + len(self.kept)} texts were dropped, most as {reason!r} ({rule}), such as {example}"


def filter_records(
    records: Sequence[Record],
    pool: ImageSet | None = None,
    clip: ClipTeacher | None = None,
    min_similarity: float | None = None,
) -> Filtered:
    """Leave out what is empty, cut off, looping or not about its image.

    The last filter needs the pool of images, a CLIP and the smallest cosine that passes, in [-1, 1]; None turns it off.
    """
    kept: list[Record] = []
    dropped: dict[str, list[Record]] = {reason: [] for reason in FILTERS}
    for record in records:
        reason = next((reason for reason, objects in FILTERS.items() if objects(record)), None)
        (dropped[reason] if reason else kept).append(record)
    if min_similarity is not None:
        if not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity is a cosine, between -1 and 1; got {min_similarity}")
        if clip is None or pool is None:
            raise ValueError("the off-image filter needs clip= and pool=; or leave min_similarity at None")
        judged = list(zip(kept, similarities(kept, pool, clip), strict=True))
        dropped["off-image"] = [record for record, cosine in judged if cosine < min_similarity]
        kept = [record for record, cosine in judged if cosine >= min_similarity]
    return Filtered(kept, dropped)


def similarities(records: Sequence[Record], pool: ImageSet, clip: ClipTeacher) -> list[float]:
    """CLIP's cosine between each record's text and its image. Each image is encoded once; they are opened one by one.

    A record about an image that is not in the pool, or can no longer be opened, is a `ValueError`.
    """
    place = {name: i for i, name in enumerate(pool.ids)}
    ids = list(dict.fromkeys(record.id for record in records))
    if missing := [name for name in ids if name not in place]:
        raise ValueError(f"{len(missing)} images of the records are not in the pool, such as {missing[0]!r}")
    if not ids:
        return []
    images = cast(Sequence, pool.subset(np.array([place[name] for name in ids])).images)
    features = dict(zip(ids, clip.features(images), strict=True))
    texts = clip.text_features([record.text for record in records])
    return [float(features[record.id] @ text) for record, text in zip(records, texts, strict=True)]
