"""Layers under the tools that people use on their models: the rows of docs/tools.md."""

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx import symbolic_trace
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torchvision.models.feature_extraction import create_feature_extractor

from deformnet import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d, deform_
from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

ROOT = Path(__file__).parents[2]
FUNC = "ops/test_func_transforms.py"
# Where the rows are tested; names of this file stand alone.
WHERE = {
    "`torch.compile`": "ops/test_compilers.py::test_fullgraph_with_inductor",
    "`torch.export`": "ops/test_compilers.py::test_export",
    "`torch.onnx.export`": "ops/test_onnx.py::test_convolutions_in_onnx_with_dynamic_shapes",
    "AOTInductor, C++ programs": (
        "ops/test_libtorch.py::test_a_compiled_program_runs_without_python"
    ),
    "`torch.jit.trace`": "nn/test_geometry.py::test_trace_works",
    "`torch.jit.script`": "test_scripted_functions_call_the_registered_operator",
    "`torch.fx.symbolic_trace`": "test_fx_has_one_node_for_a_layer",
    "`create_feature_extractor` of torchvision and timm": "test_feature_extractors",
    "FX graph mode quantization": "test_fx_quantization_keeps_the_layer",
    "`__torch_function__`": "test_torch_function",
    "`torch.func`: `grad`, `vjp`, `jacrev`, `hessian`": f"{FUNC}::test_jacobians_and_hessians",
    "`torch.vmap`, per-sample gradients": "test_gradients_of_each_sample",
    "Ensembles: `stack_module_state`": "test_ensembles",
    "`is_grads_batched`, `jacobian(vectorize=True)`": f"{FUNC}::test_batched_gradients",
    "Double backward, `gradgradcheck`": "ops/test_derivatives.py::test_gradgradcheck",
    "Forward mode: `torch.func.jvp`, `jacfwd`": "ops/test_derivatives.py::test_forward_mode",
    "`FlopCounterMode`": "ops/test_flops.py::test_a_converted_resnet18",
    "fvcore": "test_fvcore",
    "ptflops": "test_ptflops",
    "torchinfo": "test_torchinfo",
    "Networks that call torchvision's operator": (
        "compat/test_accelerate_torchvision.py::test_published_networks"
    ),
    "Pruning, weight and spectral norm": "test_pruning_and_parametrizations",
    "`AveragedModel`, `deepcopy`, pickle": "test_averaged_models",
    "`torch.utils.checkpoint`": "test_checkpointing",
    "`fuse_conv_bn_eval`": "test_batch_norm_is_fused",
    "safetensors": "test_safetensors",
    "DDP, FSDP2": "test_data_parallel",
    "Lightning Fabric": "engine/test_train.py::test_training_moves_the_weights_and_the_offsets",
    "accelerate": "test_accelerate",
    "timm": "models/backbones/test_timm.py::test_every_network_trains",
    "transformers": "test_transformers",
    "segmentation_models_pytorch": "test_segmentation_models",
    "captum": "test_captum",
    "mmengine": "test_mmengine",
    "peft (LoRA)": "test_lora",
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    layers = {"stem": nn.Conv2d(3, 4, 3, padding=1), "body": body, "head": nn.Conv2d(4, 2, 1)}
    model = nn.Sequential(OrderedDict(layers))
    deform_(model, "body.0", modulated=True)
    nn.init.normal_(body[0].conv_offset.weight, std=0.2)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(1))


def test_the_table_has_these_rows_and_tests():
    text = (ROOT / "docs/tools.md").read_text()
    rows = re.findall(r"^\| ([^|]+?) \| .* \|$", text, re.MULTILINE)[1:]
    assert rows == list(WHERE)
    for where in WHERE.values():
        file, _, name = where.rpartition("::")
        path = ROOT / "tests" / file if file else Path(__file__)
        assert f"def {name}(" in path.read_text(), where


# ------------------------------------------------------------------------------------------- graphs


def test_fx_has_one_node_for_a_layer(model, images):
    traced = symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["stem", "body.0", "body.1", "body.2", "head"]
    assert torch.equal(traced(images), model(images))
    assert torch.equal(copy.deepcopy(traced)(images), model(images))


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.ps_pool = DeformRoIPool2d(8, 2), DeformPSRoIPool2d(8, 2)

    def forward(self, maps: Tensor, boxes: Tensor) -> Tensor:
        return self.pool(maps, boxes)[:, :2] + self.ps_pool(maps, maps.relu(), [boxes[:, 1:]])


class Functions(nn.Module):
    def forward(self, maps: Tensor, boxes: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        maps = deform_conv2d(maps, offset, weight, padding=1, border="msra2017")
        pooled = deform_roi_pool(maps, boxes, None, 2, sampling="aligned")
        return pooled[:, :2] + deform_ps_roi_pool(maps, [boxes[:, 1:]], None, (2, 2))


def test_fx_has_nodes_for_pools_and_functions():
    maps, boxes = torch.randn(1, 8, 6, 6), torch.tensor([[0, 1.0, 1, 4, 5], [0, 0, 0, 3, 2]])
    pools = Pools()
    traced = symbolic_trace(pools)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["pool", "ps_pool"]
    assert torch.equal(traced(maps, boxes), pools(maps, boxes))

    inputs = maps, boxes, torch.randn(1, 18, 6, 6), torch.randn(8, 8, 3, 3)
    traced = symbolic_trace(Functions())
    targets = {node.target for node in traced.graph.nodes}
    assert {deform_conv2d, deform_roi_pool, deform_ps_roi_pool} <= targets
    assert torch.equal(traced(*inputs), Functions()(*inputs))


def test_fx_traces_models_and_not_the_layer_itself():
    message = "expected torch.fx to trace a model that contains the DeformConv2d"
    with pytest.raises(ValueError, match=message):
        symbolic_trace(DeformConv2d(3, 4, 3))


def test_feature_extractors(model, images):
    features = create_feature_extractor(model, ["body.0", "head"])(images)
    assert torch.equal(features["body.0"], model.body[0](model.stem(images)))
    assert torch.equal(features["head"], model(images))

    timm = pytest.importorskip("timm")
    from timm.models import create_feature_extractor as create_from_timm

    network = timm.create_model("test_resnet").eval()
    (name,) = deform_(network, "layer4.0.conv2")
    expected = []
    network.get_submodule(name).register_forward_hook(lambda *call: expected.append(call[2]))
    (found,) = create_from_timm(network, {name: "x"})(torch.randn(1, 3, 32, 32)).values()
    assert torch.equal(found, expected[-1])  # the first one is of the tracing


@pytest.mark.filterwarnings("ignore")
def test_fx_quantization_keeps_the_layer(model, images):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    expected = model(images)
    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (images,))
    prepared(images)
    quantized = convert_fx(prepared)
    assert type(quantized.get_submodule("body.0")) is DeformConv2d
    assert type(quantized.stem).__module__.startswith("torch.ao.nn.quantized")
    assert (quantized(images) - expected).abs().max() < 0.1 * expected.abs().max()


def test_torch_function():
    maps, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    offset, boxes = torch.zeros(1, 18, 5, 5), torch.tensor([[0, 0.0, 0, 3, 3]])
    seen = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Labeled(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    def call(maps: Tensor) -> None:
        seen.clear()
        results = [
            deform_conv2d(maps, offset, weight, padding=1),
            deform_roi_pool(maps, boxes, None, 2),
            deform_ps_roi_pool(maps, boxes, None, (2, 1)),
        ]
        assert [type(result) for result in results] == [type(maps)] * 3
        assert {deform_conv2d, deform_roi_pool, deform_ps_roi_pool} <= set(seen)

    with Log():
        call(maps)
    call(maps.as_subclass(Labeled))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_functions_call_the_registered_operator():
    def function(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.deformnet.deform_conv2d(
            input, offset, weight, None, None, [1, 1], [1, 1], [1, 1], "zeros"
        )

    inputs = torch.randn(1, 2, 5, 5), torch.randn(1, 18, 5, 5), torch.randn(3, 2, 3, 3)
    assert torch.equal(torch.jit.script(function)(*inputs), deform_conv2d(*inputs, padding=1))


# --------------------------------------------------------------------------------------- torch.func


def test_gradients_of_each_sample(model, images):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-4, atol=1e-5)


def test_ensembles(model, images):
    models = [model, copy.deepcopy(model)]
    for parameter in models[1].parameters():
        nn.init.normal_(parameter, std=0.3)
    parameters, buffers = stack_module_state(models)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(model, (parameters, buffers), (images,))

    expected = torch.stack([member(images) for member in models])
    torch.testing.assert_close(vmap(call)(parameters, buffers), expected)


# -------------------------------------------------------------------------------------------- FLOPs


@pytest.fixture
def resnet18() -> nn.Module:
    """Its convolutions have 148.05 million multiply-adds at 64x64, converted ones 149.21."""
    model = torchvision.models.resnet18().eval()
    deform_(model, "layer4.*.conv?")
    return model


def test_fvcore(resnet18):
    nn_ = pytest.importorskip("fvcore.nn")
    handles = pytest.importorskip("fvcore.nn.jit_handles")

    def flops(inputs, outputs):
        input, _, weight = map(handles.get_shape, inputs[:3])
        return handles.conv_flop_count(input, weight, handles.get_shape(outputs[0]))

    counter = nn_.FlopCountAnalysis(resnet18, torch.zeros(1, 3, 64, 64))
    counter.set_op_handle("deformnet::deform_conv2d", flops).unsupported_ops_warnings(False)
    assert counter.by_operator()["conv"] + counter.by_operator()["deform_conv2d"] == pytest.approx(
        149.21e6, abs=0.01e6
    )


def test_ptflops(resnet18):
    ptflops = pytest.importorskip("ptflops")
    from ptflops.pytorch_ops import conv_flops_counter_hook

    def count(hooks: dict) -> float:
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
        model = copy.deepcopy(resnet18)
        return ptflops.get_model_complexity_info(
            model, (3, 64, 64), custom_modules_hooks=hooks, **options
        )[0]

    with_hook, without = count({DeformConv2d: conv_flops_counter_hook}), count({})
    products = 4 * (256 + 3 * 512) * 512 * 9
    assert with_hook - without == products


def test_torchinfo(resnet18):
    torchinfo = pytest.importorskip("torchinfo")
    converted = torchinfo.summary(resnet18, (1, 3, 64, 64), verbose=0)
    plain = torchinfo.summary(torchvision.models.resnet18(), (1, 3, 64, 64), verbose=0)
    # It counts modules without children: the offsets' convolutions, and not the layers' products.
    assert converted.total_mult_adds < plain.total_mult_adds


# --------------------------------------------------------------------------------- around the layer


def test_pruning_and_parametrizations(model, images):
    for parametrize in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ):
        other = copy.deepcopy(model).double()
        parametrize(other.body[0])
        layer, x = other.body[0], other.stem(images.double())
        plain = DeformConv2d(4, 4, 3, padding=1, modulated=True).double()
        plain.load_state_dict(model.body[0].state_dict())
        plain.weight.data.copy_(layer.weight)
        torch.testing.assert_close(layer(x), plain(x))


def test_averaged_models(model, images):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.eval()(images), model(images))


def test_checkpointing(model, images):
    expected = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    for use_reentrant in (False, True):
        model.zero_grad()
        output = torch.utils.checkpoint.checkpoint(
            model, images.requires_grad_(), use_reentrant=use_reentrant
        )
        output.sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)


def test_safetensors(model, images, tmp_path):
    from safetensors.torch import load_model, save_model

    save_model(model, str(tmp_path / "model.safetensors"))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(images), model(images))


def test_batch_norm_is_fused(model, images):
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand_like(buffer.float()) + 0.5) if "running" in name else None
    expected = model(images)
    model.body[0] = nn.utils.fusion.fuse_conv_bn_eval(model.body[0], model.body[1])
    model.body[1] = nn.Identity()
    assert type(model.body[0]) is DeformConv2d
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel(model, images, one_process):
    from torch.distributed.fsdp import fully_shard

    expected = model(images).detach()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    sharded = fully_shard(
        copy.deepcopy(model), mesh=torch.distributed.init_device_mesh("cpu", (1,))
    )
    for parallel in (wrapped, sharded):
        output = parallel(images)
        output.sum().backward()
        torch.testing.assert_close(output, expected)
        assert all(parameter.grad is not None for parameter in parallel.parameters())


# ---------------------------------------------------------------------------------------- libraries


def initialize(model: nn.Module) -> None:
    """As mmengine: all convolutions first, then the children that initialize themselves."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight)
    for child in model.children():
        if hasattr(child, "init_weights"):
            child.init_weights()


def test_init_weights_restores_zero_offsets():
    layers = nn.ModuleList(
        [
            DeformConv2d(2, 3, 3, modulated=True),
            DeformConv2d(2, 3, 3, offset_conv="separable"),
            DeformRoIPool2d(2, 3),
            DeformPSRoIPool2d(2, 3),
        ]
    )
    initialize(layers)
    for layer in layers:
        offsets = [module for name, module in layer.named_children() if name.endswith("_offset")]
        assert len(offsets) == 1
        assert not offsets[0].weight.any()
    depthwise = layers[1].conv_offset.depthwise.weight
    assert depthwise.any()
    assert layers[0].weight.std() > 0.5  # of nn.init.normal_, not of the layer's own


def test_mmengine():
    model = pytest.importorskip("mmengine.model")

    class Block(model.BaseModule):
        def __init__(self) -> None:
            super().__init__({"type": "Constant", "layer": "Conv2d", "val": 1})
            self.conv = DeformConv2d(2, 3, 3)

    block = Block()
    block.init_weights()
    assert (block.conv.weight == 1).all()
    assert not any(parameter.any() for parameter in block.conv.conv_offset.parameters())


def test_accelerate(model, images):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    before = model.body[0].conv_offset.weight.clone()
    accelerator.backward(prepared(images).square().sum())
    optimizer.step()
    assert not torch.equal(model.body[0].conv_offset.weight, before)


def test_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
    network = transformers.ResNetBackbone(
        transformers.ResNetConfig(**sizes, layer_type="basic", out_features=["stage1", "stage2"])
    ).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = network(images).feature_maps
    assert deform_(network, "*.layer.1.convolution")
    for found, features in zip(network(images).feature_maps, expected, strict=True):
        torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-4)


def test_segmentation_models():
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = smp.Unet("resnet18", encoder_weights=None).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = network(images)
    assert deform_(network, "encoder.layer4.*.conv2")
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


def test_captum(model, images):
    attr = pytest.importorskip("captum.attr")
    gradients = attr.IntegratedGradients(lambda x: model(x).mean((2, 3)))
    found = gradients.attribute(images, target=1, n_steps=400)
    change = (model(images) - model(torch.zeros_like(images)))[:, 1].mean((1, 2))
    torch.testing.assert_close(found.sum((1, 2, 3)), change, rtol=0.02, atol=0.02)


class Wrapped(nn.Module):
    """Wraps a layer as peft does: without the attributes of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, maps: Tensor) -> Tensor:
        return self.base_layer(maps)


def test_offset_convolutions_in_a_wrapper(model, images):
    expected = model(images)
    model.body[0].conv_offset = Wrapped(model.body[0].conv_offset)
    assert torch.equal(model(images), expected)
    assert "offset_in_channels" not in repr(model)


def test_lora(model, images):
    """peft's branch is a plain convolution: merged, it is deformable and gives another output."""
    peft = pytest.importorskip("peft")
    offsets = peft.LoraConfig(
        target_modules=["body.0.conv_offset", "stem"], init_lora_weights=False
    )
    adapted = peft.inject_adapter_in_model(offsets, copy.deepcopy(model))
    expected = adapted(images)
    assert not torch.allclose(expected, model(images))
    for module in adapted.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    torch.testing.assert_close(adapted(images), expected, rtol=1e-4, atol=1e-4)

    layer = peft.LoraConfig(target_modules=["body.0"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(layer, copy.deepcopy(model))
    expected = adapted(images)
    adapted.body[0].merge()
    assert not torch.allclose(adapted(images), expected, rtol=1e-2)
