// One page, no framework: the form, the stream of events, and a gallery in IndexedDB.

import { closeImage, editForm, imageSize, openImage } from "./edit.js";
import { chosenLoras, setLoras, showLoras } from "./loras.js";

const $ = (id) => document.getElementById(id);
const MAX_SEED = 2 ** 32;

// --- settings that stay ------------------------------------------------------------------------------------------

const saved = JSON.parse(localStorage.getItem("fewstep") ?? "{}");

function save() {
  const { value: theme } = $("theme");
  const kept = { theme, key: $("key").value, lock: $("lock").checked, enhance: $("enhance").checked };
  kept.lora = chosenLoras();
  for (const id of ["prompt", "negative", "size", "steps", "count", "seed"]) kept[id] = $(id).value;
  localStorage.setItem("fewstep", JSON.stringify(kept));
}

function showTheme() {
  if ($("theme").value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = $("theme").value;
}

// --- the server --------------------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = typeof options.body === "string" ? { "Content-Type": "application/json" } : {};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  if (answer.status === 401) $("key-field").hidden = false;
  throw new Error(error?.message ?? `The server answered ${answer.status}.`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (!data) continue;
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function sizes({ width, height }, { multiple, max_pixels }) {
  const round = (side) => Math.max(multiple, Math.round(side / multiple) * multiple);
  const shapes = [[1, 1], [4 / 3, 3 / 4], [3 / 4, 4 / 3], [2, 2], [2, 1], [1, 2], [0.5, 0.5]];
  const all = shapes.map(([x, y]) => [round(width * x), round(height * y)]).filter(([w, h]) => w * h <= max_pixels);
  return [...new Set(all.map((sides) => sides.join("x")))];
}

let model = null;

const byInstruction = () => model.edits === "by instruction";

async function loadModel() {
  const { data } = await (await call("v1/models")).json();
  [model] = data;
  const { defaults, limits } = model;
  $("model").textContent = model.id;
  $("steps").max = limits.max_steps;
  $("count").max = limits.max_images;
  $("prompt").maxLength = limits.max_prompt;
  $("negative-field").hidden = !limits.negative_prompt;
  $("enhance-field").hidden = !model.enhancer;
  for (const id of ["mask-fields", "clear-mask", "paint"]) $(id).hidden = byInstruction();
  if (byInstruction()) $("edit-summary").textContent = "Image to edit";
  showLoras(model.loras, saved.lora);
  $("steps").value ||= saved.steps ?? defaults.steps;
  $("size").replaceChildren(...sizes(defaults, limits).map((size) => new Option(size.replace("x", " × "), size)));
  if ([...$("size").options].some((option) => option.value === saved.size)) $("size").value = saved.size;
}

// --- the gallery -------------------------------------------------------------------------------------------------

const database = new Promise((resolve, reject) => {
  const opened = indexedDB.open("fewstep", 1);
  opened.onupgradeneeded = () => opened.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
  opened.onsuccess = () => resolve(opened.result);
  opened.onerror = () => reject(opened.error);
});

async function images(mode, use) {
  const transaction = (await database).transaction("images", mode);
  const request = use(transaction.objectStore("images"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = () => reject(transaction.error);
  });
}

function makeCard(prompt) {
  const card = document.createElement("button");
  card.type = "button";
  card.className = "card pending";
  card.disabled = true;
  const [frame, text] = ["frame", "text"].map((name) => {
    const part = document.createElement("span");
    part.className = name;
    card.append(part);
    return part;
  });
  text.textContent = prompt;
  $("gallery").prepend(card);
  showEmpty();
  return { card, frame };
}

function showImage(frame, source, alt) {
  const image = frame.querySelector("img") ?? frame.appendChild(new Image());
  image.alt = alt;
  image.src = source;
}

function finishCard({ card, frame }, entry) {
  const source = URL.createObjectURL(entry.blob);
  showImage(frame, source, entry.prompt);
  card.classList.remove("pending");
  card.disabled = false;
  card.onclick = () => openViewer(entry, source, card);
}

function showEmpty() {
  const count = $("gallery").childElementCount;
  $("empty").hidden = count > 0;
  $("clear").hidden = count === 0;
}

function openViewer(entry, source, card) {
  $("large").src = source;
  $("large").alt = entry.prompt;
  $("caption").textContent = entry.prompt;
  const facts = { Seed: entry.seed, Steps: entry.steps, Size: entry.size.replace("x", " × "), Model: entry.model };
  if (entry.negative) facts["Negative prompt"] = entry.negative;
  if (entry.original) facts["Prompt before it was revised"] = entry.original;
  for (const [name, strength] of Object.entries(entry.lora ?? {})) facts[`LoRA ${name}`] = strength;
  if (entry.strength) facts["Strength of the edit"] = entry.strength;
  $("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => {
      const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, detail.textContent] = [name, value];
      return [term, detail];
    }),
  );
  $("download").href = source;
  $("download").download = `fewstep-${entry.seed}.png`;
  $("reuse").onclick = () => {
    $("prompt").value = entry.prompt;
    $("negative").value = entry.negative;
    $("size").value = entry.size;
    $("steps").value = entry.steps;
    $("seed").value = entry.seed;
    $("lock").checked = true;
    $("enhance").checked = false;
    setLoras(entry.lora ?? {});
    save();
    $("viewer").close();
  };
  $("remove").onclick = async () => {
    await images("readwrite", (store) => store.delete(entry.id));
    URL.revokeObjectURL(source);
    card.remove();
    showEmpty();
    $("viewer").close();
  };
  $("viewer").showModal();
}

// --- generation --------------------------------------------------------------------------------------------------

let running = null;

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function showRunning(isRunning) {
  $("generate").disabled = isRunning;
  $("cancel").hidden = $("bar").hidden = !isRunning;
  $("bar").value = 0;
}

async function keep(card, event, body) {
  if (event.b64_json === null) {
    card.card.classList.remove("pending");
    card.frame.replaceChildren(Object.assign(document.createElement("p"), { className: "withheld" }));
    card.frame.firstChild.textContent = "Withheld by the safety filter";
    return;
  }
  const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
  const entry = {
    blob: new Blob([bytes], { type: "image/png" }),
    prompt: event.revised_prompt ?? body.prompt,
    original: event.revised_prompt ? body.prompt : "",
    lora: body.lora ?? {},
    strength: event.type.startsWith("image_edit") && !byInstruction() ? $("strength").value : "",
    negative: body.negative_prompt ?? "",
    seed: event.seed,
    steps: body.steps,
    size: event.size,
    model: model.id,
  };
  entry.id = await images("readwrite", (store) => store.add(entry));
  finishCard(card, entry);
}

async function draw(body, signal) {
  const cards = Array.from({ length: body.n }, () => makeCard(body.prompt)).reverse();
  const steps = new Array(body.n).fill(0);
  let done = 0;
  try {
    const form = await editForm(body, byInstruction());
    const path = form ? "v1/images/edits" : "v1/images/generations";
    const answer = await call(path, { method: "POST", body: form ?? JSON.stringify(body), signal });
    for await (const event of events(answer)) {
      const kind = event.type.split(".")[1];
      if (kind === "queued") {
        const seconds = event.estimated_seconds ? `, about ${Math.ceil(event.estimated_seconds)} s` : "";
        say(event.images_ahead ? `Waiting: ${event.images_ahead} images ahead${seconds}` : "Starting");
      } else if (kind === "progress") {
        steps[event.index] = event.step / event.steps;
        $("bar").value = steps.reduce((sum, each) => sum + each, 0) / body.n;
        say(`Step ${event.step} of ${event.steps}`);
      } else if (kind === "partial_image") {
        showImage(cards[event.index].frame, `data:image/png;base64,${event.b64_json}`, body.prompt);
      } else if (kind === "completed") {
        await keep(cards[event.index], event, body);
        done += 1;
      }
    }
    if (done < body.n) throw new Error("The connection to the server ended early.");
  } finally {
    for (const { card } of cards) if (card.classList.contains("pending")) card.remove();
    showEmpty();
  }
}

async function generate() {
  if (running) return;
  if (!$("lock").checked) $("seed").value = Math.floor(Math.random() * MAX_SEED);
  save();
  running = new AbortController();
  showRunning(true);
  say("Sending");
  const start = performance.now();
  try {
    if (!model) await loadModel();
    const body = {
      prompt: $("prompt").value,
      n: Number($("count").value),
      size: $("size").value,
      steps: Number($("steps").value),
      seed: Number($("seed").value),
      stream: true,
      partial_images: 3,
      progress: true,
    };
    if (!$("negative-field").hidden && $("negative").value) body.negative_prompt = $("negative").value;
    if (Object.keys(chosenLoras()).length) body.lora = chosenLoras();
    if (!$("enhance-field").hidden && $("enhance").checked) body.enhance = true;
    await draw(body, running.signal);
    say(`Done in ${((performance.now() - start) / 1000).toFixed(1)} s, seed ${body.seed}`);
  } catch (error) {
    if (error.name === "AbortError") say("Canceled");
    else say(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
  } finally {
    running = null;
    showRunning(false);
  }
}

// --- start -------------------------------------------------------------------------------------------------------

$("theme").value = saved.theme ?? "auto";
showTheme();
for (const id of ["prompt", "negative", "count", "key"]) if (saved[id]) $(id).value = saved[id];
$("seed").value = saved.seed || Math.floor(Math.random() * MAX_SEED);
$("lock").checked = saved.lock ?? false;
$("enhance").checked = saved.enhance ?? false;
if (saved.key) $("key-field").hidden = false;

$("theme").onchange = () => { showTheme(); save(); };
$("key").onchange = () => { save(); loadModel().then(() => say(""), (error) => say(error.message, true)); };
$("form").onsubmit = (event) => { event.preventDefault(); generate(); };
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
};
$("image").onchange = async () => {
  try {
    await openImage($("image").files[0]);
  } catch {
    closeImage();
    say("This image cannot be read.", true);
    return;
  }
  const size = imageSize(model.limits);
  if (![...$("size").options].some((option) => option.value === size)) {
    $("size").add(new Option(size.replace("x", " × "), size));
  }
  $("size").value = size;
};
$("close-image").onclick = closeImage;
$("cancel").onclick = () => running?.abort();
$("close").onclick = () => $("viewer").close();
$("viewer").onclick = (event) => { if (event.target === $("viewer")) $("viewer").close(); };
$("clear").onclick = async () => {
  if (!confirm("Delete all images in this browser?")) return;
  await images("readwrite", (store) => store.clear());
  $("gallery").replaceChildren();
  showEmpty();
};

loadModel().catch((error) => say(error.message, true));
for (const entry of await images("readonly", (store) => store.getAll())) finishCard(makeCard(entry.prompt), entry);
