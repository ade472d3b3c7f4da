import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mllmfl_lite import plotting
from mllmfl_lite.teaching.tables import Gallery, Table, check, percent, safe


def test_check_answers_back():
    assert "Your turn" in check(None, lambda n: n == 4, "count again")
    assert check(4, lambda n: n == 4, "count again") == "Right!"
    assert check(5, lambda n: n == 4, "count again") == "Not yet. count again"


def test_tables_show_the_same_cells_everywhere():
    table = Table(["a", "b|c"], [["1", "2"], ["10", "x"]])
    assert repr(table).splitlines() == ["a   b|c", "1   2", "10  x"]
    assert table._repr_markdown_().splitlines() == ["| a | b\\|c |", "| --- | --- |", "| 1 | 2 |", "| 10 | x |"]
    with pytest.raises(ValueError, match="each row needs 2 cells"):
        Table(["a", "b"], [["1"]])


def test_percent():
    assert (percent(0.4567), percent(0.4567, 0.012), percent(None)) == ("45.7", "45.7\u00a0±\u00a01.2", "–")


def test_group_colours_follow_rank():
    colours = plotting.colours_by_group(np.array([1, 100, 10]))
    assert colours == [plotting.GROUP_COLOURS[g] for g in ("tail", "head", "middle")]


def test_methods_have_colours_and_markers_of_their_own():
    _, colours, markers = zip(*plotting.METHOD_STYLES.values(), strict=True)
    assert len(set(colours)) == len(set(markers)) == len(plotting.METHOD_STYLES)


def test_plots_draw_what_they_are_given():
    counts = np.array([[3, 0], [1, 2]])
    bubbles = plotting.split_bubbles(counts, ["a", "b"], "t").collections[0]
    assert bubbles.get_offsets().tolist() == [[0, 0], [0, 1], [1, 1]]
    assert [bar.get_height() for bar in plotting.class_bars(np.array([5, 2, 1]), list("abc"), "t").patches] == [5, 2, 1]
    history = [{"round": r, "metrics": {"top1": t} if t else None} for r, t in ((1, 0.1), (2, None), (3, 0.3))]
    line = plotting.learning_curves({"fedavg": [history, history]}, "t").lines[0]
    assert line.get_xdata().tolist() == [1, 3] and line.get_ydata().tolist() == pytest.approx([10, 30])
    seeds = [{"groups": {"head": h, "middle": 0.2, "tail": 0.1}} for h in (0.5, 0.7)]
    bars = plotting.group_accuracy_bars({"x": seeds}, "t").patches
    assert [bar.get_height() for bar in bars] == pytest.approx([60, 20, 10])
    plotting.image_rows({"row": np.zeros((2, 4, 4, 3), np.uint8)}, "t")
    plt.close("all")


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[a](javascript:alert(1))",
    "`x` $y$ **z** | w",
    "&lt;b&gt;",
)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_strangers_text_stays_text(hostile):
    import html

    shown = safe(hostile)
    assert not set(shown) & set("<>\"'`*[]|$") and html.unescape(shown) == hostile


def test_control_characters_and_long_texts_are_tamed():
    assert safe("a\x00b\x1b[31mc\u202ed\ne") == "ab&#91;31mcd\ne"
    long = safe("x" * 100_000)
    assert len(long) < 500 and long.endswith("… (100,000 characters)")


def test_a_gallery_shows_pictures_and_escaped_text():
    image = np.zeros((32, 32, 3), np.uint8)
    shown = Gallery([image], [{"said": "<b>bold</b>\nnew line"}], ['a "black" square'])._repr_html_()
    assert (
        shown.count("<img ") == 1 and "data:image/png;base64," in shown and 'alt="a &quot;black&quot; square"' in shown
    )
    assert "<b>bold" not in shown and "<br>new line" in shown
    with pytest.raises(ValueError, match="one alt text a picture: 1 pictures, 1, 0"):
        Gallery([image], [{}], [])
