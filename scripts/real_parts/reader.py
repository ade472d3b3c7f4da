"""A reader: a frozen language model behind a projector, in the form that `mllmfl_lite.stages.mixture` reads through."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
from standins.training import initial_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mllmfl_lite.repro import write_atomically
from mllmfl_lite.teachers.llava import MllmTeacher
from real_parts.encoder import TOKENS, Encoder
from real_parts.wording import split_words

SPECIAL = PAD, IMAGE, BEGIN, END = "<pad>", "<image>", "<s>", "</s>"
LAYERS, WIDTH, HEADS = 3, 192, 4


class Reader(nn.Module):
    """A causal language model and a projector, LayerNorm and `inside`-H-H, with the parts of a LLaVA by their names."""

    def __init__(self, language: LlamaForCausalLM, image_token: int, inside: int):
        super().__init__()
        hidden = language.config.hidden_size
        self.config = SimpleNamespace(image_token_index=image_token, text_config=language.config)
        self.model = nn.Module()
        self.model.language_model = language.model
        self.model.multi_modal_projector = nn.Sequential(
            nn.LayerNorm(inside), nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.lm_head = language.lm_head

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.get_input_embeddings()


def new_reader(words: int, inside: int, seed: int, layers: int = LAYERS, width: int = WIDTH) -> Reader:
    """The small reader, untrained: a Llama of `layers` layers over `words` ids."""
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=HEADS, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(BEGIN), eos_token_id=SPECIAL.index(END),
    )  # fmt: skip
    with initial_weights(seed):
        return Reader(LlamaForCausalLM(config), SPECIAL.index(IMAGE), inside)


class Words:
    """A tokenizer of whole words. A word that it does not have is a `ValueError`."""

    def __init__(self, words: Sequence[str]):
        self.words = [*SPECIAL, *words]
        self.of = {word: i for i, word in enumerate(self.words)}

    def __call__(self, text: str) -> list[int]:
        found = split_words(text)
        if unknown := [word for word in found if word not in self.of]:
            raise ValueError(f"the reader has no word {unknown[0]!r}, in the text {text!r:.80}; add it and train again")
        return [self.of[word] for word in found]


class RealTeacher(MllmTeacher):
    """A reader and its words behind a frozen encoder. `reader` is the model; the encoder's weights stay outside it."""

    family = "reader"

    def __init__(self, name: str, reader: Reader, words: Words, encoder: Encoder):
        settings = f"{encoder.identity} {json.dumps(words.words)}"
        super().__init__(name, reader, None, encoder.device, settings=settings)
        self.words, self.tokens = words, encoder.tokens
        self.encoder = encoder.model

    def question_ids(self, prompt: str) -> list[int]:
        """Begin, the image's 16 places, the prompt."""
        begin, image = (self.words.of[name] for name in (BEGIN, IMAGE))
        return [begin, *[image] * TOKENS, *self.words(prompt)]

    def answer_ids(self, text: str) -> list[int]:
        """The words and the end."""
        return [*self.words(text), self.words.of[END]]


def save_reader(path: Path, reader: Reader, words: Words, about: dict) -> None:
    """One file: weights, words, and how it was made."""
    weights = {name: tensor.contiguous() for name, tensor in reader.state_dict().items() if name != "lm_head.weight"}
    write_atomically(path, safetensors.torch.save(weights, {"about": json.dumps({**about, "words": words.words[4:]})}))


def load_reader(path: Path, inside: int) -> tuple[Reader, Words, dict]:
    """Read what `save_reader` wrote, strictly: `ValueError` names what is missing, unknown or of another shape."""
    if not path.is_file():
        raise ValueError(f"there is no reader {path}; make it: make real-parts")
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    words = Words(about.pop("words"))
    reader = new_reader(len(words.words), inside, 0)
    load_strictly(reader, {**found, "lm_head.weight": found.get(TIED, torch.empty(0))}, str(path))
    return reader, words, about


TIED = "model.language_model.embed_tokens.weight"  # the last layer's weights, too


def load_strictly(model: nn.Module, found: dict[str, Tensor], where: str) -> None:
    """Load weights if they are exactly the model's own, and print how many were taken."""
    wanted = model.state_dict()
    missing, unknown = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    other = sorted(name for name in {*wanted} & {*found} if wanted[name].shape != found[name].shape)
    if missing or unknown or other:
        named = "; ".join(
            f"{word} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for word, names in (("missing", missing), ("unknown", unknown), ("of another shape", other)) if names
        )  # fmt: skip
        raise ValueError(f"{where} does not fit this model: {named}; remove it and run make real-parts again")
    model.load_state_dict(found)
    taken = sum(p.numel() for p in model.parameters())  # tied weights count once
    print(f"{where}: all of {len(found)} tensors taken, {taken:,} parameters", flush=True)
