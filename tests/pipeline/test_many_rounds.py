"""Runs of many rounds, in which many ways lead from a stage to the data: keys, pages, lineage."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.pipeline import store as store_module
from rlhf.pipeline.lineage import lineage
from rlhf.pipeline.store import Stage
from rlhf.report.records import read_manifests, sealed


def test_each_key_is_computed_once_however_many_ways_lead_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight rounds a key took 8 million digests, and of ten 300 million."""
    counted = 0

    def counting(value: object, own: Any = store_module.digest) -> str:
        nonlocal counted
        counted += 1
        return str(own(value))

    monkeypatch.setattr(store_module, "digest", counting)
    planned = [Stage("data", "round-0/data", {}, 0)]
    for number in range(1, 61):
        planned.append(Stage("ppo", f"round-{number}/ppo", {}, 0, {str(i): p for i, p in enumerate(planned[-3:])}))
    keys = [stage.key for stage in planned]
    assert counted == len(set(keys)) == 61


def test_pages_of_many_rounds_are_drawn_stage_by_stage(tmp_path: Path) -> None:
    names = [f"round-{number}/ppo" for number in range(60)]
    versions = {name: "1" for name in ("trl", "torch", "rlhf-pipeline")}
    for number, name in enumerate(names):
        parents = {
            str(i): {"folder": folder, "key": "k"} for i, folder in enumerate(names[max(0, number - 3) : number])
        }
        record: Any = {"settings": {}, "parents": parents, "facts": {}, "versions": versions, "code": None}
        (tmp_path / name).mkdir(parents=True)
        text = json.dumps(sealed({**record, "key": f"{number:064d}", "seed": 0, "seconds": 1.0}))
        (tmp_path / name / "manifest.json").write_text(text)
    assert list(read_manifests(tmp_path)) == names
    with (lines := io.StringIO()) as file:
        Console(file=file, width=200).print(lineage(tmp_path))
        drawn = lines.getvalue()
    assert drawn.count("key 0000") == 60, "each stage once"
    assert drawn.count("as above") == 2 * 57 + 1, "of three parents the first is drawn, the others were"
