"""Training and scoring, on Lightning."""

from deformnet.engine.train import TrainingStopped, evaluate, propose, train

__all__ = ["TrainingStopped", "evaluate", "propose", "train"]
