"""Training and scoring, on Lightning."""

from deformnet.training.train import TrainingStopped, evaluate, propose, train

__all__ = ["TrainingStopped", "evaluate", "propose", "train"]
