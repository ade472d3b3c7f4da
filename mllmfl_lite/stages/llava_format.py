"""LLaVA's own data format: ``[{"id", "image", "conversations": [{"from", "value"}, ...]}, ...]``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.prompts import load_prompts

_ASKS = {"question", "q", "user", "human"}
_LABEL = re.compile(  # "Question 2:", "**Q1.**", "- User:", "3) Answer -"; a bare "Q" or "A" must be a capital
    r"(?:^|(?<=\s))(?:[#>*_\-•]{1,4}\s*|\d{1,3}[.)]\s*){0,3}"
    r"((?i:question|answer|user|human|assistant|gpt)|Q|A|AI)"
    r"\s?#?\d{0,3}\s?[*_]{0,2}\s?[:.)\-–]\s?[*_]{0,2}(?=\s|$)",
    re.M,
)


def to_llava(records: Sequence[Record], prompts: dict[str, str] | None = None) -> list[dict]:
    """Export records as LLaVA's instruction data. No word is lost.

    A text that follows "Question: ... Answer: ..." (in any of the usual forms) becomes one turn each; any other text
    answers its prompt. ``<image>`` stands once, in the first human turn. For LLaVA's first stage (``plain``) export one
    kind alone, ``detailed_description``. Source: the LLaVA repository's data format.
    """
    prompts = prompts or load_prompts()
    return [
        {
            "id": f"{record.id}-{record.kind}",
            "image": record.image,
            "conversations": _turns(record.text.replace("<image>", "").strip(), prompts.get(record.kind, record.kind)),
        }
        for record in records
    ]


def _turns(text: str, prompt: str) -> list[dict]:
    lead, parts = _split(text.replace("\r\n", "\n"))
    asked = next((i for i, (asks, _) in enumerate(parts) if asks), None)
    if asked is None or all(asks for asks, _ in parts):
        pairs = [(prompt, text)]
    else:
        pairs = [(prompt, "\n".join(part for part in [lead, *(t for _, t in parts[:asked])] if part))]
        for asks, part in parts[asked:]:
            if asks:
                pairs.append((part, ""))
            else:
                pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]}\n{part}".strip())
        pairs = _without_gaps(pairs)
    values = [value for pair in pairs for value in pair]
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def _split(text: str) -> tuple[str, list[tuple[bool, str]]]:
    """The words before the first label, and (is a question, words) for each label."""
    labels = list(_LABEL.finditer(text))
    if not labels:
        return "", []
    ends = [label.start() for label in labels[1:]] + [len(text)]
    parts = [
        (label[1].lower() in _ASKS, text[label.end() : end].strip(" \n*_"))
        for label, end in zip(labels, ends, strict=True)
    ]
    return text[: labels[0].start()].strip(), parts


def _without_gaps(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions without an answer join the question after them, or the last answer; an empty lead-in goes."""
    kept: list[tuple[str, str]] = []
    waiting = ""
    for number, (question, answer) in enumerate(pairs):
        if number == 0:
            kept += [(question, answer)] if answer else []
        elif answer:
            kept.append((f"{waiting}\n{question}".strip(), answer))
            waiting = ""
        else:
            waiting = f"{waiting}\n{question}".strip()
    if waiting:
        kept[-1] = (kept[-1][0], f"{kept[-1][1]}\n{waiting}")
    return kept


def check_llava(entries: Sequence[object], images: Sequence[str] | None = None) -> list[str]:
    """Name what is wrong with entries in LLaVA's format, a sentence each.

    Args:
        entries: from `to_llava`, or a file of LLaVA's; ids may repeat there, one for each conversation.
        images: the file names that exist; None: do not look.
    """
    problems, known = [], None if images is None else set(images)
    for number, entry in enumerate(entries):
        where = f"entry {number} ({entry.get('id')!r})" if isinstance(entry, dict) else f"entry {number}"
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
            problems.append(f"{where} has no list of conversations with 'from' and 'value'")
            continue
        turns = turns[1:] if turns[0]["from"] == "system" else turns
        if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            problems.append(f"{where}: turns must alternate, human first, gpt last")
        elif sum(turn["value"].count("<image>") for turn in turns) != 1 or "<image>" not in turns[0]["value"]:
            problems.append(f"{where}: <image> must stand once, in the first human turn")
        if known is not None and entry.get("image") not in known:
            problems.append(f"{where}: image {entry.get('image')!r} does not exist")
    return problems


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)


def from_llava(path: str | Path) -> tuple[list[dict], int]:
    """Read a file in LLaVA's format: the entries with an image, ids as text, and how many entries have none.

    Raises:
        ValueError: it is no JSON list, or an entry breaks the format (the first five are named).
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold one JSON list of entries; it holds a {type(entries).__name__}")
    pictured = [entry for entry in entries if not isinstance(entry, dict) or entry.get("image")]
    if problems := check_llava(pictured):
        raise ValueError(f"{path}: {len(problems)} entries break LLaVA's format; {'; '.join(problems[:5])}")
    read = [
        {"id": str(e.get("id", "")), "image": str(e["image"]), "conversations": e["conversations"]} for e in pictured
    ]
    return read, len(entries) - len(pictured)
