// The library's form that makes new files of adapters.
import { act, send } from "/static/studio.js";

document.getElementById("make")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const { kind, to, rank, base, name } = event.target.elements;
  const adapters = [...document.querySelectorAll("[data-chosen]:checked")].map((box) => (
    { file: box.dataset.chosen, strength: Number(box.closest(".chosen").querySelector('[type="number"]').value) }
  ));
  const refusal = document.getElementById("refusal"), lines = document.getElementById("make-lines");
  refusal.hidden = true;
  lines.textContent = "";
  act(event.submitter, async () => {
    try {
      const request = { kind: kind.value, adapters, to: to.value, base: base.value.trim(), name: name.value.trim() };
      const report = await send("POST", "/api/adapters", { ...request, rank: rank.value === "" ? null : Number(rank.value) });
      lines.textContent = report.lines.join("\n");
      if (report.refusal) throw new Error(report.refusal);
    } catch (error) {
      refusal.textContent = error.message;
      refusal.hidden = false;
      throw error;
    }
  });
});
