"""What chapters share: tables, plots, comparisons of seeds."""

import html
import re

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from scipy import stats

from mllmfl_lite.teaching import plotting
from mllmfl_lite.teaching.compare import (
    Difference,
    find_upwards,
    group_by_label,
    mean_and_spread,
    paired_difference,
    reported,
    seeds_needed,
)
from mllmfl_lite.teaching.explore import Explorable, bars, bubbles
from mllmfl_lite.teaching.tables import Gallery, Table, check, check_parameters, percent, safe


def test_check_answers_back():
    assert "Your turn" in check(None, lambda n: n == 4, "count again")
    assert check(4, lambda n: n == 4, "count again") == "Right!"
    assert check(5, lambda n: n == 4, "count again") == "Not yet. count again"


def test_tables_show_the_same_cells_everywhere():
    table = Table(["a", "b|c"], [["1", "2"], ["10", "x"]])
    assert repr(table).splitlines() == ["a   b|c", "1   2", "10  x"]
    assert table._repr_markdown_().splitlines() == ["| a | b&#124;c |", "| --- | --- |", "| 1 | 2 |", "| 10 | x |"]
    with pytest.raises(ValueError, match="each row needs 2 cells"):
        Table(["a", "b"], [["1"]])


def test_percent():
    assert (percent(0.4567), percent(0.4567, 0.012), percent(None)) == ("45.7", "45.7\u00a0±\u00a01.2", "–")
    assert percent(*mean_and_spread([0.4567])) == "45.7"


def test_group_colours_follow_rank():
    colours = plotting.colours_by_group(np.array([1, 100, 10]))
    assert colours == [plotting.GROUP_COLOURS[g] for g in ("tail", "head", "middle")]


def test_methods_have_colours_and_markers_of_their_own():
    _, colours, markers = zip(*plotting.METHOD_STYLES.values(), strict=True)
    assert len(set(colours)) == len(set(markers)) == len(plotting.METHOD_STYLES)


def test_plots_draw_what_they_are_given():
    seeds = [{"groups": {"head": h, "middle": 0.2, "tail": 0.1}} for h in (0.5, 0.7)]
    bars = plotting.group_accuracy_bars({"x": seeds}, "t").patches
    assert [bar.get_height() for bar in bars] == pytest.approx([60, 20, 10])
    for given, lines in ((seeds, 3), (seeds[:1], 0)):  # one seed has no spread
        ax = plotting.group_accuracy_bars({"x": given}, "t")
        assert len([one for one in ax.containers if isinstance(one, ErrorbarContainer)]) == lines
    plotting.image_rows({"row": np.zeros((2, 4, 4, 3), np.uint8)}, "t")
    plt.close("all")


def history(*top1):
    """Of rounds 1, 2, ...; None: not tested."""
    return [{"round": r, "metrics": t if t is None else {"top1": t}} for r, t in enumerate(top1, 1)]


def test_curves_are_drawn_over_the_rounds_that_all_seeds_tested():
    line = plotting.learning_curves({"fedavg": [history(0.1, None, 0.3), history(0.3, 0.9, 0.5, 0.9)]}, "t").lines[0]
    assert line.get_xdata().tolist() == [1, 3] and line.get_ydata().tolist() == pytest.approx([20, 40])
    plt.close("all")


def test_a_method_of_ones_own_has_a_style():
    ax = plotting.learning_curves({"mine": [history(0.1, 0.2)]}, "t")
    assert ax.get_legend_handles_labels()[1] == ["mine"]
    plt.close("all")


def test_a_group_that_no_test_image_has_is_left_out():
    seeds = [{"groups": {"head": 0.5, "middle": 0.2, "tail": None}}]
    heights = [bar.get_height() for bar in plotting.group_accuracy_bars({"x": seeds}, "t").patches]
    assert heights[:2] == [50, 20] and np.isnan(heights[2])
    plt.close("all")


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[a](javascript:alert(1))",
    "![a](x)",
    "`x` $y$ **z** | w",
    "&lt;b&gt;",
    "http://example.org",
)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_strangers_text_stays_text(hostile):
    cell = Table([hostile], [[hostile]])._repr_markdown_().splitlines()
    for shown in (safe(hostile), cell[0][2:-2], cell[2][2:-2]):
        assert not set(shown) & set("<>\"'`*[]|$") and "://" not in shown and html.unescape(shown) == hostile


def test_a_cell_stays_in_its_line():
    table = Table(["name\nof\u2028it", "b"], [["a\x1b[31m\r\n\u202eb", "c" * 1000]])
    assert table._repr_markdown_().splitlines()[0] == "| name of it | b |"
    assert table._repr_markdown_().splitlines()[2] == f"| a&#91;31m b | {'c' * 1000} |"
    assert len(repr(table).splitlines()) == 2 and repr(table).splitlines()[1].startswith("a[31m b ")


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
    with pytest.raises(ValueError, match="each image needs texts and an alt text; got 1, 1, 0"):
        Gallery([image], [{}], [])


def test_the_nearest_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert find_upwards("results") == tmp_path / "results" and find_upwards("b") == tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="there is no folder 'nowhere'"):
        find_upwards("nowhere")


def test_results_are_grouped_in_their_order():
    results = [{"label": label, "seed": seed} for label, seed in (("b", 0), ("a", 0), ("b", 1))]
    groups = group_by_label(results)
    assert list(groups) == ["b", "a"] and [one["seed"] for one in groups["b"]] == [0, 1]


def test_mean_and_spread():
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert np.isnan(mean_and_spread([1.0])[1])


def test_a_paired_difference_by_hand():
    """Mean 2, deviation 1, three pairs: t = 3.46 below 4.303, the interval 2 ± 4.303 / sqrt(3)."""
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found[:3] == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert found.verdict == "within chance" and found.p == pytest.approx(stats.ttest_rel([2, 4, 6], [1, 2, 3]).pvalue)
    assert paired_difference([1.5, 2.0, 2.5], [0, 0, 0]).verdict == "beyond chance"
    assert Difference(0.015, 0.006, -0.0234, 0.1).points == "+1.5 (+0.6\u00a0to\u00a0-2.3)"


def test_paired_differences_without_spread():
    assert paired_difference([0.5, 0.7], [0.5, 0.7]) == (0, 0, 0, 1)
    assert paired_difference([3.0, 5.0], [1.0, 3.0]) == (2, 2, 2, 0)
    one = paired_difference([3.0], [1.0])
    assert (one.mean, one.p) == (2, 1) and np.isnan(one.low)
    for ours, theirs in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="each seed needs a figure of both methods"):
            paired_difference(ours, theirs)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("points", "deviation"), [(5.0, 2.0), (-1.0, 1.5), (0.4, 0.03)])
def test_seeds_needed_find_the_difference_as_often_as_they_should(points, deviation, paired):
    """The same tests run on drawn figures: with n seeds at least 80 % find it, with one fewer not."""
    n = seeds_needed(points, deviation**2 if paired else 2 * deviation**2, 0.8, paired)
    draw = np.random.default_rng(0)

    def found(n):
        a, b = draw.normal(0, deviation, (2, 20_000, n))
        test = stats.ttest_1samp(b + points, 0, axis=1) if paired else stats.ttest_ind(b + points, a, axis=1)
        return np.mean(test.pvalue < 0.05)

    assert found(n) > 0.79 and (n == 2 or found(n - 1) < 0.81)


def test_seeds_needed_at_the_ends():
    assert seeds_needed(1.0, 0.0) == 2  # no spread: two always do
    assert seeds_needed(1e-9, 1.0) == 10_000
    # with one degree of freedom a shift of 32 deviations is found 98.8 times in 100, one of 55.4 nearly always
    assert [seeds_needed(p / 2**0.5, 1.0, 0.99, paired=True) for p in (32, 55.4)] == [3, 2]
    for wrong in ((0.0, 1.0, 0.8), (1.0, -1.0, 0.8), (1.0, 1.0, 1.0), (float("nan"), 1.0, 2.0)):
        with pytest.raises(ValueError, match="points must not be 0"):
            seeds_needed(*wrong)


def test_reported_figures_have_a_source():
    for entry in reported().values():
        assert entry["source"]


@pytest.mark.parametrize(
    ("value", "rule", "sentence"),
    [
        (8, (10, 100), "k must be a whole number from 10 to 100; got 8"),
        (10.0, (10, 100), "k must be a whole number from 10 to 100; got 10.0"),
        (True, (0, 1), "k must be a whole number from 0 to 1; got True"),
        ("0.5", (0.0, 1.0), "k must be a number from 0.0 to 1.0; got '0.5'"),
        (float("nan"), (0.0, 1.0), "k must be a number from 0.0 to 1.0; got nan"),
        (0.05, [0.0, 1.0], "k must be a list of numbers from 0.0 to 1.0; got 0.05"),
        ("1, 2", [1, 9], "k must be a list of whole numbers from 1 to 9; got '1, 2'"),
        ([], [1, 9], "k must be a list of whole numbers from 1 to 9; got []"),
        ([1], (1, 9), "k must be a whole number from 1 to 9; got [1]"),
        ("c", {"b", "a"}, "k must be one of 'a', 'b'; got 'c'"),
        (["a"], {"b", "a"}, "k must be one of 'a', 'b'; got ['a']"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_sentence(value, rule, sentence):
    with pytest.raises(ValueError) as error:
        check_parameters({"k": value}, k=rule)
    assert str(error.value) == sentence


def test_right_parameters_pass():
    values = {"a": 3, "b": 3, "c": 0.5, "d": [0.1, 1], "e": "word"}
    check_parameters(values, a=(1, 3), b=(0.0, 3.0), c=(0.5, 1.0), d=[0.05, 1.0], e={"word"})


def turning(**change):
    """Two knobs of two and three positions; a bar of their sum, and a row of as many bubbles as the second says."""
    one, row = bars("<sum>", ["a & b"], ["red"], 10), bubbles(["c"], ["blue"], 3, 16.0)
    given = {"knobs": {"x": [1, 2], "y": range(1, 4)}, "drawings": [one, row], "caption": "what & why",
             "at": lambda x, y: (f"</script>{x} and {y}", [x + y], np.full((1, y), 16 * x))}  # fmt: skip
    return Explorable(**given | change)


def test_an_explorable_holds_every_state_in_the_order_of_its_knobs():
    data, states = turning().data, [(x, y) for x in (1, 2) for y in (1, 2, 3)]
    assert data["says"] == tuple(f"</script>{x} and {y}" for x, y in states)
    assert data["knobs"] == [{"name": "x", "positions": ["1", "2"]}, {"name": "y", "positions": ["1", "2", "3"]}]
    for (x, y), values in zip(states, data["values"], strict=True):
        shown = "".join(map("".join, zip(data["shared"], [*values, ""], strict=True)))
        assert f'width="{10 * (x + y)}%"' in shown and f"<span>{x + y}</span></div>" in shown
        assert f'aria-label="{", ".join([str(16 * x)] * y)}"' in shown
        radii = [float(r) for r in re.findall(r'r="([^"]*)"', shown)]
        np.testing.assert_allclose(radii, [11 * x**0.25] * y + [0] * (3 - y), rtol=0.05)


@pytest.mark.parametrize(("start", "first"), [((), "2 and 3"), ((1, 2), "1 and 2")])
def test_an_explorable_stands_there_without_a_script(start, first):
    shown = turning(start=start)._repr_html_()
    visible = re.sub(r"<(script|style).*?</\1>", "", shown, flags=re.S)
    assert visible.count("<svg") == 2 and f"&lt;/script&gt;{first}" in visible
    assert "&lt;sum&gt;" in visible and "a &amp; b" in visible and "what &amp; why" in visible
    assert repr(turning(start=start)) == f"</script>{first}"
    assert shown.count("</script>") == 2 and "://" not in shown, "nothing gets out of a script, nothing is fetched"
    assert turning(start=start)._repr_html_() == shown, "outputs repeat"


def test_a_drawing_of_other_elements_is_refused():
    with pytest.raises(ValueError, match="the same elements in each state"):
        turning(drawings=[lambda of: "<b></b>" * of[0], str])


def test_a_bar_is_never_wider_than_its_place_and_says_what_is_missing():
    drawn = bars("t", ["a", "b", "c"], ["red"] * 3, 4)([float("nan"), 1000, 0.5])
    assert re.findall(r'width="([^"]*)"', drawn) == ["0%", "100%", "12.5%"]
    assert re.findall(r"<span>([^<]*)</span></div>", drawn) == ["–", "1,000", "0.5"]


def test_forty_rounds_of_ten_classes_are_light():
    panels = [bars(name, ["name"] * 10, ["#000000"] * 10) for name in "pq"]
    assert len(Explorable({"t": range(40)}, lambda t: ("x", [t] * 10, [2 * t] * 10), panels)._repr_html_()) < 60_000
