// Drawings on a page: their progress and pictures, live; removed, compared, and the better one kept.
import { act, say, send, texts } from "/static/studio.js";

function cardOf(id) {
  return document.getElementById(`drawing-${id}`);
}

// The card of a drawing, as the server makes it.
export async function fetchCard(id) {
  const response = await fetch(`/drawings/${encodeURIComponent(id)}?part=card`);
  if (!response.ok) throw new Error(texts.failed);
  const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
  return document.adoptNode(parsed.querySelector("article"));
}

async function refresh(id) {
  const fresh = await fetchCard(id), old = cardOf(id);
  if (!old) return;
  const chosen = new Set([...old.querySelectorAll("[data-compare]:checked")].map((box) => box.dataset.compare));
  for (const box of fresh.querySelectorAll("[data-compare]")) box.checked = chosen.has(box.dataset.compare);
  const focused = old.contains(document.activeElement) ? document.activeElement.dataset.remove : null;
  old.replaceWith(fresh);
  if (focused) fresh.querySelector("[data-remove]")?.focus();
}

// Follow the events of a drawing until it ends; `ended` is called then.
export function follow(id, ended = () => {}) {
  const stream = new EventSource(`/api/drawings/${encodeURIComponent(id)}/events`);
  stream.onmessage = (message) => {
    const event = JSON.parse(message.data), card = cardOf(id);
    if (!card) return stream.close();
    const bar = card.querySelector("progress"), phase = card.querySelector(".phase");
    if (event.event === "phase" && phase) phase.textContent = event.name;
    if (event.event === "advance" && bar) {
      if (event.total) bar.value = event.done / event.total;
      phase.textContent = `${event.name}: ${event.done}/${event.total ?? "?"}`;
    }
    if (event.event === "artifact") refresh(id).catch((error) => say(error.message));
  };
  stream.addEventListener("end", async () => {
    stream.close();
    try {
      await refresh(id);
      say(cardOf(id)?.querySelector(".state")?.textContent ?? "");
    } catch (error) {
      say(error.message);
    }
    ended();
  });
}

const compare = document.getElementById("compare");
function chosen() {
  return [...document.querySelectorAll("[data-compare]:checked")].map((box) => box.dataset.compare);
}

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-compare]") && compare) compare.disabled = chosen().length !== 2;
});
compare?.addEventListener("click", () => {
  const [first, second] = chosen();
  location.assign(`/compare?${new URLSearchParams({ first, second })}`);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (button?.dataset.remove) {
    act(button, async () => {
      const card = button.closest("article"), isOpen = card.dataset.follows === "true";
      await send("DELETE", button.dataset.remove);
      if (!isOpen) {
        card.remove();
        if (location.pathname.startsWith("/drawings/")) location.assign("/draw");
      }
    });
  } else if (button?.dataset.better) {
    act(button, async () => {
      const pair = await send("POST", "/api/preferences", { better: button.dataset.better, worse: button.dataset.worse });
      document.getElementById("pairs").textContent = texts.pairs_kept.replace("{count}", pair.pairs);
      say(texts.pair_saved);
    });
  }
});
for (const card of document.querySelectorAll('[data-follows="true"]')) follow(card.dataset.drawing);
