"""The examples for people: a folder of photos, receipts, a small app."""

import csv
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from urllib.parse import quote

import pytest
from PIL import Image

from examples import app, describe_folder, receipts
from helpers import (
    ROOT,
    assert_fails,
    clean_environment,
    heed_ctrl_c,
    need_tiny,
    run_python,
)
from mm1_mlx import load

SHAPES = ROOT / "examples" / "shapes.png"


@pytest.fixture
def photos(tmp_path):
    """A folder with a good picture, two broken ones, and what is no picture."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    shutil.copy(SHAPES, folder / "b, c.png")
    shutil.copy(SHAPES, folder / "more" / "d.png")
    Image.new("RGB", (40, 30), "white").save(folder / "a.JPG")
    (folder / "broken.png").write_bytes(SHAPES.read_bytes()[:200])
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_bytes(b"x")
    return folder


def run(command, *args) -> int:
    """The command in this process: its exit code."""
    return command.main([str(arg) for arg in args])


# --- a folder of photos ---


def rows_of(place):
    with open(place, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have UTF-8 alone")
def test_a_name_that_is_no_utf_8_ends_nothing(tmp_path):
    need_tiny()
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"a.png", b"c\xe9.png", b"d.png"):
        shutil.copy(SHAPES, os.fsencode(folder) + b"/" + name)
    for command in (describe_folder, receipts):
        out = tmp_path / command.__name__
        assert run(command, folder, out) == 0
        first = out.read_bytes()
        assert b"c\xe9.png" in first or b"\\udce9" in first
        assert run(command, folder, out) == 0 and out.read_bytes() == first


def test_a_folder_becomes_a_table(photos, tmp_path, capsys):
    need_tiny()
    out = tmp_path / "out.csv"
    # 1: one of them cannot be read
    assert run(describe_folder, photos, out, "--batch-size", "2") == 1
    head, *rows = rows_of(out)
    assert head == ["path", "description", "tokens", "seconds"]
    assert [row[0] for row in rows] == ["a.JPG", "b, c.png"]
    assert "star" in rows[1][1] and int(rows[1][2]) > 3 and float(rows[1][3]) > 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 2 described, 1 skipped, 0 were there\n"
    (line,) = printed.err.splitlines()
    assert line.startswith("skipped: ") and "broken.png is a damaged" in line

    before = out.read_bytes()
    shutil.copy(SHAPES, photos / "broken.png")
    assert run(describe_folder, photos, out, "--inside") == 0
    assert out.read_bytes().startswith(before)  # what was there stays as it is
    assert [row[0] for row in rows_of(out)[3:]] == ["broken.png", "more/d.png"]
    assert "2 described, 0 skipped, 2 were there" in capsys.readouterr().out


def test_a_row_that_was_cut_off_is_written_again(photos, tmp_path):
    need_tiny()
    out = tmp_path / "out.csv"
    run(describe_folder, photos, out)
    whole = rows_of(out)
    out.write_bytes(out.read_bytes()[:-25])  # in the midst of the last row
    run(describe_folder, photos, out)
    assert [row[:3] for row in rows_of(out)] == [row[:3] for row in whole]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "photos"]


def test_wrong_input_of_the_table(photos, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("name,age\nx,3\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ((tmp_path / "absent", "x.csv"), r"absent is not a folder"),
        ((empty, "x.csv"), r"has no pictures \(--inside"),
        ((photos, other), r"was not written by this command"),
        ((photos, tmp_path / "absent" / "x.csv"), r"cannot be written: there is no"),
        ((photos, photos), r"cannot be read"),
        ((photos, tmp_path / "x.csv", "--model", "mm1-tinny"), r"mm1-tinny"),
        ((photos, tmp_path / "x.csv", "--prompt", ""), r"The prompt is empty"),
        ((photos, tmp_path / "x.csv", "--prompt", "<image><image>"), r"2 .*1 "),
    ]
    for args, pattern in cases:
        code = run(describe_folder, *args)
        done = subprocess.CompletedProcess((), code, "", capsys.readouterr().err)
        assert_fails(done, pattern)
    assert other.read_text() == "name,age\nx,3\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "empty",
        "other.csv",
        "photos",
    ]


# --- receipts ---

AMOUNTS = [
    (12.5, 12.5),
    (3, 3.0),
    ("12.50", 12.5),
    ("12,50 EUR", 12.5),
    ("$1,234.50", 1234.5),
    ("1.234,50", 1234.5),
    ("1'234.5", 1234.5),
    ("1 234", 1234.0),
    ("1,234", 1234.0),
    ("-4.00", -4.0),
    ("-$5.00", -5.0),
    ("total - 5.00", 5.0),
    (".99", 0.99),
    ("none", None),
    ("", None),
    (None, None),
    (True, None),
    ([1], None),
    (float("inf"), None),
]


@pytest.mark.parametrize("value, number", AMOUNTS, ids=[str(v) for v, _ in AMOUNTS])
def test_sums_of_money(value, number):
    assert receipts.amount(value) == number


def test_fields_are_found_whatever_is_around_them():
    answer = (
        'Here {it} is:\n```json\n{"merchant": "Ca{fe", "total": "4,50", "tip": 1, '
        '"items": [{"name": "tea", "price": 2}, {"name": null, "price": "2.50"}, 7]}\n'
        "```\nThat is all }"
    )
    fields = receipts.fields_of(answer)
    assert fields == {
        "merchant": "Ca{fe",
        "date": None,
        "currency": None,
        "total": 4.5,
        "items": [{"name": "tea", "price": 2.0}, {"name": "", "price": 2.5}],
    }
    assert receipts.adds_up(fields) is True
    assert receipts.adds_up({**fields, "total": 4.6}) is False
    assert receipts.adds_up({**fields, "total": None}) is None
    assert receipts.adds_up({**fields, "items": []}) is None
    assert receipts.adds_up(None) is None


NONE = ["", "yes", "[1, 2]", '{"a": ', "{" * 5000, "{}}"]
# Ended by --max-tokens: one of its items is a whole object.
CUT = '{"merchant": "X", "items": [{"name": "a", "price": 1, "total": 2}, {"name": "b'


@pytest.mark.parametrize(
    "answer", ["", "yes", "[1, 2]", '{"a": ', "{" * 5000, "{}}", CUT]
)
def test_answers_that_are_no_receipt(answer):
    assert receipts.fields_of(answer) is None


def test_mm1_tiny_runs_and_says_that_it_cannot(photos, tmp_path, capsys):
    need_tiny()
    out = tmp_path / "out.jsonl"
    assert run(receipts, photos, out) == 1  # one of them cannot be read
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == ["a.JPG", "b, c.png"]
    assert set(lines[0]) == {"file", "fields", "adds_up", "cut", "answer"}
    printed = capsys.readouterr()
    assert printed.err.startswith("note: mm1-tiny cannot read receipts")
    assert "of 3 answers are JSON, 0 were there" in printed.out
    first = out.read_text()
    out.write_text(first[:-9])  # cut off in the midst of the last line
    (photos / "broken.png").unlink()
    assert run(receipts, photos, out) == 0
    assert out.read_text() == first
    out.write_text("{}\n")
    assert run(receipts, photos, out) == 1
    assert "line 1 was not written by this command" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["describe_folder", "receipts", "app"])
def test_help_says_how_to_run_it(name):
    done = run_python("-m", f"examples.{name}", "--help")
    assert done.returncode == 0 and f"python -m examples.{name}" in done.stdout
    wrong = run_python("-m", f"examples.{name}", "--modle", "x")
    assert_fails(wrong, r"unknown flag '--modle'; did you mean '--model'", code=2)


# --- the app ---


@pytest.fixture(scope="module")
def server():
    model, processor = load(need_tiny())
    with app.App(model, processor, 0, max_tokens=40, most_bytes=100_000) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def request(server, method, path, body=None, **headers):
    """Status and text."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body=body, headers=headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


ASK = "/ask?question=" + quote("What colour is the star?")


def test_the_app_answers_about_what_is_sent(server):
    assert server.server_address[0] == "127.0.0.1"
    status, page = request(server, "GET", "/")
    assert status == 200 and '<input type="file"' in page
    assert request(server, "POST", ASK, SHAPES.read_bytes()) == (200, "yellow")
    origin = f"http://localhost:{server.server_port}"
    sent = request(server, "POST", ASK, SHAPES.read_bytes(), Origin=origin)
    assert sent == (200, "yellow")
    status, text = request(server, "POST", ASK, b"")  # a question without a picture
    assert status == 200 and text


def test_the_app_refuses_what_it_should(server):
    post, picture = ("POST", ASK), SHAPES.read_bytes()
    cases = [
        (("GET", "/etc/passwd"), {}, 404, "There is only /"),
        (("POST", "/other", b""), {}, 404, "Questions go to /ask"),
        (("POST", "/ask?question=", picture), {}, 400, "1 to 4000 characters"),
        (("POST", "/ask?question=" + "x" * 4001, b""), {}, 400, "1 to 4000"),
        ((*post, b"no picture"), {}, 400, "is not an image"),
        ((*post, b"x" * 100_001), {}, 413, "100,001 bytes, but at most 100,000"),
        ((*post, picture), {"Host": "evil.example"}, 403, "this machine only"),
        ((*post, picture), {"Origin": "http://evil.example"}, 403, "this machine"),
        (("POST", "/ask?question=%3Cimage%3E", b""), {}, 400, "no image was given"),
    ]
    for args, headers, status, text in cases:
        found = request(server, *args, **headers)
        assert found[0] == status and text in found[1], (args[:2], found)
        assert found[1].count("\n") == 1
    # A length is asked for before anything is read.
    headers = {"Transfer-Encoding": "chunked"}
    assert request(server, *post, iter([b"x"]), **headers)[0] == 411


def test_a_browser_leaves_the_usual_port_out(monkeypatch):
    monkeypatch.setattr(app.App, "server_port", 80, raising=False)
    names = app.App.names.fget(app.App)
    assert names == ("127.0.0.1", "localhost")


def test_the_app_prints_nothing_whatever_comes(server, capfd):
    """A browser that leaves while it is refused, and lines that are no request's."""
    many = f"POST {ASK} HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    many += f"Content-Length: {'9' * 5000}\r\n\r\n"
    wrong = f"GET http://[ HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
    for text, status in ((many, b"411"), (wrong, b"400")):
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(text.encode())
            assert status in connection.makefile("rb").readline()
    connection = socket.create_connection(server.server_address)
    reset = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    head = many.replace("9" * 5000, "100000000").encode()
    connection.sendall(head + b"x" * 100_000)
    connection.close()
    assert request(server, "POST", ASK, SHAPES.read_bytes()) == (200, "yellow")
    assert capfd.readouterr().err == ""


def test_the_app_goes_on_when_a_browser_leaves(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", ASK, body=SHAPES.read_bytes())
    connection.close()
    assert request(server, "POST", ASK, SHAPES.read_bytes()) == (200, "yellow")


def test_the_app_as_a_command(server):
    need_tiny()
    busy = ("--port", server.server_port)
    assert_fails(run_python("-m", "examples.app", *busy), r"Port \d+ cannot be used")
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.app", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        preexec_fn=heed_ctrl_c,
        cwd=ROOT,
        text=True,
    )
    address = process.stdout.readline().split()[0]
    assert address.startswith("http://127.0.0.1:")
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
