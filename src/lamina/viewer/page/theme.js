// Light and dark: the choice of the system, or that of the reader.

const darkSystem = window.matchMedia("(prefers-color-scheme: dark)");
const repaints = [];

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : darkSystem.matches;
}

// The variant of a colour [light, dark] for the present scheme.
function shade(colour) {
  return typeof colour === "string" ? colour : colour[isDark() ? 1 : 0];
}

function channels(colour) {
  const text = shade(colour);
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

function variable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function repaintAll() {
  for (const one of document.querySelectorAll(".swatch, .bar span")) {
    if (one.colours) one.style.backgroundColor = shade(one.colours);
  }
  for (const repaint of repaints) repaint();
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  repaintAll();
}

darkSystem.addEventListener("change", repaintAll);
