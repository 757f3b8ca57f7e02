"""Training and scoring, on Lightning."""

from deformnet.training.proposals import propose
from deformnet.training.train import TrainingStopped, evaluate, train

__all__ = ["TrainingStopped", "evaluate", "propose", "train"]
