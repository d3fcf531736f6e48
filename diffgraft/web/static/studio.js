// What all pages share: texts, requests, and buttons that need no more than a request.
export const texts = JSON.parse(document.body.dataset.texts);

export function say(text) {
  document.getElementById("status").textContent = text;
}

// Send JSON, or a form with files, and return the answer's JSON; an error of the server is thrown as its sentence.
export async function send(method, path, body) {
  const isForm = body instanceof FormData;
  const options = { method, body: body === undefined || isForm ? body : JSON.stringify(body) };
  if (body !== undefined && !isForm) options.headers = { "content-type": "application/json" };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error(texts.failed);
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const detail = answer.detail;
  throw new Error(Array.isArray(detail) ? detail.map((item) => item.msg).join("; ") : detail || response.statusText);
}

// Run an action of a button, which is off meanwhile, and show its error.
export async function act(button, action) {
  if (button) button.disabled = true;
  say(texts.working);
  try {
    await action();
    if (document.getElementById("status").textContent === texts.working) say("");
  } catch (error) {
    say(error.message);
  } finally {
    if (button) button.disabled = false;
  }
}

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

for (const button of document.querySelectorAll("[data-delete]")) {
  button.addEventListener("click", () => act(button, async () => {
    await send("DELETE", button.dataset.delete);
    location.reload();
  }));
}
for (const button of document.querySelectorAll("[data-report]")) {
  button.addEventListener("click", () => act(button, async () => {
    const lines = await send("GET", button.dataset.report);
    button.previousElementSibling.textContent = lines.join("\n");
  }));
}
