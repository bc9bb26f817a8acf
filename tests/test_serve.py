"""scripts/serve.py: the real server, asked over a socket; the answers are the library's."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from datasets import make_dataset
from test_evaluate import write_run

import mfdist

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")),
    reason="fastapi and uvicorn are the extra 'serve'",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, run directory) of a server in a process of its own; it ends well when it is asked to."""
    folder = tmp_path_factory.mktemp("serve")
    write_run(folder / "run", make_dataset(folder / "data", rows=1200, lanes=3, users=150, items=60))
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--run-dir", str(folder / "run"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = ""
    while not (found := re.search(r"http://[\d.]+:\d+", said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    yield found[0], str(folder / "run")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def ask(server, path, body=None):
    """(status, answer)."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server[0] + path, content, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_it_listens_to_this_machine_alone(server):
    assert server[0].startswith("http://127.0.0.1:")
    assert ask(server, "/health") == (200, {"model": "mf_advanced", "users": 150, "items": 60})


def test_predictions(server):
    users, items = ["u3", "u3", "nobody"], ["i5", "nothing", "i5"]
    wanted = mfdist.load(server[1]).predict(users, items).tolist()
    assert ask(server, "/predict", {"user_ids": users, "item_ids": items}) == (200, {"predictions": wanted})


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_recommendations(server, exclude_seen):
    body = {"user_ids": ["u3", "u77"], "k": 4, "exclude_seen": exclude_seen}
    wanted = mfdist.load(server[1]).recommend(["u3", "u77"], 4, exclude_seen=exclude_seen).to_pylist()
    assert ask(server, "/recommend", body) == (200, {"recommendations": wanted})


@pytest.mark.parametrize("user", [None, "u9"])
def test_fold_in(server, user):
    items, ratings = ["i1", "i2"], [5.0, 1.0]
    one = mfdist.load(server[1]).fold_in(items, ratings, user_id=user)
    status, found = ask(server, "/fold_in", {"item_ids": items, "ratings": ratings, "user_id": user, "k": 3,
                                             "predict_ids": ["i9", "i1"]})  # fmt: skip
    assert status == 200
    assert found == {"recommendations": one.recommend(3).to_pylist(),
                     "predictions": one.predict(["i9", "i1"]).tolist()}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/predict", {"user_ids": ["u1"], "item_ids": ["i1", "i2"]}, "as many users as items"),
        ("/predict", {"user_ids": [], "item_ids": []}, "at least 1 item"),
        ("/recommend", {"user_ids": ["u1"], "k": 0}, "greater than or equal to 1"),
        ("/recommend", {"users": ["u1"]}, "user_ids"),
        ("/fold_in", {"item_ids": ["i1"], "ratings": []}, "as many items as ratings"),
        ("/fold_in", {"item_ids": ["i1"], "ratings": [1], "user_id": "nobody"}, "'nobody' was not known"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(server, path, body, words):
    status, found = ask(server, path, body)
    assert status == 422 and words in json.dumps(found)
