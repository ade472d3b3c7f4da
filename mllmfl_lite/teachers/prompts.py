"""The questions that an MLLM is asked about images."""

import hashlib
from pathlib import Path

from mllmfl_lite.repro import ASSETS

PROMPTS = ASSETS / "prompts"
KINDS = ("conversation", "detailed_description", "complex_reasoning")


def load_prompts(folder: str | Path | None = None) -> dict[str, str]:
    """The prompts of a folder, one text file a kind (``detailed_description.txt``, ...); default: the bundled ones."""
    folder = Path(folder or PROMPTS)
    try:
        prompts = {path.stem: path.read_text(encoding="utf-8-sig").strip() for path in sorted(folder.glob("*.txt"))}
    except UnicodeDecodeError as error:
        raise ValueError(f"a prompt in {folder} is not UTF-8 text ({error}); save it again as UTF-8") from error
    if not prompts or not all(prompts.values()):
        found = f"it holds {prompts}" if prompts else "it holds none"
        raise ValueError(f"{folder} must hold a text file for each kind of text, none of them empty; {found:.200}")
    return prompts


def prompt_hash(prompt: str) -> str:
    """The first 16 digits of the prompt's sha256; equal for records that answer the same question."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
