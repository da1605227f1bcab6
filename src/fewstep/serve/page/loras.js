// One slider for each LoRA file of the server; 0 leaves a file out.

const box = document.getElementById("loras");
const sliders = () => [...box.querySelectorAll("input")];

function show(slider) {
  slider.nextElementSibling.textContent = Number(slider.value).toFixed(2);
}

export function showLoras(names, strengths = {}) {
  box.hidden = names.length === 0;
  for (const row of box.querySelectorAll(".slider")) row.remove();
  for (const name of names) {
    const row = document.createElement("label");
    row.className = "slider";
    const [text, slider] = ["span", "input", "output"].map((tag) => row.appendChild(document.createElement(tag)));
    text.textContent = text.title = name;
    Object.assign(slider, { type: "range", name, min: -1, max: 2, step: 0.05, value: strengths[name] ?? 0 });
    slider.oninput = () => show(slider);
    show(slider);
    box.append(row);
  }
}

// {name: strength} of those that are not 0.
export function chosenLoras() {
  const used = sliders().filter((slider) => Number(slider.value) !== 0);
  return Object.fromEntries(used.map((slider) => [slider.name, Number(slider.value)]));
}

export function setLoras(strengths) {
  for (const slider of sliders()) {
    slider.value = strengths[slider.name] ?? 0;
    show(slider);
  }
}
