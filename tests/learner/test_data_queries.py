"""docs/data.md: its columns are the dataset's, and its queries give what a plain loop over the rows gives."""

import itertools
import json
import os
import re
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from test_quarantine import poison

from learner.config import ROOT
from learner.run import main
from records.run_folder import FORMAT, SCHEMA

PAGE = (ROOT / "docs/data.md").read_text()
BAD, BAD_EPOCH = 5, 1


@pytest.fixture(scope="module")
def run(small_settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "epoch=9" / "run"  # what readers of partitioned data take for a column
    settings = ["run.runner=inprocess", "train.epochs=3", "reward.on_bad_reward=quarantine", "evaluation.images=0",
                "flow.widths=[8,16]"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, (BAD,), BAD_EPOCH)
        assert main([*small_settings, *settings, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(run) -> list[dict]:
    files = sorted(run.glob("trajectories/epoch-*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


@pytest.fixture(scope="module")
def found(run) -> dict:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block.replace("runs/NAME", str(run)), "docs/data.md", "exec"), names)
    return names


def good(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["bad"] is None]


def test_the_page_has_the_format_and_the_columns_that_the_files_have(run, rows, found):
    assert found["version"] == FORMAT and f"this page describes {FORMAT}." in PAGE
    listed = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", PAGE, re.M)
    assert listed == [(name, str(kind)) for name, kind in SCHEMA.items()]
    assert list(rows[0]) == list(SCHEMA)
    assert [(row["epoch"], row["trajectory_id"]) for row in rows] == [(e, i) for e in range(3) for i in range(8)]
    assert {row["policy_version"] - row["epoch"] for row in rows} == {0}
    assert {row["run_id"] for row in rows} == {json.loads((run / "run.json").read_text())["run_id"]}
    assert [(row["epoch"], row["trajectory_id"]) for row in rows if row["bad"]] == [(BAD_EPOCH, BAD)]
    assert all((row["reward"] is None) == (row["bad"] is not None) for row in rows)
    assert all(row["reward_parts"] == [] for row in rows)
    for place in itertools.product(range(3), range(2)):
        mine = [row for row in rows if (row["epoch"], row["chunk"]) == place]
        assert len(mine) == 4 and len({(row["sample_seconds"], row["score_seconds"]) for row in mine}) == 1


def test_the_best_images_of_each_prompt(run, rows, found):
    best, prompts = found["best"].to_dict("records"), {row["prompt"] for row in good(rows)}
    order = sorted(good(rows), key=lambda row: (-row["reward"], row["epoch"], row["trajectory_id"]))
    for prompt in prompts:
        mine, first = ([row for row in some if row["prompt"] == prompt] for some in (best, order))
        assert mine == [{key: row[key] for key in mine[0]} for row in first[:3]]
    assert {row["prompt"] for row in best} == prompts
    written = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
    names = [f"epoch-{row['epoch']:06d}-trajectory-{row['trajectory_id']}.png" for row in best]
    assert written == dict(zip(names, (row["thumbnail_png"] for row in best), strict=True))
    assert written and all(content.startswith(b"\x89PNG") for content in written.values())


def test_reward_against_epoch_and_samples_by_policy_version(run, rows, found):
    assert found["by_epoch"].index.tolist() == found["by_version"].index.tolist() == [0, 1, 2]
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        mine = found["by_epoch"].loc[line["epoch"]]
        assert mine["mean"] == pytest.approx(line["reward_mean"], rel=1e-6)
        assert mine["deviation"] == pytest.approx(line["reward_std"], rel=1e-5, abs=1e-9)
        rewards = [row["reward"] for row in good(rows) if row["epoch"] == line["epoch"]]
        assert (mine["least"], mine["most"], mine["good"]) == (min(rewards), max(rewards), len(rewards))
        assert mine["bad"] == line["quarantined"] == (line["epoch"] == BAD_EPOCH)
    for version, mine in found["by_version"].iterrows():
        made = [row for row in rows if row["policy_version"] == version]
        assert mine["trajectories"] == len(made) == 8 and mine["adapters"] == 1 and mine["most_behind"] == 0
        assert mine["mean_reward"] == pytest.approx(np.mean([row["reward"] for row in good(made)]), rel=1e-6)
        assert mine["mean_log_pf"] == pytest.approx(np.nanmean([row["log_pf_sum"] for row in made]), rel=1e-12)


@pytest.mark.parametrize("name", ["best", "by_epoch", "by_version"])
def test_the_sql_says_the_same(run, found, name):
    blocks = re.findall(r"```sql\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    block = dict(zip(("best", "by_epoch", "by_version"), blocks, strict=True))[name]
    theirs = duckdb.sql(block.replace("runs/NAME", os.fspath(run))).df().to_dict("records")
    ours = (found[name] if name == "best" else found[name].reset_index()).to_dict("records")
    assert [sorted(row) for row in theirs] == [sorted(row) for row in ours]
    for mine, other in zip(ours, theirs, strict=True):
        for key, value in mine.items():
            exact = isinstance(value, str | bytes)
            assert type(value)(other[key]) == (value if exact else pytest.approx(value, rel=1e-6))
