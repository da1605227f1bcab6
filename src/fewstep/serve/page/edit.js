// The image that an edit begins from, and the mask that is painted on it.

const $ = (id) => document.getElementById(id);
const LONGEST = 2048; // pixels of a side that are sent

let opened = false;
let painted = false;

export async function openImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  for (const canvas of [$("source"), $("paint")]) {
    canvas.width = Math.round(bitmap.width * scale);
    canvas.height = Math.round(bitmap.height * scale);
  }
  $("source").getContext("2d").drawImage(bitmap, 0, 0, $("source").width, $("source").height);
  bitmap.close();
  painted = false;
  opened = true;
  $("edit-fields").hidden = false;
}

export function closeImage() {
  opened = false;
  $("image").value = "";
  $("edit-fields").hidden = true;
}

// The largest size of the image's shape that the server draws, not beyond the image's own.
export function imageSize({ multiple, max_pixels }) {
  const { width, height } = $("source");
  const scale = Math.min(1, Math.sqrt(max_pixels / (width * height)));
  return [width, height].map((side) => Math.max(multiple, Math.floor((side * scale) / multiple) * multiple)).join("x");
}

const png = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

// The form of /v1/images/edits, or null if there is no image. A model that edits by instruction takes no strength and no
// mask.
export async function editForm(body, byInstruction) {
  if (!opened) return null;
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.set(name, name === "lora" ? JSON.stringify(value) : value);
  form.set("image", await png($("source")), "image.png");
  if (byInstruction) return form;
  form.set("strength", $("strength").value);
  if (painted) {
    const mask = document.createElement("canvas");
    [mask.width, mask.height] = [$("paint").width, $("paint").height];
    const context = mask.getContext("2d");
    context.fillRect(0, 0, mask.width, mask.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage($("paint"), 0, 0);
    form.set("mask", await png(mask), "mask.png");
  }
  return form;
}

function clearMask() {
  $("paint").getContext("2d").clearRect(0, 0, $("paint").width, $("paint").height);
  painted = false;
}

function paint(event) {
  const canvas = $("paint");
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  const context = canvas.getContext("2d");
  context.lineCap = "round";
  context.lineWidth = Number($("brush").value) * scale;
  context.strokeStyle = "#e0245e";
  context.beginPath();
  context.moveTo(...(paint.last ?? [x, y]));
  context.lineTo(x, y);
  context.stroke();
  paint.last = [x, y];
  painted = true;
}

$("paint").onpointerdown = (event) => {
  $("paint").setPointerCapture(event.pointerId);
  paint.last = null;
  paint(event);
};
$("paint").onpointermove = (event) => { if (event.buttons) paint(event); };
$("clear-mask").onclick = clearMask;
$("strength").oninput = () => { $("strength-value").textContent = Number($("strength").value).toFixed(2); };
