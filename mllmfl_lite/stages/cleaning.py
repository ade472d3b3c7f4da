"""What comes from a model or a server, made fit to keep and to show: no secrets, no thinking, no control characters."""

import base64
import html
import json
import re
from urllib.parse import quote, unquote

PIECE = 8  # characters
_NAMES = "think|thinking|thought|thoughts|reasoning|reason|reflection|seed:think"
_END = rf"</(?:{_NAMES})>|\[/think\]|◁/think▷"
_THOUGHT = re.compile(rf"(?:<(?:{_NAMES})>|\[think\]|◁think▷).*?(?:{_END}|\Z)", re.I | re.S)
_THOUGHT_END = re.compile(_END, re.I)
_WRAP = re.compile(r"</?(?:answer|response|output)>|<\|(?:begin|end)_of_(?:box|solution)\|>", re.I)
_CONTROLS = {code: " " for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}
_LOGIN = re.compile(r"(?<=://)[^\s/?#]{1,1000}@")
_QUERY = re.compile(r"([?&][^=&?\s]{0,40}(?:key|token|secret|sig|password)[^=&?\s]{0,40}=)[^&\s]+", re.I)


def clean(text: str) -> str:
    """The text with other control characters than line breaks and tabs as blanks, and half characters as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_CONTROLS)


def one_line(text: str) -> str:
    """The text without markup, control characters and line breaks: fit for a message."""
    return " ".join(re.sub(r"<[^<>]*>", " ", clean(text)).split())


def without_thinking(text: str) -> str:
    """The text without what a model thinks before it answers; thoughts may lack their beginning or their end."""
    return _WRAP.sub("", _THOUGHT_END.split(_THOUGHT.sub("", text))[-1]).strip()


class Mask:
    """Replaces secrets by ``***``: a key, what logs in at an address, and keys in any address's query.

    Secrets are found in other spellings (percent-encoded, base64, ...) and in pieces of eight characters, since servers
    shorten what they repeat. A shorter one is found where it stands alone, unless it is a word, such as "EMPTY".
    """

    def __init__(self, key: str, url: str = ""):
        login = url.partition("://")[2].rpartition("@")[0]
        secrets = {key, login, unquote(login), login.partition(":")[2], unquote(login.partition(":")[2])}
        secrets = {secret for secret in secrets if secret and (len(secret) >= PIECE or not secret.isalpha())}
        forms = sorted({form for secret in secrets for form in _spellings(secret)}, key=len, reverse=True)
        whole = [re.escape(form) for form in forms if len(form) >= PIECE]
        alone = [rf"(?<![a-z0-9]){re.escape(form)}(?![a-z0-9])" for form in forms if len(form) < PIECE]
        self._whole = re.compile("|".join(whole + alone) or "(?!)", re.I)
        pieces = {form[i : i + PIECE] for form in forms for i in range(len(form) - PIECE + 1)}
        some = "|".join(re.escape(piece) for piece in sorted(pieces) if not piece.isalpha())  # letters: any word
        self._pieces = re.compile(rf"(?:(?={some}).)+.{{{PIECE - 1}}}" if some else "(?!)", re.I | re.S)

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        text = _QUERY.sub(r"\1***", _LOGIN.sub("***@", self._whole.sub("***", text)))
        return self._pieces.sub("***", text)

    def one_line(self, text: str) -> str:
        """A server's words, fit for a message; secrets are masked before anything is cut."""
        return self(one_line(self(text)))[:500]


def _spellings(secret: str) -> set[str]:
    code = secret.encode()
    coded = {quote(secret), quote(secret, safe=""), html.escape(secret), json.dumps(secret)[1:-1], code.hex()}
    return {secret, base64.b64encode(code).decode().rstrip("="), *coded}
