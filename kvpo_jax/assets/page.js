"use strict";
// Without this the page lacks the buttons and the order of tables, and nothing else.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
for (const video of document.querySelectorAll("video")) {
  // The controls cover a small video: they show when it is pointed at.
  video.controls = false;
  video.tabIndex = 0;
  if (still) { video.autoplay = false; video.pause(); }
  if (!video.autoplay) {
    const middle = () => { video.currentTime = video.duration / 2; };  // a first frame says little
    if (video.readyState) middle(); else video.addEventListener("loadedmetadata", middle, { once: true });
  }
  for (const name of ["mouseenter", "focus", "touchstart"])
    video.addEventListener(name, () => { video.controls = true; }, { passive: true });
  for (const name of ["mouseleave", "blur"])
    video.addEventListener(name, () => { video.controls = false; });
}
for (const button of document.querySelectorAll("button.play")) {
  const place = button.closest(".gallery") || button.closest("p").nextElementSibling;
  const videos = [...place.querySelectorAll("video")];
  if (!videos.length) continue;
  button.hidden = false;
  const name = () => { button.textContent = videos.some(v => !v.paused) ? "Pause all" : "Play all"; };
  for (const video of videos) for (const event of ["play", "pause"]) video.addEventListener(event, name);
  button.addEventListener("click", () => {
    const play = videos.every(v => v.paused);
    for (const video of videos) if (play) { video.currentTime = 0; video.play(); } else video.pause();
  });
  name();
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const order = head.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const value = row => row.cells[column].textContent;
      const compare = (a, b) => column ? parseFloat(value(a)) - parseFloat(value(b)) : value(a).localeCompare(value(b));
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...(order === "ascending" ? rows : rows.reverse()));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
