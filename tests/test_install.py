"""An installation with PyTorch alone, made without a C++ compiler."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import deformnet

ROOT = Path(__file__).parent.parent

# Makes every package invisible that PyTorch itself does not need, as if it were not installed.
BLOCKER = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *place: (
    None if name.partition(".")[0] in {blocked!r} else find_spec(name, *place)
)
"""


def requirements(distribution: str) -> set[str]:
    """A distribution and all that it requires."""
    found, queue = set(), [distribution]
    while queue:
        name = re.split(r"[^\w.-]", queue.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        queue += [entry for entry in wanted if "extra ==" not in entry]
    return found


# Runs each line of code in a fork, which has PyTorch at once; prints its exit code and output.
FORKS = """
import json, os, sys, tempfile, torch, traceback

for line in sys.stdin:
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for stream, file in enumerate(files, 1):
                os.dup2(file.fileno(), stream)
            exec(json.loads(line), {"__name__": "__main__"})
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    print(json.dumps([code, *(file.read() for file in files)]), flush=True)
"""


def other_modules() -> set[str]:
    """Top-level modules of all packages but PyTorch, what it requires, and deformnet."""
    kept = requirements("torch") | {"deformnet", "setuptools", "pip"}
    modules = metadata.packages_distributions()
    return {
        module
        for module, names in modules.items()
        if not {name.lower().replace("_", "-") for name in names} & kept
    }


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs code on an installation of the package with PyTorch alone."""
    target, build = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("build")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    without_compiler = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    done = subprocess.run(
        [*command, str(target), f"--config-settings=build-dir={build}", str(ROOT)],
        capture_output=True,
        text=True,
        env=without_compiler,
        check=False,
    )
    if done.returncode and "Connection" in done.stderr:
        pytest.skip("the build's requirements cannot be downloaded")
    assert done.returncode == 0, done.stderr
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    # Without `site`, which would find the checkout that is being tested.
    program = [sys.executable, "-S", "-c", BLOCKER.format(blocked=other_modules()) + FORKS]
    paths = {"PYTHONPATH": os.pathsep.join([str(target), packages])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, cwd=target, env=os.environ | paths, **pipes) as forks:

        def run(code: str) -> subprocess.CompletedProcess[str]:
            print(json.dumps(code), file=forks.stdin, flush=True)
            return subprocess.CompletedProcess(code, *json.loads(forks.stdout.readline()))

        yield run


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_operators_layers_and_conversion_need_torch_alone(python):
    text = output_of(
        python("""
import torch
import deformnet
from deformnet import DeformConv2d, DeformRoIPool2d, deform_, parameter_groups
from deformnet.analysis import effective_dilation
from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

x = torch.randn(1, 4, 8, 8, requires_grad=True)
deform_conv2d(x, torch.zeros(1, 18, 8, 8), torch.randn(4, 4, 3, 3), padding=1).sum().backward()
boxes = torch.tensor([[0.0, 1, 1, 6, 6]])
deform_roi_pool(x, boxes, None, 2)
deform_ps_roi_pool(x, boxes, None, 2)
DeformRoIPool2d(4, output_size=2, spatial_scale=1.0)(x, boxes)
model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1))
before = model(x)
assert deform_(model, "0") == ["0"]
assert isinstance(model[0], DeformConv2d)
torch.testing.assert_close(model(x), before)
assert len(parameter_groups(model, lr=0.1))
assert list(effective_dilation(model, x)) == ["0"]
print(deformnet.__file__, x.grad.shape)
""")
    )
    assert str(ROOT) not in text


def test_a_missing_compiler_is_said_with_the_first_slow_call(python):
    done = python("""
import torch
from deformnet.ops import backends, deform_conv2d
x = torch.randn(1, 4, 8, 8)
deform_conv2d(x, torch.zeros(1, 18, 6, 6), torch.randn(4, 4, 3, 3))
print(backends.why_unavailable("cpu"))
""")
    reason = output_of(done)
    assert "no C++ compiler was found" in reason
    assert "reference" in done.stderr  # the warning
    assert reason.strip() in done.stderr


@pytest.mark.parametrize(
    ("code", "extra", "module"),
    [
        ("import deformnet.models", "models", "torchvision"),
        ("import deformnet; deformnet.models", "models", "torchvision"),
        ("import deformnet; deformnet.load", "train", "lightning"),
        ("import deformnet.tasks", "train", ""),
        ("import deformnet.metrics", "train", ""),
        ("import deformnet.visualization", "train", "matplotlib"),
    ],
)
def test_a_missing_extra_is_named(python, code, extra, module):
    done = python(code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"pip install 'deformnet[{extra}]'" in last
    assert module in last


def test_the_command_line_names_its_extra(python):
    done = python("from deformnet.cli import main; main(['--help'])")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("deformnet: ")
    assert "pip install 'deformnet[train]'" in line


def test_the_installed_files_are_the_package_and_its_license(python):
    files = output_of(
        python("""
from pathlib import Path
for file in Path().rglob("*"):
    if file.is_file() and "__pycache__" not in file.parts:
        print(file.as_posix())
""")
    ).split()
    folders = {file.partition("/")[0] for file in files}
    assert folders == {"bin", "deformnet", f"deformnet-{deformnet.__version__}.dist-info"}
    assert not [file for file in files if file.endswith((".cpp", ".h"))]
    assert any(file.endswith("/licenses/LICENSE") for file in files)
    assert "deformnet/py.typed" in files


def test_unknown_names_are_attribute_errors():
    for name in ("backbones", "inference", "training"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(deformnet, name)


@pytest.mark.parametrize(
    ("imported", "module"),
    [("deformnet", "torch"), ("deformnet.ops, deformnet.nn", "torch._dynamo")],
)
def test_the_import_is_light(imported, module):
    code = f"import sys, {imported}; print({module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {deformnet.__version__}\n" in citation
    assert metadata.version("deformnet") == deformnet.__version__


def test_types_are_published():
    assert (Path(deformnet.__file__).parent / "py.typed").is_file()
