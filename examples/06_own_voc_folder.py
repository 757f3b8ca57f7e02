"""
Train on your own folder
========================

Training needs a folder in the layout of PASCAL VOC, here with synthetic shapes. The command line
does the same (see :doc:`/command-line`):

.. code-block:: bash

    deformnet train deeplab --data DIR --out runs/mine --backbone resnet18 --iterations 2000
    deformnet evaluate runs/mine --data DIR --split val
    deformnet predict runs/mine photo.jpg --out predictions
"""

# %%
# A folder
# --------
# The folder contains images, label maps of class indices, a list of images for each split, and the
# names of the classes unless they are VOC's. Here all shapes are one class, to keep training short.

import tempfile
from pathlib import Path

from PIL import Image

from deformnet.data.synthetic import Shapes, scene

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
# ``deformnet data check DIR`` finds missing and damaged files in a folder.
#
# Train
# -----
# A recipe contains everything that determines the result: network, image size, schedule, seed.
# The run folder keeps a copy. Calling :func:`deformnet.engine.train` again resumes an interrupted
# run.

from deformnet.engine import Hardware, LoopOptions, evaluate, load, train
from deformnet.recipes import DeepLabRecipe

recipe = DeepLabRecipe(
    backbone="resnet18",
    deform_layers=3,
    short_side=64,
    max_side=None,
    batch=8,
    iterations=40,
    warmup=10,
    lr=0.03,
    offset_lr_scale=0.1,  # with random initial weights, faster offsets can leave the map
    clip=5.0,
)
run = folder / "run"
hardware, loop = Hardware(workers=0), LoopOptions(progress=False)
result = train(recipe, data, run, hardware=hardware, loop=loop)
print(sorted(path.name for path in run.iterdir()))
print(result)

# %%
# Forty iterations from random weights are not much. For photographs, start from pretrained weights
# (``init="IMAGENET1K_V1"``) and train for thousands of iterations.
#
# Evaluate and predict
# --------------------
# A run can be evaluated on any split, and loaded for prediction.

result = evaluate(run, data, split="train", hardware=hardware, progress=False)
print(result)

import matplotlib.pyplot as plt

from deformnet.data import VOCSegmentation
from deformnet.visualization import overlay

predictor = load(run)
images = VOCSegmentation(data, "val")
figure, axes = plt.subplots(3, 4, figsize=(8, 6.2), layout="constrained")
for number, column in enumerate(axes.T):
    image, label_map = images[number]
    shown = (
        image.permute(1, 2, 0).numpy(),
        overlay(image, label_map, images.classes),
        predictor(image).plot(),
    )
    for ax, picture in zip(column, shown, strict=True):
        ax.imshow(picture)
        ax.set(xticks=[], yticks=[])
for ax, name in zip(axes[:, 0], ("image", "ground truth", "prediction"), strict=True):
    ax.set_ylabel(name)
plt.show()
