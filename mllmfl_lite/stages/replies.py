"""Replies of a server that speaks OpenAI's chat protocol: an answer, or a problem and whose it is."""

import contextlib
import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from mllmfl_lite.stages.backends import Answer, read_text
from mllmfl_lite.stages.cleaning import Mask

STOPS = {  # statuses that concern every request, and what to do
    401: "set the environment variable OPENAI_API_KEY to a key that this server takes",
    402: "see the account that pays for this key",
    403: "see what this key may use",
    404: "see the model's name, and the address, which usually ends in /v1",
    405: "see the address, which usually ends in /v1",
    429: "wait, or send fewer requests at a time",
}
PASSES = (408, 409, 425)  # and 5xx: asked again
_POLICY = re.compile(r"polic|safety|moderat|content.{0,9}filter|inappropriate", re.I)


@dataclass(eq=False)
class Problem(Exception):
    """A request that failed."""

    reason: str  #: in the server's words
    fault: str  #: as in `Answer`; ``"run"`` if no request can succeed
    wait: float | None = None  #: seconds until it may be sent again, 0 if nobody says, None for never
    advice: str = "see that it runs"  #: what to do if it stays


def read_answer(body: str, mask: Mask) -> Answer:
    """The answer in the body of a reply with status 200; raises `Problem` if there is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Problem(f"no JSON but {mask.one_line(body)!r}", "server", 0.0) from None
    try:
        choice = value["choices"][0]
        text, why_none = _text(choice["message"].get("content")), str(choice["message"].get("refusal") or "")
    except (TypeError, KeyError, IndexError, AttributeError):
        error = value.get("error") if isinstance(value, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and code in STOPS:
            raise read_problem(code, value, {}, mask) from None
        sentence = mask.one_line(_sentence(value)) or f"no completion but {mask.one_line(body)!r}"
        raise Problem(sentence, "request") from None
    finish = str(choice.get("finish_reason")).lower()
    if finish == "content_filter":
        why_none = why_none or "the server's content filter held the answer back"
    model = mask.one_line(str(value.get("model") or ""))
    return read_text(mask(text), finish not in ("length", "content_filter"), model, mask.one_line(why_none))


def read_problem(status: int, body: object, headers: Mapping[str, str], mask: Mask) -> Problem:
    """What a reply with another status than 200 means."""
    sentence = mask.one_line(_sentence(body)) or "no reason given"
    reason = f"{status}: {sentence}"
    if status in STOPS:
        wait = _retry_after(headers) if status == 429 and "insufficient_quota" not in str(body) else None
        return Problem(reason + (f"; it asks to wait {wait:,.0f} s" if wait else ""), "run", wait, STOPS[status])
    if (400 <= status < 500 and status not in PASSES) or _POLICY.search(sentence):
        return Problem(reason, "request")
    return Problem(reason, "server", _retry_after(headers) if status >= 400 else None)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, from a number or a date; 0 if it does not say."""
    said = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0


def _sentence(body: object) -> str:
    """The server's own sentence in the body of an error."""
    for _ in range(9):  # bodies in bodies
        if isinstance(body, str):
            try:
                body = json.loads(body)
            except (ValueError, RecursionError):
                return str(body)
        if not isinstance(body, dict):
            return str(body) if body else ""
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), "")
    return str(body)


def _text(content: object) -> str:
    """The text of an answer, which may come in parts."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        return "".join(_text(part.get("text")) for part in parts if part.get("type") in (None, "text", "output_text"))
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}")
    return content or ""
