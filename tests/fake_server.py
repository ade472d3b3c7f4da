"""A server on 127.0.0.1 that speaks OpenAI's chat protocol as a test tells it to."""

import base64
import contextlib
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def chat(text="A dog stands on a lawn.", finish="stop", model="m", **more):
    """The body of an answer."""
    message = {"role": "assistant", "content": text, **more}
    return {"object": "chat.completion", "model": model, "choices": [{"finish_reason": finish, "message": message}]}


def error(sentence):
    """The body of a refusal."""
    return {"error": {"message": sentence}}


def sent_image(request):
    """The image in a request."""
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


class FakeServer:
    """Answers each request by ``reply(request)``: a status, a body (JSON, or bytes as they are), perhaps headers.

    ``"hang"`` in place of a status answers nothing until the test ends, ``"close"`` closes the connection, ``"cut"``
    after half of the body.

    Attributes:
        requests: what came, as dictionaries.
        headers: of each request.
        most: the largest number of requests at the same time.
    """

    def __init__(self, reply):
        self.requests, self.headers, self.most, self.now = [], [], 0, 0
        self.ended, lock = threading.Event(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.requests.append(request)
                    self.headers.append(handler.headers)
                    self.now += 1
                    self.most = max(self.most, self.now)
                status, body, *headers = reply(request)
                with lock:
                    self.now -= 1
                if status == "hang":
                    self.ended.wait(20)
                with contextlib.suppress(OSError):
                    send(handler, status, body, headers[0] if headers else {})

            def log_message(handler, *_):
                pass

        def send(handler, status, body, headers):
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            if status in ("hang", "close"):
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            handler.send_response(200 if status == "cut" else status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(raw[: len(raw) // 2] if status == "cut" else raw)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
