"""The operators in a C++ program: libtorch.cpp registers them without Python."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deformnet.ops
from deformnet import DeformConv2d, DeformRoIPool2d
from deformnet.ops.cpu import loading

SOURCE = Path(deformnet.ops.__file__).with_name("libtorch.cpp")
TORCH = Path(torch.__file__).parent


def test_schemas_are_those_of_python():
    if not SOURCE.is_file():
        pytest.skip("an installed wheel has no C++ sources")
    calls = re.findall(r"library\.def\(([^;]*)\);", SOURCE.read_text())
    schemas = ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]
    assert len(schemas) == 2
    for schema in schemas:
        name = schema.partition("(")[0]
        python = str(getattr(torch.ops.deformnet, name).default._schema)
        declared = torch._C.parse_schema(f"deformnet::{schema}")
        assert str(declared) == python


class Network(nn.Module):
    """A network with both operators; two boxes are part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DeformConv2d(3, 8, 3, padding=1, modulated=True)
        nn.init.normal_(self.conv.conv_offset.weight, std=0.3)
        self.pool = DeformRoIPool2d(8, output_size=2, spatial_scale=1.0)
        self.register_buffer("boxes", torch.tensor([[0.0, 2, 3, 20, 15], [0, 5, 1, 30, 22]]))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # The convolution keeps channels-last.
        features = self.conv(image.contiguous(memory_format=torch.channels_last)).relu()
        return features, self.pool(features, self.boxes)


@pytest.mark.skipif(
    os.environ.get("DEFORMNET_TEST_LIBTORCH") != "1",
    reason="compiles for a minute: set DEFORMNET_TEST_LIBTORCH=1",
)
def test_a_compiled_program_runs_without_python(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    if not (TORCH / "include/torch/csrc/stable/library.h").is_file():
        pytest.skip("this PyTorch has no headers of the stable ABI")
    operators, program, package = (tmp_path / name for name in ("operators.so", "run", "net.pt2"))
    command = [compiler, "-std=c++20", "-isystem", TORCH / "include"]
    version = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    library = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", version]
    sources = [SOURCE, loading._library_file()]
    subprocess.run([*command, *library, *sources, "-o", operators], check=True)
    torch_library = TORCH / "lib"
    libraries = ["-Wl,--no-as-needed", f"-Wl,-rpath,{torch_library}", f"-L{torch_library}"]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    source = Path(__file__).with_name("libtorch_program.cpp")
    subprocess.run([*command, source, *libraries, "-o", program], check=True)

    torch.manual_seed(0)
    network, image = Network().eval(), torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        expected = torch.cat([output.flatten() for output in network(image)])
        exported = torch.export.export(network, (image,))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    (tmp_path / "image").write_bytes(bytes(image.untyped_storage()))
    subprocess.run(
        [program, operators, package, tmp_path / "image", tmp_path / "output"], check=True
    )
    output = torch.frombuffer(bytearray((tmp_path / "output").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
