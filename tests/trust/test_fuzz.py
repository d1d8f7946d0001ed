"""Thousands of files that nobody meant: whatever is opened, nothing runs, nothing is written elsewhere, and the message names the file."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from src.checkpoints import CheckpointError, load_model, read_checkpoint
from src.checkpoints.files import problem_of
from src.checkpoints.integrity import SUMS
from src.checkpoints.sharded import META, METADATA, checksums, write_shards
from src.config import ConfigError
from src.datamodules.corpora import CorpusError, TextFiles, Tokenizer
from src.evaluate import data_of, of_checkpoint
from src.reporting.results import find_sweeps
from src.runs.registry import find_runs, runs_table
from tests.reporting.fake_sweeps import make_sweep
from tests.runs import tiny_run
from tests.trust.test_registry import attacks
from tests.trust.watch import watched

# In `make test`, and by how much more with -m slow.
CASES = {"checkpoint": 600, "bytes": 250, "shards": 350, "run": 400, "manifest": 200, "tokenizer": 250, "text": 250}
MORE = 10
counted: dict[str, int] = {}


@pytest.fixture(scope="module", params=[1, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "many"])
def times(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_run(folder, "canon.positions=AC")
    return folder


@pytest.fixture(autouse=True)
def told(record_property) -> Iterator[None]:
    """``tests/conftest.py`` prints the sum."""
    counted.clear()
    yield
    for kind, number in counted.items():
        record_property("mutated inputs", (kind, number))


def opened(
    kind: str, folder: Path, case: int, open_it: Callable[[], Any], name: str, errors: tuple[type[Exception], ...]
) -> bool:
    """Opens a mutated input; true if there was nothing to object to."""
    counted[kind] = counted.get(kind, 0) + 1
    said = None
    with watched(folder) as seen:
        try:
            open_it()
        except errors as error:
            said = str(error)
    assert not seen, f"{kind} {case}: {seen}"
    assert said is None or (name in said and len(said) < 20_000), f"{kind} {case}: {said}"
    return said is None


# ---- mutations of nested plain data ---------------------------------------------------------------------------------


def strange(draw: random.Random, hit: Path) -> Any:
    nodes = list(attacks(hit).values())
    deep: Any = 1
    for _ in range(draw.choice([10, 60, 200])):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        10**6,
        10**9,
        10**30,
        -(10**30),
        0.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "a" * 5000,
    ]
    values += [
        "../../../etc/passwd",
        str(hit),
        "${oc.env:HOME}",
        "%s%n",
        "\x00",
        "\x1b[2J",
        "TTTT",
        [],
        {},
        [1, 2],
        {"a": 1},
        b"bytes",
    ]
    values += [
        [[[[]]]],
        {"_target_": "x"},
        {"_target_": None},
        {"_partial_": True},
        "src.components.mixers.gla.GLA",
        deep,
        2**63,
        "\ud800",
    ]
    return draw.choice(nodes) if draw.random() < 0.25 else draw.choice(values)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(node, dict):
        for key, value in node.items():
            found += places(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node[:20]):
            found += places(value, (*path, i))
    return found


def mutated(content: Any, draw: random.Random, hit: Path) -> Any:
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        every = places(content)
        if not every:
            return strange(draw, hit)
        *way, last = draw.choice(every)
        node = content
        for key in way:
            node = node[key]
        kind = draw.random()
        if kind < 0.15:
            del node[last]
        elif kind < 0.25 and isinstance(node, dict):
            node[draw.choice(["_args_", "_convert_", "extra", "", 7, "_target_", "dim", "seed"])] = strange(draw, hit)
        elif kind < 0.35:
            other = content
            for key in draw.choice(every):
                try:
                    other = other[key]
                except (KeyError, IndexError, TypeError):
                    break
            node[last] = copy.deepcopy(other)
        else:
            node[last] = strange(draw, hit)
    return content


def spoilt(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    kind = draw.random()
    if kind < 0.15:
        return bytes(changed[: draw.randrange(len(changed))])
    if kind < 0.25:
        start = draw.randrange(len(changed))
        return bytes(changed[:start] + changed[start : start + 64] * 3 + changed[start:])
    for _ in range(draw.choice([1, 2, 8, 64])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_checkpoints(trained, tmp_path, times):
    """Configurations and contents of files that open as plain data."""
    whole = read_checkpoint(trained)
    plain = {
        key: value
        for key, value in whole.items()
        if key not in ("state_dict", "optimizer_states", "loops", "callbacks")
    }
    path, hit = tmp_path / "fuzzed.ckpt", tmp_path / "hit"
    settings = {"data": None, "cache_dir": str(tmp_path / "cache")}
    fine = 0
    for case in range(CASES["checkpoint"] * times):
        draw = random.Random(f"checkpoint {case}")
        if draw.random() < 0.7:
            content = plain | {"config": plain["config"] | {"model": mutated(plain["config"]["model"], draw, hit)}}
        else:
            content = mutated(plain, draw, hit)
        if not isinstance(content, dict):
            content = {"config": content}
        weights = dict(whole["state_dict"])
        if draw.random() < 0.1:
            weights[draw.choice(list(weights))] = draw.choice(
                [torch.zeros(3), torch.zeros(1).expand(10**9), 3, None, "x"]
            )
        torch.save(content | {"state_dict": weights}, path)

        def open_it(path: Path = path) -> None:
            load_model(path)
            config = read_checkpoint(path)["config"]
            data_of(settings, config, path)
            of_checkpoint(config.get("loss"), "loss", path)

        fine += opened("checkpoint", tmp_path, case, open_it, path.name, (CheckpointError,))
        assert not hit.exists(), case
    assert 0 < fine < CASES["checkpoint"] * times * 0.8


def test_bytes_of_checkpoints(trained, tmp_path, times):
    content = (trained / "checkpoints" / "final.ckpt").read_bytes()
    path = tmp_path / "fuzzed.ckpt"
    for case in range(CASES["bytes"] * times):
        path.write_bytes(spoilt(content, random.Random(f"bytes {case}")))
        opened("bytes", tmp_path, case, lambda: load_model(path), path.name, (CheckpointError,))
        opened("bytes", tmp_path, case, lambda: problem_of(path), path.name, ())


def test_shards(trained, tmp_path, times):
    """With checksums that are right, as a stranger would make them."""
    sound = tmp_path / "sound.ckpt"
    write_shards(read_checkpoint(trained), sound, 2)
    description = pickle.loads((sound / METADATA).read_bytes())
    folder, hit = tmp_path / "fuzzed.ckpt", tmp_path / "hit"
    for case in range(CASES["shards"] * times):
        draw = random.Random(f"shards {case}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        if draw.random() < 0.5:
            (folder / METADATA).write_bytes(pickle.dumps(twisted(description, draw, hit)))
        else:
            file = draw.choice(sorted(path for path in folder.iterdir() if path.name != SUMS))
            file.write_bytes(spoilt(file.read_bytes(), draw))
        if draw.random() < 0.2:
            torch.save(mutated({"config": {}, "global_step": 3, "format": 1}, draw, hit), folder / META)
        (folder / SUMS).write_text(checksums(folder, [path.name for path in folder.iterdir()]))
        opened("shards", tmp_path, case, lambda: load_model(folder), folder.name, (CheckpointError,))
        opened("shards", tmp_path, case, lambda: problem_of(folder, thorough=True), folder.name, ())
        assert not hit.exists(), case


class Evil:
    def __init__(self, hit: Path):
        self.hit = hit

    def __reduce__(self) -> Any:
        return (open, (str(self.hit), "w"))


def twisted(description: Any, draw: random.Random, hit: Path) -> Any:
    """DCP's description with something else in it."""
    found = copy.deepcopy(description)
    index = draw.choice(list(found.storage_data))
    place = found.storage_data[index]
    name = draw.choice(list(found.state_dict_metadata))
    kind = draw.randrange(7)
    if kind == 0:
        where = draw.choice(["../x", "/etc/passwd", "meta.pt", "__9_9.distcp", "", Path("/"), 3, Evil(hit)])
        found.storage_data[index] = type(place)(where, place.offset, place.length)
    elif kind == 1:
        found.storage_data[index] = type(place)(place.relative_path, draw.choice([-1, 10**15, 3, None]), place.length)
    elif kind == 2:
        found.storage_data[index] = type(place)(place.relative_path, place.offset, draw.choice([0, -5, 10**15, "x"]))
    elif kind == 3:
        found.state_dict_metadata[name] = draw.choice(
            [None, Evil(hit), 3, found.state_dict_metadata[draw.choice(list(found.state_dict_metadata))]]
        )
    elif kind == 4 and found.planner_data is not None:
        found.planner_data[name] = draw.choice([("a", 10**9), ("__class__",), (), "x", None, Evil(hit)])
    elif kind == 5:
        found.storage_meta = Evil(hit)
    else:
        return draw.choice([Evil(hit), {}, None, [found], "metadata"])
    return found


# ---- what runs and sweeps leave behind ------------------------------------------------------------------------------


def test_run_folders(trained, tmp_path, times):
    logs = tmp_path / "logs"
    texts = {name: (trained / name).read_text() for name in ("run.json", "results.json", "config.yaml")}
    plain = {name: yaml.safe_load(text) for name, text in texts.items()}
    metrics = (trained / "csv" / "metrics.csv").read_bytes()
    hit = tmp_path / "hit"
    for case in range(CASES["run"] * times):
        draw = random.Random(f"run {case}")
        folder = logs / "fuzzed"
        (folder / "csv").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        (folder / "csv" / "metrics.csv").write_bytes(spoilt(metrics, draw) if draw.random() < 0.3 else metrics)
        name = draw.choice(list(texts))
        if draw.random() < 0.6:
            content = mutated(plain[name], draw, hit)
            try:
                text = json.dumps(content) if name.endswith("json") else yaml.dump(content)
            except (TypeError, RecursionError, ValueError):
                text = repr(content)
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        else:
            (folder / name).write_bytes(spoilt(texts[name].encode(), draw))

        def open_it() -> None:
            runs = find_runs(logs)
            runs_table(runs)
            for run in runs:
                run.curve("train/loss")

        opened("run", tmp_path, case, open_it, "fuzzed", ())
        assert not hit.exists(), case


def test_manifests(tmp_path, times):
    path = make_sweep(tmp_path, seeds=(1,), rates=(2e-3,)).path
    plain, text = json.loads(path.read_text()), path.read_text()
    hit = tmp_path / "hit"
    for case in range(CASES["manifest"] * times):
        draw = random.Random(f"manifest {case}")
        if draw.random() < 0.7:
            try:
                path.write_bytes(json.dumps(mutated(plain, draw, hit)).encode("utf-8", "surrogatepass"))
            except (TypeError, RecursionError, ValueError):
                path.write_text("{")
        else:
            path.write_bytes(spoilt(text.encode(), draw))

        def open_it() -> None:
            for sweep in find_sweeps(tmp_path / "logs"):
                assert sweep.outcome
                assert sweep.cells is not None

        opened("manifest", tmp_path, case, open_it, "manifest", ())
        assert not hit.exists(), case


# ---- text -----------------------------------------------------------------------------------------------------------


def test_tokenizers(tmp_path, times):
    texts = ["the quick brown fox jumps over the lazy dog"] * 5
    path, hit = tmp_path / "tokenizer.json", tmp_path / "hit"
    definition = json.loads(Tokenizer.train(texts, 300).definition)
    for case in range(CASES["tokenizer"] * times):
        draw = random.Random(f"tokenizer {case}")
        if draw.random() < 0.7:
            try:
                path.write_bytes(json.dumps(mutated(definition, draw, hit)).encode("utf-8", "surrogatepass"))
            except (TypeError, RecursionError, ValueError):
                continue
        else:
            path.write_bytes(spoilt(json.dumps(definition).encode(), draw))
        opened("tokenizer", tmp_path, case, lambda: Tokenizer.load(path).encode("the fox"), path.name, (CorpusError,))
        assert not hit.exists(), case


def read_texts(folder: Path, skip: bool) -> None:
    for document in TextFiles(folder, skip_bad=skip).documents():
        document.text.encode()


@pytest.mark.filterwarnings("ignore")
def test_texts(tmp_path, times):
    """Rows of jsonl and parquet, whole files of bytes; skipped if they cannot be read and that is asked for."""
    hit = tmp_path / "hit"
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [{"text": f"document {i} " * 9, "meta": {"id": i, "tags": ["a", "b"]}} for i in range(20)]
    table = tmp_path / "good.parquet"
    pq.write_table(pa.table({"text": [row["text"] for row in rows]}), table)
    for case in range(CASES["text"] * times):
        draw = random.Random(f"text {case}")
        for old in folder.iterdir():
            old.unlink()
        if draw.random() < 0.5:
            path = folder / "fuzzed.jsonl"
            lines = [json.dumps(row, default=str) for row in rows]
            try:
                lines[draw.randrange(20)] = json.dumps(mutated(rows[0], draw, hit), default=str)
            except (RecursionError, ValueError, TypeError):
                lines[3] = "[" * 100_000
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
            path.write_bytes(spoilt(content, draw) if draw.random() < 0.5 else content)
        else:
            path = folder / draw.choice(
                ["fuzzed.parquet", "fuzzed.txt", "fuzzed.txt.gz", "fuzzed.jsonl.xz", "fuzzed.txt.bz2", "fuzzed.md"]
            )
            path.write_bytes(spoilt(table.read_bytes(), draw))
        skip = draw.random() < 0.5
        opened(
            "text",
            tmp_path,
            case,
            partial(read_texts, folder, skip),
            str(folder),
            (CorpusError,),
        )
        assert not hit.exists(), case


def test_enough_was_tried():
    assert sum(CASES.values()) >= 2000
    assert ConfigError in CheckpointError.__mro__
