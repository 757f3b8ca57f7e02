"""Reading of files with tensors: checkpoints of `torch.save`, and safetensors files.

Neither PyTorch nor safetensors detects changed bytes, so a flipped bit would become a weight. Here,
checksums are verified: the CRC-32 of each record of a checkpoint, which PyTorch writes but does not
verify, and the SHA-256 that `pack` writes into a safetensors file; for files without them, the
SHA-256 in their name. Files contain tensors and plain values, never code, and do not expand in
memory.
"""

import errno
import hashlib
import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from deformnet._errors import TOO_LARGE, UserError, lacks_memory
from deformnet._files import BoundedReader, naming, read_json, require_file

_MAX_PICKLE_BYTES = 1 << 24  # names and shapes of all tensors; 300 kB for ResNet-101 with SGD
_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
_GLOBALS = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in _STORAGES),
    "_codecs encode",
    "__builtin__ set",
    "builtins set",
}
"""Globals that a checkpoint may use. PyTorch allows more: tensors without their own data, and calls
that allocate any amount of memory, such as `bytearray(1 << 40)`."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DTYPES = dict(
    zip(
        (*_FLOATS, *_INTEGERS),
        ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL"),
        strict=True,
    )
)
"""Names of dtypes in a safetensors file."""
_DIGEST = "sha256"
_DIGEST_KEY = f'"{_DIGEST}":"'.encode()
_NO_DIGEST = b"0" * 64
_NAMED = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,})\.")  # digits alone are a date


def read_torch(path: Path, *, legacy: bool = False) -> object:
    """The content of a checkpoint of `torch.save`: tensors on the CPU, and plain Python values.

    Args:
        path: a file.
        legacy: also read the format of PyTorch 1.5 and older, which has no checksums.
    Raises:
        OSError: if the file does not exist or cannot be read.
        UserError: if it is damaged, contains anything else, or is a pipe or a device. The message
            does not contain the file name.
    """
    require_file(path)
    with naming(path), BoundedReader(path.open("rb", 0)) as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not is_archive and not legacy:
            raise UserError("not a zip archive of torch.save")
        if is_archive:
            _require_intact_checkpoint(file)
        else:
            if (problem := named_digest_problem(path)) is not None:
                raise UserError(problem)
            _require_plain_legacy(file)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types on unreadable content
            require_of_content(error)
            if is_archive and lacks_memory(error):  # at most the size of the file
                raise MemoryError(f"{path}: {TOO_LARGE}") from error
            raise UserError(f"not readable by PyTorch ({_reason(error)})") from error
    _require_unexpanded(content)
    return content


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, whose SHA-256 is verified: that in the card of an
    exported run, NAME.json, if there is one, and otherwise that in the metadata or in its name.

    Raises:
        OSError: if the file does not exist or cannot be read.
        UserError: if it is damaged, or a pipe or a device.
    """
    require_file(path)
    with naming(path), path.open("rb") as file:  # safetensors reports any failure as a missing file
        is_of_card = _compared_with_card(path, file)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        if lacks_memory(error):
            raise MemoryError(f"{path}: {TOO_LARGE}") from error
        raise UserError(f"{path}: damaged, or not a safetensors file") from error
    if not is_of_card:
        expected = metadata.get(_DIGEST)
        if expected is None:
            problem = named_digest_problem(path)
        else:
            is_intact = expected == _digest(path, expected)
            problem = None if is_intact else "its content does not match its SHA-256"
        if problem is not None:
            raise UserError(f"{path}: damaged, {problem}")
    return tensors, metadata


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its own SHA-256 in the metadata, for `read_safetensors`.

    The digest is computed with 64 zeros in its place. Equal arguments give equal bytes, and running
    out of memory raises an error; `safetensors.torch.save` shuffles the metadata, and aborts the
    process.
    """
    header: dict[str, object] = {
        "__metadata__": dict(sorted({**metadata, _DIGEST: _NO_DIGEST.decode()}.items()))
    }
    parts, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda it: (-it[1].itemsize, it[0])):  # aligned
        part = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        place = [end, end := end + part.nbytes]
        dtype = _DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": place}
        parts.append(part)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Names have escaped quotes, and cannot match the key.
    return sealed(b"".join([len(text).to_bytes(8, "little"), text, *parts]), _DIGEST_KEY)


def unpack(content: bytes, place: Path) -> dict[str, Tensor]:
    """The tensors in a file from `pack`, whose SHA-256 is verified. Faster than `read_safetensors`.

    Args:
        content: the content of the file.
        place: its path, for error messages.
    Raises:
        UserError: if it is damaged.
    """
    if not is_sealed(content, _DIGEST_KEY):
        raise UserError(f"{place}: damaged, its content does not match its SHA-256")
    return load(content)


def sealed(content: bytes, key: bytes) -> bytes:
    """A file with its own SHA-256 in place of 64 zeros after the first `key`."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return content.replace(key + _NO_DIGEST, key + digest, 1)


def is_sealed(content: bytes, key: bytes) -> bool | None:
    """Whether a file from `sealed` is unchanged; None if it has no SHA-256."""
    if (place := content.find(key)) < 0:
        return None
    start = place + len(key)
    end = start + len(_NO_DIGEST)
    digest = hashlib.sha256(memoryview(content)[:start])
    digest.update(_NO_DIGEST)
    digest.update(memoryview(content)[end:])
    return digest.hexdigest().encode() == content[start:end]


def named_digest_problem(path: Path) -> str | None:
    """Why a file is damaged, by the SHA-256 in its name; None if it is not, or its name has none.

    Names of published weights end with its first digits. In the cache of huggingface_hub, files are
    links to files that are named after it.
    """
    blob = path.readlink().name if path.is_symlink() else ""
    found = re.fullmatch("([0-9a-f]{64})", blob) or _NAMED.search(path.name)
    if found is None:
        return None
    with naming(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, _DIGEST).hexdigest()
    if digest.startswith(found[1]):
        return None
    return (
        f"expected the sha256 {found[1][:12]}... in its name, but got {digest[:12]}...; if its "
        f"name has no sha256, rename the file; otherwise, download {path.resolve()} again"
    )


def weights(state: object) -> dict[str, Tensor]:
    """Returns a state dict whose tensors a network can load.

    Raises:
        UserError: if it is not a dict from names to dense, finite tensors.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"expected a state dict, but got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise UserError(f"expected strings as tensor names, but got {name!r:.40}")
        if not isinstance(tensor, Tensor):
            raise UserError(f"expected {name} to be a tensor, but got {type(tensor).__name__}")
        if (problem := flaw(tensor)) is not None:
            raise UserError(f"expected {name} to be {problem}")
    return cast(dict[str, Tensor], dict(state))


def flaw(tensor: Tensor, *, finite: bool = True) -> str | None:
    """Why a tensor cannot be a weight, as the end of "expected NAME to be ..."; None if it can."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"a dense tensor, but got {tensor.layout} of {tensor.dtype}"
    if tensor.device.type != "cpu":
        return f"a tensor with data, but got one on {tensor.device}"
    if tensor.dtype not in (*_FLOATS, *_INTEGERS):
        return f"real numbers, but got {tensor.dtype}"
    if finite and tensor.dtype in _FLOATS and tensor.numel():
        extremes = tensor.detach().aminmax()  # propagates NaN; 30 times as fast as isfinite
        if not all(extreme.isfinite() for extreme in extremes):
            return "finite, but got NaN or infinity"
    return None


@contextmanager
def intact_archive(file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """A zip archive as PyTorch writes it, with the checksums of its records verified.

    Raises:
        UserError: if it is damaged, has compressed records, or the block fails because of its
            content. The message does not contain the file name.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            # PyTorch finds records by case-insensitive name, and by position in the file.
            if len({name.lower() for name in names}) < len(names) or records[0].header_offset:
                raise UserError("not a zip archive of PyTorch")
            if not all(map(_is_plain, records)) or sum(it.file_size for it in records) > size:
                raise UserError("expected uncompressed records, as PyTorch writes them")
            if (wrong := archive.testzip()) is not None:
                raise UserError(f"checksum mismatch in record {wrong}")
            yield archive
    except Exception as error:  # zipfile raises many types on a damaged archive
        require_of_content(error)
        raise UserError(f"not a readable archive ({_reason(error)})") from error


def _require_intact_checkpoint(file: IO[bytes]) -> None:
    with intact_archive(file) as archive:
        root = archive.namelist()[0].partition("/")[0]
        pickled = archive.getinfo(f"{root}/data.pkl")
        if pickled.file_size > _MAX_PICKLE_BYTES:
            raise UserError(f"expected at most {_MAX_PICKLE_BYTES >> 20} MB without tensors")
        _require_plain(archive.read(pickled))


def _is_plain(record: zipfile.ZipInfo) -> bool:
    """Whether a record is as PyTorch writes it: uncompressed, without attributes.

    For a record that is marked as a folder, PyTorch would return uninitialized memory.
    """
    return (
        record.compress_type == zipfile.ZIP_STORED
        and record.compress_size == record.file_size
        and record.flag_bits & ~0x808 == 0
        and record.external_attr == 0
        and record.volume == 0
        and not record.comment
    )


def _require_unexpanded(content: object) -> None:
    """Refuses expanded tensors, which a few bytes can blow up to terabytes."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise UserError(f"expected tensors in full, but got an expanded {value.shape}")
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)


def _require_plain(pickled: bytes) -> None:
    """Refuses a pickle with globals other than those of tensors and containers."""
    _plain_until(io.BytesIO(pickled))


def _require_plain_legacy(file: IO[bytes]) -> None:
    """The same for the legacy format: five pickles, then the data of the tensors."""
    try:
        for _ in range(5):
            _plain_until(file)
    except Exception as error:  # pickletools raises several types on invalid pickles
        require_of_content(error)
        raise UserError(f"not a checkpoint of torch.save ({_reason(error)})") from error


def _plain_until(file: IO[bytes]) -> None:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and argument not in _GLOBALS and not _is_dtype(argument):
            name = str(argument).replace(" ", ".")
            raise UserError(f"expected only dense tensors and plain values, but got {name}")


def _is_dtype(name: object) -> bool:
    return isinstance(getattr(torch, str(name).removeprefix("torch "), None), torch.dtype)


def _compared_with_card(path: Path, file: io.BufferedReader) -> bool:
    """Whether the file has a card; its SHA-256 is then verified.

    Raises:
        UserError: if the SHA-256 differs.
    """
    card_file = path.with_suffix(".json")
    try:
        card = read_json(card_file) if card_file.is_file() else None
    except UserError:  # another file, or a damaged one, which the reader of cards reports
        return False
    expected = card.get(_DIGEST) if isinstance(card, dict) else None
    if not isinstance(expected, str):
        return False
    digest = hashlib.file_digest(file, _DIGEST).hexdigest()
    if digest != expected:
        raise UserError(
            f"{path}: not the weights of its card: expected the sha256 {expected[:12]}... "
            f"of {card_file.name}, but got {digest[:12]}..."
        )
    return True


def _digest(path: Path, expected: str) -> str:
    """The SHA-256 of a safetensors file with zeros in place of its digest."""
    with naming(path), path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest = hashlib.sha256(length)
        digest.update(header.replace(_DIGEST_KEY + expected.encode(), _DIGEST_KEY + _NO_DIGEST, 1))
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def require_of_content(error: Exception) -> None:
    """Raises errors that are not caused by invalid content: those with a complete message, and
    those of memory and the system."""
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):  # a bad offset
        raise cause
    if isinstance(error, UserError | MemoryError):
        raise error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{text.splitlines()[0]:.100}" if text else type(error).__name__
