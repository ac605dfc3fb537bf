hastenViews.define("canvas", (root) => {
  const slider = root.querySelector('[data-keep="canvas-step"]');
  if (!slider) return;
  const steps = Number(root.dataset.steps), tokens = [...root.querySelectorAll("[data-step]")];
  const all = root.querySelectorAll(".hv-words .hv-token").length;
  const show = () => {
    const step = Math.min(steps, Number(slider.value));
    let written = 0;
    for (const token of tokens) {
      const masked = Number(token.dataset.step) >= step;
      token.classList.toggle("hv-masked", masked);
      token.toggleAttribute("aria-hidden", masked);
      if (masked) token.setAttribute("aria-hidden", "true");
      else written += 1;
    }
    slider.setAttribute("aria-valuetext", `after step ${step} of ${steps}: ${written} of ${all} tokens written`);
    root.querySelector('[data-part="step"]').textContent = `${step} / ${steps}`;
    root.querySelector('[data-part="said"]').textContent = `${written} of ${all} tokens`;
  };
  let timer = 0;
  const stop = () => clearInterval(timer);
  const replay = () => {
    stop();
    slider.value = 0;
    show();
    timer = setInterval(() => {
      if (!root.isConnected || Number(slider.value) >= steps) return stop();
      slider.value = Number(slider.value) + 1;
      show();
    }, Math.max(60, Math.min(450, 3600 / steps)));
  };
  slider.addEventListener("input", show);
  for (const taken of ["pointerdown", "keydown"]) slider.addEventListener(taken, stop);
  root.querySelector("[data-replay]").addEventListener("click", replay);
  show();
  // After what the reader had chosen is back in place.
  if (root.dataset.play && !matchMedia("(prefers-reduced-motion: reduce)").matches) setTimeout(replay, 0);
});
