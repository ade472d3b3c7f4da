"""Draw the book's schematics: one set of glyphs for server, client, data and model, so that they always look the same.

python scripts/draw_figures.py          # writes book/figures/*.svg
"""

from pathlib import Path

from mllmfl_lite.teaching.plotting import GROUP_COLOURS

FIGURES = Path(__file__).parent.parent / "book" / "figures"
INK, QUIET, SERVER, CLIENT, LARGE, SMALL = "#1b2733", "#5d6b7a", "#e8eef6", "#f6f1e7", "#5b4b8a", "#00795a"
HEAD, MIDDLE, TAIL = GROUP_COLOURS.values()
RUST = "#a84a00"  # TAIL, dark enough for words
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def text(x, y, words, size=15, colour=INK, anchor="middle", weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{words}</text>'
    )


def lines(x, y, rows, size=13, colour=QUIET, anchor="middle"):
    return "".join(text(x, y + i * (size + 4), row, size, colour, anchor) for i, row in enumerate(rows))


def box(x, y, w, h, fill, stroke="none", radius=12, dash=""):
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{fill}" stroke="{stroke}"{dash}/>'


def arrow(x1, y1, x2, y2, colour=INK):
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{colour}" stroke-width="2.2" fill="none" marker-end="url(#tip)"/>'


def server(x, y, size=1.0):
    """A rack of three units."""
    units = "".join(
        box(0, 17 * i, 46, 14, "#33475b", radius=3) + f'<circle cx="8" cy="{17 * i + 7}" r="2.4" fill="#8fd3b6"/>'
        for i in range(3)
    )
    return f'<g transform="translate({x} {y}) scale({size})">{units}</g>'


def client(x, y, size=1.0):
    """A phone."""
    phone = box(0, 0, 30, 50, "#ffffff", INK, 6) + box(4, 7, 22, 32, CLIENT, "none", 2)
    return (
        f'<g transform="translate({x} {y}) scale({size})">{phone}<circle cx="15" cy="44.5" r="2.2" fill="{INK}"/></g>'
    )


def data(x, y, heights, bar=9, gap=2):
    """A histogram; bars in head, middle and tail colours. `y` is the base line."""
    third = [HEAD] * 4 + [MIDDLE] * 3 + [TAIL] * 3
    bars = "".join(
        f'<rect x="{x + i * (bar + gap)}" y="{y - h}" width="{bar}" height="{h}" rx="1.5" fill="{third[i]}"/>'
        for i, h in enumerate(heights)
    )
    width = 10 * (bar + gap)
    return bars + f'<path d="M{x - 3} {y + 1} h{width + 4}" stroke="{QUIET}" stroke-width="1.2"/>'


def small_model(x, y, size=1.0, colour=SMALL):
    """The compact model: three layers that narrow."""
    layers = "".join(box(13 * i, 5 * i, 9, 40 - 10 * i, colour, radius=2) for i in range(3))
    return f'<g transform="translate({x} {y}) scale({size})">{layers}</g>'


def large_model(x, y, w, h, words, frozen=True):
    """A large model; a dashed outline says that it is frozen."""
    return box(x, y, w, h, "#efecf8", LARGE, 10, "6 4" if frozen else "") + lines(
        x + w / 2, y + h / 2 + 5 - 8.5 * (len(words) - 1), words, 13.5, LARGE
    )


def save(name, width, height, title, *parts):
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / name).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{FONT}" role="img">'
        f"<title>{title}</title>"
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>'
        + box(0.5, 0.5, width - 1, height - 1, "#ffffff", "#dfe4ea", 14)
        + "".join(parts)
        + "</svg>\n",
        encoding="utf-8",
    )


HANDOVER = ["#5b4b8a", "#4f5789", "#436388", "#376f86", "#2a7b84", "#1e8780", "#0f817b", "#00795a"]  # LARGE to SMALL
ALL = [78, 47, 28, 17, 11, 8, 6, 4.5, 3.5, 3]


def clients_figure():
    hands = [
        ("client 1", [52, 9, 0, 6, 0, 0, 0, 0, 0, 0], ["mostly head"]),
        ("client 2", [11, 6, 21, 0, 9, 0, 5, 0, 0, 2], ["a mix"]),
        ("client 3", [0, 27, 0, 10, 0, 6, 0, 4, 3, 0], ["some tail"]),
    ]
    parts = [
        text(150, 40, "all images together", 15, weight="600"),
        data(92, 165, ALL, 10, 2),
        text(114, 188, "head", 13, HEAD),
        text(158, 188, "middle", 13, "#2b7fb0"),
        text(202, 188, "tail", 13, TAIL),
        text(150, 222, "nobody holds them all", 13, QUIET),
        text(284, 84, "dealt", 14, INK, weight="600"),
    ]
    for i, (name, heights, words) in enumerate(hands):
        y = 24 + 76 * i
        parts += [arrow(250, 132, 372, y + 34), box(384, y, 390, 66, CLIENT), client(400, y + 8)]
        parts += [
            text(447, y + 30, name, 14, anchor="start", weight="600"),
            lines(447, y + 48, words, 13, anchor="start"),
        ]
        parts += [data(600, y + 57, heights, 12, 3)]
    save("01_clients.svg", 800, 262, "All images are dealt to clients", *parts)


def rounds_figure():
    parts = [
        box(26, 24, 748, 92, SERVER),
        server(44, 45),
        text(104, 60, "server", 15, anchor="start", weight="600"),
        lines(104, 80, ["keeps the global weights w;", "sees no image"], 13, anchor="start"),
        small_model(330, 48),
        text(392, 66, "w", 19, SMALL, "start", "600"),
        text(520, 60, "4  take the weighted mean", 14, INK, "start", "600"),
        text(520, 84, "w ← Σ nₖ wₖ / Σ nₖ", 15, SMALL, "start"),
        lines(272, 152, ["1  draw some clients,", "send them w"], 14, INK),
        lines(528, 152, ["3  send wₖ back,", "keep the images"], 14, INK),
    ]
    hands = [[44, 8, 0, 6, 0, 0, 0, 0, 0, 0], [11, 6, 21, 0, 9, 0, 5, 0, 0, 2], [0, 27, 0, 10, 0, 6, 0, 4, 3, 0]]
    for i, heights in enumerate(hands):
        x = 26 + 256 * i
        middle = x + 118
        parts += [arrow(middle - 13, 120, middle - 13, 193), arrow(middle + 13, 194, middle + 13, 121)]
        parts += [box(x, 198, 236, 100, CLIENT), client(x + 14, 222), data(x + 60, 270, heights, 7, 1.6)]
        parts += [small_model(x + 168, 226, 0.9), text(x + 103, 290, f"n{'₁₂₃'[i]} images", 12.5, QUIET)]
        parts += [text(x + 186, 290, f"w{'₁₂₃'[i]}", 13.5, SMALL, weight="600")]
    parts += [text(400, 324, "2  each drawn client makes E passes of SGD over its own images", 14, INK, weight="600")]
    save("04_rounds.svg", 800, 342, "One communication round of federated averaging", *parts)


def stages_figure():
    parts = [
        box(20, 20, 300, 318, SERVER),
        box(340, 20, 220, 318, CLIENT),
        box(580, 20, 250, 318, SERVER),
        server(36, 36, 0.8),
        text(84, 50, "Stage 1 · pretrain", 15.5, INK, "start", "600"),
        lines(84, 68, ["on the server"], 13, anchor="start"),
        client(358, 32, 0.8),
        text(392, 50, "Stage 2 · finetune", 14.5, INK, "start", "600"),
        lines(394, 68, ["on the clients"], 13, anchor="start"),
        server(596, 36, 0.8),
        text(644, 50, "Stage 3 · align", 15.5, INK, "start", "600"),
        lines(644, 68, ["on the server"], 13, anchor="start"),
        # stage 1
        box(36, 104, 84, 52, "#ffffff", QUIET, 8),
        lines(78, 126, ["open web", "images"], 13, INK),
        arrow(122, 130, 150, 130),
        large_model(154, 100, 150, 60, ["multimodal LLM", "describes them"]),
        arrow(229, 162, 229, 188),
        large_model(154, 192, 150, 40, ["frozen LLM"]),
        large_model(36, 254, 84, 52, ["vision", "encoder"]),
        small_model(218, 262, 0.95),
        arrow(86, 250, 158, 232),
        arrow(236, 258, 232, 236),
        text(100, 222, "1 − α", 14, LARGE, weight="600"),
        text(252, 252, "α", 15, SMALL, weight="600"),
        text(170, 284, "α: 0 → 1", 13.5, INK),
        text(238, 326, "compact model", 12.5, SMALL),
        # stage 2
        arrow(290, 286, 368, 270),
        small_model(374, 250, 0.8),
        text(392, 312, "weights", 12.5, SMALL),
    ]
    for i, heights in enumerate(
        [[30, 8, 0, 6, 0, 0, 0, 0, 0, 0], [8, 4, 16, 0, 8, 0, 5, 0, 0, 3], [0, 20, 0, 9, 0, 7, 0, 5, 4, 0]]
    ):
        y = 96 + 54 * i
        parts += [client(438, y, 0.82), data(474, y + 36, heights, 5, 1.6)]
    parts += [
        text(492, 276, "long-tailed,", 13, QUIET),
        text(492, 293, "skewed;", 13, QUIET),
        text(492, 310, "images stay", 13, QUIET),
        # stage 3
        arrow(552, 262, 606, 262),
        small_model(612, 250, 0.95),
        large_model(668, 100, 148, 56, ["multimodal LLM", "as a teacher"]),
        data(602, 152, [16] * 10, 4, 1.4),
        text(628, 172, "balanced set", 12.5, QUIET),
        arrow(742, 160, 742, 196),
        box(672, 200, 140, 40, "#ffffff", SMALL, 8),
        text(742, 225, "CE + β · KL", 15, SMALL, weight="600"),
        arrow(672, 240, 652, 254),
        text(690, 284, "the final model", 13, INK, "start", "600"),
    ]
    save("three_stages.svg", 850, 358, "The three stages of the method", *parts)


def picture(x, y, side=64, cells=4):
    """A photograph, cut into patches."""
    sky, hull, sea = "#bcd7ee", "#8a5a3c", "#4f86b5"
    w = side / cells
    boat = (
        box(0, 0, side, side, sky, radius=3)
        + f'<rect y="{side * 0.62}" width="{side}" height="{side * 0.38}" fill="{sea}"/>'
        + f'<path d="M{side * 0.15} {side * 0.55} h{side * 0.7} l{-side * 0.12} {side * 0.16} h{-side * 0.46} z" '
        + f'fill="{hull}"/>'
        + f'<path d="M{side * 0.48} {side * 0.52} v{-side * 0.36} l{side * 0.26} {side * 0.36} z" fill="#ffffff"/>'
    )
    grid = "".join(
        f'<path d="M{i * w} 0 v{side} M0 {i * w} h{side}" stroke="#ffffff" stroke-width="1.4"/>'
        for i in range(cells + 1)
    )
    return f'<g transform="translate({x} {y})">{boat}{grid}</g>'


def row_of_tokens(x, y, count, colour, size=16, gap=4):
    return "".join(box(x + i * (size + gap), y, size, size, colour, radius=3) for i in range(count))


def llava_figure():
    words = ["What", "is", "it", "?"]
    parts = [
        picture(30, 44),
        text(62, 132, "a picture,", 13, QUIET),
        text(62, 148, "in patches", 13, QUIET),
        arrow(104, 76, 134, 76),
        large_model(140, 40, 130, 72, ["vision encoder", "(from a CLIP)"]),
        arrow(274, 76, 304, 76),
        row_of_tokens(310, 68, 4, "#c9c0e6"),
        text(348, 58, "one token a patch", 12.5, QUIET),
        arrow(394, 76, 424, 76),
        box(430, 48, 112, 56, "#ffffff", LARGE, 8),
        lines(486, 72, ["projector", "two layers"], 13, LARGE),
        arrow(546, 76, 576, 76),
        row_of_tokens(582, 68, 4, LARGE),
        text(622, 58, "visual tokens", 12.5, QUIET),
        text(30, 242, "a question", 13, QUIET, "start"),
        arrow(622, 94, 322, 192),
    ]
    for i, word in enumerate(words):
        parts += [box(110 + 50 * i, 224, 44, 26, "#ffffff", QUIET, 5), text(132 + 50 * i, 242, word, 12.5)]
    parts += [
        row_of_tokens(240, 192, 4, LARGE),
        arrow(310, 237, 380, 224),
        arrow(326, 202, 380, 212),
        large_model(386, 180, 190, 76, ["language model", "(a Llama)"], frozen=False),
        arrow(580, 218, 612, 218),
        lines(694, 204, ["“It is a boat.”", "one token after", "the other"], 13.5, INK),
        text(290, 282, "picture and words reach the language model as vectors of one kind", 13, INK),
    ]
    save("02_llava.svg", 790, 302, "How a LLaVA is put together", *parts)


def handover_figure():
    parts = [
        picture(24, 96),
        text(62, 184, "an open picture", 13, QUIET),
        arrow(98, 112, 138, 78),
        arrow(98, 144, 138, 180),
        large_model(144, 40, 128, 66, ["vision encoder", "f, frozen"]),
        box(284, 46, 62, 54, "#ffffff", LARGE, 8, "6 4"),
        lines(315, 78, ["P_clip"], 13, LARGE),
        small_model(166, 160, 1.1),
        lines(244, 176, ["compact", "model g"], 13, SMALL),
        box(284, 154, 62, 54, "#ffffff", SMALL, 8),
        lines(315, 186, ["P_s"], 13, SMALL),
        row_of_tokens(362, 66, 4, LARGE, 15),
        row_of_tokens(362, 174, 4, SMALL, 15),
        text(400, 54, "× (1 − α)", 14, LARGE),
        text(400, 212, "× α", 14, SMALL),
        arrow(444, 78, 476, 116),
        arrow(444, 178, 476, 140),
        text(490, 136, "+", 24, INK, weight="600"),
        arrow(504, 128, 536, 128),
        large_model(542, 84, 120, 88, ["language", "model, frozen"]),
        text(602, 62, "“Describe the picture.”", 12.5, QUIET),
        arrow(602, 68, 602, 82),
        arrow(664, 128, 684, 128),
        lines(738, 114, ["how likely is", "“A blue boat.”,", "the annotation?"], 12, INK),
        '<path d="M740 166 C740 262 420 262 220 226" stroke="#D55E00" stroke-width="2" fill="none" '
        'stroke-dasharray="7 4" marker-end="url(#tip)"/>',
        text(560, 262, "gradients train g and P_s alone", 13, RUST),
        text(24, 300, "α = 0", 13, LARGE, "start", "600"),
        *[box(78 + 16 * i, 288, 14, 14, colour, radius=0) for i, colour in enumerate(HANDOVER)],
        box(78 + 16 * len(HANDOVER), 288, 638 - 16 * len(HANDOVER), 14, HANDOVER[-1], radius=0),
        text(800 - 24, 300, "α = 1", 13, SMALL, "end", "600"),
        text(400, 326, "in the first fifth of the steps, the compact model replaces the vision encoder", 13, QUIET),
    ]
    save("03_handover.svg", 800, 344, "Dynamic Weighted Pretraining replaces the vision encoder", *parts)


def scarce_figure():
    rows = [("10 %", 10), ("2 %", 2), ("1 %", 1)]
    parts = [
        server(36, 60, 1.1),
        lines(62, 136, ["pretrained on", "open pictures", "and words"], 13),
        small_model(130, 68, 1.1),
        arrow(180, 90, 248, 130),
        text(120, 236, "or from random weights", 13, QUIET),
        small_model(100, 186, 0.8, "#9aa5b1"),
        arrow(180, 204, 248, 158),
        '<path d="M272 44 H260 V244 H272" stroke="#5b6670" stroke-width="2" fill="none"/>',
    ]
    for i, (name, share) in enumerate(rows):
        y = 46 + 72 * i
        parts += [text(290, y + 26, name, 15, INK, weight="600")]
        parts += [box(320 + 23 * j, y + 10, 19, 22, HEAD if j < share else "#e6eaee", radius=3) for j in range(10)]
    parts += [
        text(434, 26, "labelled pictures (a box is one per cent)", 13, QUIET),
        arrow(566, 128, 612, 128),
        lines(704, 104, ["how many epochs", "to a target?", "how far", "in the end?"], 14, INK),
    ]
    save("07_scarce.svg", 800, 262, "The same training from two starts, with few labels", *parts)


def alignment_figure():
    parts = [
        box(20, 20, 230, 224, SERVER),
        text(135, 46, "open web images", 15, INK, weight="600"),
        large_model(52, 62, 166, 50, ["the teacher says", "what it sees"]),
        arrow(135, 116, 135, 146),
        data(82, 202, [44, 20, 12, 30, 8, 26, 14, 34, 10, 22], 9, 2),
        lines(135, 224, ["most confident of each class"], 12.5),
        arrow(254, 132, 296, 132),
        box(300, 20, 220, 224, SERVER),
        text(410, 46, "balanced server set", 15, INK, weight="600"),
        data(356, 132, [52] * 10, 9, 2),
        lines(410, 160, ["y: the teacher's first choice", "q: its whole answer"], 13, INK),
        lines(410, 210, ["no client's image,", "no human label"], 12.5),
        arrow(524, 132, 566, 132),
        box(570, 20, 220, 224, SERVER),
        text(680, 46, "the federated model", 15, INK, weight="600"),
        small_model(610, 72, 1.1),
        text(700, 100, "answers p", 14, INK),
        box(594, 140, 172, 40, "#ffffff", SMALL, 8),
        text(680, 165, "CE(y, p) + β · KL(q ‖ p)", 12.5, SMALL, weight="600"),
        lines(680, 210, ["finetuned for", "some epochs"], 12.5),
    ]
    save("05_alignment.svg", 810, 264, "Global alignment on a balanced set that the teacher chose", *parts)


def chain(steps, height):
    """Boxes in a row, an arrow between each and the next: (name, what it is, fill, colour of the name) for each."""
    parts = []
    for i, (name, rows, fill, colour) in enumerate(steps):
        x = 12 + 160 * i
        parts += [box(x, 20, 138, height, fill), text(x + 69, 52, name, 15.5, colour, weight="600")]
        parts += [lines(x + 69, 84, rows, 13, INK)]
        if i < len(steps) - 1:
            middle = 20 + height // 2
            parts.append(arrow(x + 140, middle, x + 156, middle))
    return parts


def pipeline_figure():
    steps = [
        ("annotations", ["what the MLLM says", "of web pictures"], SERVER, LARGE),
        ("pretrained", ["the compact model", "after stage 1"], SERVER, SMALL),
        ("federated", ["after the rounds", "of stage 2"], CLIENT, SMALL),
        ("aligned", ["after stage 3"], SERVER, SMALL),
        ("results", ["figures, seeds,", "revision, device"], "#f2f4f6", INK),
    ]
    under = text(400, 166, "one folder: what is there, with the same settings, is not made again", 13.5, QUIET)
    save("06_pipeline.svg", 812, 184, "Five files, one after the other, in one folder", *chain(steps, 118), under)


def retrained(name, title, on_client, on_server):
    """What CReFF and CLIP2FL share: a client's second upload, synthetic features, a new last layer."""
    parts = [
        box(18, 20, 232, 258, CLIENT),
        client(32, 34, 0.9),
        text(70, 56, "each client", 15, INK, "start", "600"),
        data(169, 74, [34, 8, 0, 16, 0, 0, 0, 4, 0, 0], 6, 1.4),
        *on_client,
        arrow(254, 120, 326, 120),
        arrow(254, 196, 326, 196),
        lines(290, 108, ["weights"], 13),
        lines(290, 184, ["gradients"], 13, RUST),
        box(332, 20, 222, 258, SERVER),
        server(346, 34, 0.8),
        text(394, 56, "synthetic features", 15, INK, "start", "600"),
        data(382, 130, [40] * 10, 10, 2),
        lines(443, 154, ["100 vectors for each class,", "moved until they give", "the clients’ gradients"], 13, INK),
        *on_server,
        arrow(558, 148, 588, 148),
        box(594, 20, 188, 258, "#eaf5f0"),
        text(688, 56, "a new last layer", 15, INK, weight="600"),
        small_model(640, 82, 1.3),
        box(698, 92, 10, 34, TAIL, radius=2),
        lines(688, 166, ["trained on these vectors:", "as many for a rare class", "as for a common one"], 13, INK),
        lines(688, 240, ["it is tested; the next round", "starts from mean weights"], 12.5),
    ]
    save(name, 800, 298, title, *parts)


def rivals_figures():
    on_client = [
        small_model(58, 108, 1.1),
        lines(172, 122, ["trains on its", "own images"], 13, INK),
        lines(134, 200, ["the mean gradient of the", "last layer, for each class", "that it holds"], 13, RUST),
    ]
    retrained("06_creff.svg", "CReFF retrains the last layer from the clients’ gradients", on_client, [])
    on_client = [
        large_model(36, 94, 84, 44, ["CLIP"]),
        arrow(124, 116, 152, 116),
        small_model(160, 98, 0.9),
        lines(134, 164, ["CLIP’s answers about the client’s", "own images teach the model"], 12.5, LARGE),
        lines(134, 216, ["the mean gradient of the", "last layer, for each class", "that it holds"], 13, RUST),
    ]
    on_server = [lines(443, 230, ["and a little towards CLIP’s", "vector of the class name"], 12.5, LARGE)]
    retrained("06_clip2fl.svg", "CLIP2FL adds a CLIP on the clients and on the server", on_client, on_server)


def failures_figure():
    steps = [
        ("the pool", ["lacks a class,", "or shows another", "world"], SERVER, INK),
        ("the teacher", ["writes wrong words,", "gives wrong labels,", "has a favourite"], SERVER, LARGE),
        ("the clients", ["some send lies;", "some hide a", "back door"], CLIENT, INK),
        ("the model", ["forgets a class", "that it is", "not shown"], SERVER, SMALL),
        ("the users", ["gain in the mean;", "some clients", "pay for it"], CLIENT, INK),
    ]
    under = text(400, 182, "each is carried out in this chapter, and measured", 13.5, QUIET)
    save("08_failures.svg", 812, 200, "Five places where the method fails", *chain(steps, 134), under)


def run_figure():
    steps = [
        ("file", ["parameters;", "wrong lines are", "named before", "it starts"], SERVER, INK),
        ("plan", ["operations,", "rough hours,", "downloads and", "their terms"], SERVER, INK),
        ("run", ["a checkpoint", "each round;", "kill it, and", "it goes on"], CLIENT, INK),
        ("results", ["seed, commit,", "versions, device,", "each round"], "#eaf5f0", SMALL),
        ("page", ["written from the", "files; what is", "not run, with", "its cost"], "#eaf5f0", SMALL),
    ]
    save("10_paper_scale.svg", 812, 170, "From a file of parameters to a page of results", *chain(steps, 130))


def leaks_figure():
    """Who sees what: a client's messages, the server's pool, the final model."""
    parts = [box(18, 66, 176, 132, CLIENT), client(36, 82), text(84, 104, "client", 15, INK, "start", "600")]
    parts += [lines(106, 160, ["its images stay"], 13, INK)]
    parts += [box(318, 66, 176, 132, SERVER), server(336, 82), text(394, 104, "server", 15, INK, "start", "600")]
    parts += [lines(406, 160, ["pool and MLLM", "stay"], 13, INK)]
    parts += [
        box(618, 66, 176, 132, "#eaf5f0"),
        small_model(636, 84),
        text(690, 104, "everybody", 15, INK, "start", "600"),
    ]
    parts += [lines(706, 160, ["the final model"], 13, INK)]
    parts += [arrow(200, 112, 312, 112), arrow(312, 152, 200, 152), arrow(500, 132, 612, 132)]
    parts += [lines(256, 86, ["update"], 13.5), lines(256, 174, ["weights"], 13.5), lines(556, 118, ["model"], 13.5)]
    questions = [
        (256, ["which classes? which picture?", "was this picture there?"]),
        (556, ["was this picture", "in the pool?"]),
    ]
    parts += [lines(x, 26, rows, 13.5, TAIL) for x, rows in questions]
    save("09_leaks.svg", 812, 216, "What a client sends, and what a model keeps", *parts)


def recipe_figure():
    steps = [
        ("1", "encoder", ["a ViT learns from", "labels and from", "tiny-clip"], "pictures"),
        ("2", "language", ["the Llama learns", "to write, without", "any picture"], "texts"),
        ("3", "alignment", ["the projector alone", "learns to turn", "patches to words"], "pictures + texts"),
        ("4", "instruction", ["projector and Llama", "learn to answer", "every prompt"], "pictures + texts"),
    ]
    parts = []
    for i, (number, name, rows, fed) in enumerate(steps):
        x = 18 + 196 * i
        parts += [box(x, 20, 176, 150, SERVER), text(x + 16, 48, number, 20, LARGE, "start", "600")]
        parts += [text(x + 40, 47, name, 15, INK, "start", "600"), lines(x + 88, 78, rows, 13.5, INK)]
        parts += [text(x + 88, 152, f"fed with {fed}", 12.5, QUIET)]
        if i < 3:
            parts.append(arrow(x + 178, 95, x + 193, 95))
    save("a1_recipe.svg", 800, 190, "Four steps to a LLaVA", *parts)


def logo():
    parts = [
        box(2, 2, 60, 60, "#1f3550", radius=14),
        server(17, 9, 0.66),
        '<path d="M32 43 L16 50 M32 43 L32 50 M32 43 L48 50" stroke="#cfd9e4" stroke-width="2"/>',
    ]
    parts += [f'<circle cx="{x}" cy="52" r="4.6" fill="{c}"/>' for x, c in ((16, "#3f9bd6"), (32, MIDDLE), (48, TAIL))]
    (FIGURES / "logo.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><title>mllmfl_lite</title>'
        + "".join(parts)
        + "</svg>\n",
        encoding="utf-8",
    )


def draw_all():
    clients_figure()
    rounds_figure()
    stages_figure()
    llava_figure()
    handover_figure()
    alignment_figure()
    pipeline_figure()
    rivals_figures()
    scarce_figure()
    failures_figure()
    leaks_figure()
    run_figure()
    recipe_figure()
    logo()


if __name__ == "__main__":
    draw_all()
