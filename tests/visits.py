"""A real headless browser, and the rendered book on an address."""

import functools
import shutil
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pages import BROWSERS, HTML, open_browser


class Quiet(SimpleHTTPRequestHandler):
    missing = ""  # the page that a missing one is answered with

    def log_message(self, *_):
        pass

    def send_error(self, code, *more):
        if code != 404 or not self.missing:
            return super().send_error(code, *more)
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((Path(self.directory) / self.missing).read_bytes())


@contextmanager
def serve(folder, missing=""):
    """Serve a folder; yield its address."""
    handler = functools.partial(type("Answer", (Quiet,), {"missing": missing}), directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def site():
    with serve(HTML) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip(f"no browser to look at the book with; install one of {', '.join(BROWSERS)}")
    with open_browser() as chromium:
        yield chromium


class Visit:
    """One page opened in one window; what the browser complained about and asked for."""

    def __init__(self, browser, url, width=1280, scheme="light", **more):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        self.page, self.complaints, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        self.page.on("response", lambda r: self.complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url, wait_until="networkidle")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def ask(self, script):
        return self.page.evaluate(script)

    def wait(self, condition):
        """Wait until it holds: scripts of a large page may still be at work when the network is idle."""
        self.page.wait_for_function(f"() => {condition}", timeout=20_000)
