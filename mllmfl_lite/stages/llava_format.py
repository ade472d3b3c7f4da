"""LLaVA's own data format: ``[{"id", "image", "conversations": [{"from", "value"}, ...]}, ...]``."""

import re
from collections.abc import Sequence

from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.prompts import load_prompts

IMAGE = "<image>"  # the image's place in a conversation
_BOTS = ("assistant", "ai", "gpt", "bot")
_ANSWERS = {"question": ("answer",), "q": ("a", "answer"), "user": _BOTS, "human": _BOTS}  # what answers which label
_MARKS = r"[*_]{0,2}"
_LABEL = re.compile(  # "Question 2:", "**Q1.**", "- User:", "3) Answer -", alone on its line; amid a line with a colon
    rf"(?:(?P<first>^[ \t]*(?:[#>*_\-•]{{1,4}}[ \t]*|\(?\d{{1,3}}[.):][ \t]*){{0,3}})|(?<=\s){_MARKS})"
    r"(?P<word>question|answer|user|human|assistant|gpt|bot|ai|q|a)(?P<number>[ \t]?#?\d{1,3})?"
    rf"{_MARKS}(?:[ \t]?[:：]{_MARKS}|(?(number)[.)](?=\s)|(?(first)[ \t]?[.)\-–—](?=\s)|(?!)))"
    r"|(?(first)[ \t]*$|(?!)))",
    re.M | re.I,
)


def to_llava(records: Sequence[Record], prompts: dict[str, str] | None = None, plain: bool = False) -> list[dict]:
    """Export records as LLaVA's instruction data. No word is lost.

    A text of the form "Question: ... Answer: ..." becomes one turn each: with "Q1.", "User:" and "Assistant:", numbers,
    bullets or bold type as well. Words before the first question answer the prompt, as does any other text. ``<image>``
    stands once, in the first human turn. `prompts` are the texts by kind, the bundled ones by default. `plain` is for
    LLaVA's first stage: one answer each; give records of one kind that describes, such as ``detailed_description``.
    Source: the LLaVA repository's data format.
    """
    prompts = prompts or load_prompts()
    return [
        {
            "id": f"{record.id}-{record.kind}",
            "image": record.image,
            "conversations": _turns(record.text, prompts.get(record.kind, record.kind), plain),
        }
        for record in records
    ]


def _turns(text: str, prompt: str, plain: bool) -> list[dict]:
    text = text.replace(IMAGE, " ").replace("\r\n", "\n").replace("\r", "\n").strip()
    pairs = [(prompt.replace(IMAGE, " "), text)]
    if not plain and (cuts := _cuts(text)):
        lead = text[: cuts[0].start()].strip()
        pairs = [(pairs[0][0], lead)] if any(map(str.isalnum, lead)) else []
        values = _between(text, cuts)
        pairs += zip(values[::2], values[1::2], strict=True)
    values = [value for pair in pairs for value in pair]
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    return turns


def _cuts(text: str) -> list[re.Match]:
    """The labels that split a text into questions and answers, in turn; what has no answer is not split off."""
    every = [label for label in _LABEL.finditer(text) if label["first"] is not None or label["word"] not in ("q", "a")]
    best: list[re.Match] = []
    for labels in ([label for label in every if label["first"] is not None], every):  # rather those that begin a line
        for asks, answers in _ANSWERS.items():
            cuts: list[re.Match] = []
            for label in labels:
                if label["word"].lower() in (answers if len(cuts) % 2 else (asks,)):
                    cuts.append(label)
            cuts = cuts[: len(cuts) // 2 * 2]
            values = _between(text, cuts)
            cuts = [cut for i, cut in enumerate(cuts) if values[i // 2 * 2] and values[i // 2 * 2 + 1]]
            best = cuts if len(cuts) > len(best) else best
    return best


def _between(text: str, cuts: Sequence[re.Match]) -> list[str]:
    """The text after each label, up to the next."""
    ends = [cut.start() for cut in cuts[1:]] + [len(text)]
    return [_trim(text[cut.end() : end]) for cut, end in zip(cuts, ends, strict=False)]


def _trim(text: str) -> str:
    """Without blanks, rules (``===``) and a mark of bold type whose other half went with the label."""
    lines = text.strip().split("\n")
    kept = [i for i, line in enumerate(lines) if line.strip("=-_* \t")]
    text = "\n".join(lines[kept[0] : kept[-1] + 1]).strip() if kept else ""
    for mark in ("**", "*", "_"):
        if text.endswith(mark) and text.count(mark) % 2:
            text = text[: -len(mark)].rstrip()
    return text


def check_llava(entries: Sequence[object], images: Sequence[str] | None = None) -> list[str]:
    """Name what is wrong with entries in LLaVA's format, a sentence each. `images` are the file names that exist."""
    problems, known = [], None if images is None else set(images)
    for number, entry in enumerate(entries):
        if problem := _problem(entry, known):
            name = f" ({entry.get('id')!r:.100})" if isinstance(entry, dict) else ""
            problems.append(f"entry {number}{name}: {problem}")
    return problems


def _problem(entry: object, known: set[str] | None) -> str:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        return "it has no list of conversations with 'from' and 'value'"
    image = entry.get("image")
    turns = turns[1:] if turns[0]["from"] == "system" else turns
    if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        return "turns must alternate, human first, gpt last"
    if sum(turn["value"].count(IMAGE) for turn in turns) != 1 or IMAGE not in turns[0]["value"]:
        return f"{IMAGE} must stand once, in the first human turn"
    if image is not None and not isinstance(image, (str, int)):
        return "its image must be one file name"
    return f"image {image!r} does not exist" if known is not None and image not in known else ""


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
