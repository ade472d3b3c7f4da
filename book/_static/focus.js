// What scrolls sideways can be reached and scrolled by keyboard; the theme does so for tables and code alone.
function reach() {
  for (const box of document.querySelectorAll(".bd-article :is(mjx-container[display], figure)"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
}
addEventListener("load", () => (window.MathJax?.startup?.promise ?? Promise.resolve()).then(reach))
addEventListener("resize", reach)
