"""All real parts of one folder: pools, tokens, texts, the reader. Each is made once and then read."""

import functools
import json
from pathlib import Path

import numpy as np
import safetensors.torch
from standins.training import Schedule
from torch import Tensor

from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import write_atomically
from mllmfl_lite.stages.records import Record
from mllmfl_lite.stages.texts import Texts, read_texts
from real_parts.encoder import choices, load_encoder, pooled, stored_tokens
from real_parts.pool import open_pools
from real_parts.reader import RealTeacher, Words, load_reader, load_strictly, new_reader, save_reader
from real_parts.reading import STEPS, gate, train_reader
from real_parts.smollm import PROJECTOR, load_smollm
from real_parts.wording import PROMPTS, imagenet_names, vocabulary, write_records

INSIDE = 1280  # width of the encoder's tokens
SEED = 0  # of the reader


class Parts:
    """The parts in `folder`; what is asked for and not there is made. `watch` sees each step of training."""

    def __init__(self, folder: str | Path, watch=None):
        self.folder, self.watch = Path(folder).expanduser(), watch
        self.folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def pools(self) -> dict[str, ImageSet]:
        return open_pools()

    @functools.cached_property
    def encoder(self):
        return load_encoder()

    @functools.cache  # noqa: B019 (one object a process)
    def tokens(self, name: str) -> np.ndarray:
        """Of a pool: float16 (N, 16, 1280)."""
        return stored_tokens(self.encoder, self.pools[name], self.folder / "tokens")

    @functools.cache  # noqa: B019
    def choices(self, name: str) -> tuple[Tensor, Tensor]:
        """The encoder's first two ImageNet classes of a pool's images, and their probabilities."""
        return choices(self.encoder, self.features(name))

    @functools.cache  # noqa: B019
    def features(self, name: str) -> Tensor:
        """The encoder's own features: float32 (N, 1280)."""
        return pooled(self.tokens(name))

    def records(self, name: str) -> list[Record]:
        """Two texts an image."""
        pool = self.pools[name]
        return write_records(pool.images, self.choices(name)[0].tolist(), imagenet_names(), pool.ids)

    def texts(self, name: str, teacher: RealTeacher) -> Texts:
        """The texts of a pool as the teacher's ids."""
        return read_texts(self.records(name), self.pools[name].ids, teacher, PROMPTS)

    def small_reader(self) -> tuple[RealTeacher, dict]:
        """The small reader behind its encoder, and how it was made; `ValueError` if the gate refuses it."""
        path = self.folder / "reader.safetensors"
        if not path.exists():
            words = Words(vocabulary(imagenet_names()))
            new = new_reader(len(words.words), INSIDE, SEED)
            teacher = RealTeacher("small reader", new, words, self.encoder)
            about = self._teach(teacher, STEPS, [*new.parameters()])
            save_reader(path, new, words, about)
        reader, words, about = load_reader(path, INSIDE)
        return RealTeacher("small reader", reader, words, self.encoder), about

    def smollm(self, schedule: Schedule = PROJECTOR) -> tuple[RealTeacher, dict]:
        """SmolLM2 behind a trained projector, and how it was made; `ValueError` if the gate refuses it."""
        teacher, path = load_smollm(self.folder, self.encoder, INSIDE, SEED), self.folder / "projector.safetensors"
        projector = teacher.model.model.multi_modal_projector
        if not path.exists():
            about = self._teach(teacher, schedule, [*projector.parameters()])
            write_atomically(path, safetensors.torch.save(projector.state_dict(), {"about": json.dumps(about)}))
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        load_strictly(projector, safetensors.torch.load_file(path), str(path))
        return teacher, about

    def _teach(self, teacher: RealTeacher, schedule: Schedule, learning: list) -> dict:
        """Train these weights on the reader's pool, ask at the gate; return how it was."""
        for weight in learning:
            weight.requires_grad_(True)
        texts = self.texts("reader", teacher)
        losses = train_reader(teacher.model, self.tokens("reader"), texts, schedule, SEED, self.watch)
        teacher.model.requires_grad_(False)
        sight = gate(teacher.model, self.tokens("held_out"), self.texts("held_out", teacher))
        return {
            "parameters": sum(p.numel() for p in teacher.model.parameters()), "texts": len(texts),
            "steps": schedule.steps, "batch": schedule.batch, "encoder": self.encoder.identity,
            "training_loss": losses[-1], **sight,
        }  # fmt: skip
