"""A real server on a trained run: answers, limits, hostile requests, the page."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import headless_browser

import trainer
from launchers import serve as command
from trainer.runs.preflight import check_loadable
from trainer.workflows.serving.settings import LOCAL, ServeSettings, bind

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytestmark = pytest.mark.process


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    port: int

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def post(self, body: bytes | Mapping[str, Any], path: str = "/recommend", **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"content-type": "application/json", **headers})

    def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection(LOCAL, self.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, response.read())
        finally:
            connection.close()


@contextmanager
def serving(answerer: Any, settings: ServeSettings) -> Iterator[Served]:
    """The application under uvicorn, in a thread of this process."""
    import uvicorn

    from trainer.workflows.serving.app import create_app

    bound = bind(LOCAL, 0)
    bound.listen()
    server = uvicorn.Server(uvicorn.Config(create_app(answerer, settings), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield Served(bound.getsockname()[1])
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def run(teacher: Path) -> trainer.Run:
    return trainer.load_run(teacher)


@pytest.fixture(scope="module")
def answerer(teacher: Path) -> Any:
    from trainer.workflows.serving.answering import Answerer

    return Answerer(check_loadable(teacher), batch=16)


@pytest.fixture(scope="module")
def served(answerer: Any) -> Iterator[Served]:
    with serving(answerer, ServeSettings(history=50, top=20, body=4096)) as found:
        yield found


def test_concurrent_requests_are_answered_as_alone(served: Served, run: trainer.Run) -> None:
    """With different lengths, numbers of items and choices in one batch."""
    asked: list[dict[str, Any]] = [
        {"history": list(run.items.ids[i : i + 1 + i % 7]), "k": 1 + i % 20, "exclude_seen": i % 3 > 0}
        for i in range(len(run.items) - 7)
    ] * 3
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(served.post, asked))
    for query, answer in zip(asked, answers, strict=True):
        assert answer.status == 200
        [wanted] = run.recommend([query["history"]], k=query["k"], exclude_seen=query["exclude_seen"])
        found = answer.json
        assert [item["item_id"] for item in found["recommendations"]] == [i.item_id for i in wanted.recommendations]
        assert found["history"] == [asdict(seen) for seen in wanted.history]
    text = served.get("/metrics").body.decode()
    batches = re.search(r"^llm_srec_batch_size_count (\d+)", text, re.M)
    assert batches
    assert int(batches[1]) < len(asked), "nobody shared a batch"


def test_titles_numbers_times_and_names(served: Served, run: trainer.Run) -> None:
    title, other = run.items.titles[3].upper(), run.items.ids[5]
    answer = served.post({"history": [title, other], "times": ["2024-05-31", 1_700_000_000], "user_id": "Zoë"}).json
    assert answer["user_id"] == "Zoë"
    assert [seen["item_id"] for seen in answer["history"]] == [other, run.items.ids[3]]
    assert answer["history"][1]["date"] == "2024-05-31"
    skipped = served.post({"history": [title, "nothing like it"], "unknown": "skip"}).json
    assert [seen["item_id"] for seen in skipped["history"]] == [run.items.ids[3]]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 422, "send a JSON object"),
        (b"{", 422, "the body is not JSON"),
        (b"[" * 4000, 400, "error parsing the body"),
        (b'{"a":' * 800, 422, "the body is not JSON"),
        (b"[]", 422, "send a JSON object"),
        (b"\xff\xff", 400, "error parsing the body"),
        (b'{"history": ["\\ud800"]}', 422, "history.0: it is not text"),
        (b'{"history": ["i1"], "user_id": "\\udfff"}', 422, "user_id: it is not text"),
        ({"history": [""]}, 422, "history.0: it has 0 characters"),
        (b'{"history": [' + b"9" * 4000 + b"]}", 422, "it has 4000 characters: give 1 to 500"),
        ({}, 422, "history: Field required"),
        ({"history": []}, 422, "history: List should have at least 1 item"),
        ({"history": "i1"}, 422, "history: Input should be a valid list"),
        ({"history": [True]}, 422, "history.0: it is neither an id nor a title"),
        ({"history": [None]}, 422, "history.0: it is neither an id nor a title"),
        ({"history": [["i1"]]}, 422, "history.0: it is neither an id nor a title"),
        ({"history": ["x" * 501]}, 422, "it has 501 characters: give 1 to 500"),
        ({"history": ["i1"] * 51}, 422, "history has 51 items: send the latest 50"),
        ({"history": ["i1"], "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ({"history": ["i1"], "k": 21}, 422, "k is 21: ask for at most 20"),
        ({"history": ["i1"], "k": 2.5}, 422, "k: "),
        ({"history": ["i1"], "unknown": "read"}, 422, "unknown: Input should be 'error' or 'skip'"),
        ({"history": ["i1"], "extra": 1}, 422, "extra: Extra inputs are not permitted"),
        ({"history": ["i1"], "times": ["soon"]}, 422, "'soon' is not a time"),
        ({"history": ["i1"], "times": [1e308]}, 422, "is not a time"),
        (b'{"history": ["i1"], "times": [NaN]}', 422, "is not a time"),
        ({"history": ["i1"], "times": []}, 422, "it has 1 items, but 0 times"),
        ({"history": ["Amber Bras No. 0"]}, 422, "of the catalog: did you mean 'Amber Brass No. 12' (id i12)"),
        ({"history": ["../../etc/passwd"]}, 422, "is neither an id nor a title of the catalog"),
        ({"history": ["zzz"], "unknown": "skip"}, 422, "none of its 1 items is in the catalog"),
        ({"history": ["i1" + " " * 100] * 45}, 413, "more than 4,096 bytes"),
    ],
)
def test_bad_requests(served: Served, body: Any, status: int, says: str) -> None:
    answer = served.post(body)
    assert (answer.status, says in answer.json["error"]) == (status, True), answer.body
    assert list(answer.json) == ["error"]
    assert "\n" not in answer.json["error"]
    assert str(Path.cwd()) not in answer.json["error"]


def test_other_routes_methods_and_types(served: Served) -> None:
    assert served.get("/nothing").status == 404
    assert served.get("/recommend").status == 405
    assert served.get("/docs").status == 404
    assert served.get("/items").status == 422
    form = served.send("POST", "/recommend", b'{"history": ["i1"]}', {"content-type": "text/plain"})
    assert form.status == 422


def test_a_long_request_without_a_length_is_cut(served: Served) -> None:
    """In chunks, whose sum nobody announces: the server answers before the sender ends."""
    head = (
        b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((LOCAL, served.port), timeout=60) as connection:
        connection.sendall(head + b"1000\r\n" + b" " * 4096 + b"\r\n" + b"10\r\n" + b" " * 16 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_health_items_and_metrics(served: Served, run: trainer.Run) -> None:
    health = served.get("/health").json
    assert (health["status"], health["system"], health["items"]) == ("ok", "sasrec", len(run.items))
    found = served.get("/items?search=amber").json
    assert found
    assert all("Amber" in item["title"] for item in found)
    assert served.get("/items?search=i7").json[0]["item_id"] == "i7"
    for line in served.get("/metrics").body.decode().splitlines():
        assert re.fullmatch(r"# TYPE \w+ (counter|gauge|histogram)|\w+(\{[^{}]*\})? [\d.]+", line), line


def test_a_full_queue_says_when_to_come_back(answerer: Any, run: trainer.Run) -> None:
    may, began = threading.Event(), threading.Event()

    class Slow:
        """The real answers, once they may come."""

        saved, items, read = answerer.saved, answerer.items, answerer.read

        def answer(self, questions: Any) -> Any:
            began.set()
            assert may.wait(60)
            return answerer.answer(questions)

    with serving(Slow(), ServeSettings(queue=2, batch=1)) as served, ThreadPoolExecutor(4) as pool:
        first = pool.submit(served.post, {"history": ["i1"]})
        assert began.wait(60)
        waiting = [pool.submit(served.post, {"history": ["i1"]}) for _ in range(2)]
        while served.get("/health").json["queue"] < 2:
            pass
        refused = served.post({"history": ["i1"]})
        may.set()
        assert refused.status == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert [future.result(60).status for future in (first, *waiting)] == [200] * 3
        assert 'route="/recommend",status="503"} 1' in served.get("/metrics").body.decode()


def test_a_bug_fails_one_request(answerer: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        saved, items, read = answerer.saved, answerer.items, answerer.read

        def answer(self, questions: Any) -> Any:
            if any(question.k == 3 for question in questions):
                raise RuntimeError("secret")
            return answerer.answer(questions)

    with serving(Broken(), ServeSettings()) as served:
        failed = served.post({"history": ["i1"], "k": 3})
        assert (failed.status, failed.json) == (500, {"error": "the server failed; its log has the reason"})
        assert served.post({"history": ["i1"]}).status == 200
    assert "secret" in caplog.text


def test_the_page(served: Served, run: trainer.Run) -> None:
    """Type a title, pick it, see recommendations; the page loads nothing from elsewhere."""
    answer = served.get("/")
    assert not re.search(rb"""(src|href)=|https?://|@import""", answer.body)
    with headless_browser() as browser:
        page = browser.new_page()
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"http://{LOCAL}:{served.port}/")
        page.fill("#title", run.items.titles[12][:-1])
        page.click("#found button")
        page.wait_for_selector("#recommended li")
        shown = page.eval_on_selector_all("#recommended li span", "nodes => nodes.map(node => node.textContent)")
        [wanted] = run.recommend([[run.items.ids[12]]])
        assert shown == [item.title for item in wanted.recommendations]
        page.click("#history button")
        page.wait_for_selector("#recommended li", state="detached")
        assert errors == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--queue", "0"], "--queue 0: give at least 1"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--port", "99999"], "--port 99999"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--port", "{taken}"], "choose another --port"),
        (["--llm", "x"], "sasrec has no language model"),
    ],
)
def test_refusals(teacher: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.workflows.serving.server.serve", lambda *_: pytest.fail("it serves"))
    with bind(LOCAL, 0) as taken:
        taken.listen()
        words = [word.format(taken=taken.getsockname()[1]) for word in words]
        with pytest.raises(ValueError, match=re.escape(says)):
            command.main([str(teacher), *words])
