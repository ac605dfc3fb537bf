// Each token says who guessed it: under the pointer, and where the slider stands. The tokens and the bar of its forward are shown with it.
hastenViews.define("decoding", (root) => {
  const slider = root.querySelector('[data-keep="decoding-token"]');
  if (!slider) return;
  const said = root.querySelector('[data-part="said"]'), tokens = [...root.querySelectorAll("[data-token]")];
  const bars = new Map([...root.querySelectorAll("[data-bar]")].map((bar) => [bar.dataset.bar, bar]));
  const written = new Map();
  for (const token of tokens) written.set(token.dataset.round, [...(written.get(token.dataset.round) ?? []), token]);
  let marked = [];
  const show = (token, words) => {
    for (const each of marked) each.classList.remove("hv-chosen", "hv-together");
    const round = token.dataset.round, bar = bars.get(round);
    marked = [token, ...(written.get(round) ?? []), ...(bar ? [bar] : [])];
    for (const each of marked.slice(1)) each.classList.add("hv-together");
    if (!words) token.classList.add("hv-chosen");
    said.textContent = words ?? token.title;
  };
  const chosen = () => tokens[Math.min(tokens.length, Number(slider.value)) - 1];
  const settle = () => {
    show(chosen());
    slider.setAttribute("aria-valuetext", `“${chosen().textContent}”. ${chosen().title}`);
  };
  const point = (event, choose) => {
    const token = event.target.closest?.("[data-token]"), bar = event.target.closest?.("[data-bar]");
    if (token && choose) slider.value = tokens.indexOf(token) + 1;
    if (token && choose) settle();
    else if (token) show(token);
    else if (bar && written.has(bar.dataset.bar)) show(written.get(bar.dataset.bar)[0], bar.title);
    else settle();
  };
  root.addEventListener("pointerover", (event) => point(event, false));
  root.addEventListener("pointerleave", settle);
  root.addEventListener("click", (event) => point(event, true));
  slider.addEventListener("input", settle);
  settle();
});
