"""Train the stand-in CLIP and write it into the package.

    MLLMFL_DATA=~/data python scripts/make_tiny_clip.py        # one core: over an hour; all of CIFAR is needed

The images are those of CIFAR-10's and CIFAR-100's training sets that no part of `cifar10_mini` holds.
"""

import argparse
from pathlib import Path

import safetensors.torch
import torch
from standins.claims import look
from standins.clip import new_clip, text_bank, train_clip
from standins.corpus import corpus, rest_of_cifar, train_tokenizer
from standins.training import Schedule

from mllmfl_lite.repro import write_atomically
from mllmfl_lite.teachers.base import TINY_CLIP
from mllmfl_lite.teachers.clip import load_clip

SEED, TEXTS_PER_CLASS = 0, 200
FIRST = Schedule(640_000, lr=2e-3)  # both encoders, three quarters of the pictures from CIFAR-10
SECOND = Schedule(480_000, lr=1.5e-3)  # the image encoder alone, nine tenths from CIFAR-10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(TINY_CLIP))
    args = parser.parse_args()

    torch.set_num_threads(1)
    train, watched = rest_of_cifar()
    texts = corpus(train, look(train.images), TEXTS_PER_CLASS, SEED)
    few = [text for kind in texts.values() for of_class in kind for text in of_class[:40]]
    tokenizer = train_tokenizer(few, add_end=True)
    model = new_clip(args.folder, tokenizer, SEED)

    def watch(step: int, loss: float) -> None:
        if step % 250 == 249:
            print(f"step {step + 1}: loss {loss:.3f}", flush=True)

    bank = text_bank(tokenizer, texts, train.names, SEED)
    train_clip(model, train, bank, FIRST, SEED, main_share=0.75, watch=watch)
    train_clip(model, train, bank[:, ::10], SECOND, SEED + 1, main_share=0.9, learn_text=False, watch=watch)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(args.folder / "open_clip_model.safetensors", safetensors.torch.save(weights))
    guess = load_clip(str(args.folder), device="cpu").class_probabilities(watched.images, train.names[:10]).argmax(1)
    print(f"zero-shot on {len(watched)} images that it did not see: {(guess.numpy() == watched.labels).mean():.4f}")


if __name__ == "__main__":
    main()
