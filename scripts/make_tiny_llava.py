"""Train the stand-in LLaVA in four steps and write it into the package; `scripts/make_tiny_clip.py` comes first.

    MLLMFL_DATA=~/data python scripts/make_tiny_llava.py --work ~/tiny_llava      # two cores: about two hours

Encoder, language model, projector, both: each step leaves a file in the work folder and is skipped when it is there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from standins.claims import look, names_class
from standins.clip import clip_teacher
from standins.corpus import corpus, rest_of_cifar, train_tokenizer
from standins.llava import STAGES, Lessons, all_prompts, new_llava, new_processor, train_llava
from standins.tower import TowerHead, new_tower, train_tower
from standins.training import Schedule

from mllmfl_lite.stages.backends import TransformersBackend
from mllmfl_lite.teachers.base import TINY_CLIP, TINY_LLAVA
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import KINDS, load_prompts

SEED = 0
TOWER = Schedule(480_000, lr=2e-3)
STEPS = {
    "language": Schedule(48_000, batch=64, lr=3e-3),
    "projector": Schedule(8_000, batch=64, lr=3e-3),
    "both": Schedule(40_000, batch=64, lr=2e-3),
}
KIND_SHARES = {"class_name": 2, "caption": 1, **dict.fromkeys(KINDS, 2)}


def watch(step: int, loss: float) -> None:
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss:.3f}", flush=True)


def trained_tower(train, work: Path):
    """Step 1, or its file."""
    tower, file = new_tower(train.images, SEED), work / "tower.pt"
    if not file.exists():
        head = TowerHead(tower.config.hidden_size, train.num_classes, 96)
        teacher = clip_teacher(TINY_CLIP, train.names)
        train_tower(tower, head, train, teacher, TOWER, SEED, distil_from=0.65, watch=watch)
        torch.save(tower.state_dict(), file)
    tower.load_state_dict(torch.load(file))
    return tower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the steps leave their files")
    parser.add_argument("--folder", type=Path, default=Path(TINY_LLAVA))
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    train, watched = rest_of_cifar()
    facts = look(train.images)
    texts = corpus(train, facts, 40, SEED)
    asked = [f"USER: {prompt} ASSISTANT:" for prompts in all_prompts().values() for prompt in prompts]
    written = [f" {text}" for kind in texts.values() for own in kind for text in own]
    names = [f" {text}" for text in train.names for _ in range(20)]
    tokenizer = train_tokenizer([*written, *names, *asked * 20], add_end=False)
    model = new_llava(trained_tower(train, args.work), tokenizer, SEED)
    processor = new_processor(tokenizer)
    lessons = Lessons(processor, train, facts, KIND_SHARES)
    for stage in STAGES:
        file = args.work / f"{stage}.pt"
        if not file.exists():
            train_llava(model, lessons, stage, STEPS[stage], SEED, watch=watch)
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file))
    model.save_pretrained(args.folder)
    processor.save_pretrained(args.folder)
    report(str(args.folder), watched)


def report(folder: str, watched) -> None:
    backend = TransformersBackend(load_mllm(folder, device="cpu", batch_size=250), 64)
    few, prompt = watched.subset(np.arange(500)), load_prompts()["detailed_description"]
    answers = [answer for i in range(0, 500, 250) for answer in backend.answer(few.images[i : i + 250], [prompt] * 250)]
    hits = np.mean(
        [names_class(a.text, watched.names[label]) for a, label in zip(answers, watched.labels, strict=False)]
    )
    print(f"class named in the description of 500 images that it did not see: {hits:.3f}")


if __name__ == "__main__":
    main()
