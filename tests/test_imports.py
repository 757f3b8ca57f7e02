"""Who may import whom, and what may be asked where: the rules that keep the house in one piece."""

import ast
import builtins
import sys
from pathlib import Path

import deformnet

ROOT = Path(deformnet.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the bottom to the top. A part imports parts of lower ranks: never up, never sideways.
RANKS = (
    ("_errors",),
    ("_files", "_text"),
    ("_hub",),
    ("ops",),
    ("nn",),
    ("compat",),
    ("models", "analysis"),
    ("recipes", "metrics", "data", "visualization"),
    ("tasks",),
    ("engine",),
    ("paper", "inspection"),
    ("demo",),
    ("deformnet",),  # the package itself, which names parts lazily
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}

# The light core: whoever installs deformnet for an operator or a layer needs PyTorch alone.
TORCH_ALONE = ("_errors", "_files", "_text", "ops", "nn", "analysis")
PACKAGES = {
    "compat": {"torch", "torchvision"},  # the latter inside accelerate_torchvision
    "models": {"torch", "torchvision", "timm", "safetensors", "numpy"},
    "recipes": set(),  # the command line reads recipes before anything heavy is needed
}
IMPLEMENTATIONS = {"reference", "cpu", "triton"}
# What differs between tasks is said in `tasks`: nothing above asks which kind it has.
ABOVE_TASKS = ("engine", "paper", "inspection", "demo", "cli")


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    names = set()
    package = [ROOT.name, *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*stem, *([node.module] if node.module else [])])
            # `from a import b` may name a module b, or a name in a: both count.
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return "deformnet" if first == "__init__.py" else first.removesuffix(".py")


def parts_imported(path: Path) -> set[str]:
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("deformnet.")}
    return parts & set(RANK)  # names such as deformnet.__version__ belong to no part


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_parts_import_lower_parts_only():
    assert len(FILES) > 100
    for path in FILES:
        part = part_of(path)
        assert part in RANK, f"{part} has no place in the order of imports: give it one"
        for other in parts_imported(path) - {part}:
            assert RANK[other] < RANK[part], f"{identifier(path)} imports {other}"


def test_lower_parts_need_few_packages():
    for path in FILES:
        part = part_of(path)
        if part not in TORCH_ALONE and part not in PACKAGES:
            continue
        packages = {name.split(".")[0] for name in imported(path)}
        foreign = packages - set(sys.stdlib_module_names) - {"deformnet"}
        allowed = PACKAGES.get(part, {"torch"})
        if part == "ops" and ("triton" in path.parent.name or path.stem.startswith("triton")):
            allowed = allowed | {"triton"}
        assert foreign <= allowed, identifier(path)


def test_drop_ins_need_torch_alone_until_called():
    for path in (ROOT / "compat").glob("*.py"):
        lines = path.read_text().splitlines()
        assert not [it for it in lines if it.startswith(("import torchvision", "from torchvision"))]


def is_operator(folder: Path) -> bool:
    return (folder / "reference.py").is_file()


def test_operators_and_implementations_are_independent():
    operators = {folder.name for folder in (ROOT / "ops").iterdir() if is_operator(folder)}
    assert {"deform_conv", "roi_pool"} <= operators
    for path in (ROOT / "ops").rglob("*.py"):
        own = path.parent.name
        for name in imported(path):
            parts = name.split(".")
            if parts[:2] != ["deformnet", "ops"] or len(parts) < 4 or parts[2] not in operators:
                continue
            if own in operators:
                assert parts[2] == own, f"an operator imports another's {name}"
            # What two implementations share lies in neither.
            kind, other = path.stem.split("_")[0], parts[3].split("_")[0]
            if kind in IMPLEMENTATIONS and other in IMPLEMENTATIONS:
                assert kind == other, f"{identifier(path)} imports {name}"


def asked_types(path: Path) -> set[str]:
    """The types that `isinstance` is asked about in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, kinds]):
                names.update(n.id for n in ast.walk(kinds) if isinstance(n, ast.Name))
                names.update(n.attr for n in ast.walk(kinds) if isinstance(n, ast.Attribute))
    return names


def own_types() -> set[str]:
    """Names of this package's classes of models, recipes, data, scores and tasks."""
    return {
        node.name
        for path in FILES
        if part_of(path) in ("models", "recipes", "data", "metrics", "tasks")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    } - set(dir(builtins))


def test_nothing_above_tasks_asks_what_kind_it_has():
    own = own_types()
    assert {"DeepLab", "RFCNRecipe", "SegmentationDataset"} <= own
    for path in FILES:
        if part_of(path) in ABOVE_TASKS:
            assert not asked_types(path) & own, identifier(path)
