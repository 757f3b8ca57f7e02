"""The reader of files with tensors: damaged, hostile or unsuitable files are never used."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from damage import cases, flipped, result
from deformnet import UserError
from deformnet.models._tensors import flaw, pack, read_safetensors, read_torch, unpack, weights
from deformnet.models.backbones.weights import read_weights
from small_sets import one_line

CASES = cases(150)


def network() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    return dict(model.to(memory_format=torch.channels_last).state_dict())


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are bitwise identical."""
    return state.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.numpy().tobytes() == other[name].numpy().tobytes()
        for name, value in state.items()
    )


def as_torch(path: Path) -> None:
    torch.save({"state_dict": network(), "epoch": 3}, path)


def as_safetensors(path: Path) -> None:
    path.write_bytes(pack(network(), {"format": "pt"}))


def with_card(path: Path) -> None:
    """Without a checksum in the file, as other programs write it."""
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in network().items()})
    path.write_bytes(content)
    card = {"weights": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("write", "name"),
    [(as_torch, "a.pth"), (as_safetensors, "a.safetensors"), (with_card, "b.safetensors")],
)
def test_no_flipped_bit_is_used(write: Callable[[Path], None], name, tmp_path):
    path = tmp_path / name
    write(path)
    assert equal(read_weights(path), network())
    found = 0
    for content in flipped(path.read_bytes(), CASES):
        path.write_bytes(content)
        state = result(path, read_weights)
        assert state is None or equal(state, network())
        found += state is None
    assert found > CASES / 3


def test_truncated_files(tmp_path):
    for write, name in ((as_torch, "a.pth"), (as_safetensors, "a.safetensors")):
        path = tmp_path / name
        write(path)
        content = path.read_bytes()
        for length in range(0, len(content), 97):
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match="damaged"):
                read_weights(path)


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in records.items():
            made.writestr(name, content)
        for record in made.infolist():
            record.external_attr = 0  # as PyTorch writes it
    return file.getvalue()


def records() -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save({"a": torch.arange(10.0)}, file)
    with zipfile.ZipFile(file) as made:
        return {name: made.read(name) for name in made.namelist()}


def pickled(call: str, argument: object) -> bytes:
    """A pickle that calls a global, in protocol 2."""
    module, _, name = call.rpartition(".")
    arguments = pickle.dumps((argument,), 2)[2:-1]
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R."


def test_hostile_archives(tmp_path):
    good = records()
    (data,) = (name for name in good if name.endswith("data.pkl"))
    declared = good[data].replace(b"K\ntq", b"J" + struct.pack("<i", 2**31 - 1) + b"tq", 1)
    zeros = {data.replace("data.pkl", f"data/{n}"): bytes(10**6) for n in range(1, 9)}
    cases = {
        "record size": archive(good | {data: declared}),
        "uncompressed records": archive(good | zeros, zipfile.ZIP_DEFLATED),
        "bytearray": archive(good | {data: pickled("__builtin__.bytearray", 1 << 40)}),
        "FloatTensor": archive(good | {data: pickled("torch.FloatTensor", 1 << 40)}),
        "UntypedStorage": archive(good | {data: pickled("torch.storage.UntypedStorage", 1 << 40)}),
        "os.system": archive(good | {data: pickled("os.system", "touch ran")}),
        "not a zip archive": archive({**good, data.upper(): good[data]}),
        "at most 16 MB": archive(good | {data: bytes(1 << 25)}),
        "data.pkl": archive({name: value for name, value in good.items() if name != data}),
        "readable archive": b"PK\x03\x04 ",
    }
    path = tmp_path / "a.pth"
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_torch(path)
    path.write_bytes(archive(good))
    assert torch.equal(read_torch(path)["a"], torch.arange(10.0))


def test_no_bit_of_a_small_archive_changes_what_is_read(tmp_path):
    """Including the headers: one bit marks a record as a folder, for which PyTorch returns
    uninitialized memory."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(3.0)}, path)
    content = path.read_bytes()
    places = range(8 * len(content)) if CASES > 1000 else range(3, 8 * len(content), 23)
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        state = result(path, read_weights)
        assert state is None or equal(state, {"a": torch.arange(3.0)}), place


def test_other_kinds_of_tensors(tmp_path):
    dense = torch.ones(2, 2)
    kinds = {
        "sparse": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "meta": dense.to("meta"),
        "nested": torch.nested.nested_tensor([dense, dense]),
        "float8": dense.to(torch.float8_e4m3fn),
        "complex": dense.to(torch.complex64),
        "expanded": torch.ones(1).expand(1 << 20),
        "NaN": torch.tensor([1.0, float("nan")]),
        "infinity": torch.tensor([1.0, float("-inf")]).half(),
        "a string": "x",
        "a list": [1.0],
        "nothing": None,
    }
    path = tmp_path / "a.pth"
    for name, value in kinds.items():
        torch.save({"good": dense, "a": value}, path)
        with pytest.raises(UserError) as error:
            read_weights(path)
        assert str(path) in str(error.value), name
        assert "\n" not in str(error.value)
    for good in (dense.bfloat16(), dense.t(), dense[:, :0], torch.ones(()), torch.arange(3)):
        torch.save({"a": good}, path)
        assert torch.equal(read_weights(path)["a"], good)


def test_no_number_hides_from_the_search_for_nan():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for place in range(0, 1000, 7):
            tensor = torch.ones(1000, dtype=dtype)
            assert flaw(tensor) is None
            tensor[place] = float("nan") if place % 2 else float("inf")
            assert flaw(tensor) == "finite, but got NaN or infinity"


def test_the_format_without_an_archive(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(network(), path, _use_new_zipfile_serialization=False)
    assert equal(read_weights(path), network())
    with pytest.raises(UserError, match=r"not a zip archive of torch\.save"):
        read_torch(path)
    for content in flipped(path.read_bytes(), CASES // 5):  # it has no checksum
        path.write_bytes(content)
        state = result(path, read_weights)
        assert state is None or all(value.isfinite().all() for value in state.values())
    long = {"a" * (3 << 20): torch.ones(2)}  # a read of more than a MiB returns no more than asked
    torch.save(long, path, _use_new_zipfile_serialization=False)
    assert equal(read_torch(path, legacy=True), long)
    for code in (b"\x8d", b"\x8e", b"\x96"):  # a string, bytes and a bytearray of 2**62 bytes
        path.write_bytes(b"\x80\x05" + code + struct.pack("<Q", 1 << 62))
        with one_line(UserError, "not a checkpoint of torch.save"):
            read_torch(path, legacy=True)
    for call in ("__builtin__.bytearray", "torch.FloatTensor", "os.system"):
        path.write_bytes(pickled(call, 1 << 40))
        with pytest.raises(UserError, match=call.rpartition(".")[2]):
            read_torch(path, legacy=True)


@pytest.mark.parametrize("named", ["end of the name", "link"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_flipped_bit_is_used_if_the_name_has_a_digest(suffix, named, tmp_path):
    """Neither format has a checksum: as old files of torchvision, or as others' in Hub's cache."""
    if suffix == ".pth":
        torch.save(network(), path := tmp_path / "a", _use_new_zipfile_serialization=False)
    else:
        path = tmp_path / "a"
        safetensors.torch.save_file({k: v.contiguous() for k, v in network().items()}, path)
    digest = hashlib.sha256(content := path.read_bytes()).hexdigest()
    if named == "link":
        store, blob = tmp_path / ("f" * 64), tmp_path / digest  # blobs can be links themselves
        blob.symlink_to(path.rename(store))
        path = tmp_path / f"model{suffix}"
        path.symlink_to(blob)
    else:
        path = path.rename(tmp_path / f"net-{digest[:8]}{suffix}")
    assert equal(read_weights(path), network())
    for damaged in flipped(content, CASES // 5):
        path.write_bytes(damaged)
        assert result(path, read_weights) is None
    path.write_bytes(damaged := content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"expected the sha256 {digest[:8]}.* in its name") as error:
        read_weights(path)
    assert f"rename the file; otherwise, download {path.resolve()} again" in str(error.value)
    (renamed := tmp_path / f"a{suffix}").write_bytes(damaged)
    read_weights(renamed)


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    def refused(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for write, name in ((as_torch, "a.pth"), (as_safetensors, "a.safetensors")):
        write(path := tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refused)
            with pytest.raises(PermissionError) as error:
                read_weights(path)
        assert error.value.filename == str(path)
    os.mkfifo(tmp_path / "pipe.pth")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("pipe.pth", "pipe.safetensors"):
        with pytest.raises(UserError, match="expected a file, but got a pipe"):
            read_weights(tmp_path / name)


def test_failures_of_the_system_are_not_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    as_torch(path)

    def read(error: Exception) -> None:
        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "load", load)
        read_weights(path)

    with pytest.raises(MemoryError, match="too large for the memory"):
        read(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"))
    with pytest.raises(OSError, match="Input/output") as error:
        read(OSError(5, "Input/output error"))
    assert error.value.filename == str(path)
    with pytest.raises(UserError, match="damaged"):
        read(RuntimeError("bad content"))


def test_metadata_of_a_packed_file(tmp_path):
    path = tmp_path / "a.safetensors"
    for names in ("0" * 64, '"sha256":"' + "0" * 64):
        path.write_bytes(pack(network(), {"names": names}))
        state, metadata = read_safetensors(path)
        assert equal(state, network())
        assert metadata["names"] == names


def test_no_flipped_bit_of_a_packed_file_is_unpacked(tmp_path):
    tensors = {"maps": torch.arange(6, dtype=torch.float16).view(1, 2, 3), "none": torch.zeros(0)}
    content = pack(tensors, {"note": "sha256"})
    assert equal(unpack(content, tmp_path), tensors)
    damaged = [bytearray(content) for _ in content]
    for place, copy in enumerate(damaged):
        copy[place] ^= 1 << place % 8
    for copy in (*map(bytes, damaged), content[:-1], content[:8], b"", content + b"0"):
        with pytest.raises(UserError, match="damaged, its content does not match its SHA-256"):
            unpack(copy, tmp_path)


def test_names_are_strings(tmp_path):
    for state in ({1: torch.ones(1)}, OrderedDict({(): torch.ones(1)}), [torch.ones(1)], None):
        with pytest.raises(UserError, match="expected"):
            weights(state)


def test_equal_content_makes_equal_files():
    metadata = {"names": '["ä", "\\""]', "format": "pt", "x": ""}
    files = {pack({"b": torch.ones(3), "a": torch.zeros(2)}, metadata) for _ in range(20)}
    assert len(files) == 1


def test_safetensors_reads_what_is_packed():
    numbers = torch.arange(6).reshape(2, 3)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): numbers.to(dtype) for dtype in (*floats, *integers)}
    tensors |= {"number": torch.tensor(1.5), "none": torch.ones(0, 3), "transposed": numbers.t()}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3))
    found = safetensors.torch.load(pack(tensors, {}))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
