"""Open pictures in, words out: an MLLM annotates images, one JSON line for each image and kind of text.

    python -m mllmfl_lite.annotate my_pictures --out annotations

writes `annotations.jsonl` (every record, with model, prompt hash and time), `annotations.llava.json` (what passed the
filters, in LLaVA's own format) and `annotations.rejected.json` (images that could not be used, and why). The same code
annotates with the bundled stand-in, with LLaVA-1.5-7B on a GPU, or through any endpoint that speaks OpenAI's protocol.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from mllmfl_lite.stages.records import AnnotationError
from mllmfl_lite.teachers.llava import MllmTeacher


@dataclass(frozen=True)
class Answer:
    """A model's text, and whether it ended by itself."""

    text: str
    finished: bool


class Backend(Protocol):
    """Whatever answers prompts about pictures.

    Attributes:
        model: the name that goes into each record.
        batch_size: how many questions `answer` is given at a time.
    """

    model: str
    batch_size: int

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each picture and prompt."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens of one question, its picture included."""


class TransformersBackend:
    """Answers from a model in this process: batched, padded on the left, greedy, so that the same run says the same.

    Args:
        teacher: from `mllmfl_lite.teacher.load_mllm`: any device and precision.
        max_new_tokens: where an answer is cut off.
    """

    def __init__(self, teacher: MllmTeacher, max_new_tokens: int = 128):
        self.teacher, self.max_new_tokens = teacher, max_new_tokens
        self.model, self.batch_size = teacher.identity, teacher.batch_size

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each picture and prompt."""
        import torch

        inputs = self.teacher.inputs(images, prompts)
        tokenizer = self.teacher.processor.tokenizer
        ends = self.teacher.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends])
        with torch.inference_mode():
            out = self.teacher.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :].cpu()
        return [
            Answer(tokenizer.decode(row, skip_special_tokens=True).strip(), bool(torch.isin(row, ends).any()))
            for row in new
        ]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of one question, its picture included."""
        from PIL import Image

        return self.teacher.inputs([Image.new("RGB", (32, 32))], [prompt])["input_ids"].shape[1]


class EndpointBackend:
    """Answers from any server that speaks OpenAI's chat protocol: vLLM, `transformers serve`, a GPT-4-class service.

    Several requests run at once. The `openai` client retries with growing pauses what may pass (429, 408, 409, 5xx, a
    lost connection, a hang beyond `timeout`) and waits as long as the server's ``Retry-After`` says. Answers that are
    not the protocol's JSON are asked for again here. The key comes from the environment, ``OPENAI_API_KEY``, alone.

    Args:
        url: e.g. ``"http://localhost:8000/v1"``.
        model: the name that the server knows it by.
        max_new_tokens: where an answer is cut off.
        concurrency: requests at once.
        timeout: seconds to wait for one answer.
        retries: further attempts for one answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int = 128,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
    ):
        from openai import OpenAI

        self.model, self.batch_size, self.max_new_tokens = model, concurrency, max_new_tokens
        self._retries = retries
        self._settings = {"max_tokens": max_new_tokens, "temperature": 0}
        self._key = os.environ.get("OPENAI_API_KEY")
        self._client = OpenAI(base_url=url, api_key=self._key or "none", timeout=timeout, max_retries=retries)
        self._pool = ThreadPoolExecutor(concurrency)

    def answer(self, images: Sequence, prompts: Sequence[str]) -> list[Answer]:
        """One answer for each picture and prompt, asked for at the same time.

        Raises:
            AnnotationError: the server still refuses or fails after all attempts.
        """
        return list(self._pool.map(self._ask, images, prompts))

    def _ask(self, image, prompt: str) -> Answer:
        picture = {"type": "image_url", "image_url": {"url": _data_url(image)}}
        message = {"role": "user", "content": [picture, {"type": "text", "text": prompt}]}
        for attempt in range(self._retries + 1):
            try:
                choice = self._create(message).choices[0]
                return Answer((choice.message.content or "").strip(), choice.finish_reason == "stop")
            except Exception as error:
                if attempt == self._retries or not _is_garbage(error):
                    raise AnnotationError(self._explain(error)) from None  # the cause's text may hold the key
                time.sleep(min(8.0, 0.25 * 2**attempt))
        raise AssertionError("unreachable")

    def _create(self, message: dict):
        """One request; settings that this server's model does not take are renamed or left out, once and for all."""
        from openai import BadRequestError

        settings = dict(self._settings)
        try:
            return self._client.chat.completions.create(model=self.model, messages=[message], **settings)
        except BadRequestError as error:
            if "max_completion_tokens" in str(error) and "max_tokens" in settings:
                settings["max_completion_tokens"] = settings.pop("max_tokens")
            elif "temperature" in str(error) and "temperature" in settings:
                del settings["temperature"]
            else:
                raise
        self._settings = settings
        return self._create(message)

    def _explain(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"[:300]
        if self._key:
            text = text.replace(self._key, "***")
        advice = "set OPENAI_API_KEY" if "401" in text else "see that it runs and serves this model"
        where = f"the endpoint {self._client.base_url} gave no answer for model {self.model!r}"
        return f"{where} ({text}); {advice}, then run the same command again: it goes on where it stopped"

    def count_tokens(self, prompt: str) -> int:
        """Roughly: four characters a token, and LLaVA-1.5's 576 tokens for the picture."""
        return 576 + len(prompt) // 4


def _is_garbage(error: Exception) -> bool:
    """Whether a reply came but was not the protocol's JSON; everything else the client has already retried."""
    from openai import APIResponseValidationError

    return isinstance(error, (ValueError, TypeError, AttributeError, IndexError, APIResponseValidationError))


def _data_url(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
