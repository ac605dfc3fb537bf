// Keys of the page, and their list. Views have their own while they are focused; here is what works from anywhere.
(() => {
  if (window.hastenPage) return;
  window.hastenPage = true;
  const seen = (element) => element.offsetParent !== null && !element.disabled;
  const first = (selector) => [...document.querySelectorAll(selector)].find(seen);
  const typing = (element) => element.closest?.("input, textarea, select, [contenteditable=true], .cm-editor, [role=listbox], [role=combobox]");

  const keys = [
    ["Ctrl + Enter", "run what this tab is for"], ["Esc", "stop the run"], ["← →", "one frame back or on"], ["Space", "play or pause"],
    ["S", "swap left and right"], ["1 to 4", "wipe, side by side, blink, difference"], ["?", "this list"],
  ];

  function help() {
    let dialog = document.getElementById("hp-help");
    if (!dialog) {
      dialog = document.createElement("dialog");
      dialog.id = "hp-help";
      dialog.className = "hv";
      dialog.setAttribute("aria-labelledby", "hp-help-title");
      const rows = keys.map(([key, does]) => `<div><dt><kbd>${key}</kbd></dt><dd>${does}</dd></div>`).join("");
      dialog.innerHTML =
        `<h2 id="hp-help-title">Keys</h2><dl>${rows}</dl><form method="dialog"><button class="hv-button" autofocus>Close</button></form>`;
      dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
      (document.querySelector(".gradio-container .contain") ?? document.body).append(dialog);
    }
    if (dialog.open) dialog.close();
    else dialog.showModal();
  }

  // The player on this tab hears its keys even when nothing is focused.
  function toPlayer(event) {
    const player = first(".hv-player .hv-keys");
    if (!player) return false;
    player.dispatchEvent(new KeyboardEvent("keydown", { key: event.key, cancelable: true }));
    return true;
  }

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      const button = first("button.go");
      if (!button) return;
      event.preventDefault();
      document.activeElement?.blur?.(); // so that what was typed last is taken along
      setTimeout(() => button.click(), 60);
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && !typing(event.target)) return void first("button.halt")?.click();
    if (typing(event.target) || event.target.closest?.(".hv-player, [role=tab], [role=radio], [role=slider]")) return;
    if (event.key === "?") {
      event.preventDefault();
      return help();
    }
    if (event.key === " " && event.target.tagName === "BUTTON") return;
    const plays = ["ArrowLeft", "ArrowRight", " ", "s", "S", "1", "2", "3", "4"].includes(event.key);
    if (plays && toPlayer(event)) event.preventDefault();
  }, true);

  document.addEventListener("click", (event) => event.target.closest?.("[data-help]") && help());
})();
