"""Open pictures in, words out: an MLLM annotates images, one JSON line for each image and kind of text.

    python -m mllmfl_lite.annotate my_pictures --out annotations

writes `annotations.jsonl` (every record, with model, prompt hash and time), `annotations.llava.json` (what passed the
filters, in LLaVA's own format) and `annotations.rejected.json` (images that could not be used, and why). The same code
annotates with the bundled stand-in, with LLaVA-1.5-7B on a GPU, or through any endpoint that speaks OpenAI's protocol.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mllmfl_lite.stages.records import AnnotationError, Record
from mllmfl_lite.teachers.llava import load_prompts

_TURN = re.compile(r"Question:\s*(.+?)\s*\n\s*Answer:\s*(.+?)\s*(?=\nQuestion:|\Z)", re.S)


def to_llava(records: Sequence[Record], prompts: dict[str, str] | None = None) -> list[dict]:
    """Records as LLaVA's instruction data: ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

    A conversation that follows "Question: ... Answer: ..." becomes one turn each; any other text answers its prompt.
    ``<image>`` stands once, at the start of the first human turn. Source: the LLaVA repository's data format.
    """
    prompts = prompts or load_prompts()
    return [
        {
            "id": f"{record.id}-{record.kind}",
            "image": record.image,
            "conversations": _turns(_without_markers(record.text), prompts[record.kind]),
        }
        for record in records
    ]


def _turns(text: str, prompt: str) -> list[dict]:
    pairs = _TURN.findall(text) or [(prompt, text)]
    turns = [{"from": who, "value": value} for pair in pairs for who, value in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def _without_markers(text: str) -> str:
    return text.replace("<image>", "").strip()


def check_llava(entries: Sequence[dict], images: Sequence[str] | None = None) -> list[str]:
    """What is wrong with entries in LLaVA's format, a sentence each; an empty list where nothing is.

    Args:
        entries: from `to_llava`, or a file of LLaVA's.
        images: the names that exist; None: do not look.
    """
    problems, seen, there = [], set(), None if images is None else set(images)
    for number, entry in enumerate(entries):
        where = f"entry {number} ({entry.get('id')!r})" if isinstance(entry, dict) else f"entry {number}"
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
            problems.append(f"{where} has no list of conversations with 'from' and 'value'")
            continue
        if entry.get("id") in seen:
            problems.append(f"{where}: the id stands twice")
        seen.add(entry.get("id"))
        if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            problems.append(f"{where}: turns must alternate, human first, gpt last")
        if sum(turn["value"].count("<image>") for turn in turns) != 1 or "<image>" not in turns[0]["value"]:
            problems.append(f"{where}: <image> must stand once, in the first human turn")
        if there is not None and entry.get("image") not in there:
            problems.append(f"{where}: image {entry.get('image')!r} does not exist")
    return problems


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)


def from_llava(path: str | Path) -> list[dict]:
    """The entries of a file in LLaVA's format; fields beside id, image and conversations are left out.

    Raises:
        AnnotationError: it is no JSON list, or an entry breaks the format (the first five are named).
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(entries, list):
        raise AnnotationError(f"{path} must hold one JSON list of entries; it holds a {type(entries).__name__}")
    problems = check_llava(entries)
    if problems:
        raise AnnotationError(f"{path}: {len(problems)} entries break LLaVA's format; {'; '.join(problems[:5])}")
    return [{key: entry[key] for key in ("id", "image", "conversations") if key in entry} for entry in entries]
