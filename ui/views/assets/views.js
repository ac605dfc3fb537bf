// What all views share: they are started once, replaced without losing what the reader has opened, and heard of by events.
(() => {
  if (window.hastenViews) return;
  const kinds = {};
  let count = 0;

  function start(container) {
    for (const root of container.querySelectorAll("[data-view]")) {
      if (root.dataset.started) continue;
      root.dataset.started = String(++count);
      const emit = (name, detail) => root.dispatchEvent(new CustomEvent("hasten:" + name, { bubbles: true, detail }));
      kinds[root.dataset.view]?.(root, emit);
    }
  }

  // A listener on the whole page that ends with its view.
  function hear(root, name, act) {
    const listen = (event) => {
      if (!root.isConnected) return document.removeEventListener("hasten:" + name, listen);
      if ((event.detail.group ?? "") === (root.dataset.group ?? "") && !root.contains(event.target)) act(event.detail);
    };
    document.addEventListener("hasten:" + name, listen);
  }

  // New HTML in place of old. What the reader opened, scrolled, typed and chose stays.
  function replace(slot, html) {
    if (slot.hastenHtml === html) return;
    slot.hastenHtml = html;
    const kept = keep(slot);
    const fresh = document.createElement("template");
    fresh.innerHTML = html;
    const live = slot.querySelector("[data-live]"), next = fresh.content.querySelector("[data-live]");
    if (live && next && live.dataset.live === next.dataset.live) patch(slot.firstElementChild, fresh.content.firstElementChild);
    else {
      slot.replaceChildren(fresh.content);
      start(slot);
    }
    kept();
  }

  // Views that change many times a second keep their elements: only parts whose words differ are written.
  function patch(old, fresh) {
    const parts = new Map([...fresh.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
    for (const part of old.querySelectorAll("[data-part]")) {
      const now = parts.get(part.dataset.part);
      if (!now) continue;
      if (part.innerHTML !== now.innerHTML) part.innerHTML = now.innerHTML;
      for (const name of ["style", "class", "value", "hidden", "aria-valuenow"])
        if (now.hasAttribute(name)) part.setAttribute(name, now.getAttribute(name));
        else part.removeAttribute(name);
    }
  }

  // A slider that stood at its end stands at the end of what has grown since.
  const atEnd = (each) => each.type === "range" && each.value === each.max;

  function keep(slot) {
    const open = [...slot.querySelectorAll("details")].map((each) => each.open);
    const left = [...slot.querySelectorAll(".hv-scroll")].map((each) => each.scrollLeft);
    const typed = new Map([...slot.querySelectorAll("[data-keep]")].map((each) => [each.dataset.keep, [atEnd(each) ? null : each.value, each.checked]]));
    const focus = slot.contains(document.activeElement) ? document.activeElement.dataset.keep : null;
    return () => {
      slot.querySelectorAll("details").forEach((each, at) => (each.open = open[at] ?? each.open));
      slot.querySelectorAll(".hv-scroll").forEach((each, at) => (each.scrollLeft = left[at] ?? 0));
      for (const each of slot.querySelectorAll("[data-keep]")) {
        if (!typed.has(each.dataset.keep)) continue;
        const [value, checked] = typed.get(each.dataset.keep);
        [each.value, each.checked] = [value ?? each.max, checked];
        each.dispatchEvent(new Event("input", { bubbles: true }));
        if (each.dataset.keep === focus) each.focus();
      }
    };
  }

  window.hastenViews = { define: (name, begin) => (kinds[name] = begin), start, hear, replace };
})();
