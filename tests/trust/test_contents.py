"""Small files that ask for much, or lie: found by attacking. Each is refused in a moment, by a message that names the file."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from src.callbacks.guard import replay
from src.checkpoints import CheckpointError, load_model
from src.checkpoints.__main__ import main
from src.checkpoints.contents import check_contents
from src.checkpoints.files import problem_of
from src.checkpoints.plain import is_filled, load_plain
from src.config import ConfigError, RunError
from src.evaluate import evaluate
from src.modules.optimizers import AdamW, check_loaded
from tests.runs import compose_run, tiny_run
from tests.trust.watch import watched

EVERY = ["callbacks.checkpoint.every_n_train_steps=1"]


def shared() -> list:
    """A list that is written in a few bytes and has 2^40 ends."""
    node: list = []
    for _ in range(39):
        node = [node, node]
    return node


def cycle() -> dict:
    node: dict = {}
    node["again"] = node
    return node


def large(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype).expand(2 * 10**9)


def pairs() -> tuple:
    node: tuple = ()
    for _ in range(45):
        node = (node, node)
    return node


# Where, and what is put there.
LIES = {
    "a list of itself twice, forty times": (("config", "model", "norm_eps"), shared),
    "a cycle": (("data", "again"), cycle),
    "a million blocks": (("config", "model", "depth"), lambda: 3e6),
    "a large moment": (("optimizer_states", 0, "state", 0, "exp_avg"), large),
    "a large seed": (("data", "seed"), lambda: large(torch.int8)),
    "a tensor for a name": (("config", "name"), lambda: torch.zeros(2)),
    "a metric that is none": (("validated",), lambda: {"a": 1}),
    "a metric with a name for terminals": (("pending_metrics",), lambda: {"\x1b[31m": 1.0}),
    "loops that are none": (("loops",), lambda: 3),
    "a long word, again and again": (("data", "again"), lambda: ["a" * 2**16] * 1000),
    "long ways to many parts": (
        ("config", "again"),
        lambda: {"a" * 900: {"b" * 900: dict.fromkeys(map(str, range(20_000)))}},
    ),
}


def lie(trained: Path, path: Path, name: str) -> Path:
    way, make = LIES[name]
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    node = checkpoint
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = make()
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("name", LIES)
def test_a_checkpoint_that_asks_for_much(trained, tmp_path, name):
    path = lie(trained, tmp_path / "lie.ckpt", name)
    with watched(tmp_path, seconds=15):
        with pytest.raises(CheckpointError, match=r"lie\.ckpt"):
            load_model(path)
        if name != "a million blocks":
            assert problem_of(path) is not None
        assert main(["inspect", str(path)]) in (0, 2)
        with pytest.raises(ConfigError, match=r"lie\.ckpt"):
            evaluate(compose_run(tmp_path, f"ckpt_path={path}", f"paths.output_dir={tmp_path}", config_name="evaluate"))


def test_a_long_number_is_as_long_as_it_is_written_out(trained):
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    checkpoint["config"]["again"] = [2**2000] * 60_000
    with pytest.raises(ValueError, match="its words have more than"):
        check_contents(checkpoint)


def test_what_a_long_value_is_told_of_is_cut(trained, tmp_path, capsys):
    path = forged(trained, tmp_path / "long.ckpt", lambda c: c["config"]["model"].update(norm_eps="a" * 10**5))
    with pytest.raises(ConfigError, match=r"long\.ckpt") as caught:
        tiny_run(tmp_path / "run", *EVERY, f"ckpt_path={path}")
    assert len(str(caught.value)) < 2000
    assert main(["inspect", str(forged(trained, path, lambda c: c["data"].update(again="a" * 10**5)))]) == 0
    assert len(capsys.readouterr().out) < 5000


def kept(checkpoint: dict, name: str) -> dict:
    """The state of a callback."""
    return next(state for key, state in checkpoint["callbacks"].items() if key.startswith(name))


def loop(checkpoint: dict, name: str) -> dict:
    return checkpoint["loops"]["fit_loop"][f"epoch_loop.{name}"]


def group(checkpoint: dict) -> dict:
    return checkpoint["optimizer_states"][0]["param_groups"][0]


def moments(checkpoint: dict, **changes) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state.update({name: make(state["exp_avg"]) for name, make in changes.items()})


def forged(trained: Path, path: Path, change) -> Path:
    """A checkpoint of the run in which something has been changed."""
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def cast(*dtypes: torch.dtype):
    """Changes the types of the first weights."""

    def change(checkpoint: dict) -> None:
        weights = checkpoint["state_dict"]
        for name, dtype in zip(list(weights), dtypes, strict=False):
            weights[name] = weights[name].to(dtype)

    return change


@pytest.mark.parametrize("dtypes", [[torch.complex64], [torch.float8_e4m3fn], [torch.int64], [torch.bfloat16]])
def test_weights_of_types_that_no_model_is_computed_in_are_refused(trained, tmp_path, dtypes):
    """A last one is of a type that would do, but the others are of another."""
    path = forged(trained, tmp_path / "odd.ckpt", cast(*dtypes))
    with pytest.raises(CheckpointError, match=rf"odd\.ckpt.* of {dtypes[0]}"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"odd\.ckpt"):
        evaluate(compose_run(tmp_path, f"ckpt_path={path}", f"paths.output_dir={tmp_path}", config_name="evaluate"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weights_that_are_no_fractions_are_not_gone_on_with(trained, tmp_path, dtype):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    forged(trained, folder / "checkpoints" / "step00000099.ckpt", cast(dtype))
    with pytest.raises(RunError, match=rf"step00000099\.ckpt cannot be gone on from: .* of {dtype}"):
        tiny_run(folder, "trainer.max_steps=9", f"ckpt_path={folder / 'checkpoints' / 'step00000099.ckpt'}")


def test_names_of_one_tensor_are_no_blocks(trained, tmp_path):
    """They cost next to nothing in a file, and a block each in memory."""

    def deep(checkpoint: dict) -> None:
        one = torch.zeros(1)
        checkpoint["config"]["model"]["depth"] = 3000
        checkpoint["state_dict"] = {f"net.blocks.{i}.{j}": one for i in range(3000) for j in range(3)}

    with pytest.raises(
        CheckpointError, match=r"deep\.ckpt.*model\.depth=3,000, but its tensors are those of at most 0"
    ):
        load_model(forged(trained, tmp_path / "deep.ckpt", deep))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_one_other_floating_type_are_taken(trained, tmp_path, dtype):
    path = forged(trained, tmp_path / "half.ckpt", cast(*[dtype] * 100))
    assert {weight.dtype for weight in load_model(path).state_dict().values()} == {dtype}


FORGED = {
    "a million blocks": lambda c: c["config"]["model"].update(depth=3_000_000),
    "no optimizer": lambda c: c["config"].pop("optimizer"),
    "an optimizer that is none": lambda c: c["config"].update(optimizer={"_target_": "os.system"}),
    "a state of no number": lambda c: c["optimizer_states"][0]["state"].update(x={}),
    "a state of no parameter": lambda c: c["optimizer_states"][0]["state"].update({10**6: {}}),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_cannot_be_resharded_is_an_error_that_names_the_file(trained, tmp_path, name, capsys):
    path = forged(trained, tmp_path / "forged.ckpt", FORGED[name])
    with watched(tmp_path, seconds=15):
        assert main(["reshard", str(path), str(tmp_path / "out.ckpt")]) == 2
    assert "forged.ckpt" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()


def test_names_of_files_are_shown_as_text(trained, tmp_path, caplog):
    """A folder of a stranger's, in which a name is a command to the terminal."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "final.ckpt").write_bytes(b"")
    (folder / "x\x1b[31m.ckpt").write_bytes(b"")
    for asked in (folder, folder / "nothing.ckpt", folder / "link.ckpt"):
        if asked.name == "link.ckpt":
            asked.symlink_to(folder / "\x1b[31mgone.ckpt")
        with pytest.raises(CheckpointError) as caught:
            load_model(asked)
        assert "\x1b" not in str(caught.value)
        assert "\\x1b[31m" in str(caught.value)
    assert "\x1b" not in caplog.text
    with zipfile.ZipFile(tmp_path / "parts.ckpt", "w") as archive:
        archive.writestr("x\x1b[31m", "what was written")
    content = (tmp_path / "parts.ckpt").read_bytes()
    (tmp_path / "parts.ckpt").write_bytes(content.replace(b"what was", b"what is "))
    assert "part x\\x1b[31m has changed" in str(problem_of(tmp_path / "parts.ckpt"))


STATES = {
    "a history that is none": lambda c: kept(c, "Guard").update(history=3),
    "a history of words": lambda c: kept(c, "Guard").update(history={"loss": ["a"] * 40, "grad_norm": []}),
    "steps that never end": lambda c: loop(c, "automatic_optimization.optim_progress")["optimizer"]["step"][
        "total"
    ].update(ready=-(10**9)),
    "a count that is a word": lambda c: loop(c, "batch_progress")["total"].update(ready="x"),
    "a count that is missing": lambda c: loop(c, "batch_progress")["total"].pop("ready"),
    "batches of other steps": lambda c: loop(c, "batch_progress")["total"].update(ready=7),
    "a schedule that is none": lambda c: c["lr_schedulers"][0].update(step=3),
    "a schedule without its optimizer": lambda c: c["lr_schedulers"][0].update(optimizer={}),
    "rates of a schedule that are words": lambda c: c["lr_schedulers"][0].update(base_lrs=["a"]),
    "a rate that is a word": lambda c: group(c).update(lr="x"),
    "groups of others": lambda c: c["optimizer_states"][0].update(param_groups=[{"params": [0]}]),
    "moments of one number": lambda c: moments(
        c, exp_avg=lambda m: torch.zeros(1), exp_avg_sq=lambda m: torch.zeros(1)
    ),
    "moments of another shape": lambda c: moments(c, exp_avg=lambda m: torch.zeros(*m.shape, 2)),
    "moments that are words": lambda c: moments(c, exp_avg=lambda m: "much"),
    "many steps at once": lambda c: moments(c, step=lambda m: torch.zeros(3)),
    "parameters that are words": lambda c: group(c).update(params=["a"] * len(group(c)["params"])),
    "kept by words": lambda c: kept(c, "Checkpoints").update(best_k_models={"a": "b"}),
    "kept that are none": lambda c: kept(c, "Checkpoints").update(best_k_models=5),
    "kept under no name": lambda c: kept(c, "Checkpoints").update(last_model_path=5),
    "a time without end": lambda c: c.update(seconds=10**400),
    "no time": lambda c: c.update(seconds=float("nan")),
    "a step without end": lambda c: c.update(global_step=10**300),
    "continued from tensors": lambda c: c.update(continued=[{"step": torch.zeros(1)}]),
    "callbacks that are a number": lambda c: c["config"].update(callbacks=5),
    "a schedule that is a number": lambda c: c["config"].update(scheduler=5),
    "a speed without end": lambda c: kept(c, "Throughput").update(tokens=10**400),
    "a speed that is no number": lambda c: kept(c, "Throughput").update(seconds=float("nan")),
    "time that runs backwards": lambda c: kept(c, "Throughput").update(waited=-1.0),
    "a weight of another shape": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): torch.zeros(3)}),
    "a weight too few": lambda c: c["state_dict"].pop(next(iter(c["state_dict"]))),
    "an end that is a kind of numbers": lambda c: c.update(ended={"why": "x", "step": torch.float32}),
    "an end at no step": lambda c: c.update(ended={"why": "x", "step": "y"}),
    "a pattern without end": lambda c: c["config"]["data"].update(pattern="[" * 20_000),
    "a function": lambda c: c["config"]["model"].update(mixers={"T": _rebuild_tensor_v2}),
    "words for a speed": lambda c: c["callbacks"].update(Throughput={"tokens": "x", "seconds": 1.0}),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_none_are_an_error_that_names_the_file(trained, tmp_path, name):
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    STATES[name](checkpoint)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(checkpoint, folder / "step00000003.ckpt")
    with watched(tmp_path, seconds=60), pytest.raises((RunError, ConfigError), match="step00000003"):
        tiny_run(tmp_path, *EVERY, "ckpt_path=auto")


def test_settings_of_the_optimizer_are_those_of_the_run(trained, tmp_path):
    """Of a checkpoint, moments are taken over; what its groups say of rates and decays is not."""
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    group(checkpoint).update(betas="ab", amsgrad=True, lr=1e9, eps=1e9, fused=None, surprise=1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(checkpoint, folder / "step00000003.ckpt")
    assert tiny_run(tmp_path, *EVERY, "ckpt_path=auto")["test/loss"] == pytest.approx(
        json.loads((trained / "results.json").read_text())["metrics"]["test/loss"], abs=1e-6
    )


# ---- how a file is put together -------------------------------------------------------------------------------------

PAIRS = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(45))
HEX = b"c_codecs\nencode\nq\x00X\x05\x00\x00\x00abcdeX\x06\x00\x00\x00latin1\x86Rq\x01"
HEX += b"".join(b"h\x00h%cX\x03\x00\x00\x00hex\x86Rq%c" % (i + 1, i + 2) for i in range(40))
STEPS = {
    "a key that is a pair of pairs of pairs": (PAIRS + b"}h\x2dK\x01s.", "a key that is neither"),
    "the same by many at once": (PAIRS + b"}(h\x2dK\x01u.", "a key that is neither"),
    "the name of numbers": (
        PAIRS + b"((X\x07\x00\x00\x00storageq\x60ctorch\nFloatStorage\nh\x2dX\x03\x00\x00\x00cpuK\x01tQ.",
        "asks for numbers in a way",
    ),
    "attributes of a dictionary": (
        PAIRS + b"ccollections\nOrderedDict\n)R](h\x2dK\x01\x86eb.",
        "changes what is no dictionary",
    ),
    "sizes again and again": (b"ctorch\nSize\n(K\x01K\x01K\x01t\x85R.", "a pickled object, torch.Size"),
    "numbers that are not there": (
        b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.",
        "calls class of storage",
    ),
    "the same in an OrderedDict": (
        PAIRS + b"ccollections\nOrderedDict\n](h\x2dK\x01\x86e\x85R.",
        "calls collections OrderedDict in a way",
    ),
    "whole numbers as keys, which can all have one hash": (
        b"}(" + b"".join(b"\x8a\x09" + (k * (2**61 - 1)).to_bytes(9, "little") + b"N" for k in range(1, 50)) + b"u.",
        "a number as a key",
    ),
    "a fraction as a key": (b"}G" + struct.pack(">d", 2.0**61) + b"K\x01s.", "a key that is neither"),
    "long keys, compared to the end": (
        b"}" + b"".join(b"X" + struct.pack("<L", 2000) + b"k" * 2000 + b"Ns" for _ in range(2)) + b".",
        "a key of more than 1,000 letters",
    ),
    "a set": (PAIRS + b"cbuiltins\nset\n]h\x2da\x85R.", "a pickled object, builtins.set"),
    "encodings of encodings": (HEX + b".", "a pickled object, _codecs.encode"),
    "more bytes than there are": (
        b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "a pickled object, builtins.bytearray",
    ),
}


def archive_of(trained: Path, path: Path, steps: bytes) -> Path:
    """A file of torch.save with other steps by which it is put together."""
    source = trained / "checkpoints" / "step00000003.ckpt"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in whole.namelist():
            archive.writestr(name, b"\x80\x02" + steps if name.endswith("data.pkl") else whole.read(name))
    return path


@pytest.mark.parametrize("name", STEPS)
def test_a_kilobyte_takes_no_time_and_no_memory(trained, tmp_path, name):
    steps, why = STEPS[name]
    path = archive_of(trained, tmp_path / "small.ckpt", steps)
    with watched(tmp_path, seconds=10), pytest.raises(CheckpointError, match=rf"small\.ckpt.*{why}"):
        load_model(path)
    with watched(tmp_path, seconds=10), pytest.raises(ConfigError, match=rf"small\.ckpt.*{why}"):
        replay(path, load_model(trained))


@pytest.mark.parametrize(
    "steps",
    [b"](" + b"}" * 2000 + b"e.", b"](" + b"X\2\0\0\0ab" * 2000 + b"e.", b"](" + b"N" * 9000 + b"e."],
    ids=["dictionaries", "words", "nothings"],
)
def test_a_file_holds_no_more_things_than_a_checkpoint(trained, tmp_path, monkeypatch, steps):
    """They are counted before they are made: a byte can stand for a hundred."""
    monkeypatch.setattr("src.checkpoints.plain.MOST_THINGS", 1000)
    monkeypatch.setattr("src.checkpoints.plain.MOST_STEPS", 8000)
    path = archive_of(trained, tmp_path / "small.ckpt", steps)
    with pytest.raises(CheckpointError, match=r"small\.ckpt.*more words, tensors and containers"):
        load_model(path)


def test_a_tensor_again_and_again_is_counted_each_time(trained, tmp_path, monkeypatch):
    """It can be made of five bytes that name what has been made before."""
    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\nq\0((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ"
    )
    call += b"K\0K\1\x85K\1\x85\x89ccollections\nOrderedDict\n)Rtq\1"
    monkeypatch.setattr("src.checkpoints.plain.MOST_THINGS", 1000)
    path = archive_of(trained, tmp_path / "small.ckpt", call + b"](" + b"h\0h\1R" * 300 + b"e.")
    with pytest.raises(CheckpointError, match=r"small\.ckpt.*more words, tensors and containers"):
        load_model(path)


@pytest.mark.parametrize("numbers", [10**9, -1])
def test_a_tensor_has_no_more_numbers_than_there_are(tmp_path, numbers):
    """PyTorch believes what a file says of how many there are, and would read what lies behind them in memory."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(300)}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(tmp_path / "odd.ckpt", "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("data.pkl"):
                said = b"J" + numbers.to_bytes(4, "little", signed=True)
                assert content.count(b"M\x2c\x01tq") == 1
                content = content.replace(b"M\x2c\x01tq", said + b"tq")
            archive.writestr(name, content)
    for source in (tmp_path / "odd.ckpt", io.BytesIO((tmp_path / "odd.ckpt").read_bytes())):
        with pytest.raises(pickle.UnpicklingError, match="more numbers than there are"):
            load_plain(source)


def test_a_file_of_another_format_in_front_of_an_archive_is_refused(trained, tmp_path):
    """PyTorch reads what begins with something else in another way, of which nothing has been looked at."""
    path = tmp_path / "two.ckpt"
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + (trained / "checkpoints" / "step00000003.ckpt").read_bytes())
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(pickle.UnpicklingError, match="not a checkpoint"):
            load_plain(source)


def test_moments_lie_one_number_after_another(trained):
    """A kernel goes through as many numbers as there should be, wherever those of the file lie."""
    stored = torch.zeros(100)
    overlapping = stored.as_strided((100,), (0,), 99)
    assert not is_filled(overlapping)
    assert not is_filled(stored.as_strided((50, 2), (1, 1)))
    assert is_filled(stored.view(10, 10).t())
    parameter = torch.nn.Parameter(torch.zeros(100))
    optimizer = AdamW([("a", parameter)], lr=0.1)
    optimizer.register_load_state_dict_pre_hook(check_loaded)
    state = {"step": torch.tensor(1.0), "exp_avg": overlapping, "exp_avg_sq": torch.zeros(200)[::2]}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [{"params": [0]}]})
    assert all(optimizer.state[parameter][name].stride() == (1,) for name in ("exp_avg", "exp_avg_sq"))
    parameter.grad = torch.ones(100)
    optimizer.step()
    assert not stored.any()


def test_a_format_that_is_a_pair_of_pairs_is_not_written_out(trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    torch.save(checkpoint | {"format": pairs()}, tmp_path / "odd.ckpt")
    with watched(tmp_path, seconds=10), pytest.raises(CheckpointError, match=r"odd\.ckpt.*a pair of pairs"):
        load_model(tmp_path / "odd.ckpt")


def test_attributes_of_a_tensor_or_a_dictionary_hide_nothing(trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    odd = torch.zeros(3)
    odd.numel = 5  # type: ignore[method-assign]
    torch.save(checkpoint | {"extra": odd}, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt.*_rebuild_from_type_v2"):
        load_model(tmp_path / "odd.ckpt")
    hiding = OrderedDict(checkpoint)
    hiding.get = 5  # type: ignore[assignment]
    torch.save(hiding, tmp_path / "hiding.ckpt")
    assert load_model(tmp_path / "hiding.ckpt").count_parameters() == load_model(trained).count_parameters()


def test_an_archive_with_two_directories_is_refused(trained, tmp_path):
    """One directory for who looks, another for who reads: a record of its end says where, and need not be where it says."""

    def end_64(entries: int, length: int, first: int) -> bytes:
        return struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, length, first)

    bomb, honest = tmp_path / "bomb.ckpt", io.BytesIO()
    source = trained / "checkpoints" / "step00000003.ckpt"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    content = bomb.read_bytes()
    end = content.rfind(b"PK\5\6")
    entries, length, first = struct.unpack("<HLL", content[end + 10 : end + 20])
    content, place = content[:end] + end_64(entries, length, first), end
    with zipfile.ZipFile(honest, "w") as archive:
        archive.writestr("archive/data.pkl", b"hello")
    shown = honest.getvalue()
    end = shown.rfind(b"PK\5\6")
    entries, length, first = struct.unpack("<HLL", shown[end + 10 : end + 20])
    directory = bytearray(shown[first : first + length])
    struct.pack_into("<L", directory, 42, len(content))
    content += shown[:first] + directory + end_64(entries, length, len(content) + first)
    content += struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
    bomb.write_bytes(
        content + struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    )
    assert [entry.compress_type for entry in zipfile.ZipFile(bomb).infolist()] == [zipfile.ZIP_STORED]
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt.*two directories"):
        load_model(bomb)


def test_archives_that_unpack_to_more_than_they_are(trained, tmp_path):
    """PyTorch stores; what is compressed is a bomb or somebody else's."""
    path = tmp_path / "bomb.ckpt"
    source = trained / "checkpoints" / "step00000003.ckpt"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w", method) as archive:
            for name in whole.namelist():
                archive.writestr(name, whole.read(name))
        assert "compressed" in str(problem_of(path))
        with pytest.raises(CheckpointError, match=r"bomb\.ckpt.*compressed"):
            load_model(path)
    sparse = tmp_path / "bomb.ckpt.sha256"
    with sparse.open("wb") as file:
        file.truncate(20 * 2**30)
    with watched(tmp_path, seconds=10):
        assert problem_of(path) is not None


def test_what_a_stranger_has_written_is_shown_as_text(trained, tmp_path, capsys):
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    checkpoint["config"]["name"] = "\x1b]0;mine\x07"
    checkpoint["config"]["model"]["\x1b[2J"] = 1
    del checkpoint["config"]["trainer"]["max_steps"]
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert main(["inspect", str(tmp_path / "odd.ckpt")]) == 0
    assert main(["verify", str(tmp_path / "odd.ckpt")]) == 0
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "odd.ckpt")
    shown = capsys.readouterr().out + str(caught.value)
    assert "\x1b" not in shown
    assert "mine" in shown
