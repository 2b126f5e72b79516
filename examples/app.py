"""A small app in the browser: choose a picture, ask, and see the answer being made.

    python -m examples.app
    python -m examples.app --model llava-hf/llava-1.5-7b-hf --port 8080

It runs on this machine for this machine: it is bound to 127.0.0.1, and answers only
requests that name it so. One answer is made at a time. Nothing that is uploaded is
written to the disk. Ctrl-C ends it.

Without the page: curl --data-binary @a.png 'http://127.0.0.1:8000/ask?question=What?'
"""

import argparse
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.run import explain, run_door
from mm1_mlx.errors import MM1Error

HOST = "127.0.0.1"
LONGEST = 4000  # characters of a question
MOST_DRAINED = 100_000_000  # bytes
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>mm1_mlx</title>
<style>
  body { font: 16px system-ui; max-width: 40em; margin: 2em auto; padding: 0 1em }
  img { max-width: 100%; max-height: 24em; display: block; margin: 1em 0 }
  input[type=text] { width: 75% } #answer { white-space: pre-wrap; min-height: 3em }
</style>
<h1>Ask about a picture</h1>
<form id="form">
  <input type="file" id="file" accept="image/*" aria-label="picture">
  <img id="shown" alt="" hidden>
  <input type="text" id="question" required maxlength="4000" aria-label="question"
    placeholder="What colour is the star?">
  <button id="ask">Ask</button>
</form>
<p id="answer" aria-live="polite"></p>
<script>
  const of = id => document.getElementById(id);
  of("file").onchange = () => {
    const file = of("file").files[0];
    of("shown").hidden = !file;
    if (file) of("shown").src = URL.createObjectURL(file);
  };
  of("form").onsubmit = async event => {
    event.preventDefault();
    of("ask").disabled = true;
    of("answer").textContent = "";
    try {
      const query = new URLSearchParams({question: of("question").value});
      const body = of("file").files[0] || new Blob();
      const reply = await fetch("/ask?" + query, {method: "POST", body});
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let piece; !(piece = await reader.read()).done;)
        of("answer").textContent += piece.value;
    } catch (error) { of("answer").textContent += " [" + error + "]"; }
    of("ask").disabled = false;
  };
</script></html>
"""


class App(ThreadingHTTPServer):
    """Serves the page, and answers questions about what is sent with them.

    port: 0 takes any that is free. most_bytes: of a picture.
    """

    daemon_threads = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        port: int,
        *,
        max_tokens: int = 256,
        most_bytes: int = 20_000_000,
    ):
        self.model, self.processor = model, processor
        self.max_tokens, self.most_bytes = max_tokens, most_bytes
        self.turn = Lock()
        super().__init__((HOST, port), Handler)

    @property
    def names(self) -> tuple[str, str]:
        """How a browser on this machine names this server; without the port 80."""
        port = "" if self.server_port == 80 else f":{self.server_port}"
        return f"{HOST}{port}", f"localhost{port}"


class Refused(Exception):
    """A request that is not answered: its status, and one line."""

    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: App  # type: ignore[assignment]
    timeout = 30  # seconds that a slow sender may keep a thread waiting
    server_version, sys_version = "mm1_mlx", ""
    _has_read = False

    def do_GET(self) -> None:
        """The page."""
        self._answer(self._page)

    def do_POST(self) -> None:
        """A question, with a picture as the body."""
        self._answer(self._ask)

    def _answer(self, how: Any) -> None:
        try:
            try:
                self._check_names()
                how(self._url())
            except Refused as error:
                self._drain()
                self._send(error.status, f"{error}\n".encode())
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the browser has gone

    def _url(self) -> Any:
        try:
            return urlsplit(self.path)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "The address is none.") from error

    def _length(self) -> int | None:
        """The bytes that are sent; None where they are not told, or in no number."""
        length = self.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() and len(length) < 20 else None

    def _check_names(self) -> None:
        """Another site that a browser shows must not reach this machine's server: not
        by a name that it makes point here, nor by sending a form."""
        origin = self.headers.get("Origin")
        named = self.headers.get("Host") in self.server.names
        own = origin is None or origin in [f"http://{n}" for n in self.server.names]
        if not named or not own:
            raise Refused(HTTPStatus.FORBIDDEN, "This app answers this machine only.")

    def _page(self, url: Any) -> None:
        if url.path != "/":
            raise Refused(HTTPStatus.NOT_FOUND, "There is only / and /ask.")
        self._send(HTTPStatus.OK, PAGE.encode(), "text/html")

    def _ask(self, url: Any) -> None:
        if url.path != "/ask":
            raise Refused(HTTPStatus.NOT_FOUND, "Questions go to /ask.")
        question = parse_qs(url.query).get("question", [""])[0]
        if not question.strip() or len(question) > LONGEST:
            why = f"A question has 1 to {LONGEST} characters."
            raise Refused(HTTPStatus.BAD_REQUEST, why)
        picture = self._body()
        images = [picture] if picture else []
        from mm1_mlx import stream_generate

        with self.server.turn:
            pieces = stream_generate(
                self.server.model,
                self.server.processor,
                question,
                images,
                max_tokens=self.server.max_tokens,
            )
            try:
                first = next(pieces)  # prompt and picture are read here
            except Exception as error:
                bad = isinstance(error, MM1Error)
                status = HTTPStatus.BAD_REQUEST if bad else HTTPStatus(500)
                raise Refused(status, explain(error)) from error
            try:
                self._head(HTTPStatus.OK, "text/plain")
                self.wfile.write(first.text.encode())
                for piece in pieces:
                    self.wfile.write(piece.text.encode())
            finally:
                pieces.close()

    def _drain(self) -> None:
        """Read what was sent and is not wanted: a browser that is still sending when
        the connection ends never sees the answer."""
        left = min(self._length() or 0, MOST_DRAINED)
        while not self._has_read and left > 0:
            data = self.rfile.read(min(left, 65536))
            left = left - len(data) if data else 0

    def _body(self) -> bytes:
        """What was sent. Without a length nothing is kept, nor over the limit."""
        length, most = self._length(), self.server.most_bytes
        if length is None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "The request has no length.")
        if length > most:
            why = f"The picture has {length:,} bytes, but at most {most:,} are read."
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        self._has_read = True
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refused(HTTPStatus.BAD_REQUEST, "The picture was cut off.")
        return data

    def _head(self, status: HTTPStatus, kind: str) -> None:
        """HTTP/1.0: the end of the answer is the end of the connection."""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self._head(status, kind)
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what people ask is theirs."""


def run(args: argparse.Namespace) -> None:
    """Load, and serve until Ctrl-C."""
    from mm1_mlx import load

    model, processor = load(args.model)
    try:
        app = App(
            model,
            processor,
            args.port,
            max_tokens=args.max_tokens,
            most_bytes=int(args.max_megabytes * 1e6),
        )
    except OSError as error:
        raise MM1Error(
            f"Port {args.port} cannot be used ({error.strerror}). Give another with "
            f"--port."
        ) from error
    with app:
        print(f"http://{HOST}:{app.server_port}/ (Ctrl-C ends it)", flush=True)
        app.serve_forever()


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(prog="python -m examples.app", description=__doc__ or "")
    p.add_argument("--model", default="mm1-tiny", metavar="NAME")
    p.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=8000,
        metavar="N",
        help="0 takes any that is free (%(default)s)",
    )
    p.add_argument("-m", "--max-tokens", type=whole_number(1), default=256, metavar="N")
    p.add_argument(
        "--max-megabytes",
        type=whole_number(1, 200),
        default=20,
        metavar="N",
        help="of a picture (%(default)s)",
    )
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
