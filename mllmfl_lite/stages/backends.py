"""Who answers prompts about images: the common interface, and a model in this process."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from PIL import Image

from mllmfl_lite.stages.cleaning import clean, one_line, without_thinking
from mllmfl_lite.teachers.llava import MllmTeacher


class Question(NamedTuple):
    """An image's id, the kind of text, and the prompt."""

    id: str
    kind: str
    prompt: str

    @property
    def key(self) -> tuple[str, str]:
        """Image and kind, as of the record that answers it."""
        return self.id, self.kind


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    text: str = ""  #: empty if there is none
    finished: bool = True  #: False if it was cut off by the token limit or a content filter
    model: str = ""  #: who answered, if the server says so
    refusal: str = ""  #: why there is no text
    fault: str = ""  #: whose the refusal is, ``"file"``, ``"server"``, ``"request"`` or ``"tokens"``


Open = Callable[[str], Image.Image]
Answers = Generator[tuple[Question, Answer], None, None]


class Backend(Protocol):
    """Whatever answers prompts about images."""

    model: str  #: the name that goes into each record
    batch_size: int  #: questions that are asked together
    max_new_tokens: int  #: where an answer is cut off

    def answers(self, batches: Iterable[list[Question]], open_image: Open) -> Answers:
        """Each question with its answer, as they come. An image that cannot be opened is a refusal.

        Raises:
            ValueError: nothing more can be asked.
        """
        ...


class TransformersBackend:
    """Answers from a model in this process: batched, greedy, cut off at `max_new_tokens`."""

    def __init__(self, teacher: MllmTeacher, max_new_tokens: int = 128):
        self.teacher, self.max_new_tokens = teacher, max_new_tokens
        self.model, self.batch_size = teacher.identity, teacher.batch_size

    def answers(self, batches: Iterable[list[Question]], open_image: Open) -> Answers:
        """One batch after the other. An image that the model cannot take is refused; the others are asked alone."""
        for batch in batches:
            images, asked = [], []
            for question in batch:
                try:
                    images.append(open_image(question.id))
                    asked.append(question)
                except ValueError as error:
                    yield question, Answer(refusal=str(error), fault="file")
            yield from zip(asked, self._answer_each(images, [q.prompt for q in asked]), strict=True)

    def _answer_each(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        try:
            return self.answer(images, prompts) if prompts else []
        except torch.OutOfMemoryError as error:
            raise ValueError("the device is out of memory; use smaller batches, or a smaller dtype") from error
        except Exception as error:  # a processor's rules are many
            if len(prompts) > 1:
                return [self._answer_each([i], [p])[0] for i, p in zip(images, prompts, strict=True)]
            return [Answer(refusal=f"the model cannot take it: {one_line(str(error))[:300]}", fault="server")]

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each image and prompt, as one batch."""
        inputs, model = self.teacher.inputs(images, prompts), cast(Any, self.teacher.model)
        ends = torch.tensor(model.generation_config.eos_token_id)  # one or several
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :].cpu()
        texts = self.teacher.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [read_text(text, bool(torch.isin(row, ends).any())) for text, row in zip(texts, new, strict=True)]


def read_text(text: str, finished: bool, model: str = "", why_none: str = "") -> Answer:
    """The answer in what a model said, without its thinking; if nothing is left, a refusal that says why."""
    text = without_thinking(clean(text))
    if text:
        return Answer(text, finished, model)
    if finished or why_none:
        return Answer("", finished, model, why_none or "the model gave an empty answer", "request")
    return Answer("", False, model, "the tokens ran out before the model answered; allow more", "tokens")
