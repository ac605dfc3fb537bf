hastenViews.define("progress", () => {});

hastenViews.define("queue", (root, emit) => {
  for (const job of root.querySelectorAll("button[data-id]")) job.addEventListener("click", () => emit("select", { id: job.dataset.id }));
});

hastenViews.define("gallery", (root, emit) => {
  const box = root.querySelector('input[type="search"]');
  if (!box) return;
  const cards = [...root.querySelectorAll("li[data-words]")];
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const card of cards) {
      card.hidden = !words.every((word) => card.dataset.words.includes(word));
      found += card.hidden ? 0 : 1;
    }
    root.querySelector('[data-part="count"]').textContent = `${found} ${found === 1 ? "result" : "results"}`;
    root.querySelector("[data-none]").hidden = found > 0;
  });
  for (const card of cards) {
    const button = card.querySelector("button");
    button.addEventListener("click", () => emit("select", JSON.parse(button.dataset.send)));
  }
});
