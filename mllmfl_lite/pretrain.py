"""Stage 1b, Dynamic Weighted Pretraining: a compact model takes a frozen CLIP's place in front of a frozen LLM::

    mllm  = load_mllm()
    texts = read_texts(bundled_annotations(), array_source(web).ids, mllm)
    views = ArrayViews(web, mllm, folder="runs/features")
    done  = pretrain(build_model("resnet8", 10, width=16), mllm, views, texts, PretrainSettings(epochs=8))
    done.model                                     # what goes to the clients

The language model sees ``H(x) = (1 - alpha) * P_clip(f_clip(x)) + alpha * P_s(g(x))`` in the places of the picture,
with alpha rising from 0 to 1, and its loss on the annotation's tokens trains g and P_s alone. The mixture is the
paper's; this equation, the schedules and the start of P_s are our reading of it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from mllmfl_lite.annotate import Record, load_prompts
from mllmfl_lite.batches import Batches, channel_statistics
from mllmfl_lite.checkpoint import RunFolder
from mllmfl_lite.data import ImageSet
from mllmfl_lite.models import CompactModel
from mllmfl_lite.pictures import PictureSource
from mllmfl_lite.repro import (
    numpy_generator,
    pick_device,
    progress_bar,
    sha256_arrays,
    stable_seed,
    torch_generator,
    write_json,
)
from mllmfl_lite.settings import PRECISIONS, check_choice, check_whole
from mllmfl_lite.teacher import MllmTeacher, StoredFeatures

START_IMAGES = 256  # looked at to give the projection its start
STAIRS = 4  # levels of the schedule "step": 0, 1/3, 2/3, 1


class PretrainError(ValueError):
    """Pretraining cannot start: texts, images, model and settings do not fit together; the message says how."""


class PretrainDiverged(RuntimeError):
    """The loss is no longer a number. Weights were not changed by that batch; the checkpoint before it is good.

    Attributes:
        step: the step, counted from 0.
        ids: the image ids of the batch.
    """

    def __init__(self, step: int, ids: list[str], saved: Path | None):
        where = f"its images are listed in {saved}" if saved else f"its images: {', '.join(ids[:8])}"
        super().__init__(
            f"the loss of step {step} is not finite; {where}. Look at them, lower the learning rate, or use float32"
        )
        self.step, self.ids = step, ids


# ---------------------------------------------------------------------------------------------------------- alpha

SCHEDULES = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
    "step": lambda u: min(1.0, math.floor(u * STAIRS) / (STAIRS - 1)),
    "constant": lambda u: 1.0,
}


def alpha_at(step: int, steps: int, schedule: str = "linear", ramp: float = 1.0, end: float = 1.0) -> float:
    """The weight of the compact model in step `step` of `steps`, counted from 0: from 0 in the first to `end`.

    Args:
        step: which step.
        steps: how many there are.
        schedule: ``"linear"``, ``"cosine"``, ``"step"`` (four stairs), or ``"constant"``: `end` from the start, the
            ablation without dynamic weighting.
        ramp: the share of the steps in which alpha rises; it rests at `end` in the others.
        end: where it ends; 1 takes CLIP out.

    Source: the paper has alpha rise from 0 to 1; the shapes are our reading.
    """
    progress = min(1.0, step / max(1, ramp * (steps - 1)))
    return end * SCHEDULES[schedule](progress)


@dataclass(frozen=True)
class PretrainSettings:
    """The numbers of a pretraining run. Defaults are for the laptop; LLaVA's own values stand in brackets.

    Attributes:
        epochs: passes over the texts (1).
        batch_size: texts a step, in each process (128 over all GPUs).
        accumulate: batches whose gradients are added up before a step.
        lr: the peak of AdamW's learning rate, reached after `warmup` and lowered along a cosine (2e-3).
        weight_decay: AdamW's (0).
        warmup: share of the steps in which the learning rate rises (0.03).
        schedule: of alpha, see `alpha_at`.
        ramp: share of the steps in which alpha rises.
        alpha_end: where alpha ends; under 1, CLIP would still be needed on the client.
        language_weight: of the language-model loss; 0 leaves plain feature distillation (with `feature_weight`).
        feature_weight: of the optional feature term, 1 - cosine of the two projected tokens.
        max_answer_tokens: longer answers are cut.
        augment: crops and flips for the compact model's view; CLIP always sees the whole picture.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast) for the trained part.
        compile: `torch.compile` for the trained part.
        gradient_checkpointing: keep one tensor a layer of the LLM and compute the rest again: less memory, more time.
        checkpoint_every: steps between checkpoints, where a folder is given.
        seed: of batches, augmentation and the new projection.
    """

    epochs: int = 8
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    schedule: str = "linear"
    ramp: float = 0.2
    alpha_end: float = 1.0
    language_weight: float = 1.0
    feature_weight: float = 0.0
    max_answer_tokens: int = 128
    augment: bool = True
    precision: str = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "epochs", "batch_size", "accumulate", "max_answer_tokens", "checkpoint_every")
        check_choice(self, schedule=SCHEDULES, precision=PRECISIONS)
        for name, low, high in (("lr", 0, math.inf), ("ramp", 0, 1), ("alpha_end", 0, 1)):
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name} must be above {low} and at most {high}; got {getattr(self, name)}")
        for name in ("language_weight", "feature_weight", "weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if not self.language_weight + self.feature_weight:
            raise ValueError("language_weight and feature_weight are both 0: there is nothing to learn from")
        if self.alpha_end < 1:
            warnings.warn(
                f"alpha ends at {self.alpha_end}, not at 1: CLIP would still be needed on the client", stacklevel=3
            )

    def alpha(self, step: int, steps: int) -> float:
        """The weight of the compact model in a step."""
        return alpha_at(step, steps, self.schedule, self.ramp, self.alpha_end)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate in a step: a line up, half a cosine down."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


# ---------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Texts:
    """Annotations as token ids, one row a text, sorted by image and kind.

    Attributes:
        image: int64 (R,), the number of each text's image among `ids`.
        kind: int64 (R,), into `questions`.
        questions: for each kind the ids of chat, picture places and prompt.
        answers: for each text the ids of the answer, its end included.
        ids: the names of the images.
    """

    image: np.ndarray
    kind: np.ndarray
    questions: list[list[int]]
    answers: list[list[int]]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.image)

    def shuffled(self, seed: int) -> Texts:
        """The control: the same texts and pictures, but every picture is given another picture's texts."""
        there = np.unique(self.image)
        turned = numpy_generator(seed, "shuffled texts").permutation(len(there))
        followed_by = dict(zip(there[turned].tolist(), there[np.roll(turned, 1)].tolist(), strict=True))
        return replace(self, image=np.array([followed_by[i] for i in self.image.tolist()], np.int64))

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """One epoch: row numbers in batches of one kind and similar length, in an order that seed and epoch decide.

        Rows that do not fill a batch are left out; other epochs leave out others.
        """
        rng = numpy_generator(seed, "texts", epoch)
        batches = []
        for kind in np.unique(self.kind):
            rows = rng.permutation(np.flatnonzero(self.kind == kind))
            for chunk in np.split(rows, range(16 * size, len(rows), 16 * size)):  # sorted by length within a chunk
                chunk = chunk[np.argsort([len(self.answers[row]) for row in chunk], kind="stable")]
                whole = len(chunk) // size * size
                batches += np.split(chunk[:whole], whole // size) if whole else []
        return [batches[i] for i in rng.permutation(len(batches))]

    def tokens(self, rows: np.ndarray, longest: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels of rows of one kind: int64 (B, L); -100 wherever nothing is to be learned.

        Answers are padded on the right: under a causal mask no learned token sees the padding.
        """
        question = self.questions[self.kind[rows[0]]]
        answers = [self.answers[row][:longest] for row in rows]
        length = len(question) + max(map(len, answers))
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for i, answer in enumerate(answers):
            end = len(question) + len(answer)
            ids[i, :end] = torch.tensor(question + answer)
            labels[i, len(question) : end] = torch.tensor(answer)
        return ids, labels


def read_texts(
    records: Sequence[Record], ids: Sequence[str], mllm: MllmTeacher, prompts: dict[str, str] | None = None
) -> Texts:
    """Annotations as what the language model reads and says, whatever their order in the file.

    Args:
        records: what passed the filters.
        ids: the names of the images, as their source numbers them.
        mllm: whose tokenizer and chat form are used.
        prompts: what is asked for each kind; default the bundled prompts.

    Raises:
        PretrainError: no record, a record of an image that is not there, or of a kind without a prompt.
    """
    prompts = prompts or load_prompts()
    place = {name: i for i, name in enumerate(ids)}
    if not records:
        raise PretrainError(
            "there is no text to learn from: the annotation file is empty, or filters took every record"
        )
    missing = [record.id for record in records if record.id not in place]
    if missing:
        raise PretrainError(
            f"{len(missing)} of {len(records)} records are about images that are not there, such as {missing[0]!r}; "
            f"give the images that were annotated ({len(place)} are here, such as {next(iter(place), None)!r})"
        )
    kinds = sorted({record.kind for record in records})
    if unknown := [kind for kind in kinds if kind not in prompts]:
        raise PretrainError(f"there is no prompt for records of kind {unknown[0]!r}; prompts: {', '.join(prompts)}")
    ordered = sorted(records, key=lambda record: (place[record.id], record.kind))
    return Texts(
        np.array([place[record.id] for record in ordered]),
        np.array([kinds.index(record.kind) for record in ordered]),
        [mllm.question_ids(prompts[kind]) for kind in kinds],
        [mllm.answer_ids(record.text) for record in ordered],
        list(ids),
    )


# ---------------------------------------------------------------------------------------------------------- views


class Views(Protocol):
    """What both encoders are shown of picture number i.

    Attributes:
        identity: a name that differs wherever the pictures differ.
    """

    identity: str

    def __len__(self) -> int:
        """How many pictures there are."""

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """For the compact model: float (B, 3, H, W); augmented if there is a generator."""

    def tokens(self, indices: np.ndarray) -> Tensor:
        """What the MLLM's projector is given: (B, P, D)."""


class ArrayViews:
    """Views of an image set in memory.

    Args:
        data: the images.
        mllm: whose tower makes the tokens.
        folder: keep the tokens here, computed once (see `StoredFeatures`); "" computes them each time anew.
        device: where the compact model trains.
    """

    def __init__(self, data: ImageSet, mllm: MllmTeacher, folder: str | Path = "", device: str = "cpu"):
        self.identity = data.checksum()
        self.data, self.mllm = data, mllm
        self._batches = Batches(data, device)
        self._stored = StoredFeatures(mllm, "tokens", data, folder) if folder else None

    def __len__(self) -> int:
        return len(self.data)

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Float (B, 3, H, W), normalised; cropped and flipped if there is a generator."""
        where = torch.from_numpy(indices).to(self._batches.labels.device)
        return self._batches.augmented(where, generator) if generator else self._batches.plain(where)

    def tokens(self, indices: np.ndarray) -> Tensor:
        """Float (B, P, D), read or computed."""
        if self._stored:
            return torch.from_numpy(self._stored[indices])
        return self.mllm.tokens(self.data.images[indices])


class PictureViews:
    """Views of pictures on the disk, opened and cut by threads as they are needed; CLIP's tokens are computed live.

    Storing them would not pay: 595,000 pictures of LLaVA-1.5's tokens are 700 GB, and one epoch reads each picture
    once for each kind of text.

    Args:
        source: the pictures.
        mllm: whose tower makes the tokens.
        size: the compact model's side in pixels. Its feature map must fit the token grid: ResNet-50 at 384 has 12 x 12.
        device: where the compact model trains.
        threads: that open pictures.
    """

    def __init__(self, source: PictureSource, mllm: MllmTeacher, size: int, device: str = "cpu", threads: int = 8):
        from torchvision.transforms import v2

        self.source, self.mllm, self.size, self.device = source, mllm, size, device
        self.identity = f"{len(source)} pictures, {source.ids[0]} to {source.ids[-1]}"
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*channel_statistics(size))]
        self._whole = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *finish])
        self._finish = v2.Compose(finish)
        self._pool = ThreadPoolExecutor(threads)

    def __len__(self) -> int:
        return len(self.source)

    def compact(self, indices: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Float (B, 3, size, size), normalised; a random part, flipped or not, if there is a generator."""
        chances = torch.rand(len(indices), 5, generator=generator).tolist() if generator else [None] * len(indices)
        return torch.stack(list(self._pool.map(self._view, indices, chances))).to(self.device)

    def _view(self, index: int, chances: list[float] | None) -> Tensor:
        picture = self.source.open(self.source.ids[index])
        return self._whole(picture) if chances is None else self._finish(random_part(picture, self.size, chances))

    def tokens(self, indices: np.ndarray) -> Tensor:
        """Float (B, P, D), computed."""
        return self.mllm.tokens(list(self._pool.map(lambda i: self.source.open(self.source.ids[i]), indices)))


def random_part(picture, size: int, chances: Sequence[float]):
    """A part of a PIL image at `size` x `size`: 20 to 100 % of the area, 3:4 to 4:3, flipped or not.

    As torchvision's RandomResizedCrop, with the five numbers in [0, 1) given, so that threads cannot change them.
    """
    width, height = picture.size
    area = (0.2 + 0.8 * chances[0]) * width * height
    ratio = math.exp((2 * chances[1] - 1) * math.log(4 / 3))
    w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = chances[2] * (width - w), chances[3] * (height - h)
    part = picture.resize((size, size), resample=2, box=(left, top, left + w, top + h))
    return part.transpose(0) if chances[4] < 0.5 else part


# ---------------------------------------------------------------------------------------------------------- the mixture


class CompactEncoder(nn.Module):
    """What is trained: the compact model g and the projection P_s, two layers with a GELU like LLaVA-1.5's own.

    Args:
        model: g; its head is not used.
        grid: the side of the token grid that the MLLM reads.
        hidden: H, the width of the language model.
    """

    def __init__(self, model: CompactModel, grid: int, hidden: int):
        super().__init__()
        self.model, self.grid = model, grid
        self.model.head.requires_grad_(False)
        self.projection = nn.Sequential(nn.Linear(model.num_features, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> visual tokens (B, grid * grid, H)."""
        return self.projection(self.model.tokens(x, self.grid))

    @torch.no_grad()
    def start_like(self, x: Tensor, visual: Tensor) -> None:
        """Give P_s the mean and spread that the MLLM's projector has, so that the LLM meets tokens of a known size.

        Args:
            x: images (B, 3, H, W).
            visual: the MLLM's projected tokens of the same or other images, (B, P, H).
        """
        last, statistics = self.projection[-1], copy.deepcopy(self.state_dict())
        own = self.train()(x)
        self.load_state_dict(statistics)  # looking must not move BatchNorm's averages
        middle, own_middle = visual.mean((0, 1)), own.mean((0, 1))
        scale = (visual - middle).std() / (own - own_middle).std().clamp(min=1e-6)
        last.weight.mul_(scale)
        last.bias.copy_(middle - scale * (own_middle - last.bias))


def new_encoder(
    model: CompactModel, mllm: MllmTeacher, views: Views, texts: Texts, seed: int, device: str | torch.device = "cpu"
) -> CompactEncoder:
    """What training starts from: a copy of `model`, and a new projection with the mean and spread of the MLLM's own.

    Args:
        model: the compact model.
        mllm: the frozen LLaVA.
        views: the pictures; up to `START_IMAGES` of them are looked at.
        texts: their questions say how many visual tokens the MLLM reads.
        seed: of the projection's weights.
        device: where it will be trained.

    Raises:
        PretrainError: the MLLM's visual tokens are no square grid.
        ValueError: the compact model's feature map does not fit the grid.
    """
    reader = FrozenReader(mllm)
    places = texts.questions[0].count(reader.image_token)
    grid = math.isqrt(places)
    if grid * grid != places:
        raise PretrainError(f"the MLLM reads {places} visual tokens, which is no square grid")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "projection"))
        encoder = CompactEncoder(copy.deepcopy(model), grid, reader.hidden)
    encoder.to(device, memory_format=torch.channels_last)
    rng = numpy_generator(seed, "start")
    where = np.sort(rng.permutation(np.unique(texts.image))[:START_IMAGES])
    visual = reader.project(views.tokens(where)).float().to(device)
    encoder.start_like(views.compact(where, None), visual)
    return encoder


class FrozenReader:
    """The frozen half: the MLLM's projector P_clip and its language model.

    Args:
        mllm: from `load_mllm`; no weight of it is ever changed.
        gradient_checkpointing: see `PretrainSettings`.
    """

    def __init__(self, mllm: MllmTeacher, gradient_checkpointing: bool = False):
        self.model = mllm.model
        self.image_token = mllm.model.config.image_token_index
        self.hidden = mllm.model.config.text_config.hidden_size
        language = self.model.model.language_model
        if gradient_checkpointing:
            language.gradient_checkpointing_enable({"use_reentrant": False})
        language.train(gradient_checkpointing)  # checkpointing is for training mode; a LLaVA's LLM has no dropout

    def project(self, tokens: Tensor) -> Tensor:
        """P_clip: patch tokens (B, P, D) -> visual tokens (B, P, H)."""
        with torch.no_grad():
            return self.model.model.multi_modal_projector(tokens.to(self.model.device, self.model.dtype))

    def loss(self, visual: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood of the learned tokens, in nats, with `visual` in the picture's places.

        Args:
            visual: (B, P, H).
            ids: int64 (B, L), with P image tokens in each row.
            labels: int64 (B, L); -100 where nothing is learned.
        """
        words = self.model.get_input_embeddings()(ids)
        words = words.masked_scatter((ids == self.image_token)[..., None], visual.to(words.dtype))
        hidden = self.model.model.language_model(inputs_embeds=words, use_cache=False).last_hidden_state
        learned = labels[:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][learned])  # of answer tokens only
        return cross_entropy(logits.float(), labels[:, 1:][learned])


def mixed_loss(
    encoder: nn.Module,
    reader: FrozenReader,
    alpha: float,
    x: Tensor,
    tokens: Tensor | None,
    ids: Tensor,
    labels: Tensor,
    settings: PretrainSettings,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch: ``-log p_LLM(answer | H(x), question)`` and, if wanted, the feature term.

    Args:
        encoder: `CompactEncoder`, or what wraps it.
        reader: the frozen half.
        alpha: the compact model's weight.
        x: the compact model's images (B, 3, H, W).
        tokens: CLIP's patch tokens (B, P, D); may be None at alpha 1 without feature term: CLIP is out of the path.
        ids: int64 (B, L).
        labels: int64 (B, L).
        settings: supplies the two weights.

    Returns:
        The loss, and its parts as numbers.
    """
    own = encoder(x)
    seen = own
    if tokens is not None:
        frozen = reader.project(tokens)
        seen = (1 - alpha) * frozen + alpha * own if alpha < 1 else own
    loss, parts = own.new_zeros(()), {}
    if settings.language_weight:
        language = reader.loss(seen, ids, labels)
        loss, parts["language"] = loss + settings.language_weight * language, language.item()
    if settings.feature_weight:
        feature = (1 - cosine_similarity(own.float(), frozen.float(), dim=-1)).mean()
        loss, parts["feature"] = loss + settings.feature_weight * feature, feature.item()
    return loss, parts


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Pretrained:
    """What a run leaves.

    Attributes:
        model: the compact model g, ready for the clients.
        projection: the state of P_s.
        history: one record a step: step, alpha, loss, gradient norm into g, and the loss's parts.
        seconds: spent in steps, by this process and those before it.
    """

    model: CompactModel
    projection: dict[str, Tensor]
    history: list[dict]
    seconds: float


def pretrain(
    model: CompactModel,
    mllm: MllmTeacher,
    views: Views,
    texts: Texts,
    settings: PretrainSettings | None = None,
    *,
    folder: str | Path | None = None,
    device: str = "auto",
    label: str = "pretraining",
) -> Pretrained:
    """Dynamic Weighted Pretraining from the weights of `model`, which is not changed.

    Under ``accelerate launch`` or ``torchrun`` every process takes its own share of each batch, and all must call this
    with the same arguments and ``device="auto"`` (each its own GPU) or ``"cpu"``. The first one writes the checkpoints;
    files that the caller writes are the caller's own care (see `pipeline.stage_one`). A run goes on with as many
    processes as it was begun with.

    Args:
        model: the compact model.
        mllm: the frozen LLaVA.
        views: the pictures.
        texts: what was said of them.
        settings: the numbers.
        folder: keep a checkpoint here, and go on from it if it is there.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        label: a name for the progress bar.

    Raises:
        PretrainError: too few texts for a batch, or a text about an image that `views` lack.
        ValueError: the compact model's feature map does not fit the token grid.
        PretrainDiverged: the loss is not finite; the batch's image ids are saved in the folder.
        CheckpointError: the folder is another run's, damaged, in use or not writable.
    """
    run = _Run(model, mllm, views, texts, settings or PretrainSettings(), pick_device(device), label)
    if folder is None:
        return run.go(None, None)
    kept = RunFolder(folder, run.identity())
    if not run.accelerator.is_main_process:
        return run.go(kept.load(), None)  # all go on from the checkpoint, one writes it
    with kept:
        return run.go(kept.load(), kept)


class _Run:
    def __init__(self, model, mllm, views, texts, settings, device, label):
        from accelerate import Accelerator

        self.mllm, self.views, self.texts, self.settings, self.label = mllm, views, texts, settings, label
        self.given = model
        if len(texts) and texts.image.max() >= len(views):
            raise PretrainError(f"a text is about image {texts.image.max()}, but there are only {len(views)} images")
        self.accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=settings.accumulate)
        processes = self.accelerator.num_processes
        per_epoch = len(texts.batches(settings.batch_size * processes, settings.seed, 0))
        if not per_epoch:
            raise PretrainError(
                f"{len(texts)} texts do not fill one batch of {settings.batch_size * processes}; lower batch_size"
            )
        self.steps = settings.epochs * per_epoch // settings.accumulate
        self.encoder = new_encoder(model, mllm, views, texts, settings.seed, device)
        self.reader = FrozenReader(mllm, settings.gradient_checkpointing)
        self.history: list[dict] = []
        self.seconds = 0.0

    def identity(self) -> dict:
        """What makes two runs the same run."""
        digest = hashlib.sha256(repr((self.texts.image.tolist(), self.texts.kind.tolist())).encode())
        digest.update(repr((self.texts.questions, self.texts.answers)).encode())
        numbers = {k: v for k, v in asdict(self.settings).items() if k not in ("checkpoint_every", "compile")}
        processes = self.accelerator.num_processes  # each adds its own share to a batch
        return {
            **numbers,
            **({"processes": processes} if processes > 1 else {}),
            "mllm": self.mllm.identity,
            "images": self.views.identity,
            "texts": digest.hexdigest(),
            "initial_weights": sha256_arrays(t.cpu().numpy() for t in self.given.state_dict().values()),
        }

    def go(self, found: tuple | None, folder: RunFolder | None) -> Pretrained:
        """From a checkpoint, or from the start, to the end."""
        settings = self.settings
        trained = list(self._trained().values())
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        if found:
            self._restore(found, optimizer)
        trained, optimizer = self.accelerator.prepare(self.encoder, optimizer)
        if settings.compile:
            trained = torch.compile(trained)
        trained.train()
        started, before = time.perf_counter(), self.seconds
        with progress_bar(self.steps, "steps", self.label, done=len(self.history)) as bar:
            for batches in self._batches_from(len(self.history)):
                self._step(trained, optimizer, batches, folder)
                self.seconds = before + time.perf_counter() - started
                bar.set_postfix_str(f"alpha {self.history[-1]['alpha']:.2f}, loss {self.history[-1]['loss']:.3f}")
                bar.update()
                step = len(self.history)
                if folder and (step % settings.checkpoint_every == 0 or step == self.steps):
                    self._save(folder, optimizer)
        model, projection = self.encoder.model.cpu().eval(), self.encoder.projection.cpu().state_dict()
        model.head.requires_grad_(True)
        return Pretrained(model, projection, self.history, self.seconds)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.encoder.named_parameters() if p.requires_grad}

    def _batches_from(self, done: int):
        """For each step its batches of row numbers, this process's share of them."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        step, waiting = 0, []
        for epoch in range(self.settings.epochs):
            for rows in self.texts.batches(self.settings.batch_size * processes, self.settings.seed, epoch):
                waiting.append(rows[rank::processes])
                if len(waiting) == self.settings.accumulate:
                    if step >= done:
                        yield waiting
                    step, waiting = step + 1, []

    def _step(self, trained, optimizer, batches: list[np.ndarray], folder: RunFolder | None) -> None:
        settings, step = self.settings, len(self.history)
        alpha = settings.alpha(step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, self.steps)
        record = {"step": step, "alpha": round(alpha, 6), "loss": 0.0}
        for number, rows in enumerate(batches):
            generator = torch_generator(settings.seed, "views", step, number, self.accelerator.process_index)
            with self.accelerator.accumulate(trained):
                loss, parts = self._loss(trained, alpha, rows, generator)
                if not math.isfinite(loss.item()):
                    raise self._diverged(step, rows, folder)
                self.accelerator.backward(loss)
                record["loss"] += loss.item() / len(batches)
                for name, value in parts.items():
                    record[name] = record.get(name, 0.0) + value / len(batches)
        record["gradient"] = _gradient_norm(self.encoder.model)
        nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.history.append(record)

    def _loss(self, trained, alpha: float, rows: np.ndarray, generator) -> tuple[Tensor, dict[str, float]]:
        settings, images = self.settings, self.texts.image[rows]
        device = self.accelerator.device
        ids, labels = (t.to(device) for t in self.texts.tokens(rows, settings.max_answer_tokens))
        needed = alpha < 1 or settings.feature_weight > 0
        tokens = self.views.tokens(images) if needed else None
        x = self.views.compact(images, generator if settings.augment else None)
        with torch.autocast(device.type, PRECISIONS[settings.precision], enabled=settings.precision != "float32"):
            return mixed_loss(trained, self.reader, alpha, x, tokens, ids, labels, settings)

    def _diverged(self, step: int, rows: np.ndarray, folder: RunFolder | None) -> PretrainDiverged:
        ids = [self.texts.ids[i] for i in self.texts.image[rows]]
        saved = folder.path / "bad_batch.json" if folder else None
        if saved:
            write_json(saved, {"step": step, "images": ids, "texts": rows.tolist()})
        return PretrainDiverged(step, ids, saved)

    def _save(self, folder: RunFolder, optimizer) -> None:
        names = list(self._trained())
        moments = {
            f"optimizer.{names[i]}.{key}": value.float().cpu()
            for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        weights = {f"encoder.{name}": tensor.cpu() for name, tensor in self.encoder.state_dict().items()}
        record = {"history": self.history, "seconds": round(self.seconds, 3), "steps": self.steps}
        folder.save(len(self.history), {**weights, **moments}, record)

    def _restore(self, found, optimizer) -> None:
        _, tensors, record = found
        self.encoder.load_state_dict(_within(tensors, "encoder."))
        state = optimizer.state_dict()
        for i, name in enumerate(self._trained()):
            state["state"][i] = _within(tensors, f"optimizer.{name}.")
        optimizer.load_state_dict(state)
        self.history, self.seconds = record["history"], record["seconds"]


def _within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _gradient_norm(module: nn.Module) -> float:
    """The length of the gradient of all of a module's parameters together."""
    squares = [p.grad.float().square().sum() for p in module.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
