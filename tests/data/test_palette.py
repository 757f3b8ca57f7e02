"""Files of class names and colors."""

import pytest

from deformnet.data.base import IGNORE
from deformnet.data.palette import VOID_COLOR, find_class_file, read_class_file, voc_colors
from small_sets import one_line

RED, BLACK, BLUE = (128, 0, 0), (0, 0, 0), (0, 0, 128)
VOID = (VOID_COLOR, IGNORE)


def write(path, content):
    path.write_text(content)
    return read_class_file(path)


def test_names(tmp_path):
    content = write(tmp_path / "classes.txt", "sky\n\n class 1 \ntraffic light\n3\n# not a class\n")
    assert content.names == ("sky", "class 1", "traffic light", "3")
    assert content.colors == content.ids == ()


def test_names_of_labelme(tmp_path):
    content = write(tmp_path / "class_names.txt", "_background_\ncat\n")
    assert content.names == ("background", "cat")


def test_labelmap_of_cvat(tmp_path):
    content = write(
        tmp_path / "labelmap.txt",
        "# label:color_rgb:parts:actions\n"
        "background:0,0,0::\n"
        "traffic light:128,0,0:head,foot:run\n",
    )
    assert content.names == ("background", "traffic light")
    assert content.colors == ((BLACK, 0), (RED, 1), VOID)
    assert content.ids == ()


def test_labelmap_without_colors(tmp_path):
    """Colors of VOC, as CVAT and Datumaro choose them."""
    content = write(tmp_path / "labelmap.txt", "background:::\ncat:::\n")
    assert content.colors == ((BLACK, 0), (RED, 1), VOID)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "sky 0 0 0\nwide road 128 0 0\n"),
        ("palette.txt", "sky\t0\t0\t0\nwide road\t128\t0\t0\n"),
        ("label_colors.txt", "0 0 0\tsky\n128 0 0\twide road\n"),
        ("label_colors.txt", "0 0 0 sky\n128 0 0 wide road\n"),
        ("class_dict.csv", 'name,r,g,b\n"sky",0,0,0\nwide road, 128, 0, 0\n'),
        ("palette.csv", "id;name;r;g;b\n0;sky;0;0;0\n1;wide road;128;0;0\n"),
        ("palette.csv", "sky,0,0,0,0\nwide road,128,0,0,1\n"),
    ],
)
def test_palettes(tmp_path, name, text):
    content = write(tmp_path / name, text)
    assert content.names == ("sky", "wide road")
    assert content.colors == ((BLACK, 0), (RED, 1), VOID)
    assert content.ids == ()


def test_ids_of_roboflow(tmp_path):
    content = write(tmp_path / "_classes.csv", "Pixel Value, Class\n0, background\n2, cat\n")
    assert content.names == ("background", "cat")
    assert content.ids == ((0, 0), (2, 1))
    content = write(tmp_path / "_classes.csv", "Pixel Value, Class\n0, background\n1, cat\n")
    assert content.ids == ()


def test_void_is_no_class(tmp_path):
    content = write(tmp_path / "palette.txt", "Void 0 0 0\nsky 128 0 0\n")
    assert content.names == ("sky",)
    assert content.colors == ((BLACK, IGNORE), (RED, 0), VOID)
    assert content.ids == ((0, IGNORE), (1, 0))


def test_class_of_two_colors(tmp_path):
    content = write(tmp_path / "palette.txt", "road 0 0 0\nlane 0 0 128\nroad 128 0 0\n")
    assert content.names == ("road", "lane")
    assert content.colors == ((BLACK, 0), (BLUE, 1), (RED, 0), VOID)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.txt", "# nothing\n", "expected class names, one per line, but found none"),
        ("classes.txt", "a\nb\na\n", "'a' more than once"),
        ("classes.txt", "void\n", "expected class names, one per line, but found none"),
        ("classes.txt", "sky 0 0 0\nroad 128 0\n", "'road 128 0'"),
        ("classes.txt", "sky 0 0 0\nroad 0 0 0\n", "sky and road both have (0, 0, 0)"),
        ("classes.txt", "sky 0 0 256\n", "0 to 255, but got 'sky 0 0 256'"),
        ("labelmap.txt", "sky:0,0::\n", "'sky:0,0::'"),
        ("labelmap.txt", "sky:0,0,x::\n", "'sky:0,0,x::'"),
        ("_classes.csv", "0, a\n0, b\n", "a unique id"),
        ("_classes.csv", "0, a\n300, b\n", "a unique id from 0 to 255"),
        ("classes.txt", "\n".join(map(str, range(256))), "at most 255 classes"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with one_line(ValueError, tmp_path / name, message):
        write(tmp_path / name, text)


def test_first_file_decides(tmp_path):
    inner = tmp_path / "masks"
    inner.mkdir()
    assert find_class_file([tmp_path, inner]) is None
    (inner / "classes.txt").write_text("inner\n")
    assert find_class_file([tmp_path, inner]).names == ("inner",)
    (tmp_path / "labelmap.txt").write_text("cvat:0,0,0::\n")
    assert find_class_file([tmp_path, inner]).names == ("cvat",)
    (tmp_path / "classes.txt").write_text("outer\n")
    assert find_class_file([tmp_path, inner]).names == ("outer",)


def test_colors_of_voc():
    colors = dict(voc_colors(21))
    assert len(colors) == 22
    assert colors[(192, 128, 128)] == 15
    assert colors[VOID_COLOR] == IGNORE
