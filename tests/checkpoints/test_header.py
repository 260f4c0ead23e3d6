"""Headers are read as safetensors writes them, and nothing else is believed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hostile import cases, json_object, odd_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save

from wemoe_plugin.checkpoints import tensors
from wemoe_plugin.checkpoints.header import ITEM_BYTES, build_header, read_header
from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.checkpoints.tensors import TORCH_DTYPE
from wemoe_plugin.errors import CheckpointError

STATE = {
    "b.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor(7, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
}


def test_the_bytes_of_a_header() -> None:
    header = build_header([("w", "F16", (2, 3)), ("b", "F16", ())], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"F16","shape":[],"data_offsets":[12,14]}}'
    )
    padding = -len(text) % 8
    assert header == (len(text) + padding).to_bytes(8, "little") + text + b" " * padding


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(STATE))
    stored = read_header(path)
    assert {n: t.shape for n, t in stored.items()} == {n: tuple(t.shape) for n, t in STATE.items()}
    with RangeReader({path: None}) as reader:
        for name, tensor in STATE.items():
            values = tensors.read(reader, stored[name], 0, stored[name].elements)
            assert values.dtype == tensor.dtype
            assert torch.equal(values.view(tensor.shape), tensor)
        assert tensors.read(reader, stored["b.weight"], 2, 3).tolist() == [2, 3, 4]


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=6
    )
)
def test_safetensors_reads_what_we_write(drawn: list[tuple[str, tuple[int, ...]]]) -> None:
    entries = sorted(((f"t{i}", d, s) for i, (d, s) in enumerate(drawn)), key=lambda e: -ITEM_BYTES[e[1]])
    size = sum(ITEM_BYTES[dtype] * torch.Size(shape).numel() for _, dtype, shape in entries)
    loaded = load(build_header(entries, {"format": "pt"}) + bytes(size))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in loaded.items()} == {
        name: (TORCH_DTYPE[dtype], shape) for name, dtype, shape in entries
    }


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(STATE)
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors: not a whole safetensors file"):
            read_header(path)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(data_offsets=[0, 4])}, "needs 8 bytes, its offsets 4"),
        ({"a": entry(data_offsets=[-8, 0])}, "not natural numbers"),
        ({"a": entry(data_offsets=[0, 8.0])}, "not natural numbers"),
        ({"a": entry(shape=[-2])}, "not natural numbers"),
        ({"a": entry(shape=[True, 2])}, "not natural numbers"),
        ({"a": entry(shape=[2**62, 2**62])}, "needs"),
        ({"a": entry(dtype="F8_E4M3")}, "has dtype 'F8_E4M3'; known"),
        ({"a": entry(more=1)}, "is not dtype, shape and data_offsets"),
        ({"a": entry(shape=[10**4000, 10**4000])}, "not natural numbers"),
        ({"a": entry(dtype=["F32"])}, "has dtype ['F32']; known"),
        ({"\ud800": entry()}, "cannot be the name of a tensor"),
        ({"7" * 5000: entry()}, "a tensor's name has 5,000 characters"),
        ({"a": 3}, "is not dtype, shape and data_offsets"),
        ({"a": entry(), "b": entry()}, "does not begin where the tensor before it ends"),
        ({"a": entry(data_offsets=[8, 16])}, "does not begin where"),
        ([1], "not a JSON object"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, message: str) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


names = st.sampled_from(['"a"', '"b"', '"c"', '"__metadata__"', '"\\ud800"', '"a\\u0000"', f'"{"7" * 5000}"'])
axes = st.sampled_from(["0", "1", "2", "3"]) | odd_json
offsets = st.sampled_from(["0", "4", "8", "12", "16", "24"]) | odd_json
lists = st.builds(lambda items: f"[{', '.join(items)}]", st.lists(axes | offsets, max_size=3))


@st.composite
def headers(draw: st.DrawFn) -> str:
    """A header as it should be, with any number of its values exchanged and its entries repeated."""
    entries, end = [], 0
    for name in draw(st.lists(names, max_size=4)):
        dtype, shape = draw(st.sampled_from(["F32", "I8"])), draw(st.lists(st.integers(0, 3), max_size=2))
        begin, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        entry = {'"dtype"': f'"{dtype}"', '"shape"': str(shape), '"data_offsets"': f"[{begin}, {end}]"}
        for key in draw(st.sets(st.sampled_from([*entry, '"more"']), max_size=1)):
            entry[key] = draw(lists | odd_json)
        entries.append((name, draw(st.just(json_object(list(entry.items()))) | odd_json)))
    return draw(st.just(json_object(entries)) | odd_json) if draw(st.integers(0, 9)) == 0 else json_object(entries)


@given(headers(), st.integers(0, 80))
@cases("headers")
def test_tensors_lie_in_the_file_and_apart_whatever_the_header_says(tmp_path: Path, header: str, size: int) -> None:
    path = tmp_path / "x.safetensors"
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    try:
        tensors = read_header(path).values()
    except CheckpointError:
        return
    end = 8 + len(text)
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        assert tensor.offset >= end
        end = tensor.offset + tensor.nbytes
    assert end <= path.stat().st_size


@given(st.binary(max_size=200))
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_header(path)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header claims 1,152,921,504,606,846,976 bytes"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(STATE))
    stored = read_header(path)
    with RangeReader({path: None}) as reader:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 4)
        last = max((t for t in stored.values() if t.elements), key=lambda tensor: tensor.offset)
        with pytest.raises(CheckpointError, match="it was changed during the merge"):
            tensors.read(reader, last, 0, last.elements)


def test_ranges_written_in_any_order_make_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    file = TensorFile(path, [("w", "F32", (4, 3)), ("b", "BF16", (2,))])
    tensors.write(file, "b", 0, torch.tensor([1.0, 2.0]))
    for start in (6, 0, 9, 3):
        tensors.write(file, "w", start, torch.arange(start, start + 3, dtype=torch.float64))
    file.sync()
    file.close()
    loaded = load_file(path)
    assert torch.equal(loaded["w"], torch.arange(12.0).view(4, 3))
    assert torch.equal(loaded["b"], torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert set(read_header(path)) == {"w", "b"}
