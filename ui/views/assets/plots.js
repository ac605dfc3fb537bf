// Drawings that answer: cells say what they are, points can be chosen, lines seek.
(() => {
  // Cells have their words in <title>; the line below repeats them, for touch and for who cannot wait for a tooltip.
  function cells(root) {
    const said = root.querySelector(".hv-said");
    if (!said) return;
    const tell = (event) => {
      const words = event.target.closest?.("g, circle")?.querySelector("title")?.textContent;
      said.textContent = words ?? said.dataset.said;
    };
    root.addEventListener("pointerover", tell);
    root.addEventListener("click", tell);
  }

  hastenViews.define("timeline", (root) => {
    cells(root);
    root.querySelector('[data-do="download"]')?.addEventListener("click", (event) => {
      const { json, name } = event.currentTarget.dataset;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([json], { type: "application/json" }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  });
  hastenViews.define("density", cells);

  hastenViews.define("front", (root, emit) => {
    const points = [...root.querySelectorAll("button.hv-point")], said = root.querySelector(".hv-said");
    const tell = (point) => (said.textContent = point ? point.getAttribute("aria-label") : chosen() ?? said.dataset.said);
    const chosen = () => root.querySelector('.hv-point[aria-pressed="true"]')?.getAttribute("aria-label");
    // Points overlap: the one whose middle is nearest to the pointer is meant.
    const nearest = (event) => {
      const away = (point) => {
        const box = point.getBoundingClientRect();
        return Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
      };
      return points.reduce((best, point) => (away(point) < away(best) ? point : best));
    };
    points.forEach((point, at) => {
      point.addEventListener("pointerenter", () => tell(point));
      point.addEventListener("pointerleave", () => tell(null));
      point.addEventListener("click", (event) => {
        const one = event.detail ? nearest(event) : point;
        for (const each of points) each.setAttribute("aria-pressed", each === one);
        tell(one);
        emit("select", { number: Number(one.dataset.number), recipe: one.dataset.recipe });
      });
      point.addEventListener("keydown", (event) => {
        const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: points.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        const next = points[Math.min(points.length - 1, Math.max(0, to))];
        for (const each of points) each.tabIndex = each === next ? 0 : -1;
        next.focus();
        tell(next);
      });
    });
  });

  hastenViews.define("metrics", (root, emit) => {
    const sliders = [...root.querySelectorAll(".hv-seek")];
    const show = (frame) => {
      for (const slider of sliders) {
        const all = Number(slider.max) + 1, values = slider.dataset.values.split(" dB").join("").split(" ");
        slider.value = frame;
        slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${all}, ${values[frame]} dB`);
        slider.closest(".hv-area").style.setProperty("--at", `${(100 * (frame + 0.5)) / all}%`);
      }
    };
    for (const slider of sliders)
      slider.addEventListener("input", () => {
        show(Number(slider.value));
        emit("seek", { frame: Number(slider.value), group: root.dataset.group ?? "" });
      });
    if (sliders.length) show(0);
    hastenViews.hear(root, "frame", (detail) => show(detail.frame));
  });

  hastenViews.define("loss", (root) => {
    const box = root.querySelector('[data-keep="loss-log"]');
    const show = () => {
      for (const plot of root.querySelectorAll("[data-axis]")) plot.hidden = (plot.dataset.axis === "log") !== Boolean(box?.checked);
    };
    box?.addEventListener("input", show);
    show();
  });
})();
