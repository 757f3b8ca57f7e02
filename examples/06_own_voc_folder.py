"""
Train on your own folder
========================

A folder in the layout of PASCAL VOC is all that training needs. Here it is made of drawn shapes.
The command line does the same (see :doc:`/command-line`):

.. code-block:: bash

    deformnet train deeplab --data DIR --out runs/mine --backbone resnet18 --iterations 2000
    deformnet evaluate runs/mine --data DIR --split val
    deformnet predict runs/mine photo.jpg --out predictions
"""

# %%
# A folder
# --------
# Images, label maps of class indices, a list for each split, and the names of the classes where
# they are not VOC's. Here the images come from the made data set, and all its shapes are one class:
# training is short.

import tempfile
from pathlib import Path

from PIL import Image

from deformnet.data.synthetic.shapes import Shapes, scene

folder = Path(tempfile.mkdtemp())
data = folder / "data"
voc = data / "VOCdevkit/VOC2012"
for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
    (voc / name).mkdir(parents=True)

shapes = Shapes(height=64, width=64, objects=(1, 2), radius=(0.25, 0.45), clutter=0, mute=0.9)
for split, count in (("train", 48), ("val", 8)):
    names = [f"{split}_{number}" for number in range(count)]
    for number, name in enumerate(names):
        drawn = scene(shapes, split, number)
        Image.fromarray(drawn.image).save(voc / f"JPEGImages/{name}.jpg")
        Image.fromarray((drawn.labels > 0).astype("uint8")).save(
            voc / f"SegmentationClass/{name}.png"
        )
    (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
(data / "classes.txt").write_text("background\nobject\n")

# %%
# What is missing or damaged in a folder, ``deformnet data check DIR`` finds; a whole made data set,
# ``deformnet shapes DIR`` writes.
#
# Train
# -----
# A recipe is all that decides the result: network, image size, schedule, seed. The run folder keeps
# it. Called again, :func:`deformnet.engine.train` continues a run that was stopped, and leaves
# one alone that is whole.

from deformnet.recipes import DeepLabRecipe
from deformnet.engine import evaluate, train

recipe = DeepLabRecipe(
    backbone="resnet18",
    deform_layers=3,
    short_side=64,
    max_side=None,
    batch=8,
    iterations=40,
    warmup=10,
    lr=0.03,
    offset_lr_scale=0.1,  # from random weights, faster offsets can leave the map
    clip=5.0,
)
run = folder / "run"
metrics = train(recipe, data, run, workers=0, progress=False)
print(sorted(path.name for path in run.iterdir()))
print(f"mean IoU {100 * metrics['mean_iou']:.1f} %")

# %%
# Forty iterations from random weights are few; for photographs one would start from a classifier's
# weights (``init="IMAGENET1K_V1"``) and train for thousands.
#
# Score and predict
# -----------------
# Any split can be scored later, and the run folder is also what predicts.

scores = evaluate(run, data, split="train", workers=0, progress=False)
print(f"mean IoU on the images it was trained on: {100 * scores['mean_iou']:.1f} %")

import matplotlib.pyplot as plt

from deformnet.data import VOCSegmentation
from deformnet.inference import SegmentationPredictor, overlay

predictor = SegmentationPredictor.from_run(run)
images = VOCSegmentation(data, "val")
figure, axes = plt.subplots(3, 4, figsize=(8, 6.2), layout="constrained")
for number, column in enumerate(axes.T):
    image, truth = images[number]
    shown = (
        image.permute(1, 2, 0).numpy(),
        overlay(image, truth, images.classes),
        overlay(image, predictor(image), images.classes),
    )
    for ax, picture in zip(column, shown, strict=True):
        ax.imshow(picture)
        ax.set(xticks=[], yticks=[])
for ax, name in zip(axes[:, 0], ("image", "truth", "prediction"), strict=True):
    ax.set_ylabel(name)
plt.show()
