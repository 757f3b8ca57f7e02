"""Networks for tasks: tensors in, predictions and losses out."""

from deformnet.models.classifier import Classifier
from deformnet.models.deeplab import DeepLab
from deformnet.models.detector import Candidates, Detections, Detector, Proposals, Target
from deformnet.models.faster_rcnn import FasterRCNN
from deformnet.models.rfcn import RFCN
from deformnet.models.rpn import RPN, RPNDetector
from deformnet.models.selection import select

__all__ = [
    "RFCN",
    "RPN",
    "Candidates",
    "Classifier",
    "DeepLab",
    "Detections",
    "Detector",
    "FasterRCNN",
    "Proposals",
    "RPNDetector",
    "Target",
    "select",
]
