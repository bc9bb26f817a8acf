"""What is written for others to read: markup in names means nothing, and permissions are those that the user set."""

from __future__ import annotations

import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import make_dataset

import mfdist
from mfdist.cluster.world import World
from mfdist.errors import DataError, UsageError, exit_code_of
from mfdist.jobs import baseline, evaluate, export, predict, prepare, recommend
from mfdist.log import Console
from mfdist.results.model_card import model_card, plain
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

QUIET = Console(speaks=False)
EVIL = """<script>alert('x')</script><img src=x onerror=y>&amp;"'`**b**_i_[l](javascript:a)|c|{{7*7}}"""
NAME = EVIL.replace("/", "∕")  # a file's name has no slash


class Elements(HTMLParser):
    """Names and attributes of the elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def config(data, run, **values):
    values = {"epochs": 2, "batch_size": 100, "emb_dim": 4, "device": "cpu", **values}
    return TrainConfig.ready("vignette_mf_advanced", data=str(data), run_dir=str(run), **values)


def test_markup_in_every_name_and_id_stays_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = Path(NAME)
    place.mkdir()
    rows = [f'"{EVIL.replace(chr(34), chr(34) * 2)}{k % 30}","{NAME.replace(chr(34), chr(34) * 2)}{k % 11}",{k % 5 + 1}'
            for k in range(900)]  # fmt: skip
    (place / f"{NAME}.csv").write_text("\n".join([*rows, f"bad{EVIL[:20]},x,{EVIL[:8]}"]) + "\n")
    data, run, other = f"{NAME}/{NAME}", f"{NAME}/run", f"{NAME}/svd"
    assert prepare.main([f"{NAME}/{NAME}.csv", "--out", data, "--columns", "0,1,2"]) == 0
    train(config(data, run), World.alone(), QUIET)
    pytest.importorskip("surprise", reason="needs Surprise")
    assert baseline.main(["--data", data, "--run-dir", other, "--epochs", "2"]) == 0
    assert evaluate.main([run, other, "--html", f"{NAME}/comparison.html", "--out", "out.json"]) == 0
    pages = [path for path in place.rglob("*.html")]
    assert len(pages) == 4, pages  # dataset, two runs, comparison
    for page in pages:
        text = page.read_text()
        found = Elements(text)
        assert not found.names & {"script", "img"} - ({"img"} if 'src="data:' in text else set()), page
        assert not {"onerror", "onload"} & found.attributes, page
        assert "<script>alert" not in text and "49" not in re.findall(r"\{\{7\*7\}\}|\b49\b(?=[^<]*\|c\|)", text)
        assert "&lt;script&gt;" in text, page
    for card in (run, other):
        text = Path(card, "model/README.md").read_text().split("\n---\n", 1)[1]  # before it: YAML, of quoted text
        assert not re.search(r"(?<!\\)<(script|img)", text) and not re.search(r"(?<!\\)\[l", text), text
        assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


def test_markdown_of_a_name_is_the_name():
    markdown = pytest.importorskip("markdown_it", reason="needs the package markdown-it-py")
    page = markdown.MarkdownIt("commonmark", {"html": True}).render(f"# on {plain(EVIL)}\n")
    assert Elements(page).names == {"h1"}
    text = re.sub(r"<[^>]*>", "", page)
    for code, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(code, letter)
    assert text.strip() == f"on {EVIL}"


def test_a_card_of_a_strangers_model_is_harmless():
    dataset = {"name": "a\n# b\n<script>", "num_users": 1, "num_items": 1, "fingerprint": "x`<script>`"}
    text = model_card({"dataset": dataset, "model": "*m*", "dim": 3, "bias": True, "sigmoid": False, "cold": "`x`",
                       "rating_scale": [1, 5], "global_mean": 3.0})  # fmt: skip
    assert r"# \*m\*, 3 factors, on a \# b \<script\>" in text and "`x'<script>'`" in text


def test_what_steers_a_terminal_is_shown_as_text(capsys):
    Console().info("a\x1b[31mred\x07\ttab\r")
    Console().warn("b\x9b2J")

    def fail():
        raise DataError("c\x1b]0;title\x07")

    assert exit_code_of(fail) == 3
    said = capsys.readouterr()
    assert said.out == "a\\x1b[31mred\\x07\ttab\\r\n"
    assert said.err == "warning: b\\x9b2J\nerror: c\\x1b]0;title\\x07\n"


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o027, 0o640, 0o750), (0o007, 0o660, 0o770)])
def test_what_is_written_has_the_permissions_that_the_user_set(tmp_path, monkeypatch, mask, file, folder):
    monkeypatch.chdir(tmp_path)
    before = os.umask(mask)
    try:
        Path("r.csv").write_text("".join(f"u{k % 30},i{k % 11},{k % 5 + 1},{k}\n" for k in range(600)))
        Path("pairs.csv").write_text("u1,i1\n")
        assert prepare.main(["r.csv", "--out", "data"]) == 0
        assert prepare.main(["r.csv", "--out", "grown"]) == 0
        Path("more.csv").write_text("new,i1,3,1\n")
        assert prepare.main(["more.csv", "--out", "grown", "--append"]) == 0
        assert prepare.main(["grown", "--compact"]) == 0
        train(config("data", "run", checkpoint_every="1"), World.alone(), QUIET)
        assert recommend.main(["--run-dir", "run", "--out", "best.parquet"]) == 0
        assert recommend.main(["--run-dir", "run", "--out", "best.csv"]) == 0
        assert predict.main(["pairs.csv", "--run-dir", "run", "--out", "scored.csv"]) == 0
        for kind in ("parquet", "safetensors"):
            assert export.main(["--run-dir", "run", "--format", kind, "--out", kind]) == 0
        assert evaluate.main(["run", "--out", "table.json", "--html", "table.html"]) == 0
    finally:
        os.umask(before)
    others = {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.rglob("*")
              if stat.S_IMODE(path.stat().st_mode) != (folder if path.is_dir() else file)}  # fmt: skip
    assert others == {}
    assert len(list(tmp_path.rglob("*"))) > 150


def test_from_python_what_a_stranger_would_try(tmp_path, monkeypatch):
    make_dataset(tmp_path / "data", rows=600, lanes=3, val_rows=90, users=60, items=30)
    train(config(tmp_path / "data", tmp_path / "run"), World.alone(), QUIET)
    whole = mfdist.load(str(tmp_path / "run")).recommend(["u1"], k=3)
    for place in (tmp_path / "run/model", f"{tmp_path}/run/model/", tmp_path / "run"):
        model = mfdist.load(place)
        assert model.recommend(["u1"], k=3) == whole
        assert len(model.recommend(["u1"], k=3, exclude_seen=True)) == 3
    monkeypatch.chdir(tmp_path / "run")
    assert len(mfdist.load("model").recommend(["u1"], k=3, exclude_seen=True)) == 3
    for wrong in (1, "u1", 2.5, None, b"u1"):
        with pytest.raises(UsageError, match=r"expected a list of ids, got .* alone; give \["):
            model.recommend(wrong)
    with pytest.raises(UsageError, match="cannot be an id"):
        model.recommend([None])
    for wrong in (0, -1, "3", 2.5, None, True):
        for ask in (model.recommend, model.similar_users):
            with pytest.raises(UsageError, match=r"needs k that is a whole number of at least 1"):
                ask(["u1"], k=wrong)
