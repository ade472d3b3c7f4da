// Turns the explorables of a page or a notebook. All states were computed before; knobs choose one of them.
// A copy stands in each output, so that it needs no other file. The first one to run starts those that are there.
for (const box of document.querySelectorAll(".explorable:not([data-on])")) {
  box.dataset.on = ""
  const {knobs, start, says, shared, values} = JSON.parse(box.querySelector("[type='application/json']").textContent)
  const sentence = box.querySelector("output"), picture = box.querySelector(".picture"), tell = []
  const at = knobs.map(({positions}, k) => // of each knob; the last one turns fastest
    Math.floor(start / knobs.slice(k + 1).reduce((many, knob) => many * knob.positions.length, 1)) % positions.length)
  const ours = {"data-lm-suppress-shortcuts": ""} // JupyterLab leaves us the keys
  let timer

  function make(parent, tag, attributes, text = "") {
    const made = parent.appendChild(document.createElement(tag))
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
    made.textContent = text
    return made
  }

  // Elements stay and take what differs, so that a style sheet can move them.
  function take(old, fresh) {
    for (const {name, value} of fresh.attributes ?? []) old.setAttribute(name, value)
    if (fresh.children.length) [...fresh.children].forEach((child, k) => take(old.children[k], child))
    else old.textContent = fresh.textContent
  }

  function show() {
    const state = at.reduce((sum, position, k) => sum * knobs[k].positions.length + position, 0)
    const fresh = document.createElement("template")
    fresh.innerHTML = shared.map((piece, k) => piece + (values[state][k] ?? "")).join("")
    take(picture, fresh.content)
    sentence.textContent = says[state]
    tell.forEach((knob) => knob())
  }

  function stop() {
    clearInterval(timer)
    timer = undefined
    sentence.removeAttribute("aria-live")
  }

  function choose(k, position) {
    stop()
    at[k] = position
    show()
  }

  function addButtons({name, positions}, k) {
    const group = make(turn, "div", {class: "knob", role: "group", "aria-label": name})
    make(group, "span", {}, name)
    positions.forEach((position, p) => {
      const button = make(group, "button", {type: "button", ...ours}, position)
      button.addEventListener("click", () => choose(k, p))
      tell.push(() => button.setAttribute("aria-pressed", at[k] === p))
    })
  }

  function addSlider({name, positions}, k) {
    const label = make(turn, "label", {class: "knob"}), text = make(label, "span", {})
    const input = make(label, "input", {type: "range", min: 0, max: positions.length - 1, "aria-label": name, ...ours})
    input.addEventListener("input", () => choose(k, +input.value))
    tell.push(() => {
      input.value = at[k]
      input.setAttribute("aria-valuetext", positions[at[k]])
      text.textContent = `${name}: ${positions[at[k]]}`
    })
  }

  function addPlay({positions}) {
    const button = make(turn, "button", {type: "button", ...ours})
    tell.push(() => {button.textContent = timer ? "Stop" : "Play"})
    button.addEventListener("click", () => {
      if (timer) return choose(0, at[0])
      sentence.setAttribute("aria-live", "off") // a screen reader cannot keep up
      at[0] = 0
      timer = setInterval(() => {
        if (++at[0] === positions.length - 1) stop()
        show()
      }, 500)
      show()
    })
  }

  const turn = make(document.createDocumentFragment(), "div", {class: "turn"})
  if (knobs.length === 1) addPlay(knobs[0])
  knobs.forEach((knob, k) => (knob.positions.length > 4 ? addSlider : addButtons)(knob, k))
  box.insertBefore(turn, sentence)
  show()
}
