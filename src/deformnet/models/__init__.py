"""Networks: tensors in, predictions and losses out."""

from deformnet._errors import require_extra

require_extra(__name__, "models", "torchvision", "timm", "safetensors", "numpy")

from deformnet.models.classifier import Classifier
from deformnet.models.deeplab import DeepLab
from deformnet.models.detection.detector import Candidates, Detections, Detector, Proposals, Target
from deformnet.models.detection.faster_rcnn import FasterRCNN
from deformnet.models.detection.postprocess import postprocess
from deformnet.models.detection.rfcn import RFCN
from deformnet.models.detection.rpn import RPN, RPNDetector
from deformnet.models.network import Network

__all__ = [
    "RFCN",
    "RPN",
    "Candidates",
    "Classifier",
    "DeepLab",
    "Detections",
    "Detector",
    "FasterRCNN",
    "Network",
    "Proposals",
    "RPNDetector",
    "Target",
    "postprocess",
]
