"""The endpoint backend against a real server: `transformers serve` with tiny-llava, and faults put in its way."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mllmfl_lite.data import load_images
from mllmfl_lite.data.folders import array_source
from mllmfl_lite.stages.annotate import annotate, main
from mllmfl_lite.stages.backends import EndpointBackend, TransformersBackend
from mllmfl_lite.stages.records import AnnotationError, read_records
from mllmfl_lite.teachers.base import TINY_LLAVA
from mllmfl_lite.teachers.llava import load_mllm
from mllmfl_lite.teachers.prompts import load_prompts

KEY = "sk-not-to-be-found-anywhere"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    """The port of `transformers serve`, started for this file and stopped after it."""
    port = free_port()
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
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Troubled(BaseHTTPRequestHandler):
    """Passes requests on to the real server, but the first ones meet the faults that the test has put up."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else None
            self.server.met.append(fault)
            self.server.times.append(time.monotonic())
        if fault == "meet":  # until all the others are here, too
            self.server.together.wait(60)
        if fault == "hang":
            self.server.release.wait(20)
            self.close_connection = True
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"id": "chat')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "garbage":
            self.reply(200, b'{"choices": [{"mess')
        elif fault == "no choices":
            self.reply(200, b'{"id": "x", "object": "chat.completion", "choices": []}')
        elif isinstance(fault, str) and fault.startswith("refuse ") and json.loads(body).keys() & {fault.split()[1]}:
            self.reply(400, json.dumps({"error": {"message": fault.split(" ", 1)[1]}}).encode())
        elif isinstance(fault, int):
            echo = self.headers["Authorization"].encode()  # a careless server repeats the key
            self.reply(fault, b'{"error": {"message": "no: ' + echo + b'"}}')
        else:
            real = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=120)
            real.request("POST", self.path, body, {"Content-Type": "application/json"})
            answer = real.getresponse()
            self.reply(answer.status, answer.read())

    def reply(self, status, body):
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def trouble(server):
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Troubled)
    proxy.daemon_threads = True
    proxy.behind, proxy.faults, proxy.met, proxy.times = server, [], [], []
    proxy.lock, proxy.release = threading.Lock(), threading.Event()
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.release.set()
    proxy.shutdown()
    proxy.server_close()


def backend(proxy, **options):
    settings = {"max_new_tokens": 24, "concurrency": 2, "timeout": 30.0, "retries": 3} | options
    return EndpointBackend(f"http://127.0.0.1:{proxy.server_port}/v1", TINY_LLAVA, **settings)


@pytest.fixture(scope="module")
def pictures():
    return array_source(load_images("cifar10_mini", "test").subset(range(0, 2000, 400)))


def test_the_server_says_what_the_model_says_here(trouble, pictures):
    """Same weights, same picture, same prompt, greedy: the same words, over HTTP or in this process."""
    prompt = load_prompts()["detailed_description"]
    images = [pictures.open(i) for i in pictures.ids[:3]]
    here = TransformersBackend(load_mllm(device="cpu", batch_size=1), max_new_tokens=24)
    expected = [here.answer([image], [prompt])[0] for image in images]
    assert backend(trouble).answer(images, [prompt] * 3) == expected


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbage", "no choices"])
def test_a_fault_that_passes_is_ridden_out(trouble, pictures, tmp_path, fault):
    trouble.faults = [fault, fault]
    summary = annotate(pictures, backend(trouble), tmp_path / "a.jsonl", kinds=["conversation"])
    assert trouble.met[:2] == [fault, fault] and len(summary.records) == len(pictures)
    assert all(record.text for record in summary.records)


def test_a_hang_ends_at_the_time_limit_and_is_asked_again(trouble, pictures):
    trouble.faults = ["hang"]
    asker = backend(trouble, timeout=1.5, concurrency=1)
    start = time.monotonic()
    (answer,) = asker.answer([pictures.open(pictures.ids[0])], ["Describe the picture."])
    assert answer.text and 1.5 < time.monotonic() - start < 15 and trouble.met == ["hang", None]


def test_the_command_has_as_many_questions_under_way_as_it_is_told(trouble, pictures, tmp_path):
    """Four requests, of which the server answers none before it has all four."""
    for i in pictures.ids[:4]:
        pictures.open(i).save(tmp_path / f"{i}.png")
    trouble.faults, trouble.together = ["meet"] * 4, threading.Barrier(4)
    where = ["--endpoint", f"http://127.0.0.1:{trouble.server_port}/v1", "--mllm", TINY_LLAVA, "--batch-size", "4"]
    what = ["--kinds", "conversation", "--max-new-tokens", "8", "--out", str(tmp_path / "a")]
    assert main([str(tmp_path), *where, *what]) == 0
    assert trouble.met == ["meet"] * 4 and not trouble.together.broken
    assert len(read_records(tmp_path / "a.jsonl")) == 4


def test_retry_after_is_honoured(trouble, pictures):
    trouble.faults = [429]
    backend(trouble, concurrency=1).answer([pictures.open(pictures.ids[0])], ["Describe the picture."])
    assert trouble.times[1] - trouble.times[0] >= 1.0


def test_a_fault_that_stays_ends_in_a_sentence_and_the_run_goes_on_later(trouble, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asker = backend(trouble, retries=1, concurrency=1)
    trouble.faults = [None, None] + [500] * 2
    with pytest.raises(AnnotationError, match=r"gave no answer for model .*run the same command again") as caught:
        annotate(pictures, asker, tmp_path / "a.jsonl", kinds=["conversation"])
    assert KEY not in str(caught.value) and "no: Bearer ***" in str(caught.value)
    summary = annotate(pictures, asker, tmp_path / "a.jsonl", kinds=["conversation"])
    assert len(summary.records) == len(pictures) and summary.written == len(pictures) - 2
    assert KEY not in (tmp_path / "a.jsonl").read_text()


def test_a_refusal_is_not_repeated_and_says_what_to_set(trouble, pictures):
    trouble.faults = [401]
    with pytest.raises(AnnotationError, match="set OPENAI_API_KEY"):
        backend(trouble, concurrency=1).answer([pictures.open(pictures.ids[0])], ["Describe."])
    assert trouble.met == [401]


def test_settings_that_a_model_does_not_take_are_changed_once(trouble, pictures):
    """Newer services refuse `max_tokens` and a temperature; the names they want stand in their message."""
    hints = ["refuse max_tokens use max_completion_tokens instead", "refuse temperature is not supported"]
    trouble.faults = list(hints)
    asker, images = backend(trouble, concurrency=1), [pictures.open(pictures.ids[0])] * 2
    answers = asker.answer(images, ["Describe the picture."] * 2)
    assert all(answer.text for answer in answers) and trouble.met == [*hints, None, None]
    assert asker._settings == {"max_completion_tokens": 24}


def test_nobody_listens(pictures):
    asker = EndpointBackend(f"http://127.0.0.1:{free_port()}/v1", "any", retries=0)
    with pytest.raises(AnnotationError, match="see that it runs"):
        asker.answer([pictures.open(pictures.ids[0])], ["Describe."])
