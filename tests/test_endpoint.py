"""Annotation through an endpoint: a real server (`transformers serve`), and a fake one that misbehaves."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer, chat, error, sent_image
from PIL import Image

from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.stages.annotate import annotate
from mllmfl_lite.stages.backends import Question, TransformersBackend
from mllmfl_lite.stages.endpoint import EndpointBackend
from mllmfl_lite.stages.filters import filter_records
from mllmfl_lite.stages.records import read_records
from mllmfl_lite.stages.replies import Problem
from mllmfl_lite.teachers.base import TINY_LLAVA
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import load_prompts

KEY = "sk-not-to-be-found-anywhere"
KIND = "detailed_description"


@pytest.fixture
def pool(tmp_path):
    """Six pictures, 40 pixels wide and 40 to 45 high."""
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 40 + i), "teal").save(tmp_path / "pictures" / f"{i}.png")
    return folder_images(tmp_path / "pictures")


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(FakeServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def backend(server, pause=lambda seconds: None, **options):
    """A backend that calls `pause` in place of waiting."""
    made = EndpointBackend(getattr(server, "url", server), "m", **{"concurrency": 2, "retries": 2, **options})
    made._wait = lambda seconds, reason: pause(seconds)
    return made


def go(pool, server, tmp_path, kinds=(KIND,), tell=lambda _: None, retry=False, **options):
    return annotate(pool, backend(server, **options), tmp_path / "a.jsonl", kinds, tell=tell, retry_rejected=retry)


def rejected(tmp_path):
    return json.loads((tmp_path / "a.rejected.json").read_text())


def height(request):
    return sent_image(request).size[1]


# ---------------------------------------------------------------------------------------- what concerns one picture


@pytest.mark.parametrize("refusal", [
    (400, error("the image is too thin")), (413, b"<html><h1>too thin</h1></html>"), (422, {"detail": "too thin"}),
    (500, error("blocked by our content policy: too thin")), (200, error("too thin")),
    (200, {"choices": None, "error": {"message": "too thin"}}), (200, chat(None, refusal="too thin")),
    (400, {"error": "too thin"}), (400, {"object": "error", "message": "too thin"}),
])  # fmt: skip
def test_a_refused_picture_is_named_with_the_servers_sentence_and_the_rest_goes_on(pool, serve, tmp_path, refusal):
    server = serve(lambda request: refusal if height(request) == 42 else (200, chat()))
    summary = go(pool, server, tmp_path)
    assert [r.id for r in summary.records] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert list(rejected(tmp_path)) == list(summary.rejected) == ["2.png"] and len(server.requests) == 6
    assert "too thin" in summary.rejected["2.png"] and "<" not in summary.rejected["2.png"]


def test_a_picture_whose_request_always_breaks_off_is_rejected(pool, serve, tmp_path):
    for fault in [("close", ""), ("cut", chat()), (503, b""), (200, b'{"choices": [{"mess'), (200, b"")]:
        server = serve(lambda request, fault=fault: fault if height(request) == 40 else (200, chat()))
        summary = go(pool, server, tmp_path, retries=1)
        assert list(summary.rejected) == ["0.png"] and len(summary.records) == 5 and len(server.requests) == 7
        (tmp_path / "a.jsonl").unlink()
        (tmp_path / "a.rejected.json").unlink()


def test_rejected_pictures_are_asked_again_only_on_demand(pool, serve, tmp_path):
    server, told = serve(lambda request: (400, error("no")) if height(request) < 42 else (200, chat())), []
    go(pool, server, tmp_path)
    again = serve(lambda request: (200, chat()))
    summary = go(pool, again, tmp_path, tell=told.append)
    assert not again.requests and list(summary.rejected) == ["0.png", "1.png"] and summary.written == 0
    assert told == ["2 questions were rejected before and are not asked again"]
    summary = go(pool, again, tmp_path, retry=True)
    assert len(again.requests) == summary.written == 2 and summary.rejected == rejected(tmp_path) == {}


def test_another_model_is_asked_about_what_the_first_one_refused(pool, serve, tmp_path):
    refuses = serve(lambda request: (400, error("no")))
    assert len(go(pool, refuses, tmp_path).rejected) == 6
    other = EndpointBackend(serve(lambda request: (200, chat())).url, "other")
    assert len(annotate(pool, other, tmp_path / "a.jsonl", [KIND]).records) == 6


def test_a_file_that_cannot_be_opened_is_named_without_its_folder(pool, serve, tmp_path):
    (tmp_path / "pictures" / "3.png").unlink()
    (tmp_path / "pictures" / "4.png").write_bytes(b"no picture")
    summary = go(pool, serve(lambda request: (200, chat())), tmp_path)
    assert list(summary.rejected) == ["3.png", "4.png"] and str(tmp_path) not in json.dumps(rejected(tmp_path))


# --------------------------------------------------------------------------------------------- what concerns the run


@pytest.mark.parametrize(("status", "advice"), [
    (401, "set the environment variable OPENAI_API_KEY"), (402, "pays"), (403, "may use"), (404, "usually ends in /v1"),
])  # fmt: skip
def test_what_concerns_every_request_ends_the_run(pool, serve, tmp_path, status, advice):
    server = serve(lambda request: (status, error("no way")) if height(request) > 41 else (200, chat()))
    with pytest.raises(ValueError, match=rf"{status}: no way.*{advice}.* 2 of 6 texts were written in this run, 2 are"):
        go(pool, server, tmp_path, concurrency=1)
    assert len(server.requests) == 3 and rejected(tmp_path) == {}
    assert len(go(pool, serve(lambda request: (200, chat())), tmp_path).records) == 6


def test_a_status_inside_a_200_counts_as_one(pool, serve, tmp_path):
    server = serve(lambda request: (200, {"error": {"message": "no credits", "code": 402}}))
    with pytest.raises(ValueError, match="402: no credits"):
        go(pool, server, tmp_path)


def test_a_rate_limit_below_the_concurrency_is_waited_out(pool, serve, tmp_path):
    """Two answers, then a pause of 3 s, and so on: every answer that came is kept."""
    left, waits = [2], []

    def reply(request):
        left[0] -= 1
        if left[0] >= 0:
            return 200, chat()
        time.sleep(0.3)  # the answers arrive first
        return 429, error("2 a minute"), {"Retry-After": "3"}

    def pause(seconds):
        waits.append(seconds)
        left[0] = 2

    summary = go(pool, serve(reply), tmp_path, concurrency=6, retries=1, pause=pause)
    assert len(summary.records) == 6 and set(waits) == {3.0}


def test_what_others_are_answered_while_a_request_is_out_counts_at_once(pool, serve, tmp_path):
    """With one more attempt, a second refusal ends the run only if nobody was answered since the first."""
    made, sent = backend(serve(lambda request: (200, chat())), concurrency=1, retries=1), []
    answered_by_the_server = made._send

    def send(message):
        sent.append(message)
        if len(sent) > 2:
            return answered_by_the_server(message)
        made._answered += len(sent) == 2  # another request's
        raise Problem("429", "run", 3.0)

    made._send = send
    assert len(annotate(pool, made, tmp_path / "a.jsonl", (KIND,)).records) == 6


def test_a_rate_limit_that_stays_ends_the_run_and_keeps_what_came(pool, serve, tmp_path):
    count, waits = [], []

    def reply(request):
        count.append(1)
        return (200, chat()) if len(count) <= 2 else (429, error("2 a day"))

    with pytest.raises(ValueError, match=r"429: 2 a day.*2 of 6 texts were written"):
        go(pool, serve(reply), tmp_path, pause=waits.append, concurrency=1, retries=4)
    assert waits == [0.5, 1.0, 2.0, 4.0] and len(read_records(tmp_path / "a.jsonl")) == 2


@pytest.mark.parametrize(("header", "expected"), [
    ("7", 7.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.5), ("soon", 0.5), ("-3", 0.5), ("nan", 0.5),
])  # fmt: skip
def test_retry_after_in_all_its_forms(pool, serve, tmp_path, header, expected):
    replies, waits = [(429, error("wait"), {"Retry-After": header})], []
    go(pool, serve(lambda request: replies.pop() if replies else (200, chat())), tmp_path, pause=waits.append)
    assert waits == [expected]


@pytest.mark.parametrize("reply", [
    (429, error("wait"), {"Retry-After": "3600"}), (429, error("wait"), {"Retry-After": "inf"}),
    (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}),
])  # fmt: skip
def test_a_limit_that_waiting_does_not_lift_ends_the_run_at_once(pool, serve, tmp_path, reply):
    waits = []
    with pytest.raises(ValueError, match="429"):
        go(pool, serve(lambda request: reply), tmp_path, pause=waits.append)
    assert waits == []


@pytest.mark.parametrize("fault", [(500, error("oops")), (503, b"<html>busy</html>"), ("close", ""), ("cut", chat()),
                                   (200, b"garbage"), (408, b""), (302, b"")])  # fmt: skip
def test_a_server_that_fails_every_time_ends_the_run_and_nothing_is_rejected_for_good(pool, serve, tmp_path, fault):
    server = serve(lambda request: (200, chat()) if height(request) == 40 else fault)
    with pytest.raises(ValueError, match=r"5 requests in a row failed in the same way.* 1 of 6 texts were written"):
        go(pool, server, tmp_path, retries=0, concurrency=1)
    summary = go(pool, serve(lambda request: (200, chat())), tmp_path)
    assert len(summary.records) == 6 and summary.rejected == {}


def test_a_server_that_never_answers_ends_a_short_run_too(pool, serve, tmp_path):
    with pytest.raises(ValueError, match="no request succeeded; the last failed so: 500: oops"):
        go(pool.subset(np.arange(2)), serve(lambda request: (500, error("oops"))), tmp_path, retries=0)


def test_the_pictures_at_which_a_run_ended_are_asked_last_and_then_rejected(pool, serve, tmp_path):
    """Else five bad pictures at the beginning of a folder would end every run."""
    server = serve(lambda request: (200, chat()) if height(request) == 45 else (500, error("oops")))
    with pytest.raises(ValueError, match="5 requests in a row"):
        go(pool, server, tmp_path, retries=0, concurrency=1)
    summary = go(pool, server, tmp_path, retries=0, concurrency=1)
    assert [r.id for r in summary.records] == ["5.png"] and len(summary.rejected) == 5


def test_a_passing_fault_is_ridden_out(pool, serve, tmp_path):
    faults = [(500, error("oops")), ("close", ""), (429, error("wait")), (200, b"garbage"), (503, b"")]
    server = serve(lambda request: faults.pop() if faults else (200, chat()))
    assert len(go(pool, server, tmp_path, retries=5).records) == 6 and not faults


def test_a_server_that_hangs(pool, serve, tmp_path):
    faults = [("hang", "")]
    server = serve(lambda request: faults.pop() if faults else (200, chat()))
    assert len(go(pool, server, tmp_path, timeout=0.5).records) == 6 and len(server.requests) == 7


def test_nobody_listens(pool, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match=r"see that it runs. 0 of 6 texts were written"):
        annotate(pool, backend(url), tmp_path / "a.jsonl", [KIND])


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "", "http://", "http://h:port/v1", "http://h:99999/v1", "http://[::1/v1", "http://\udcff/v1"],
)
def test_what_is_no_address_is_said_at_once(url):
    with pytest.raises(ValueError, match="endpoint"):
        EndpointBackend(url, "m")


def test_requests_run_at_the_same_time_and_no_more_than_allowed(pool, serve, tmp_path):
    three = threading.Barrier(3)

    def reply(request):
        with contextlib.suppress(threading.BrokenBarrierError):
            three.wait(5)
        return 200, chat()

    server = serve(reply)
    assert len(go(pool, server, tmp_path, concurrency=3).records) == 6
    assert server.most == 3 and not three.broken


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(("finish", "finished"), [
    ("stop", True), ("eos_token", True), (None, True), ("", True), ("tool_calls", True), (["stop"], True),
    ("length", False), ("content_filter", False),
])  # fmt: skip
def test_only_two_finish_reasons_mean_incomplete(pool, serve, tmp_path, finish, finished):
    summary = go(pool, serve(lambda request: (200, chat(finish=finish))), tmp_path)
    assert {r.finished for r in summary.records} == {finished}
    assert filter_records(summary.records).counts["kept"] == 6 * finished


@pytest.mark.parametrize("content", [
    "<think>\nIs it a cat? No.\n</think>\n\nA dog.",
    [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A dog."}],
    ["A ", "dog."], [{"text": "A dog."}],
])  # fmt: skip
def test_thoughts_and_parts(pool, serve, tmp_path, content):
    summary = go(pool, serve(lambda request: (200, chat(content, reasoning_content="It may be a dog."))), tmp_path)
    assert {r.text for r in summary.records} == {"A dog."}


@pytest.mark.parametrize(
    "reply", [chat("", "length", reasoning_content="Let me look"), chat("<think>Let me", "length")]
)
def test_tokens_that_ran_out_are_asked_for_again_with_more(pool, serve, tmp_path, reply):
    def answer(request):
        return 200, reply if request["max_tokens"] < 100 else chat()

    summary, told = go(pool, serve(answer), tmp_path, max_new_tokens=50), []
    assert summary.records == [] and len(summary.rejected) == 6 and "tokens ran out" in summary.rejected["0.png"]
    server = serve(answer)
    assert go(pool, server, tmp_path, max_new_tokens=50).written == 0 and not server.requests
    assert go(pool, server, tmp_path, max_new_tokens=100, tell=told.append).written == 6
    assert told == ["6 questions for which the tokens were too few are asked again, now with more"]


@pytest.mark.parametrize(("reply", "reason"), [
    (chat(""), "empty answer"), (chat(None), "empty answer"), (chat(" \n"), "empty answer"), (chat([]), "empty answer"),
    (chat(None, "content_filter"), "content filter"), ({"choices": []}, "no completion"), ([], "no completion"),
    ({"choices": [{"message": {"content": 5}}]}, "no completion"), ("hello", "hello"), (None, "no completion"),
])  # fmt: skip
def test_a_200_without_a_text_is_a_rejection(pool, serve, tmp_path, reply, reason):
    server = serve(lambda request: (200, reply) if height(request) == 40 else (200, chat()))
    summary = go(pool, server, tmp_path)
    assert list(summary.rejected) == ["0.png"] and reason in summary.rejected["0.png"] and len(server.requests) == 6


def test_deep_and_long_bodies(pool, serve, tmp_path):
    bodies = [b"[" * 200_000, b'{"error": ' * 9000 + b"1" + b"}" * 9000, json.dumps(chat("word " * 300_000)).encode()]
    summary = go(
        pool.subset(np.arange(3)), serve(lambda request: (200, bodies[height(request) - 40])), tmp_path, retries=0
    )
    assert [len(r.text) for r in summary.records] == [1_499_999] and len(summary.rejected) == 2


def test_half_characters_and_control_characters(pool, serve, tmp_path):
    summary = go(
        pool, serve(lambda request: (200, chat("A happy dog \ud83d.\0\x1b[31m \ud83d\ude00", "length"))), tmp_path
    )
    assert {r.text for r in summary.records} == {"A happy dog \ufffd.  [31m \U0001f600"}
    assert sorted(read_records(tmp_path / "a.jsonl"), key=lambda record: record.id) == summary.records


def test_other_scripts_and_markdown_are_texts(pool, serve, tmp_path):
    texts = [
        "图片中有一只棕色的狗，站在绿色的草地上",
        "**A dog stands on a lawn.**",
        "- a dog\n- a lawn",
        "كلب على العشب",
        "dog",
        "कुत्ता",
    ]
    summary = go(pool, serve(lambda request: (200, chat(texts[height(request) - 40]))), tmp_path)
    assert [r.text for r in summary.records] == texts and filter_records(summary.records).counts["kept"] == 6


def test_the_answers_own_model_is_recorded_and_a_difference_said_once(pool, serve, tmp_path):
    told = []
    summary = go(pool, serve(lambda request: (200, chat(model="owl"))), tmp_path, tell=told.append)
    assert {r.model for r in summary.records} == {"owl (asked as m)"} and told == [
        "note: 'owl' answers, though 'm' is asked"
    ]
    (tmp_path / "pictures" / "9.png").write_bytes((tmp_path / "pictures" / "0.png").read_bytes())
    more = folder_images(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"holds texts of 'owl \(asked as m\)', now 'm' answers; use another file"):
        go(more, serve(lambda request: (200, chat(model="m"))), tmp_path)
    assert len(go(more, serve(lambda request: (200, chat(model="owl"))), tmp_path).records) == 7


# ---------------------------------------------------------------------------------------------- pictures and secrets


def test_pictures_are_sent_small_and_in_the_shape_that_fits(serve, tmp_path):
    for name, size in {"phone.jpg": (3000, 2000), "icon.png": (20, 64), "thin.png": (1500, 40)}.items():
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / name)
    server = serve(lambda request: (200, chat()))
    go(folder_images(tmp_path), server, tmp_path, max_side=512)
    sent = {(image.format, image.size) for image in map(sent_image, server.requests)}
    assert sent == {("JPEG", (512, 341)), ("PNG", (20, 64)), ("JPEG", (512, 14))}
    assert all(len(json.dumps(request)) < 300_000 for request in server.requests)


def test_no_more_pictures_are_open_than_requests_are_under_way(pool, serve):
    opened, server = [], serve(lambda request: (200, chat()))
    questions = [[Question(str(i), KIND, "What?")] for i in range(6)]

    def open_image(name):
        opened.append(name)
        return Image.new("RGB", (40, 40))

    answers = backend(server, concurrency=2).answers(iter(questions), open_image)
    next(answers)
    assert len(opened) <= 3
    answers.close()


def test_settings_that_a_model_does_not_take_are_changed_once(pool, serve, tmp_path):
    def reply(request):
        if "max_tokens" in request:
            return 400, error("use max_completion_tokens instead of max_tokens")
        return (400, error("temperature is not supported")) if "temperature" in request else (200, chat())

    server = serve(reply)
    assert len(go(pool, server, tmp_path, concurrency=1, max_new_tokens=24).records) == 6
    assert len(server.requests) == 8 and server.requests[-1]["max_completion_tokens"] == 24


@pytest.mark.parametrize("key", [KEY, f"{KEY}\n", f"  {KEY}\r\n"])
def test_the_key_is_sent_stripped_and_found_nowhere(pool, serve, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    told = []

    def reply(request):
        echo = server.headers[-1]["Authorization"]
        sentence = f"{'x' * 490}no: {echo} {echo.upper()} {echo[:25]}"  # a cut may not leave half of it
        if height(request) < 42:
            return 400, error(sentence)
        return (
            (401, error(sentence)) if height(request) == 45 else (200, chat(f"It says {echo}.", model=f"m of {echo}"))
        )

    server = serve(reply)
    with pytest.raises(ValueError, match=r"401: x+no: \*?") as caught:
        go(pool, server, tmp_path, concurrency=1, tell=told.append)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    written = "".join(path.read_text() for path in tmp_path.glob("a.*"))
    for place in (str(caught.value), written, " ".join(told)):
        assert KEY[:9] not in place and KEY[-9:] not in place.lower()
    assert "It says Bearer ***." in written


def test_a_password_in_the_address_is_found_nowhere(pool, serve, tmp_path):
    echoed = []

    def reply(request):
        echoed.append(server.headers[-1]["Authorization"])
        return 401, error(f"who is me:hunter-two@? {echoed[0]}")

    server = serve(reply)
    url = server.url.replace("://", "://me:hunter-two@")
    with pytest.raises(ValueError, match=r"http://\*\*\*@127.0.0.1") as caught:
        annotate(pool, EndpointBackend(url, "m"), tmp_path / "a.jsonl", [KIND])
    assert "hunter" not in str(caught.value) and echoed[0].removeprefix("Basic ") not in str(caught.value)


def test_a_key_that_cannot_be_one_is_named_and_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abc\ndef")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a blank, a line break") as caught:
        EndpointBackend("http://localhost/v1", "m")
    assert "sk-abc" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def real_server():
    """The address of `transformers serve`, started for this file and stopped after it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", TINY_LLAVA, "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        assert process.poll() is None, "transformers serve did not start"
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_server_says_what_the_model_says_here(real_server, tmp_path):
    """Same weights, same picture, same prompt, greedy: the same words, over HTTP or in this process."""
    pictures = load_images("cifar10_mini", "test").subset(np.arange(0, 1200, 400))
    here = TransformersBackend(load_mllm(device="cpu", batch_size=1), max_new_tokens=24)
    expected = [here.answer([image], [load_prompts()[KIND]])[0].text for image in pictures.images]
    there = EndpointBackend(real_server, TINY_LLAVA, max_new_tokens=24, concurrency=2)
    records = annotate(pictures, there, tmp_path / "a.jsonl", [KIND]).records
    assert [record.text for record in records] == expected
