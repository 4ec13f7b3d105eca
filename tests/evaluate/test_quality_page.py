"""The report: complete, self-contained, and safe whatever a tokenizer's texts and a model's name are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlxq.errors import OutputError
from mlxq.evaluate.quality.chart import Point, block_chart, divergence_chart, marks
from mlxq.evaluate.quality.page import check_place, page, write_page
from mlxq.evaluate.quality.results import Candidate, Evaluation, Flip, ModelQuality
from mlxq.evaluate.quality.statistics import Estimate
from mlxq.evaluate.quality.table import estimate, short_names

HOSTILE = '</script><img src=x onerror="alert(1)"><!-- <script> & \u2028 \x00 \'"'


class Reader(HTMLParser):
    """Elements, attributes and text of a page, as a browser's parser finds them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def flip(text: str = "word", kl: float = 0.5) -> Flip:
    return Flip(1, 9, kl, f"before {text}", text, text, Candidate(text, 0.7, 0.2), Candidate("x", 0.1, 0.6))


def model(name: str, kl: float = 0.1, flips: tuple[Flip, ...] = (), notes: tuple[str, ...] = ()) -> ModelQuality:
    return ModelQuality(
        model=name,
        kind="mlx",
        nbytes=127_000_000,
        bpw=4.5,
        perplexity=Estimate(40, 2),
        kl_mean=Estimate(kl, kl / 10),
        kl_median=Estimate(kl, kl / 10),
        kl_p99=Estimate(kl, kl / 10),
        agreement=Estimate(0.8, 0.01),
        block_errors=(0.1, 0.2, 0.3),
        n_flips=len(flips),
        flips=flips,
        notes=notes,
    )


def evaluation(*models: ModelQuality, notes: tuple[str, ...] = ()) -> Evaluation:
    reference = ModelQuality("dir/reference", "huggingface", 452_000_000, 16.0, Estimate(33, 2))
    return Evaluation("text.txt", "second-half", 12, 3072, 512, reference, models, notes=notes)


def data(text: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_nothing_hostile_becomes_markup() -> None:
    bad = model(f"dir/{HOSTILE.replace('/', '_')}", flips=(flip(HOSTILE),), notes=(HOSTILE,))
    text = page(dataclasses.replace(evaluation(bad, notes=(HOSTILE,)), text=HOSTILE))
    found, plain = Reader(text), Reader(page(evaluation(model("a", flips=(flip(),)), notes=("n",))))
    assert "img" not in found.tags
    assert found.tags.count("script") == plain.tags.count("script") == 2
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    (item,) = data(text)[0]["flips"]
    assert (item["target"], item["reference"]["token"], item["before"]) == (HOSTILE, HOSTILE, f"before {HOSTILE}")
    assert HOSTILE in "".join(found.text["li"])


def test_the_page_loads_nothing() -> None:
    text = page(evaluation(model("a", flips=(flip(),))))
    addresses = re.findall(r"https?://[^\s\"'<]+", text)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}, "the name of a language, not an address that is fetched"
    assert not re.search(r"\b(src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|innerHTML", text)
    assert "default-src 'none'" in text


def test_the_page_has_every_model_and_its_figures() -> None:
    text = page(evaluation(model("x/small", 0.25), model("x/large", 0.01)))
    found = Reader(text)
    cells = "".join(found.text["td"])
    for expected in ("0.250 ± 0.025", "0.0100 ± 0.0010", "80.0 ± 1.0 %", "127.0", "4.500"):
        assert expected in cells
    assert text.count("<circle") == 2
    assert {"small", "large", "reference (reference)"} <= set(found.text["th"])


def test_without_a_reference_there_is_a_table_alone() -> None:
    bare = dataclasses.replace(model("a"), kl_mean=None, kl_median=None, kl_p99=None, agreement=None)
    text = page(dataclasses.replace(evaluation(bare), reference=None))
    assert "<svg" not in text
    assert "explorer" not in Reader(text).tags
    assert 'id="explorer"' not in text


@pytest.mark.parametrize("kl", [0.0, math.inf, 1e-9])
def test_divergences_off_the_scale_are_drawn(kl: float) -> None:
    chart = divergence_chart([Point("a", "a", 100, 0.1, 0.01), Point("b", "b", 120, kl, None)])
    assert chart.count("<circle") == 2
    numbers = [float(n) for n in re.findall(r'c[xy]="([^"]*)"', chart)]
    assert all(0 <= n <= 760 for n in numbers)


def test_nothing_to_draw_is_said() -> None:
    assert "Nothing to draw" in divergence_chart([Point("a", "a", 100, 0.0, 0.0)])
    assert "Nothing to draw" in block_chart([("a", ())])


def test_labels_do_not_stand_on_each_other() -> None:
    points = [Point(f"model {i}", f"model {i}", 100.0, 0.1 + i / 1000, None) for i in range(6)]
    places = re.findall(r'<text class="name" x="([^"]*)" y="([^"]*)" text-anchor="(\w+)"', divergence_chart(points))
    heights = sorted(float(y) for _, y, _ in places)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12


def test_long_names_are_numbered() -> None:
    assert marks(["a", "b"]) == ["a", "b"]
    assert marks(["a", "b" * 40]) == ["1", "2"]
    assert short_names(["x/a", "y/b", "z/b"]) == ["a", "y/b", "z/b"]


@pytest.mark.parametrize(
    ("value", "se", "shown"),
    [
        (0.0434567, 0.00123, "0.0435 ± 0.0012"),
        (41.03, 2.4, "41.0 ± 2.4"),
        (1234567.8, 4321.0, "1,234,568 ± 4,321"),
        (0.0, 0.0, "0 ± 0"),
        (0.5, None, "0.5"),
        (math.inf, None, "not finite"),
    ],
)
def test_figures_are_shown_to_the_digits_that_are_known(value: float, se: float | None, shown: str) -> None:
    assert estimate(Estimate(value, se)) == shown


def test_a_page_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "report.html"
    place.write_text("old")
    write_page(evaluation(model("a")), place)
    assert place.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    ("name", "message"),
    [("report.gguf", "ends in .html"), ("absent/r.html", "there is no directory"), ("d.html", "is a directory")],
)
def test_places_where_no_page_can_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "d.html").mkdir()
    with pytest.raises(OutputError, match=message):
        check_place(tmp_path / name)
