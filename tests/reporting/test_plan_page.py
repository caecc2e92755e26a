"""The page of a plan: whole in one file, and drawn by a real browser where there is one."""

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from memo_runtime.errors import OutputError
from memo_runtime.placement import PlacedRequest
from memo_runtime.records import Executor, Growth
from memo_runtime.reporting.lanes import lanes_of
from memo_runtime.reporting.plan_page import plan_page, write_page
from tests.reporting.samples import PLAN

BROWSER = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1200,900"]


def placed_plan(rows=60):
    """Steps of a stair: row i lives in [i, i + 5)."""
    placement = tuple(
        PlacedRequest(id=f"forward layers.{i % 3} {i}", lower=i, upper=i + 5, size=512, offset=i % 5 * 512)
        for i in range(rows)
    )
    return replace(PLAN, placement=placement, seq_len=4096)


def data_of(page):
    return json.loads(re.search(r"const D=(.*?),tip=", page, re.DOTALL).group(1).replace("<\\/", "</"))


def test_the_data_are_the_plan_and_the_load():
    data = data_of(plan_page(placed_plan()))
    assert len(data["rows"]) == 60
    assert data["rows"][7] == ["forward layers.1 7", 7, 12, 512, 1024]
    assert data["bound"] == data["arena"] == 5 * 512
    assert data["load"][0] == [0, 512]
    assert data["load"][-1] == [64, 0]


def test_nothing_is_fetched_from_elsewhere_and_names_cannot_end_the_script():
    plan = placed_plan(1)
    bad = replace(plan.placement[0], id="</script><b>")
    page = plan_page(replace(plan, placement=(bad,)))
    assert "</script><b>" not in page
    assert page.count("</script>") == 1
    assert not re.search(r"(src|href)=|https?://|@import|@(TITLE|TABLE|DATA)@", page)


def test_lanes_follow_one_another():
    plan = PLAN
    bars = lanes_of(plan)
    for lane in ("compute", "to host", "to device"):
        own = [bar for bar in bars if bar.lane == lane]
        assert all(bar.start <= bar.end for bar in own)
        assert all(first.end <= second.start + 1e-12 for first, second in itertools.pairwise(own))
    fetched = {bar.block: bar.end for bar in bars if bar.lane == "to device"}
    backward = {bar.block: bar.start for bar in bars if bar.what == "backward"}
    assert all(end <= backward[block] + 1e-12 for block, end in fetched.items() if block in backward)
    copied = {block.name for block in plan.blocks if block.bytes_to_host}
    assert {bar.block for bar in bars if bar.lane == "to host"} == copied


def test_what_tiles_run_again_has_a_bar():
    costs = {"rerun_seconds": Growth(linear=2e-6), "rerun_flops": Growth(linear=100)}
    kinds = [replace(block, **costs) for block in PLAN.profile.blocks]
    tiled = [replace(block, executor=Executor.TILED, recomputed_flops=50 * block.tokens) for block in PLAN.blocks]
    plan = replace(PLAN, profile=replace(PLAN.profile, blocks=tuple(kinds)), blocks=tuple(tiled))
    again = {bar.block: bar.end - bar.start for bar in lanes_of(plan) if bar.what == "rerun"}
    assert again == pytest.approx({block.name: 1e-6 * block.tokens for block in plan.blocks})


def test_a_page_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write_page(PLAN, tmp_path / "none" / "plan.html")


def browse(page, tmp_path, *more):
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_draws_every_row_and_bar(tmp_path):
    plan = placed_plan()
    page, empty = tmp_path / "plan.html", tmp_path / "empty.html"
    write_page(plan, page)
    dom = browse(page, tmp_path, "--dump-dom")
    drawn = [int(count) for count in re.findall(r'data-drawn="(\d+)"', dom)]
    assert drawn == [60, len(lanes_of(plan))]
    assert "60 requests in 2.5 KiB" in dom
    empty.write_text(re.sub(r"<script>.*</script>", "", page.read_text(), flags=re.DOTALL))
    shots = []
    for source in (page, empty):
        browse(source, tmp_path, f"--screenshot={source.with_suffix('.png')}")
        shots.append(source.with_suffix(".png").stat().st_size)
    # The same page without its script has no drawing.
    assert shots[0] > 1.2 * shots[1] > 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_plan_without_addresses_says_so(tmp_path):
    page = tmp_path / "plan.html"
    write_page(PLAN, page)
    assert "not where it lives" in browse(page, tmp_path, "--dump-dom")
