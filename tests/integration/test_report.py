"""``miepo report`` on real runs, and the page as a browser shows it, on a phone and on a desk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from miepo.cli.command import main
from miepo.errors import UserError
from miepo.report import report
from tests.helpers.browser import open_page
from tests.integration.test_cli import config, run

HOSTILE = (
    "<script>document.title = 'taken'</script><img src='https://example.org/x.png'></div>\0\ud800\u202e " + "w" * 300
)
HEADINGS = [
    "Before and after",
    "Pareto front",
    "Training",
    "Rewards under each preference",
    "Answers along the simplex",
]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the tiny model with another learning rate; a response of the first means harm."""
    folders = []
    for name, rate in (("one", 0.01), ("other", 0.02)):
        root = tmp_path_factory.mktemp(name)
        run("fit", config(tiny_model, root, model__learning_rate=rate), root)
        folders.append(root / "run/version_0")
    file = folders[0] / "evaluations/step_000002.jsonl"
    measured, first, *others = file.read_text().split("\n")
    file.write_text("\n".join([measured, json.dumps(json.loads(first) | {"response": HOSTILE}), *others]))
    return folders


@pytest.fixture(scope="module")
def pages(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    main(["report", str(runs[0]), "--out", str(root / "one.html")])
    main(["report", *map(str, runs), "--out", str(root / "both.html"), "--prompts", "2"])
    return {path.stem: path for path in root.iterdir()}


def test_figures_are_those_that_the_run_logged(runs: list[Path], pages: dict[str, Path]) -> None:
    html = pages["one"].read_text()
    assert "have others" not in html  # the answers give HV, MIP and CRD as logged
    assert html.count("[") >= 3 * 3
    assert len(html) < 3_000_000
    for name, differ in (("one", False), ("both", True)):
        rows = pages[name].read_text().partition("<h3>Settings that differ</h3>")[2].partition("</table>")[0]
        assert all(said in rows for said in ("learning_rate", "0.01", "0.02")) is differ


@pytest.mark.browser
@pytest.mark.parametrize("which", ["one", "both"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_page_in_a_browser(which: str, width: int, height: int, pages: dict[str, Path], tmp_path: Path) -> None:
    address = pages[which].as_uri()
    with open_page(address, width, height) as page:
        page.screenshot(path=tmp_path / "closed.png", full_page=True)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        headings = page.locator("h2").all_inner_texts()
        assert headings == ["Run" if which == "one" else "Runs", *HEADINGS]
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.locator("img").count() > 10
        assert "<script>document.title = 'taken'</script><img src=" in page.locator("body").inner_text()
        assert page.title().startswith("Report: ")
        assert page.locator("script").count() == 0
        assert {r for r in page.requests if not r.startswith("data:")} == {address}
        assert page.complaints == []
        page.screenshot(path=tmp_path / "open.png", full_page=True)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("closed", "open"))


@pytest.mark.browser
def test_the_frame_of_a_notebook(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><title>notebook</title><h1 style='color: red'>Cell</h1>{report(runs)._repr_html_()}"
    )
    with open_page((tmp_path / "notebook.html").as_uri(), 1000, 900) as page:
        frame = page.frame_locator("iframe")
        assert frame.locator("h2").count() == 6
        assert page.locator("h1").evaluate("e => getComputedStyle(e).color") == "rgb(255, 0, 0)"
        assert page.locator("iframe").bounding_box()["height"] >= 800
        assert page.title() == "notebook"
        assert not [r for r in page.requests if not r.startswith(("data:", "file:", "about:"))]


def test_what_is_no_file_stays_as_it_is(runs: list[Path], tmp_path: Path) -> None:
    """A link is followed; a device, or a pipe, is refused."""
    made = report(runs[:1], 1)
    (tmp_path / "page.html").touch()
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    made.save(tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_text() == made.html
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"expected a file for the report, got '.*pipe', which is a device or the like"):
        made.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "expected the folder of a run, got 'nowhere', which does not exist"),
        (["."], "expected the folder of a run, with metrics.csv in it, got '.', which has none"),
        (["{run}", "--out", "no/folder/report.html"], "expected a folder to write the report into, got 'no/folder'"),
        (["{run}", "--prompts", "-1"], "expected 0 or more, got -1"),
        (["a\0b"], "which does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(
    args: list[str], message: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["report", *(arg.format(run=runs[0]) for arg in args)])
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("miepo: error:") and message in lines[0]
    assert list(tmp_path.iterdir()) == []
