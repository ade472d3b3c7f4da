"""Who answers prompts about images: the common interface, and a model in this process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from PIL import Image

from mllmfl_lite.teachers.llava import MllmTeacher

_THINKING = re.compile(
    r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)|◁think▷.*?(?:◁/think▷|\Z)", re.S
)


class Question(NamedTuple):
    """An image's id, the kind of text, and the prompt."""

    id: str
    kind: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: the answer.
        finished: False if it was cut off by the token limit or a content filter.
        model: who answered, if the server says so.
        refusal: why there is no text, in the server's own words; empty if there is one.
    """

    text: str = ""
    finished: bool = True
    model: str = ""
    refusal: str = ""


Open = Callable[[str], Image.Image]


class Backend(Protocol):
    """Whatever answers prompts about images.

    Attributes:
        model: the name that goes into each record.
        batch_size: questions that are asked together.
    """

    model: str
    batch_size: int

    def answers(self, batches: Iterable[list[Question]], open_image: Open) -> Iterator[tuple[Question, Answer]]:
        """Each question with its answer, as they come. An image that cannot be opened is a refusal.

        Raises:
            ValueError: nothing more can be asked.
        """
        ...


class TransformersBackend:
    """Answers from a model in this process: batched, greedy.

    Args:
        teacher: from `load_mllm`.
        max_new_tokens: where an answer is cut off.
    """

    def __init__(self, teacher: MllmTeacher, max_new_tokens: int = 128):
        self.teacher, self.max_new_tokens = teacher, max_new_tokens
        self.model, self.batch_size = teacher.identity, teacher.batch_size

    def answers(self, batches: Iterable[list[Question]], open_image: Open) -> Iterator[tuple[Question, Answer]]:
        """One batch after the other."""
        for batch in batches:
            images, asked = [], []
            for question in batch:
                try:
                    images.append(open_image(question.id))
                    asked.append(question)
                except ValueError as error:
                    yield question, Answer(refusal=str(error))
            if asked:
                yield from zip(asked, self.answer(images, [q.prompt for q in asked]), strict=True)

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each image and prompt, as one batch."""
        inputs = self.teacher.inputs(images, prompts)
        tokenizer = self.teacher.processor.tokenizer
        ends = self.teacher.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends])
        with torch.inference_mode():
            out = self.teacher.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :].cpu()
        texts = [without_thinking(tokenizer.decode(row, skip_special_tokens=True)) for row in new]
        return [Answer(text, bool(torch.isin(row, ends).any())) for text, row in zip(texts, new, strict=True)]


def without_thinking(text: str) -> str:
    """The text without what a model thinks before it answers."""
    return _THINKING.sub("", text.rpartition("</think>")[2] if "<think>" not in text else text).strip()
