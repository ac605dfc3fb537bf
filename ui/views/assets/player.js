hastenViews.define("player", (root, emit) => {
  const keys = root.querySelector(".hv-keys");
  if (!keys) return;
  const stage = root.querySelector(".hv-stage");
  const find = (name) => root.querySelector(`[data-do="${name}"]`);
  const tell = (name, words) => (root.querySelector(`[data-part="${name}"]`).textContent = words);
  const wipe = root.querySelector(".hv-wipe"), time = find("time"), gain = find("gain");
  const frames = Number(root.dataset.frames), fps = Number(root.dataset.fps);
  const side = (name) => stage.querySelector(".hv-" + name + " .hv-media");
  const both = () => [side("a"), side("b")];
  let playing = false, blink = 0;

  // --- time -----------------------------------------------------------------------------------
  // A frame is sought at its middle, so that rounding never shows its neighbour.
  const shown = () => Math.min(frames - 1, Math.max(0, Math.floor(side("a").currentTime * fps + 1e-3)));

  function seek(frame) {
    pause();
    const to = ((Math.round(frame) % frames) + frames) % frames;
    for (const media of both()) media.currentTime = (to + 0.5) / fps;
    report(to);
  }

  function report(frame) {
    if (!time) return;
    time.value = frame;
    time.setAttribute("aria-valuetext", `frame ${frame + 1} of ${frames}`);
    tell("frame", `${frame + 1} / ${frames}`);
    emit("frame", { frame, group: root.dataset.group ?? "" });
  }

  function pause() {
    if (!time) return;
    playing = false;
    for (const media of both()) media.pause();
    press();
  }

  function play() {
    if (!time) return;
    playing = true;
    side("b").currentTime = side("a").currentTime;
    Promise.all(both().map((media) => media.play())).catch(pause);
    press();
    requestAnimationFrame(follow);
  }

  function press() {
    root.classList.toggle("hv-playing", playing);
    find("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  }

  // The right clip follows the left one: a little faster or slower, and by a jump when it is a frame away.
  function follow() {
    if (!playing || !root.isConnected) return;
    const [a, b] = both(), away = b.currentTime - a.currentTime;
    if (Math.abs(away) < (a.duration || 1) / 2) {
      if (Math.abs(away) > 0.9 / fps) b.currentTime = a.currentTime;
      b.playbackRate = Math.abs(away) > 0.1 / fps ? Math.min(1.15, Math.max(0.85, 1 - 4 * away)) : 1;
    }
    report(shown());
    requestAnimationFrame(follow);
  }

  // --- views ----------------------------------------------------------------------------------
  const modes = [...root.querySelectorAll('input[type="radio"]')];
  for (const mode of modes) mode.name = "hv-mode-" + root.dataset.started;

  function look(mode) {
    stage.dataset.mode = mode;
    for (const each of modes) each.checked = each.value === mode;
    root.querySelector(".hv-gain").hidden = mode !== "difference";
    wipe.disabled = mode !== "wipe";
    clearInterval(blink);
    stage.classList.remove("hv-first");
    if (mode === "blink")
      blink = setInterval(() => (root.isConnected ? stage.classList.toggle("hv-first") : clearInterval(blink)), 600);
  }

  function cut() {
    stage.style.setProperty("--cut", wipe.value + "%");
    wipe.setAttribute("aria-valuetext", `${Math.round(wipe.value)} % left`);
  }

  function amplify() {
    const times = 2 ** Number(gain.value);
    stage.style.setProperty("--gain", times);
    gain.setAttribute("aria-valuetext", `${times} times`);
    tell("gain", `${times}×`);
  }

  function choose(name) {
    const select = find(name), media = side(name), label = select.selectedOptions[0].textContent;
    if (media.getAttribute("src") !== select.value) media.src = select.value;
    media.setAttribute(media.tagName === "IMG" ? "alt" : "aria-label", label);
    media.parentElement.querySelector(".hv-tag").textContent = label;
    root.setAttribute("aria-label", `Comparison of ${["a", "b"].map((each) => find(each).selectedOptions[0].textContent).join(" and ")}`);
  }

  function swap() {
    const frame = time ? Number(time.value) : 0;
    const [a, b] = [find("a"), find("b")];
    [a.selectedIndex, b.selectedIndex] = [b.selectedIndex, a.selectedIndex];
    pause();
    choose("a");
    choose("b");
    if (time) seek(frame);
  }

  // --- what the reader does -------------------------------------------------------------------
  const acts = { play: () => (playing ? pause() : play()), previous: () => seek(Number(time.value) - 1), next: () => seek(Number(time.value) + 1), swap };
  for (const [name, act] of Object.entries(acts)) find(name)?.addEventListener("click", act);
  time?.addEventListener("input", () => seek(Number(time.value)));
  gain.addEventListener("input", amplify);
  wipe.addEventListener("input", cut);
  // After a drag the arrow keys step through frames again; who reaches the slider by Tab moves the wipe with them.
  wipe.addEventListener("pointerup", () => keys.focus({ preventScroll: true }));
  for (const mode of modes) mode.addEventListener("change", () => look(mode.value));
  for (const name of ["a", "b"]) find(name).addEventListener("change", () => (pause(), choose(name), time && seek(Number(time.value))));

  keys.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const plain = event.target === keys || event.target.tagName === "BUTTON";
    const on = {
      ArrowLeft: plain && time && acts.previous, ArrowRight: plain && time && acts.next,
      ",": time && acts.previous, ".": time && acts.next, " ": event.target === keys && time && acts.play, c: swap, s: swap,
      1: () => look("wipe"), 2: () => look("side"), 3: () => look("blink"), 4: () => look("difference"),
    };
    const act = on[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });
  hastenViews.hear(root, "seek", (detail) => time && seek(detail.frame));
  root.hastenDrift = () => Math.abs(side("a").currentTime - side("b").currentTime) * fps; // in frames, for tests

  look(stage.dataset.mode);
  cut();
  amplify();
  if (time) seek(0);
});
