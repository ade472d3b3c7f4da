"""Answers from a server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from PIL import Image

from mllmfl_lite.data.pictures import as_pil
from mllmfl_lite.stages.backends import Answer, Open, Question, without_thinking

FAILURES = 5  # requests in a row that fail on the server's side before the run stops
SMALL = 64  # pixels; smaller images are sent without loss


class EndpointBackend:
    """Answers from vLLM, `transformers serve`, a GPT-4-class service, or the like.

    The `openai` client retries 408, 409, 429, 5xx and lost connections, and waits as ``Retry-After`` says. The key
    comes from the environment variable ``OPENAI_API_KEY`` and is masked in everything that is kept or shown.

    Args:
        url: e.g. ``"http://localhost:8000/v1"``.
        model: the name by which the server knows it.
        max_new_tokens: where an answer is cut off.
        concurrency: requests at a time; so many images are open.
        timeout: seconds to wait for one answer.
        retries: further attempts for one answer.
        max_side: pixels; larger images are made smaller before they are sent.
    """

    batch_size = 1

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int = 128,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        max_side: int = 1024,
    ):
        from openai import OpenAI  # slow

        if concurrency < 1 or max_side < SMALL:
            raise ValueError(
                f"concurrency must be at least 1, max_side at least {SMALL}; got {concurrency}, {max_side}"
            )
        self.model, self.concurrency, self.max_side = model, concurrency, max_side
        self._key, self._url = _api_key(), url
        self._settings: dict = {"max_tokens": max_new_tokens, "temperature": 0}
        client = OpenAI(base_url=url, api_key=self._key or "none", timeout=timeout, max_retries=retries)
        self._create = client.chat.completions.with_raw_response.create
        self._failures = 0

    def answers(self, batches: Iterable[list[Question]], open_image: Open) -> Iterator[tuple[Question, Answer]]:
        """As the server sends them, `concurrency` requests at a time."""
        questions = (question for batch in batches for question in batch)
        with ThreadPoolExecutor(self.concurrency) as pool:
            running: dict[Future, Question] = {}
            for question in questions:
                running[pool.submit(self._ask, question, open_image)] = question
                if len(running) >= self.concurrency:
                    yield from self._collect(running)
            while running:
                yield from self._collect(running)

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        """One answer for each image and prompt."""
        questions = [[Question(str(i), "", prompt)] for i, prompt in enumerate(prompts)]
        found = {q.id: answer for q, answer in self.answers(questions, lambda name: as_pil(images[int(name)]))}
        return [found[str(i)] for i in range(len(prompts))]

    def _collect(self, running: dict[Future, Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield what has come. If the run must stop, answers that are under way are still yielded first."""
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        if failed := next((job for job in done if job.exception()), None):
            wait(running)
            done = set(running)
        for job in done:
            question = running.pop(job)
            if not job.exception():
                yield question, job.result()
        if failed:
            raise failed.exception()

    def _ask(self, question: Question, open_image: Open) -> Answer:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            image = open_image(question.id)
        except ValueError as error:
            return Answer(refusal=str(error))
        picture = {"type": "image_url", "image_url": {"url": data_url(image, self.max_side)}}
        message = {"role": "user", "content": [picture, {"type": "text", "text": question.prompt}]}
        try:
            answer = self._read(self._request(message).text)
        except APITimeoutError as error:
            return self._failed(f"no answer in time: {error}")
        except APIStatusError as error:
            reason = f"{error.status_code}: {_sentence(error.body) or error.message}"
            if error.status_code in (401, 403, 404, 429):
                advice = "set OPENAI_API_KEY" if error.status_code == 401 else "see the server's sentence"
                raise self._stopped(reason, advice) from None
            return Answer(refusal=self.mask(reason)) if error.status_code < 500 else self._failed(reason)
        except APIConnectionError as error:
            raise self._stopped(f"{error} {error.__cause__ or ''}", "see that it runs and can be reached") from None
        self._failures = 0
        return answer

    def _request(self, message: dict):
        """Send one request; settings that the server does not take are renamed or left out for all that follow."""
        from openai import BadRequestError

        settings = dict(self._settings)
        try:
            return self._create(model=self.model, messages=[message], **settings)
        except BadRequestError as error:
            if "max_completion_tokens" in str(error) and "max_tokens" in settings:
                settings["max_completion_tokens"] = settings.pop("max_tokens")
            elif "temperature" in str(error) and "temperature" in settings:
                del settings["temperature"]
            else:
                raise
        self._settings = settings
        return self._request(message)

    def _read(self, body: str) -> Answer:
        try:
            value = json.loads(body)
            choice = value["choices"][0]
            message = choice["message"]
            content = message.get("content") or ""
            if isinstance(content, list):
                content = "".join(part.get("text", "") for part in content)
            refusal = message.get("refusal") or ""
            finished = choice.get("finish_reason") not in ("length", "content_filter")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return self._failed(_sentence(body) or f"its answer is no completion: {body[:200]!r}")
        text = without_thinking(self.mask(str(content)))
        if not text:
            refusal = refusal or (
                "it gave an empty answer" if finished else "its tokens ran out before it answered; allow more tokens"
            )
        return Answer(text, finished, self.mask(str(value.get("model") or "")), self.mask(refusal) if not text else "")

    def _failed(self, reason: str) -> Answer:
        """A request that failed on the server's side: a refusal, until too many follow one another."""
        self._failures += 1
        if self._failures >= FAILURES:
            raise self._stopped(f"{FAILURES} requests in a row failed, the last with: {reason}", "see that it runs")
        return Answer(refusal=self.mask(reason))

    def _stopped(self, reason: str, advice: str) -> ValueError:
        where = f"the endpoint {self._url} gave no answer for model {self.model!r}"
        return ValueError(self.mask(f"{where} ({reason[:1000]}); {advice}"))

    def mask(self, text: str) -> str:
        """The text without the key and without passwords in addresses."""
        text = text.replace(self._key, "***") if self._key else text
        return re.sub(r"(://[^/\s:@]{0,200}:)[^/\s@]{1,200}@", r"\1***@", text)


def _api_key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("OPENAI_API_KEY holds a blank, a line break or a character that no key has; set it again")
    return key


def _sentence(body: object) -> str:
    """The server's own sentence in the body of an error."""
    try:
        value = json.loads(body) if isinstance(body, str) else body
    except ValueError:
        return str(body)[:500]
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            return _sentence(value[key]) if isinstance(value[key], dict) else str(value[key])
    return ""


def data_url(image: Image.Image, max_side: int) -> str:
    """The image as a data URL: JPEG, its longer side at most `max_side`; small images as PNG."""
    if max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
