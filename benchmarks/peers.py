"""Other implementations of deformable convolution: forward, float32, on the CPU.

Converting the input tensors is part of a call; building the model is not.
"""

import tempfile
from pathlib import Path

import ncnn
import numpy as np
import onnx
import onnxruntime
import openvino
import openvino.opset8
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.calls import Forward
from benchmarks.shapes import Shape, Tensors


def with_onnxruntime(shape: Shape, tensors: Tensors, threads: int) -> Forward:
    feeds = {
        "x": tensors.input.detach().numpy(),
        "w": tensors.weight.detach().numpy(),
        "offset": tensors.offset.detach().numpy(),
    }
    node = helper.make_node(
        "DeformConv",
        list(feeds),
        ["y"],
        kernel_shape=[3, 3],
        pads=[shape.dilation] * 4,
        dilations=[shape.dilation] * 2,
        offset_group=shape.offset_groups,
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(feeds["x"].shape))
    model = helper.make_model(
        helper.make_graph([node], "deform_conv", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 22)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would keep spinning while the next implementation runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def with_openvino(shape: Shape, tensors: Tensors, threads: int) -> Forward:
    feeds = [tensors.input.detach().numpy(), tensors.offset.detach().numpy()]
    x, offset = (openvino.opset8.parameter(array.shape, np.float32) for array in feeds)
    d = [shape.dilation] * 2
    layer = openvino.opset8.deformable_convolution(
        *(x, offset, tensors.weight.detach().numpy(), [1, 1], d, d, d),
        deformable_group=shape.offset_groups,
        bilinear_interpolation_pad=True,
    )
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Its default would be bfloat16.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.compile_model(openvino.Model([layer], [x, offset]), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: torch.from_numpy(request.infer(feeds, share_inputs=True)[0])


def with_ncnn(shape: Shape, tensors: Tensors, threads: int) -> Forward | None:
    """None for several offset groups, which ncnn lacks. It processes one image at a time."""
    if shape.offset_groups != 1:
        return None
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    c, d = shape.channels, shape.dilation
    layer = (
        f"DeformableConv2D y 2 1 x offset y 0={c} 1=3 2={d} 3=1 4={d} 5=0 "
        f"6={tensors.weight.numel()} 11=3 12={d} 13=1 14={d} 15={d} 16={d}"
    )
    text = f"7767517\n3 3\nInput x 0 1 x\nInput offset 0 1 offset\n{layer}\n"
    # A flag for float32, then the weights.
    content = np.zeros(1, np.uint32).tobytes() + tensors.weight.detach().numpy().tobytes()
    with tempfile.TemporaryDirectory() as folder:
        params, weights = Path(folder, "net.param"), Path(folder, "net.bin")
        params.write_text(text)
        weights.write_bytes(content)
        if net.load_param(str(params)) or net.load_model(str(weights)):
            raise RuntimeError("ncnn: cannot load the layer")
    images = tensors.input.detach().numpy()
    offsets = tensors.offset.detach().numpy()

    def run() -> Tensor:
        output = torch.empty(images.shape)
        for i in range(shape.batch):
            extractor = net.create_extractor()
            extractor.input("x", ncnn.Mat(images[i]))
            extractor.input("offset", ncnn.Mat(offsets[i]))
            failed, found = extractor.extract("y")
            if failed:
                raise RuntimeError("ncnn: cannot run the layer")
            output[i] = torch.from_numpy(np.array(found, copy=False))
        return output

    return run
