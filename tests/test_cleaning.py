"""Secrets, thoughts and control characters: none is kept or shown, nothing else is lost, in linear time."""

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmfl_lite.stages.cleaning import Mask, clean, one_line, without_thinking

KEY = "sk-Proj/abc+DEF=0123456789"


@pytest.mark.parametrize("echo", [
    KEY, KEY.upper(), f"Bearer {KEY}", "sk-Proj%2Fabc%2BDEF%3D0123456789", KEY[:20], KEY[8:], KEY.encode().hex(),
    base64.b64encode(KEY.encode()).decode(), f"x{KEY}y",
])  # fmt: skip
def test_a_key_is_masked_in_every_spelling(echo):
    masked = Mask(KEY)(f"before {echo} after")
    assert "***" in masked and masked.startswith("before ") and masked.endswith(" after")
    assert not any(part in masked.lower() for part in ("proj", "abc", "def", "456", echo[-6:].lower()))


@pytest.mark.parametrize("text", [
    "http://me:secret-word@host/v1", "http://me:secret-word@host:80", "see https://secret-word@host", "secret-word",
    base64.b64encode(b"me:secret-word").decode(), "http://other:secret/../@secret-word@x", "me:secret-word",
])  # fmt: skip
def test_what_logs_in_at_an_address_is_masked(text):
    masked = Mask("", "http://me:secret-word@host/v1")(text)
    assert (
        "secret-word" not in masked and "***" in masked and base64.b64encode(b"secret-word")[:8].decode() not in masked
    )


@pytest.mark.parametrize(
    "text", ["http://x/v1?api_key=hidden&b=1", "https://x?b=1&access_token=hidden", "/v1?sig=hidden"]
)
def test_a_key_in_an_address_is_masked(text):
    assert "hidden" not in Mask("")(text)


@pytest.mark.parametrize("key", ["", "EMPTY", "none", "ollama", "sk-abc"])
def test_placeholders_and_short_keys_take_no_words_from_a_text(key):
    text = "An EMPTY bottle, none else, a task-abcess, see http://host/@llama?a=1"
    assert Mask(key, "http://host/v1")(text) == text


def test_a_key_of_letters_alone_is_masked():
    assert Mask("mysecretkey")("Bearer MySecretKey, a secret key") == "Bearer ***, a secret key"


@given(st.text(), st.text(alphabet="abc-123", max_size=30))
def test_masking_ends_and_leaves_no_key(text, key):
    masked = Mask(key)(f"{text} {key}")
    assert len(key) < 8 or key not in masked.replace("***", "")


@pytest.mark.parametrize("text", [
    "<think>Is it a cat?</think>A dog.", "<think>\nhm\n</think>\n\nA dog.\n", "Is it a cat?\n</think>\n\nA dog.",
    "<thinking>hm</thinking> A dog.", "[THINK]hm[/THINK]A dog.", "◁think▷hm◁/think▷A dog.", "<THINK>hm</THINK>A dog.",
    "<reasoning>hm</reasoning>A dog.", "<think>a</think>b</think>A dog.", "<think>a <think> b</think>A dog.",
    "<think>hm</think><answer>A dog.</answer>", "<|begin_of_box|>A dog.<|end_of_box|>", "A dog.<think>hm", "A dog.",
    "<think></think>A dog.", "<think>a</think>A <think>b</think>dog.",
])  # fmt: skip
def test_thoughts_are_left_out(text):
    assert without_thinking(text) == "A dog."


@pytest.mark.parametrize(
    "text", ["<think>Let me look", "[THINK]hm", "<think>hm</think>", "hm</think>", "", "<thinking>a"]
)
def test_thoughts_alone_leave_nothing(text):
    assert without_thinking(text) == ""


@given(st.text())
def test_cleaned_texts_can_be_written_and_keep_their_words(text):
    cleaned = clean(text)
    cleaned.encode()
    assert not any(ord(c) < 32 and c not in "\t\n\r" for c in cleaned)
    assert [w for w in cleaned if w.isalnum()] == [w for w in text if w.isalnum()]


def test_half_characters_become_whole():
    assert clean("\ud83d\ude00 \ud83d") == "\U0001f600 \ufffd"
    assert one_line("<html>\n<b>Bad\x1b</b>  gateway\r\n") == "Bad gateway"


@pytest.mark.parametrize("text", [
    "<think>" * 150_000, "a" * 1_000_000, "?" * 1_000_000, "://" * 300_000, "<" * 1_000_000, "?key" * 250_000,
    "://a:" * 200_000, "&token" * 160_000, "sk-" * 300_000,
])  # fmt: skip
def test_a_megabyte_takes_no_time(text):
    start = time.process_time()
    without_thinking(Mask(KEY, "http://me:secret-word@host")(one_line(clean(text))))
    assert time.process_time() - start < 5
