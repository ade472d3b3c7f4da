"""Bars that a slider moves, in a page without a kernel: HTML, and a few lines of JavaScript over computed numbers."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from string import Template

import numpy as np

_PAGE = Template("""<figure id="$id" style="margin:1em 0"><style>
#$id .panels, #$id .turn:not([hidden]) {display:flex; flex-wrap:wrap; gap:.5em 2em; align-items:center}
#$id .panels > div {flex:1 1 17em}
#$id .bar {display:grid; grid-template-columns:6em 1fr 2.5em; gap:.5em; align-items:center; line-height:1.5}
#$id i {display:block; height:1em; min-width:1px; print-color-adjust:exact; -webkit-print-color-adjust:exact}
#$id .bar :last-child {text-align:right; font-variant-numeric:tabular-nums}
#$id input {flex:1 1 12em; height:2.75em; margin:0; accent-color:#0072B2}
#$id button {min-height:2.75em; padding:0 1em; font:inherit; cursor:pointer}
@media print {#$id .turn {display:none !important}}
</style>
<div class="turn" hidden><button type="button">Play</button>
<input type="range" min="0" max="$last" value="$last" aria-label="frame"></div>
<output style="display:block;margin:.5em 0"><b>$label</b></output>
<div class="panels">$panels</div>
<figcaption style="color:inherit;text-align:left">$caption</figcaption>
<script>(() => {
const box = document.getElementById("$id"), {values, labels} = $data, find = (what) => box.querySelector(what);
const turn = find(".turn"), slider = find("input"), bars = [...box.querySelectorAll(".bar")];
let timer;
function show(frame) {
  slider.value = frame;
  slider.setAttribute("aria-valuetext", labels[frame]);
  find("output b").textContent = labels[frame];
  bars.forEach((bar, k) => {
    bar.querySelector("i").style.width = values[frame][k] + "%";
    bar.lastChild.textContent = values[frame][k];
  });
}
slider.addEventListener("input", () => {clearInterval(timer); show(+slider.value)});
find("button").addEventListener("click", () => {
  clearInterval(timer);
  let frame = 0;
  show(0);
  timer = setInterval(() => {if (++frame < labels.length) show(frame); else clearInterval(timer)}, 500);
});
turn.hidden = false;
show(labels.length - 1);
})()</script></figure>""")


class MovingBars:
    """Horizontal bars of a few panels, one frame at a time, turned by mouse, touch or keyboard.

    `panels` are shares in [0, 1] by title, each (frames, bars); `names` and `colours` are those of the bars, `labels`
    say what each frame shows, `caption` what all do. Without scripts, and on paper, the last frame stands there.
    """

    def __init__(
        self,
        panels: Mapping[str, np.ndarray],
        names: Sequence[str],
        colours: Sequence[str],
        labels: Sequence[str],
        caption: str = "",
    ):
        shapes = {title: np.shape(values) for title, values in panels.items()}
        if not shapes or set(shapes.values()) != {(len(labels), len(names))} or len(names) != len(colours):
            raise ValueError(
                f"each panel needs (frames, bars) = ({len(labels)}, {len(names)}) shares, as there are labels and "
                f"names, and each bar one of {len(colours)} colours; got {shapes}"
            )
        self.panels, self.names, self.colours, self.labels, self.caption = panels, names, colours, labels, caption

    def __repr__(self) -> str:
        return "\n".join(self.labels)

    def _repr_html_(self) -> str:
        percents = {title: np.rint(100 * np.asarray(values)).astype(int) for title, values in self.panels.items()}
        data = {"values": np.hstack(list(percents.values())).tolist(), "labels": list(self.labels)}
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        return _PAGE.substitute(
            id="bars-" + hashlib.sha256(text.encode()).hexdigest()[:12],
            last=len(self.labels) - 1,
            label=html.escape(self.labels[-1]),
            panels="".join(self._panel(title, values[-1]) for title, values in percents.items()),
            caption=html.escape(self.caption),
            data=text,
        )

    def _panel(self, title: str, values: np.ndarray) -> str:
        bars = "".join(
            f'<div class="bar"><span>{html.escape(name)}</span><span><i style="width:{value}%;background:{colour}"></i>'
            f"</span><span>{value}</span></div>"
            for name, colour, value in zip(self.names, self.colours, values, strict=True)
        )
        return f"<div><b>{html.escape(title)}</b>{bars}</div>"
