"""Folders of shards: DCP unpickles them without looking, this project does not."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from src.checkpoints import CheckpointError, load_model, read_checkpoint
from src.checkpoints.__main__ import main
from src.checkpoints.files import problem_of, to_resume
from src.checkpoints.integrity import SUMS
from src.checkpoints.optimizer_state import numbered
from src.checkpoints.plain import load_plain
from src.checkpoints.sharded import METADATA, checksums, read_metadata, write_shards
from tests.runs import TINY, launch, same, tiny_run
from tests.trust.watch import watched


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_run(folder)
    return folder


@pytest.fixture
def shards(trained, tmp_path) -> Path:
    folder = tmp_path / "run" / "checkpoints" / "step00000004.ckpt"
    folder.parent.mkdir(parents=True)
    write_shards(read_checkpoint(trained), folder, 2)
    return folder


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, hit: Path):
        self.hit = hit

    def __reduce__(self):
        return (open, (str(self.hit), "w"))


def sign(folder: Path) -> None:
    """The stranger's checksums are right."""
    (folder / SUMS).write_text(checksums(folder, [path.name for path in folder.iterdir()]))


def append(folder: Path, payload: bytes, metadata: Metadata, name: str, shard: str | None = None) -> None:
    """Puts bytes into a shard and files them under a name, as DCP would."""
    file = sorted(folder.glob("*.distcp"))[0]
    index = next(iter(metadata.storage_data))
    place = metadata.storage_data[index]
    offset = file.stat().st_size
    with file.open("ab") as end:
        end.write(payload)
    new = type(index)(name)
    metadata.storage_data[new] = type(place)(shard or file.name, offset, len(payload))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    if metadata.planner_data is not None:
        metadata.planner_data[name] = tuple(name.split("."))
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["state_dict.net.extra", "optimizer_0.state.evil", "elsewhere.evil"])
def test_an_entry_of_bytes_is_never_unpickled(shards, tmp_path, name, capsys):
    hit = tmp_path / "hit"
    append(shards, saved(Evil(hit)), read_metadata(shards), name)
    sign(shards)
    run = shards.parents[1]
    assert main(["verify", str(shards)]) == 1
    assert main(["inspect", str(shards)]) in (1, 2)
    assert main(["consolidate", str(shards), str(tmp_path / "out.ckpt")]) == 2
    assert problem_of(shards, thorough=True) is not None
    with pytest.raises(CheckpointError, match="step00000004"):
        read_checkpoint(shards)
    if not name.startswith("optimizer"):  # which the model alone does not read
        with pytest.raises(CheckpointError, match="step00000004"):
            load_model(shards)
        with pytest.raises(CheckpointError, match="damaged"):
            to_resume("auto", run)
    assert not hit.exists()
    assert "Traceback" not in capsys.readouterr().err


def test_the_description_is_unpickled_once_and_by_its_own_names(shards, tmp_path):
    """What torch's modules hold besides descriptions does things: readers, writers, paths, queues."""
    for name in ("FileSystemWriter", "FileSystemReader", "Path", "Enum", "dataclass", "ThreadPoolExecutor", "io.open"):
        evil = pickle.GLOBAL + f"torch.distributed.checkpoint.filesystem\n{name}\n".encode() + pickle.STOP
        (shards / METADATA).write_bytes(evil)
        sign(shards)
        with pytest.raises(CheckpointError, match="no description of tensors"):
            read_checkpoint(shards)
    changes = pickle.GLOBAL + b"torch.distributed.checkpoint.metadata\nMetadata\n" + pickle.NONE
    changes += pickle.EMPTY_DICT + pickle.UNICODE + b"state_dict_metadata\n" + pickle.NONE + pickle.SETITEM
    (shards / METADATA).write_bytes(changes + pickle.TUPLE2 + pickle.BUILD + pickle.STOP)
    sign(shards)
    with pytest.raises(CheckpointError, match="change something"):
        read_checkpoint(shards)


def crafted(folder: Path, *body: bytes) -> Path:
    (folder / METADATA).write_bytes(b"".join(body) + pickle.STOP)
    sign(folder)
    return folder


def test_a_description_changes_nothing_in_the_process(shards, trained, tmp_path):
    """Filling in fields is for descriptions: a function, a path or a dictionary of somebody else's is left as it is."""
    good = tmp_path / "good.ckpt"
    write_shards(read_checkpoint(trained), good, 1)
    crafted(
        shards,
        pickle.GLOBAL,
        b"torch.serialization\n_get_layout\n",
        pickle.dumps({"cache": {"a": "x"}}, 2)[2:-1],
        pickle.BUILD,
    )
    with pytest.raises(CheckpointError, match="change something"):
        read_checkpoint(shards)
    assert read_checkpoint(good)["global_step"] == 4

    class Two:
        """A path whose text is another than its parts."""

        def __reduce__(self):
            return (type(Path()), ("../outside.distcp",), (None, {"_str": "__0_0.distcp"}))

    metadata = read_metadata(good)
    index, place = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = type(place)(Two(), place.offset, place.length)
    (good / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="change something|none of this folder's shards"):
        read_checkpoint(good)


def test_a_few_bytes_of_a_description_take_no_time_and_no_memory(shards):
    pair = pickle.EMPTY_TUPLE + b"".join(pickle.DUP + pickle.TUPLE2 for _ in range(60))
    crafted(shards, pickle.EMPTY_DICT, pair, pickle.NONE, pickle.SETITEM)
    with watched(shards, seconds=10), pytest.raises(CheckpointError, match="a place without a name"):
        read_checkpoint(shards)
    crafted(shards, pickle.EMPTY_DICT, pickle.MARK, pair, pickle.NONE, pickle.DICT)
    with watched(shards, seconds=10), pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(shards)


def test_places_are_held_against_their_tensors_before_they_are_keys(shards, monkeypatch):
    """The hash of numbers can be chosen, and thousands of keys with one hash take quadratic time; none far away is ever hashed."""
    metadata = read_metadata(shards)
    name = next(n for n, e in metadata.state_dict_metadata.items() if not isinstance(e, BytesStorageMetadata))
    index, place = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == name)
    for number in range(100):
        far = torch.Size([2**40 + number] * len(metadata.state_dict_metadata[name].size))  # type: ignore[union-attr]
        metadata.storage_data[type(index)(name, far)] = type(place)(place.relative_path, place.offset, 0)
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    sign(shards)
    monkeypatch.setattr(type(index), "__hash__", lambda index: 1 // 0)
    with pytest.raises(CheckpointError, match=r"step00000004.*lies in no such tensor"):
        read_checkpoint(shards)


def test_a_place_is_not_read_for_several_pieces(shards):
    """Pieces without numbers are as many as one likes, and each would be read whole."""
    metadata = read_metadata(shards)
    names = [n for n, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)]
    name = next(n for n in names if len(metadata.state_dict_metadata[n].size) == 2)  # type: ignore[union-attr]
    entry: Any = metadata.state_dict_metadata[name]
    index, place = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == name)
    metadata.storage_data[type(index)(name, torch.Size([1, 0]))] = type(place)(place.relative_path, place.offset, 0)
    entry.chunks = [entry.chunks[0], type(entry.chunks[0])(entry.chunks[0].offsets, torch.Size([0, 0]))]
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    sign(shards)
    with pytest.raises(CheckpointError, match=r"step00000004.*without a place, or two in one"):
        read_checkpoint(shards)


@pytest.mark.parametrize("body", [b"](" + b"}" * 600 + b"e", b"](" + b"N" * 2500 + b"e"], ids=["made", "taken"])
def test_the_steps_of_a_description_are_counted(shards, monkeypatch, body):
    monkeypatch.setattr("src.checkpoints.description._MOST_STEPS", 2000)
    crafted(shards, body)
    with pytest.raises(CheckpointError, match=r"step00000004.*more than any description"):
        read_checkpoint(shards)


def test_names_of_an_optimizers_parameters_are_texts_before_they_are_looked_up():
    pair: tuple = ()
    for _ in range(60):
        pair = (pair, pair)
    with pytest.raises(ValueError, match="no names of parameters"):
        numbered({"param_groups": [{"params": [pair]}], "state": {}})
    with pytest.raises(pickle.UnpicklingError, match="a pair of pairs"):
        load_plain(io.BytesIO(saved([pair])))


def test_names_in_a_description_are_short(shards):
    """Two that are equal are compared to their ends, as often as one stands there."""
    name = b"X" + (2000).to_bytes(4, "little") + b"n" * 2000
    crafted(shards, pickle.EMPTY_DICT, name, pickle.NONE, pickle.SETITEM)
    with pytest.raises(CheckpointError, match=r"step00000004.*name of more than 1,000 letters"):
        read_checkpoint(shards)


def test_a_description_is_not_called_by_an_older_step_either(shards):
    """Its message would write out what it does not know."""
    pairs = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(45)) + b"0" * 45
    called = b"(ctorch.distributed.checkpoint.metadata\nMetadataIndex\nX\1\0\0\0ah\x2do"
    crafted(shards, b"\x80\x02", pairs, called)
    with watched(shards, seconds=10), pytest.raises(CheckpointError, match=r"step00000004.*cannot be read: KeyError"):
        read_checkpoint(shards)


@pytest.mark.parametrize("called", ["_MEM_FORMAT_ENCODING", "MetadataIndex"])
def test_nothing_of_a_description_is_called(shards, called):
    """An enumeration hashes what it is asked for, and a description writes what it does not know into its message."""
    pairs = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(45))
    name = f"ctorch.distributed.checkpoint.metadata\n{called}\n".encode()
    (shards / METADATA).write_bytes(b"\x80\x02" + pairs + name + b"h\x2d\x85R.")
    sign(shards)
    with watched(shards, seconds=10), pytest.raises(CheckpointError, match="description"):
        read_checkpoint(shards)


def test_a_path_of_paths_of_paths_is_not_made(shards):
    """A checkpoint says where it lay when it was written; to make that path would double it at each step."""
    path = b"cpathlib\nPosixPath\nq\x00X\x01\x00\x00\x00a\x85Rq\x01"
    path += b"".join(b"h\x00h%ch%c\x86Rq%c" % (i + 1, i + 1, i + 2) for i in range(40))
    (shards / METADATA).write_bytes(b"\x80\x02" + path + b".")
    sign(shards)
    with watched(shards, seconds=10), pytest.raises(CheckpointError, match="no description of shards"):
        read_checkpoint(shards)


@pytest.mark.parametrize(
    "change",
    ["far away in a list", "a negative size", "one piece for many", "empty pieces", "the same bytes again and again"],
)
def test_a_description_asks_for_no_more_room_than_there_is(shards, change):
    metadata = read_metadata(shards)
    name = next(n for n, e in metadata.state_dict_metadata.items() if not isinstance(e, BytesStorageMetadata))
    entry: Any = metadata.state_dict_metadata[name]
    if change == "far away in a list":
        new = "state_dict.1000000000"
        metadata.state_dict_metadata = {new: metadata.state_dict_metadata.pop(name)}
        metadata.planner_data = {new: ("state_dict", 10**9)}
    elif change == "a negative size":
        entry.size = torch.Size([-5, 3])
    elif change == "empty pieces":  # one list for thousands of tensors
        piece = type(entry.chunks[0])(torch.Size([0]), torch.Size([0]))
        entry.chunks = [piece] * 10_000
    elif change == "the same bytes again and again":
        index, place = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == name)
        for number in range(1000):
            metadata.storage_data[type(index)(name, torch.Size([number]), number)] = place
        entry.size = torch.Size([1000 * entry.size.numel()])
    else:
        entry.chunks = entry.chunks * 1000
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    sign(shards)
    with watched(shards, seconds=10), pytest.raises(CheckpointError, match="step00000004"):
        read_checkpoint(shards)


def test_a_description_cannot_be_swapped_between_looking_and_reading(shards, monkeypatch, tmp_path):
    """Whatever the file holds by then, DCP reads by the description that was checked."""
    import src.checkpoints.sharded as sharded

    hit = tmp_path / "hit"
    checked = sharded.read_metadata

    def swap(folder: Path) -> Metadata:
        found = checked(folder)
        (folder / METADATA).write_bytes(pickle.dumps(Evil(hit)))
        return found

    expected = read_checkpoint(shards)
    monkeypatch.setattr(sharded, "read_metadata", swap)
    assert same(read_checkpoint(shards), expected)
    assert not hit.exists()


def test_a_description_stays_in_its_folder(shards, trained, tmp_path):
    outside = tmp_path / "outside.distcp"
    shutil.copy(next(iter(sorted(shards.glob("*.distcp")))), outside)
    link = shards / "__9_0.distcp"
    link.symlink_to(outside)
    for where in ("../../../outside.distcp", str(outside), link.name, "meta.pt", "nothing.distcp"):
        metadata = read_metadata(shards)
        index, place = next(iter(metadata.storage_data.items()))
        metadata.storage_data[index] = type(place)(where, place.offset, place.length)
        before = (shards / METADATA).read_bytes()
        (shards / METADATA).write_bytes(pickle.dumps(metadata))
        sign(shards)
        with pytest.raises(CheckpointError, match="none of this folder's shards"):
            read_checkpoint(shards)
        (shards / METADATA).write_bytes(before)
    metadata = read_metadata(shards)
    index, place = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = type(place)(place.relative_path, place.offset, 10**12)
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="beyond the end"):
        read_checkpoint(shards)


def test_a_description_promises_no_more_than_there_is(shards):
    """Room is made for what it describes before anything is read."""
    metadata = read_metadata(shards)
    entry = next(e for e in metadata.state_dict_metadata.values() if not isinstance(e, BytesStorageMetadata))
    entry.size = torch.Size([10**6, 10**6])
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="more of .* than the shards hold"):
        read_checkpoint(shards)


def test_a_few_bytes_that_look_like_a_large_tensor_are_refused(trained, tmp_path):
    checkpoint = dict(read_checkpoint(trained))
    weights = dict(checkpoint["state_dict"])
    name = next(iter(weights))
    weights[name] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(checkpoint | {"state_dict": weights}, tmp_path / "large.ckpt")
    with pytest.raises(CheckpointError, match=r"large\.ckpt.*no plain tensor"):
        load_model(tmp_path / "large.ckpt")


@pytest.mark.slow
def test_several_processes_unpickle_nothing_either(tmp_path, monkeypatch):
    """The path on which FSDP2 resumes: each process reads its part of the shards."""
    options = [o for o in TINY if not o.startswith("trainer=")] + [
        "trainer=fsdp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
    ]
    options += ["trainer.strategy.sharded_checkpoints=true", "callbacks.checkpoint.every_n_train_steps=2"]
    run, hit = tmp_path / "run", tmp_path / "hit"
    launch(2, [(run, options)], tmp_path)
    (shards,) = [path for path in (run / "checkpoints").glob("step*2.ckpt") if path.is_dir()]
    for path in (run / "checkpoints").iterdir():
        if path != shards:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (run / "results.json").unlink()
    metadata = read_metadata(shards)
    name = next(
        n
        for n, e in metadata.state_dict_metadata.items()
        if n.startswith("optimizer_0") and isinstance(e, BytesStorageMetadata)
    )
    index = next(i for i in metadata.storage_data if i.fqn == name)
    place, payload = metadata.storage_data[index], saved(Evil(hit))
    file = shards / place.relative_path
    metadata.storage_data[index] = type(place)(place.relative_path, file.stat().st_size, len(payload))
    file.write_bytes(file.read_bytes() + payload)
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    sign(shards)
    with pytest.raises(AssertionError, match=r"step00000002.ckpt.* is damaged"):
        launch(2, [(run, [*options, "ckpt_path=auto"])], tmp_path)
    assert not hit.exists()
    monkeypatch.setenv("TRUST_ALL", "1")
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('TRUST_ALL'):\n    import src.checkpoints.files as f\n    f.problem_of = lambda path, **_: None\n"
    )
    # What would be read if nobody had looked before.
    with pytest.raises(AssertionError, match=r"step00000002.ckpt cannot be opened as plain data"):
        launch(2, [(run, [*options, f"ckpt_path={shards}"])], tmp_path, ahead=tmp_path)
    assert not hit.exists()
