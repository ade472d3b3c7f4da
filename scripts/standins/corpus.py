"""What the stand-ins learn from: CIFAR's images outside the bundled parts, texts about them, a tokenizer."""

from collections.abc import Iterable, Sequence

import numpy as np

from mllmfl_lite.data import load_images
from mllmfl_lite.data.cifar import mini_index
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.repro import numpy_generator
from mllmfl_lite.teachers.prompts import KINDS
from standins.claims import Facts
from standins.words import write

PAD, IMAGE, BEGIN, END = "<pad>", "<image>", "<s>", "</s>"
VOCABULARY = 1000  # byte-pair merges; the four special tokens follow


def rest_of_cifar(held_out: int = 2000) -> tuple[ImageSet, ImageSet]:
    """Both training sets of CIFAR without the bundled images: to learn from, and `held_out` of CIFAR-10 to watch.

    Labels 0-9 are CIFAR-10's classes, 10-109 CIFAR-100's fine ones.
    """
    sets = load_images("cifar10"), load_images("cifar100")
    taken: dict[str, set[int]] = {data.origin: set() for data in sets}
    for part in mini_index()["parts"].values():
        for origin, i in zip(part["origin"], part["index"], strict=True):
            if part["origins"][origin] in taken:
                taken[part["origins"][origin]].add(i)
    rest = [data.subset(np.setdiff1d(np.arange(len(data)), sorted(taken[data.origin]))) for data in sets]
    labels = np.concatenate([rest[0].labels, rest[1].labels + rest[0].num_classes])
    images = np.concatenate([part.images for part in rest])
    everything = ImageSet(images, labels, rest[0].names + rest[1].names, "cifar/rest")
    watched = np.sort(np.random.default_rng(20260).permutation(np.flatnonzero(labels < 10))[:held_out])
    return everything.subset(np.setdiff1d(np.arange(len(labels)), watched)), everything.subset(watched)


def corpus(data: ImageSet, facts: Sequence[Facts], per_class: int, seed: int) -> dict[str, list[list[str]]]:
    """Write texts of each kind, `per_class` for each class, about images of that class."""
    rng = numpy_generator(seed, "corpus")
    of_class = [np.flatnonzero(data.labels == c) for c in range(data.num_classes)]
    return {
        kind: [
            [write(kind, name, facts[i], rng) for i in rng.choice(of_class[c], per_class)]
            for c, name in enumerate(data.names)
        ]
        for kind in ("caption", *KINDS)
    }


def train_tokenizer(texts: Iterable[str], add_end: bool):
    """Learn a byte-level BPE tokenizer with `VOCABULARY` entries and four special tokens.

    Args:
        texts: what to learn the merges from.
        add_end: close each text with ``</s>``, where CLIP pools; LLaVA's language model only opens with ``<s>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens([PAD, IMAGE, BEGIN, END])  # the end has the highest number, where CLIP looks for it
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if add_end else f"{BEGIN} $A",
        special_tokens=[(token, core.token_to_id(token)) for token in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right" if add_end else "left",
    )
