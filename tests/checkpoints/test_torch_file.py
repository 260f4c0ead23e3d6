"""Torch files are read where they lie, and no code in them ever runs."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import cases, refusal
from hypothesis import given
from hypothesis import strategies as st
from models import fine_tuned, open_clip_family, transformers_family
from safetensors.torch import load_file
from torch import Tensor, nn

from wemoe_plugin.checkpoints import tensors as torch_tensors
from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.tensors import read_tensors
from wemoe_plugin.checkpoints.torch_file import read_torch_header
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.pipeline.convert import convert
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

STATE = {
    "weight": torch.arange(12.0).view(3, 4),
    "half": torch.ones(5, dtype=torch.float16),
    "brain": torch.full((2,), 3.0, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.randn(2, 2)),
    "part": torch.arange(10.0)[3:7],
    "empty": torch.empty(0, 3),
}


def read(path: Path) -> dict[str, Tensor]:
    tensors = read_torch_header(path)
    with RangeReader({path: None}) as reader:
        return {name: torch_tensors.read(reader, t, 0, t.elements).view(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "name": "x", "optimizer": {"lr": [0.1]}},
        lambda state: {"module": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["plain", "training checkpoint", "nested twice", "data parallel"],
)
def test_reads_what_torch_writes(tmp_path: Path, wrap) -> None:  # type: ignore[no-untyped-def]
    torch.save(wrap(STATE), tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert list(found) == list(STATE)
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_shared_storages_stay_shared(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    torch.save({"a": whole, "b": whole[2:4], "c": whole}, tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert found["b"].tolist() == [2, 3]
    tensors = read_torch_header(tmp_path / "x.pt")
    assert tensors["a"].offset == tensors["c"].offset == tensors["b"].offset - 8


class Payload:
    """Would write a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.write_text, (self.path, "executed")


def test_a_file_that_needs_code_is_refused_and_can_be_converted(tmp_path: Path) -> None:
    path, victim = tmp_path / "x.pt", tmp_path / "executed"
    torch.save({"state_dict": STATE, "args": argparse.Namespace(a=1), "evil": Payload(victim)}, path)
    with pytest.raises(CheckpointError, match=r"must not run code; wemoe-merge convert .*x\.pt DIR reads its tensors"):
        open_checkpoint(path)
    assert convert(path, tmp_path / "out") == len(STATE)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in STATE.items())
    assert not victim.exists()


def test_converting_beside_a_configuration_gives_a_model(tmp_path: Path) -> None:
    (base,) = open_clip_family(tmp_path, 0)
    torch.save({"state_dict": base.state_dict()}, tmp_path / "epoch_1.pt")
    convert(tmp_path / "epoch_1.pt", tmp_path / "out", tmp_path / "base")
    model = load_model(tmp_path / "out")
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda p: torch.save(nn.Linear(2, 2), p), "needs torch.nn.modules.linear.Linear to be loaded"),
        (lambda p: torch.save({"a": torch.ones(2, 3).T}, p), "'a' is a view with stride"),
        (lambda p: torch.save({"epoch": 3}, p), "holds no state dict"),
        (lambda p: torch.save([1, 2], p), "holds no state dict"),
        (lambda p: torch.save(STATE, p, _use_new_zipfile_serialization=False), "not a torch file of version 1.6"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "not a torch file of version 1.6"),
        (lambda p: zipfile.ZipFile(p, "w").writestr("readme", "x"), "not one that torch.save wrote"),
        (lambda p: torch.jit.script(nn.Linear(2, 2)).save(str(p)), "a TorchScript archive"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_is_no_state_dict_is_refused(tmp_path: Path, save, message: str) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        read_torch_header(tmp_path / "x.pt")
    assert message in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "x.pt").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_torch_header(tmp_path / "x.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as source, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="its data is compressed"):
        read_torch_header(tmp_path / "x.pt")


def test_a_merge_of_torch_files_is_the_merge_of_their_tensors(tmp_path: Path) -> None:
    base, *experts = open_clip_family(tmp_path)
    training = {"state_dict": {f"module.{n}": t for n, t in experts[0].state_dict().items()}, "epoch": 1}
    torch.save(training, tmp_path / "epoch_1.pt")
    torch.save(experts[1].state_dict(), tmp_path / "e1" / "open_clip_pytorch_model.bin")
    (tmp_path / "e1" / "open_clip_model.safetensors").unlink()
    for name, models in (
        ("torch", "[{model: epoch_1.pt, name: e0}, {model: e1}]"),
        ("safe", "[{model: e0}, {model: s1}]"),
    ):
        (tmp_path / f"{name}.yaml").write_text(
            f"base_model: base\nmodels: {models}\nmerge_method: task_arithmetic\nparameters: {{lambda: 0.3}}\n"
        )
    convert(tmp_path / "e1" / "open_clip_pytorch_model.bin", tmp_path / "s1", tmp_path / "base")
    states = []
    for name in ("torch", "safe"):
        source = load_recipe(tmp_path / f"{name}.yaml")
        merge(source, plan_merge(source), tmp_path / f"out-{name}")
        states.append(load_file(tmp_path / f"out-{name}" / "open_clip_model.safetensors"))
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["visual.proj"], base.state_dict()["visual.proj"])


def test_transformers_torch_files_in_shards(tmp_path: Path) -> None:
    base, _ = transformers_family(tmp_path, 0)
    state = dict(fine_tuned(base, 0).state_dict())
    names = list(state)
    directory = tmp_path / "sharded"
    directory.mkdir()
    (directory / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    weight_map = {}
    for i, part in enumerate((names[:30], names[30:])):
        torch.save({name: state[name].clone() for name in part}, directory / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    import json

    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all(torch.equal(state[name], t) for name, t in read_tensors(open_checkpoint(directory)).items())


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickle(path: Path, data: bytes) -> None:
    """A torch file with one storage of 16 bytes and any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", bytes(16))


def lies_inside_or_is_refused(path: Path) -> None:
    def check(opaque: bool) -> None:
        for tensor in read_torch_header(path, opaque=opaque).values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= path.stat().st_size

    for read in (lambda: check(False), lambda: check(True)):
        message = refusal(read, CheckpointError)
        assert message is None or len(message.splitlines()) == 1


WHOLE = saved({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int8)})
DIRECTORY = WHOLE.index(b"PK\x01\x02")
places = st.integers(0, 400) | st.integers(DIRECTORY, len(WHOLE) - 1)
bytes_of_interest = st.sampled_from(b"\x00\x01\x7f\x80\xff(.)0RbscitBq") | st.integers(0, 255)


@given(st.lists(st.tuples(places, bytes_of_interest), min_size=1, max_size=6), st.integers(0, 3))
@cases("torch files")
def test_tensors_lie_in_the_file_whatever_its_bytes(tmp_path: Path, changes: list[tuple[int, int]], width: int) -> None:
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place : place + 1 + width] = bytes([byte]) * (1 + width)
    (tmp_path / "x.pt").write_bytes(data)
    lies_inside_or_is_refused(tmp_path / "x.pt")


def called(name: str) -> bytes:
    return f"c{name.replace(':', chr(10))}\n".encode()


STORAGE = b"(X\x07\x00\x00\x00storage" + called("torch:FloatStorage") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
TENSOR = called("torch._utils:_rebuild_tensor_v2") + b"(" + STORAGE + b"K\x00K\x02\x85K\x01\x85\x89" + b"}tR"
NAME = b"X\x01\x00\x00\x00w"
pieces = st.sampled_from(
    [
        *(TENSOR, STORAGE, NAME, NAME + TENSOR + b"s", b"}", b"]", b")", b"(", b"N", b"K\x01", b"J\xff\xff\xff\xff"),
        *(b"\x85", b"\x86", b"t", b"l", b"d", b"R", b"b", b"s", b"u", b"a", b"e", b"Q", b"0", b"2", b"\x81", b"\x8f"),
        *(b"\x90", b"\x91", b"\x93", b"o", b"q\x01", b"h\x01", b"r\xff\xff\xff\xff", b"\x8a\xff" + b"\x7f" * 255),
        *(
            b"X\x03\x00\x00\x00\xed\xa0\x80",
            b"}X\x06\x00\x00\x00offsetJ\xf0\xff\xff\xffsb",
            b"\x96" + b"\xff" * 5 + b"\x00" * 3,
        ),
        *(called("collections:OrderedDict") + b")R", called("torch:Size"), called("torch._utils:_rebuild_tensor_v2")),
        *(called("torch._utils:_rebuild_parameter"), called("builtins:exec") + b"V" + b"open('executed', 'w')\n\x85R"),
        *(called("os:system") + b"Vtouch executed\n\x85R", b"(Vtouch executed\nios\nsystem\n", called("torch:load")),
    ]
)


@given(st.lists(pieces, max_size=12), st.booleans())
@cases("pickles")
def test_a_pickle_calls_nothing_and_places_no_tensor_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: list[bytes], in_a_dict: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    body = b"".join(program)
    with_pickle(tmp_path / "x.pt", b"\x80\x02" + (b"}" + NAME + TENSOR + body + b"s." if in_a_dict else body + b"."))
    lies_inside_or_is_refused(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


DEEP = b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02}" + NAME + TENSOR + b"}X\x06\x00\x00\x00offsetJ\xf0\xff\xff\xffsbs.", None),
        (b"\x80\x02}" + NAME + TENSOR + b"s}X\x05\x00\x00\x00itemsK\x01sb.", None),
        (b"\x80\x02}r\xff\xff\xff\x7f" + NAME + TENSOR + b"s.", None),
        (b"\x80\x02}K\x01" + TENSOR + b"s.", "a tensor is named by a int"),
        (b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80" + TENSOR + b"s.", "cannot be the name of a tensor"),
        (b"\x80\x02\x96" + b"\xff" * 5 + b"\x00" * 3 + b".", "its pickle is damaged"),
        (DEEP, "a key of nested tuples"),
    ],
    ids=["changed tensor", "changed dict", "huge memo", "number as name", "no UTF-8", "huge bytes", "nested key"],
)
def test_a_pickle_cannot_harm_the_process(tmp_path: Path, data: bytes, message: str | None) -> None:
    with_pickle(tmp_path / "x.pt", data)
    found = refusal(lambda: read_torch_header(tmp_path / "x.pt"), CheckpointError)
    assert found is None if message is None else found is not None and message in found
    if found is None:
        assert read(tmp_path / "x.pt")["w"].tolist() == [0, 0]


def test_a_directory_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    with_pickle(tmp_path / "x.pt", b"\x80\x02}" + NAME + TENSOR.replace(b"K\x02\x85", b"J\x00\x00\x01\x00\x85") + b"s.")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    sizes = data.rindex(b"PK\x01\x02") + 20
    data[sizes : sizes + 8] = 2 * (1 << 20).to_bytes(4, "little")
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="the archive is damaged at 'w'"):
        read_torch_header(tmp_path / "x.pt")
