"""Chromium without a window, driven as by a visitor, and a server for its pages."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60  # seconds


class Page:
    """A tab. Commands are those of the DevTools protocol."""

    def __init__(self, requests, answers):
        self.requests, self.answers, self.count, self.session = requests, answers, 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}

    def call(self, method, **params):
        self.count += 1
        request = {"id": self.count, "method": method, "params": params, **self.session}
        self.requests.write(json.dumps(request).encode() + b"\0")
        self.requests.flush()
        while True:
            answer = json.loads(b"".join(iter(self._byte, b"\0")))
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def _byte(self):
        byte = self.answers.read(1)
        assert byte, "Chromium has ended"
        return byte

    def evaluate(self, expression):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(f"!!({expression})"):
            assert time.monotonic() < end, f"never true: {expression}\n{self.text()}"
            time.sleep(0.05)

    def go(self, address):
        self.call("Page.navigate", url=address)

    def text(self):
        return self.evaluate("document.body?.innerText")

    def click(self, selector):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def pick(self, selector, paths):
        """Choose files in an <input type=file>."""
        node = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=node, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def drop(self, paths):
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=100, y=100, data=data)


@contextlib.contextmanager
def browser(profile):
    """A `Page` of a new browser with the profile folder."""
    (their_input, requests), (answers, their_output) = os.pipe(), os.pipe()
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(  # Chromium reads from 3 and writes to 4; dash knows no 10
        ["bash", "-c", f'exec "$@" 3<&{their_input} 4>&{their_output}', "bash", *command],
        pass_fds=(their_input, their_output), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_input)
    os.close(their_output)
    with process, open(requests, "wb") as requests, open(answers, "rb") as answers:
        page = Page(requests, answers)
        try:
            yield page
        finally:
            page.session = {}
            page.call("Browser.close")


@contextlib.contextmanager
def serving(folder, port=0, gate=None):
    """The address of a folder that is served, and a list of the requests (method, path) that come.

    gate : a threading.Event that models wait for.
    """
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if gate and self.path.endswith(".onnx"):
                gate.wait(PATIENCE)
            super().do_GET()

        def log_message(self, *_):
            requests.append((self.command, self.path))

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("localhost", port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://localhost:{server.server_port}", requests
        finally:
            server.shutdown()
