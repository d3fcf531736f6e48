// The page of a run: the loss as a drawing, progress, pictures and messages, live from the stream of its events.
import { act, element, say, send, texts } from "/static/studio.js";

const run = document.getElementById("run");
const address = run.dataset.run;
const steps = new Map(); // step → metrics

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 640, HEIGHT = 260, LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 26;

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// Exponential moving average over about a twentieth of the steps.
function smoothed(points) {
  const keep = 1 - 1 / Math.max(1, points.length / 20);
  let mean = points[0][1];
  return points.map(([step, value]) => [step, (mean = keep * mean + (1 - keep) * value)]);
}

function draw() {
  const board = document.getElementById("loss");
  const entries = [...steps.entries()].sort((a, b) => a[0] - b[0]);
  const losses = entries.filter(([, values]) => Number.isFinite(values.loss)).map(([step, values]) => [step, values.loss]);
  const checks = entries.filter(([, values]) => Number.isFinite(values.validation))
    .map(([step, values]) => [step, values.validation]);
  board.replaceChildren();
  if (!losses.length) return;
  const all = [...losses, ...checks].map(([, value]) => value);
  const low = Math.min(...all), high = Math.max(...all), first = losses[0][0], last = losses[losses.length - 1][0];
  const x = (step) => LEFT + (step - first) / Math.max(1, last - first) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (high - value) / (high - low || 1) * (HEIGHT - TOP - BOTTOM);
  for (let line = 0; line <= 4; line++) {
    const value = low + (high - low) * line / 4;
    board.append(shape("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    board.append(shape("text", { x: 4, y: y(value) + 4 }, value.toPrecision(3)));
  }
  board.append(shape("text", { x: LEFT, y: HEIGHT - 8 }, `${texts.step} ${first}`));
  board.append(shape("text", { x: WIDTH - RIGHT, y: HEIGHT - 8, "text-anchor": "end" }, String(last)));
  const path = (points) => points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  board.append(shape("polyline", { class: "raw", points: path(losses) }));
  board.append(shape("polyline", { class: "smooth", points: path(smoothed(losses)) }));
  for (const [step, value] of checks) board.append(shape("circle", { class: "validation", cx: x(step), cy: y(value), r: 3 }));
}

let isDrawn = true;
function drawSoon() {
  if (!isDrawn) return;
  isDrawn = false;
  requestAnimationFrame(() => { isDrawn = true; draw(); });
}

function clock(seconds) {
  const rest = Math.max(0, Math.round(seconds)), hours = Math.floor(rest / 3600);
  const minutes = String(Math.floor(rest / 60) % 60).padStart(2, "0"), last = String(rest % 60).padStart(2, "0");
  return hours ? `${hours}:${minutes}:${last}` : `${minutes}:${last}`;
}

function note(text) {
  const list = document.getElementById("messages");
  if (!text || (list.lastElementChild && list.lastElementChild.textContent === text)) return;
  list.append(element("li", { textContent: text }));
  document.getElementById("messages-part").hidden = false;
  while (list.children.length > 200) list.firstElementChild.remove();
}

function showPicture(file) {
  const path = file.split("/").map(encodeURIComponent).join("/");
  const source = `${address}/files/${path}`, picture = element("img", { src: source, alt: file });
  const link = element("a", { href: source }, picture);
  document.getElementById("pictures-part").hidden = false;
  document.getElementById("pictures").prepend(element("figure", {}, link, element("figcaption", { textContent: file })));
}

function receive(event) {
  if (event.event === "step" && Number.isInteger(event.step)) {
    steps.set(event.step, { ...steps.get(event.step), ...event.values });
    if (event.total) document.getElementById("step").textContent = texts.step_of.replace("{step}", event.step).replace("{steps}", event.total);
    drawSoon();
  } else if (event.event === "advance") {
    const bar = document.getElementById("progress");
    if (event.total) bar.value = event.done / event.total; else bar.removeAttribute("value");
    const left = Number.isFinite(event.remaining) ? `, ${clock(event.remaining)} ${texts.left}` : "";
    const values = Object.entries(event.values || {}).filter(([, value]) => Number.isFinite(value))
      .map(([name, value]) => `, ${name} ${value.toPrecision(4)}`).join("");
    document.getElementById("phase").textContent = `${event.name}: ${event.done}/${event.total ?? "?"}${values}${left}`;
  } else if (event.event === "phase") {
    document.getElementById("phase").textContent = event.name;
  } else if (event.event === "note" || event.event === "log") {
    note(event.text);
  } else if (event.event === "artifact" && event.path && event.kind === "samples") {
    showPicture(event.path);
  }
}

async function begin() {
  const detail = await send("GET", address);
  for (const entry of detail.metrics) steps.set(entry.step, entry);
  draw();
  if (run.dataset.follows !== "true") return;
  const stream = new EventSource(`${address}/events?after=${detail.last_event}`);
  stream.onmessage = (message) => receive(JSON.parse(message.data));
  stream.addEventListener("end", () => {
    stream.close();
    say(texts.ended);
    setTimeout(() => location.reload(), 1500);
  });
}

document.getElementById("stop")?.addEventListener("click", (event) => act(event.currentTarget, async () => {
  await send("POST", `${address}/stop`);
  say(texts.stopping);
}));
document.getElementById("resume")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const given = event.target.elements.steps;
  const settings = given.value === given.defaultValue ? {} : { steps: Number(given.value) };
  act(event.submitter, async () => {
    await send("POST", `${address}/resume`, { settings, allow_changes: event.target.elements.changes.checked });
    location.reload();
  });
});
document.getElementById("judge")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const { strengths, seeds } = event.target.elements;
  act(event.submitter, async () => {
    const numbers = strengths.value.split(",").map(Number);
    await send("POST", `${address}/evaluate`, { strengths: numbers, seeds: Number(seeds.value) });
    location.reload();
  });
});
begin().catch((error) => say(error.message));
