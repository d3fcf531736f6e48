// The page that draws: the mixer, regions on a canvas, axes of a plot, and remarks on the prompt while it is written.
import { act, element, send, texts } from "/static/studio.js";
import { fetchCard, follow } from "/static/gallery.js";

const form = document.getElementById("draw"), fields = form.elements;
const mixer = document.getElementById("mixer"), regions = document.getElementById("regions");
const canvas = document.getElementById("canvas");
const SIDES = ["left", "top", "right", "bottom"];
const USUAL = { in: 1, mid: 1, out: 1, start: 0, end: 1 };

function part(item, name) {
  return item.querySelector(`[data-of="${name}"]`);
}

function added(template, list) {
  const item = document.getElementById(template).content.firstElementChild.cloneNode(true);
  list.append(item);
  item.querySelector("[data-take-out]").addEventListener("click", () => {
    item.remove();
    drawRegions();
  });
  return item;
}

// The mixer.
function addAdapter(adapter) {
  const item = added("mixed", mixer);
  item.dataset.file = adapter.file;
  item.querySelector("strong").textContent = adapter.file;
  item.querySelector("[data-take-out]").ariaLabel = `${texts.take_out} ${adapter.file}`;
  const given = { ...USUAL, ...adapter.blocks, start: adapter.start, end: adapter.end, strength: adapter.strength };
  for (const [name, value] of Object.entries(given)) if (value !== undefined) part(item, name).value = value;
  part(item, "has_text").checked = typeof adapter.text_encoder === "number";
  part(item, "text_encoder").value = adapter.text_encoder ?? adapter.strength ?? 1;
  const show = () => {
    for (const slider of item.querySelectorAll('input[type="range"]')) {
      slider.closest("label").querySelector("output").textContent = Number(slider.value).toFixed(2);
    }
    part(item, "text_encoder").disabled = !part(item, "has_text").checked;
  };
  item.addEventListener("input", show);
  show();
  return item;
}

function mixed() {
  return [...mixer.children].map((item) => {
    const value = (name) => Number(part(item, name).value);
    const blocks = Object.fromEntries(["in", "mid", "out"].map((name) => [name, value(name)]).filter(([, v]) => v !== 1));
    return {
      file: item.dataset.file, strength: value("strength"), blocks, start: value("start"), end: value("end"),
      text_encoder: part(item, "has_text").checked ? value("text_encoder") : null,
    };
  });
}

document.getElementById("add-adapter").addEventListener("click", () => {
  const file = document.getElementById("adapter-choice").value;
  if (file) part(addAdapter({ file }), "strength").focus();
});

// Regions: boxes on the canvas, which numbers beside them tell and change as well.
const SVG = "http://www.w3.org/2000/svg";
function boxOf(item) {
  return SIDES.map((side) => Number(part(item, side).value));
}

function drawRegions() {
  canvas.replaceChildren();
  [...regions.children].forEach((item, place) => {
    const [left, top, right, bottom] = boxOf(item), box = document.createElementNS(SVG, "rect");
    const text = document.createElementNS(SVG, "text");
    const shape = { x: left * 100, y: top * 100, width: Math.max(0, right - left) * 100, height: Math.max(0, bottom - top) * 100 };
    for (const [key, value] of Object.entries(shape)) box.setAttribute(key, value);
    text.setAttribute("x", left * 100 + 2);
    text.setAttribute("y", top * 100 + 9);
    text.textContent = String(place + 1);
    canvas.append(box, text);
  });
}

function addRegion(region) {
  const item = added("region", regions);
  part(item, "prompt").value = region.prompt;
  SIDES.forEach((side, place) => { part(item, side).value = region.box[place]; });
  item.addEventListener("input", drawRegions);
  drawRegions();
  return item;
}

document.getElementById("add-region").addEventListener("click", () => {
  const isSecond = regions.children.length % 2 === 1;
  part(addRegion({ prompt: "", box: isSecond ? [0.55, 0, 1, 1] : [0, 0, 0.45, 1] }), "prompt").focus();
});
let drag = null;
function place(event) {
  const area = canvas.getBoundingClientRect(), share = (value) => Math.round(Math.min(1, Math.max(0, value)) * 100) / 100;
  return [share((event.clientX - area.left) / area.width), share((event.clientY - area.top) / area.height)];
}
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  drag = { start: place(event), item: null };
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = place(event), [left, top] = drag.start;
  if (Math.abs(x - left) < 0.03 || Math.abs(y - top) < 0.03) return;
  drag.item ??= addRegion({ prompt: "", box: [0, 0, 1, 1] });
  const box = [Math.min(x, left), Math.min(y, top), Math.max(x, left), Math.max(y, top)];
  SIDES.forEach((side, index) => { part(drag.item, side).value = box[index]; });
  drawRegions();
});
canvas.addEventListener("pointerup", () => {
  if (drag?.item) part(drag.item, "prompt").focus();
  drag = null;
});
canvas.addEventListener("pointercancel", () => { drag = null; });

// What is wrong in the prompt, under the word that it is about.
function showProblems(problems, prompt) {
  document.getElementById("problems").replaceChildren(...problems.map((problem) => {
    const word = element("mark", { textContent: prompt.slice(problem.start, problem.end) || "␣" });
    const sentence = element("small", { textContent: problem.text, lang: "en" });
    const wrong = element("span", { className: problem.is_error ? "wrong bad" : "wrong" }, word, sentence);
    return element("p", { className: "marked" }, prompt.slice(0, problem.start), wrong, prompt.slice(problem.end));
  }));
}

let waiting = 0;
fields.prompt.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    const prompt = fields.prompt.value;
    try {
      const problems = await send("POST", "/api/prompt", { prompt, steps: Number(fields.steps.value) || 1 });
      if (prompt === fields.prompt.value) showProblems(problems, prompt);
    } catch { /* the next letter asks again */ }
  }, 400);
});

function numberOf(name) {
  return fields[name].value === "" ? null : Number(fields[name].value);
}

function request() {
  const axes = [...document.querySelectorAll(".axis")].map((row) => ({
    name: row.querySelector('[data-axis="name"]').value.trim(), values: row.querySelector('[data-axis="values"]').value.trim(),
  })).filter((axis) => axis.name && axis.values);
  return {
    prompt: fields.prompt.value, negative: fields.negative.value, base: fields.base.value.trim(), adapters: mixed(),
    count: numberOf("count") ?? 1, seed: numberOf("seed") ?? 0, steps: numberOf("steps") ?? 25, guidance: numberOf("guidance"),
    width: numberOf("width"), height: numberOf("height"), sampler: fields.sampler.value, axes,
    regions: [...regions.children].map((item) => ({ prompt: part(item, "prompt").value, box: boxOf(item) })),
  };
}

function refuse(text) {
  const refusal = document.getElementById("refusal");
  refusal.textContent = text;
  refusal.hidden = !text;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  refuse("");
  act(event.submitter, async () => {
    let drawing;
    try {
      drawing = await send("POST", "/api/drawings", request());
    } catch (error) {
      refuse(error.message);
      throw error;
    }
    document.getElementById("gallery").prepend(await fetchCard(drawing.id));
    follow(drawing.id, async () => {
      const { problems, message } = await send("GET", `/api/drawings/${drawing.id}`);
      if (fields.prompt.value !== drawing.request.prompt) return;
      showProblems(problems.filter((problem) => problem.field === "prompt"), drawing.request.prompt);
      if (!problems.length) refuse(message);
    });
  });
});

const given = JSON.parse(form.dataset.given);
given.adapters.forEach(addAdapter);
given.regions.forEach(addRegion);
document.getElementById("regions-part").open = given.regions.length > 0;
document.getElementById("plot-part").open = given.axes.length > 0;
given.axes.forEach((axis, index) => {
  const row = document.querySelectorAll(".axis")[index];
  row.querySelector('[data-axis="name"]').value = axis.name;
  row.querySelector('[data-axis="values"]').value = axis.values;
});
