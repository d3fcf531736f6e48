// The page that prepares a training: pictures with captions, the recipe's form, the plan, and the start.
import { act, element, say, send, texts } from "/static/studio.js";

const folder = document.getElementById("folder");
const recipe = document.getElementById("recipe-name").dataset.recipe;

function figure(picture) {
  const source = `/api/pictures/thumbnail?file=${encodeURIComponent(picture.file)}`;
  const image = element("img", { src: source, alt: picture.name, loading: "lazy" });
  const caption = element("figcaption", {}, element("div", { textContent: picture.name }));
  if (picture.can_change) {
    const area = element("textarea", { rows: 2, value: picture.caption ?? "", ariaLabel: `${texts.caption} ${picture.name}` });
    area.addEventListener("change", () => act(null, async () => {
      await send("PUT", "/api/pictures/caption", { file: picture.file, caption: area.value });
      say(texts.saved);
    }));
    caption.append(area);
  } else {
    caption.append(element("div", { textContent: picture.caption ?? texts.no_caption }));
  }
  return element("figure", {}, image, caption);
}

async function showPictures() {
  if (!folder.value.trim()) throw new Error(texts.no_folder);
  const pictures = await send("GET", `/api/pictures/list?folder=${encodeURIComponent(folder.value.trim())}`);
  document.getElementById("pictures").replaceChildren(...pictures.map(figure));
}

// Settings that differ from the recipe's own.
function changedSettings() {
  const settings = {};
  for (const input of document.querySelectorAll("#settings [data-key]")) {
    let value = input.value, usual = input.defaultValue;
    if (input.type === "checkbox") [value, usual] = [String(input.checked), String(input.defaultChecked)];
    if (input.tagName === "SELECT") usual = [...input.options].find((option) => option.defaultSelected)?.value ?? input.options[0]?.value;
    if (value !== usual) settings[input.dataset.key] = value;
  }
  if (folder.value.trim()) settings.images = folder.value.trim();
  return settings;
}

function refuse(text) {
  const refusal = document.getElementById("refusal");
  refusal.textContent = text;
  refusal.hidden = !text;
}

document.getElementById("choose").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, showPictures);
});
document.getElementById("upload").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, async () => {
    const answer = await send("POST", "/api/pictures", new FormData(event.target));
    folder.value = answer.folder;
    await showPictures();
    say(answer.refusals.join(" "));
  });
});
document.getElementById("recipe").addEventListener("submit", (event) => {
  const kept = element("input", { type: "hidden", name: "folder", value: folder.value.trim() });
  event.target.append(kept);
});
document.getElementById("plan").addEventListener("click", (event) => act(event.currentTarget, async () => {
  refuse("");
  const plan = await send("POST", "/api/plan", { recipe, settings: changedSettings() });
  document.getElementById("plan-lines").textContent = plan.lines.join("\n");
  refuse(plan.refusal && `${texts.refused} ${plan.refusal}`);
}));
document.getElementById("start").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, async () => {
    const name = document.getElementById("run-name").value.trim();
    const job = await send("POST", "/api/runs", { recipe, settings: changedSettings(), name });
    location.assign(`/runs/${encodeURIComponent(job.run)}`);
  });
});
if (folder.value.trim()) act(null, showPictures);
