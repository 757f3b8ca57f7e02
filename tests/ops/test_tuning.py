"""Autotuning of tiles: what is timed, what is stored, and what is not trusted."""

import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

import triton

from deformnet.ops.deform_conv import triton as kernels
from deformnet.ops.deform_conv.checks import Geometry
from deformnet.ops.deform_conv.triton_geometry import Tile
from deformnet.ops.deform_conv.triton_tiles import TILES, candidates
from deformnet.ops.triton import devices, tuning
from deformnet.ops.triton.devices import Kind, kind_of, uses_tf32


class Small(NamedTuple):
    rows: int
    warps: int


SLOW, FAST, BROKEN = Small(16, 4), Small(64, 8), Small(128, 8)
ON = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A simulated GPU; `Card.choose` defines how long its tiles run."""
    card = Card("NVIDIA H200 / 141 GB")
    module = SimpleNamespace(get_device_name=lambda device: card.name)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: run())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.delenv("DEFORMNET_AUTOTUNE", raising=False)
    tuning.forget()
    yield card
    tuning.forget()


class Card:
    def __init__(self, name: str) -> None:
        self.name, self.capturing, self.timed = name, False, []

    def choose(self, *tiles: Small, problem: str = "forward half 64") -> Small:
        def run(tile: Small) -> float:
            self.timed.append(tile)
            if tile == BROKEN:
                raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
            return {SLOW: 2.0, FAST: 1.0}[tile]

        return tuning.fastest(ON, problem, tiles, run)


def test_the_fastest_is_chosen_once_and_kept_for_later_processes(card, tmp_path):
    assert card.choose(SLOW, FAST) == FAST
    assert card.timed == [SLOW, FAST]
    assert card.choose(SLOW, FAST) == FAST
    tuning.forget()
    assert card.choose(SLOW, FAST) == FAST
    assert card.timed == [SLOW, FAST]
    assert card.choose(SLOW, FAST, problem="another") == FAST
    (file,) = (tmp_path / "deformnet").iterdir()
    assert len(json.loads(file.read_text())["tiles"]) == 2
    card.name = "another card"
    assert card.choose(SLOW, FAST) == FAST
    assert len(card.timed) == 6
    assert len(list((tmp_path / "deformnet").iterdir())) == 2


def test_tiles_that_do_not_run_are_not_chosen(card):
    assert card.choose(BROKEN, SLOW) == SLOW
    # The kernel's own launch then raises the error.
    assert card.choose(BROKEN, Small(128, 8), problem="another") == BROKEN


def test_a_single_candidate_is_not_timed(card):
    assert card.choose(SLOW) == SLOW
    assert card.timed == []


def test_what_turns_it_off(card, monkeypatch):
    assert card.choose(SLOW, FAST) == FAST
    card.timed.clear()
    monkeypatch.setenv("DEFORMNET_AUTOTUNE", "0")
    assert card.choose(SLOW, FAST) == SLOW
    monkeypatch.setenv("DEFORMNET_AUTOTUNE", "1")
    torch.use_deterministic_algorithms(True)
    try:
        assert card.choose(SLOW, FAST) == SLOW
    finally:
        torch.use_deterministic_algorithms(False)
    card.capturing = True
    # Known choices may be used.
    assert card.choose(SLOW, FAST) == FAST
    assert card.choose(SLOW, FAST, problem="another") == SLOW
    assert card.timed == []
    cpu = SimpleNamespace(device=torch.device("cpu"), is_cuda=False)
    assert tuning.fastest(cpu, "forward", [SLOW, FAST], print) == SLOW
    monkeypatch.setenv("DEFORMNET_AUTOTUNE", "no")
    with pytest.raises(ValueError, match="expected DEFORMNET_AUTOTUNE to be 0 or 1, but got 'no'"):
        card.choose(SLOW, FAST)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"card": "NVIDIA H200 / 141 GB", "tiles": {"forward half 64": [16',
        b"[" * 100_000,
        b"\xff\x00",
        b"[]",
        b'{"tiles": {"forward half 64": [16, 4]}}',
        b'{"card": "another card", "tiles": {"forward half 64": [16, 4]}}',
        b'{"card": "NVIDIA H200 / 141 GB", "tiles": [16, 4]}',
        b'{"card": "NVIDIA H200 / 141 GB", "tiles": {"forward half 64": [4096, 64]}}',
        b'{"card": "NVIDIA H200 / 141 GB", "tiles": {"forward half 64": {"rows": 16}}}',
        b'{"card": "NVIDIA H200 / 141 GB", "tiles": {"forward half 64": [NaN, 4]}}',
    ],
)
def test_files_of_other_cards_or_damaged_are_not_trusted(card, content):
    file = tuning._file(card.name)
    file.parent.mkdir()
    file.write_bytes(content)
    assert card.choose(SLOW, FAST) == FAST
    assert card.timed == [SLOW, FAST]
    tuning.forget()
    assert card.choose(SLOW, FAST) == FAST
    assert card.timed == [SLOW, FAST]


def test_a_folder_that_cannot_be_written_to_is_no_error(card, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file"))
    assert card.choose(SLOW, FAST) == FAST
    assert card.choose(SLOW, FAST) == FAST
    assert card.timed == [SLOW, FAST]


def test_two_processes_keep_what_both_found(card):
    card.choose(SLOW, FAST)
    other = tuning._file(card.name).read_text().replace("forward half 64", "found elsewhere")
    tuning._file(card.name).write_text(other)
    card.choose(SLOW, FAST, problem="another")
    tuning.forget()
    card.timed.clear()
    for problem in ("forward half 64", "found elsewhere", "another"):
        assert card.choose(SLOW, FAST, problem=problem) == FAST
    assert card.timed == []


@pytest.fixture
def problems_of(monkeypatch):
    """Problems by kernel, of both passes of a 1x1 convolution in two groups that does not run."""
    found = {}

    def fastest(on, problem, tiles, run):
        found[problem.split()[0]] = problem
        return tiles[0]

    monkeypatch.setattr(tuning, "fastest", fastest)
    monkeypatch.setattr(devices, "target", lambda: ("cuda", "90"))
    monkeypatch.setattr(kernels._Call, "launch", lambda *_: None)

    def problems(width=8191, offset_groups=1, masked=False, border="zeros", needs=(True,) * 5):
        def on_meta(channels):
            return torch.empty(1, channels, 4096, width, device="meta")

        input, offset = on_meta(64), on_meta(2 * offset_groups)
        weight = torch.empty(64, 32, 1, 1, device="meta")
        mask = on_meta(offset_groups) if masked else None
        geometry = Geometry((1, 1), (0, 0), (1, 1), border)
        found.clear()
        kernels.deform_conv2d(input, offset, weight, None, mask, geometry)
        kernels.deform_conv2d_backward(input, input, offset, weight, mask, geometry, needs)
        return dict(found)

    return problems


@pytest.mark.parametrize(
    "change",
    [
        {"width": 8192},  # 2**31 elements: wide indices
        {"offset_groups": 2},
        {"masked": True},
        {"border": "msra2017"},
        {"needs": (True, False, True, True, False)},
        {"needs": (False, True, True, True, True)},
    ],
    ids=str,
)
def test_problems_differ_where_the_compiled_code_does(problems_of, change):
    usual, other = problems_of(), problems_of(**change)
    every = ["forward", "positions", "weight"]
    assert list(usual) == list(other) == every
    differ = [kernel for kernel in every if usual[kernel] != other[kernel]]
    assert differ == (["positions"] if "needs" in change else every)
    # Maps of similar sizes share a choice.
    assert problems_of(width=8000) == usual


def test_kinds_of_gpus():
    targets = ["80", "86", "89", "90", "100", "103", "120"]
    kinds = [kind_of("cuda", architecture) for architecture in targets]
    assert kinds == [*[Kind.AMPERE] * 3, Kind.HOPPER, *[Kind.BLACKWELL] * 2, Kind.AMPERE]
    assert {kind_of("hip", f"gfx{number}") for number in ("90a", "942", "950")} == {Kind.CDNA}
    others = [("hip", "gfx1100"), ("hip", "gfx1201"), ("xpu", "{}"), ("maia", "1"), ("", "")]
    assert {kind_of(*target) for target in others} == {Kind.SMALL}


def test_tf32_is_asked_for_where_the_card_has_it():
    allowed = torch.backends.cudnn.allow_tf32
    try:
        for wanted in (True, False):
            torch.backends.cudnn.allow_tf32 = wanted
            assert uses_tf32("cuda", "80") == wanted
            assert uses_tf32("hip", "gfx942") == wanted
            assert not uses_tf32("hip", "gfx90a")
            assert not uses_tf32("hip", "gfx1100")
            assert not uses_tf32("xpu", "{}")
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("kind", Kind)
def test_tiles_of_every_kind_and_precision(kind):
    precisions = "half", "tf32", "float32", "float64"
    assert set(TILES[kind]) == {
        (kernel, precision)
        for kernel in ("forward", "positions", "weight")
        for precision in precisions
    }
    for (kernel, precision), tiles in TILES[kind].items():
        assert len(set(tiles)) == len(tiles) > 0
        for tile in tiles:
            assert all(size & (size - 1) == 0 and size >= 16 for size in tile[:3])
        assert candidates(kind, kernel, precision, 2**20, 2**20, 2**20) == tiles
        (smallest,) = {tile[:3] for tile in candidates(kind, kernel, precision, 1, 3, 5)}
        assert smallest == Tile(16, 16, 16, 0, 0)[:3]
