"""Open pictures in, words out: an MLLM annotates images, one JSON line for each image and kind of text.

    python -m mllmfl_lite.annotate my_pictures --out annotations

writes `annotations.jsonl` (every record, with model, prompt hash and time), `annotations.llava.json` (what passed the
filters, in LLaVA's own format) and `annotations.rejected.json` (images that could not be used, and why). The same code
annotates with the bundled stand-in, with LLaVA-1.5-7B on a GPU, or through any endpoint that speaks OpenAI's protocol.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mllmfl_lite.data.folders import PictureSource
from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.clip import ClipTeacher


def is_empty(record: Record) -> bool:
    """Fewer than three words."""
    return len(re.findall(r"\w+", record.text)) < 3


def is_cut_off(record: Record) -> bool:
    """It ran into the token limit, or does not end like a sentence."""
    return not record.finished or not re.search(r"[.!?][\"')\]]*\s*$", record.text)


def is_looping(record: Record, length: int = 4, times: int = 3) -> bool:
    """The same `length` words come at least `times` times."""
    words = re.findall(r"\w+", record.text.lower())
    runs = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return bool(runs) and max(runs.values()) >= times


FILTERS = {"empty": is_empty, "cut-off": is_cut_off, "looping": is_looping}


@dataclass(frozen=True)
class Filtered:
    """What passed, and how many records each filter took (the first that objects counts).

    Attributes:
        kept: the records that passed.
        dropped: for each filter the records that it took out.
    """

    kept: list[Record]
    dropped: dict[str, list[Record]]

    @property
    def counts(self) -> dict[str, int]:
        """How many records were kept, and how many each filter took."""
        return {"kept": len(self.kept)} | {reason: len(records) for reason, records in self.dropped.items()}


def filter_records(
    records: Sequence[Record],
    source: PictureSource | None = None,
    clip: ClipTeacher | None = None,
    min_similarity: float | None = None,
) -> Filtered:
    """Leave out what is empty, cut off, looping or, by CLIP, not about its picture.

    Args:
        records: what was written.
        source: where the pictures are; needed for the last filter, as are the two below.
        clip: who compares picture and text.
        min_similarity: the smallest cosine that passes; None turns the filter off.
    """
    kept, dropped = [], {reason: [] for reason in FILTERS}
    for record in records:
        reason = next((reason for reason, objects in FILTERS.items() if objects(record)), None)
        (dropped[reason] if reason else kept).append(record)
    if min_similarity is not None:
        if clip is None or source is None:
            raise ValueError("the off-image filter needs clip= and source=; or leave min_similarity at None")
        cosines = similarities(kept, source, clip)
        dropped["off-image"] = [r for r, cosine in zip(kept, cosines, strict=True) if cosine < min_similarity]
        kept = [r for r, cosine in zip(kept, cosines, strict=True) if cosine >= min_similarity]
    return Filtered(kept, dropped)


def similarities(records: Sequence[Record], source: PictureSource, clip: ClipTeacher) -> list[float]:
    """CLIP's cosine between each record's text and its picture; each picture is encoded once."""
    ids = list(dict.fromkeys(record.id for record in records))
    if not ids:
        return []
    features = dict(zip(ids, clip.features([source.open(i) for i in ids]), strict=True))
    texts = clip.text_features([record.text for record in records])
    return [float(features[record.id] @ text) for record, text in zip(records, texts, strict=True)]
