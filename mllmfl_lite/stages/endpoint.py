"""Questions to a server that speaks OpenAI's chat protocol, several at a time."""

import base64
import io
import itertools
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from mllmfl_lite.stages.backends import Answer, Answers, Open, Question
from mllmfl_lite.stages.cleaning import Mask
from mllmfl_lite.stages.replies import Problem, read_answer, read_problem

CONNECT = 10.0  # seconds until a server must have taken the connection
SAID = 9.0  # seconds; longer waits are logged
LONGEST_WAIT = 600.0  # seconds; a server that asks for a longer pause ends the run
MOST = 1000  # requests at a time
SMALL = 64  # pixels; smaller images are sent without loss


class EndpointBackend:
    """Answers from vLLM, `transformers serve`, a GPT-4-class service, or the like, `concurrency` requests at a time.

    Busy servers (408, 409, 425, 429, 5xx) and lost connections are asked again, after as long as ``Retry-After`` says,
    `retries` times for one answer; under a rate limit they count anew whenever another answer came. `timeout` is in
    seconds. Images with a side of more than `max_side` pixels are sent smaller. The key comes from the environment
    variable ``OPENAI_API_KEY`` and is masked in everything that is kept or shown.

    Raises:
        ValueError: a number, the address or the key cannot be used.
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
        from openai import OpenAI, Timeout  # slow

        if not 1 <= concurrency <= MOST or max_new_tokens < 1 or max_side < SMALL or not timeout > 0:
            raise ValueError(
                f"concurrency must be 1..{MOST}, max_new_tokens at least 1, max_side at least {SMALL}, timeout above 0;"
                f" got {concurrency}, {max_new_tokens}, {max_side}, {timeout}"
            )
        key, url = _api_key(), url.strip()
        self.model, self.max_new_tokens, self.concurrency = model.strip(), max_new_tokens, concurrency
        self.timeout, self.retries, self.max_side = timeout, retries, max_side
        self._settings: dict = {"max_tokens": max_new_tokens, "temperature": 0}
        self._stop, self._answered, self._quiet_until = threading.Event(), 0, 0.0
        self._mask = Mask(key, url)
        self._endpoint = f"the endpoint {self._mask.one_line(url)!r}"
        try:
            if not re.match(r"https?://[^/]", url) or not url.isprintable() or urlsplit(url).port == 0:
                raise ValueError("an address begins with http:// or https://")
            limit = Timeout(timeout, connect=min(timeout, CONNECT))
            client = OpenAI(base_url=url, api_key=key or "none", timeout=limit, max_retries=0)
        except Exception as error:  # what is no address
            raise ValueError(f"{self._endpoint} cannot be used: {self._mask.one_line(str(error))}") from None
        self._create = client.chat.completions.with_raw_response.create

    def answers(self, batches: Iterable[list[Question]], open_image: Open) -> Answers:
        """As the server sends them, `concurrency` requests at a time; those under way are awaited if the run ends."""
        questions = (question for batch in batches for question in batch)
        done: queue.Queue[tuple[Question, Answer | Exception]] = queue.Queue()
        self._stop = threading.Event()

        def work(question: Question) -> None:
            try:
                done.put((question, self._ask(question, open_image)))
            except Exception as error:
                done.put((question, error))

        running, failed = 0, None
        try:
            while True:
                for question in itertools.islice(questions, 0 if failed else self.concurrency - running):
                    threading.Thread(target=work, args=(question,), daemon=True).start()  # Ctrl-C does not wait for it
                    running += 1
                if not running:
                    break
                question, answer = done.get()
                running -= 1
                if isinstance(answer, Exception):
                    failed = failed or answer
                    self._stop.set()
                elif not (failed and answer.fault == "server"):
                    yield question, answer
            if failed:
                raise failed
        finally:
            self._stop.set()

    def _ask(self, question: Question, open_image: Open) -> Answer:
        """One answer, after as many attempts as there may be."""
        try:
            picture = {"type": "image_url", "image_url": {"url": data_url(open_image(question.id), self.max_side)}}
        except ValueError as error:
            return Answer(refusal=str(error), fault="file")
        message = {"role": "user", "content": [picture, {"type": "text", "text": question.prompt}]}
        attempt, answered = 0, self._answered
        while True:
            try:
                answer = self._send(message)
                self._answered += 1
                return answer
            except Problem as problem:
                if problem.fault == "run" and self._answered > answered:  # others were answered: it goes on
                    attempt, answered = 0, self._answered
                again = problem.wait is not None and problem.wait <= LONGEST_WAIT and attempt < self.retries
                if not again or self._wait(problem.wait or min(8.0, 0.5 * 2**attempt), problem.reason):
                    if problem.fault == "run":
                        failure = f"{self._endpoint} gave no answer for model {self.model!r}"
                        raise ValueError(f"{failure} ({problem.reason}); {problem.advice}") from None
                    return Answer(refusal=problem.reason, fault=problem.fault)
                attempt += 1

    def _wait(self, seconds: float, reason: str) -> bool:
        """Wait before a further attempt; return True if the run has ended meanwhile."""
        if seconds > SAID and time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + seconds
            logging.getLogger(__name__).warning("waiting %.0f s: %s", seconds, reason)
        return self._stop.wait(seconds)

    def _send(self, message: Any) -> Answer:
        """Send one request; settings that the server does not take are renamed or left out for all that follow."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        settings = dict(self._settings)
        try:
            reply = self._create(model=self.model, messages=[message], **settings)
            return read_answer(reply.text, self._mask)
        except APIStatusError as error:
            if error.status_code == 400 and _mend(settings, str(error)):
                self._settings = settings
                return self._send(message)
            raise read_problem(error.status_code, error.body, error.response.headers, self._mask) from None
        except APIConnectionError as error:
            cause = type(error.__cause__).__name__
            if isinstance(error, APITimeoutError) and cause != "ConnectTimeout":
                raise Problem(f"no answer within {self.timeout:g} s", "server", 0.0) from None
            reason = self._mask.one_line(f"{error} {error.__cause__ or ''}")
            raise Problem(reason, "run" if cause.startswith("Connect") else "server", 0.0) from None


def _api_key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("OPENAI_API_KEY holds a blank, a line break or a character that no key has; set it again")
    return key


def _mend(settings: dict, complaint: str) -> bool:
    """Change the settings as a server's complaint asks; return False if it asks for nothing that can be changed."""
    if "max_completion_tokens" in complaint and "max_tokens" in settings:
        settings["max_completion_tokens"] = settings.pop("max_tokens")
    elif "temperature" in complaint and "temperature" in settings:
        del settings["temperature"]
    else:
        return False
    return True


def data_url(image: Image.Image, max_side: int) -> str:
    """The image as a data URL: JPEG, its longer side at most `max_side`; small images as PNG."""
    if max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
