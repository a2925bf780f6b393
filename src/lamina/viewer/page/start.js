// The head of the page, and what the address of the page remembers: the range in view, colours, rounding and theme.

const THEMES = ["auto", "light", "dark"];
let theme = "auto";

function recall() {
  const found = new URLSearchParams(location.hash.slice(1));
  const number = (name, rest) => {
    const value = Number(found.get(name) === null ? NaN : found.get(name));
    return Number.isSafeInteger(value) && value >= 0 ? value : rest;
  };
  if (ROUNDS.includes(number("round", 0))) diskState.round = number("round", 0);
  else diskState.round = ROUNDS[0];
  if (["content", "layer", "place"].includes(found.get("colours"))) diskState.by = found.get("colours");
  if (THEMES.includes(found.get("theme"))) theme = found.get("theme");
  return [number("start", 0), number("length", diskLength)];
}

function remember() {
  const told = new URLSearchParams();
  if (diskLanes.span < diskLength) {
    told.set("start", String(diskLanes.low));
    told.set("length", String(diskLanes.span));
  }
  if (diskState.round > GRAIN) told.set("round", String(diskState.round));
  if (diskState.by !== "content") told.set("colours", diskState.by);
  if (theme !== "auto") told.set("theme", theme);
  clearTimeout(remember.waiting);
  remember.waiting = setTimeout(() => history.replaceState(null, "", `#${told}`), 200);
}

function facts(disk) {
  const totals = disk.status.totals, extents = disk.rows.begins ? disk.rows.begins.reduce((sum, one) => sum + one, 0) : disk.rows.count;
  return [size(disk.size), disk.format, disk.layers.length > 1 ? counted(disk.layers.length, "layer") : null,
    counted(extents, "extent"), `${size(totals[0] + totals[1])} stored`].filter(Boolean).join("  \u00b7  ");
}

function buildHead() {
  const titles = disks.map((disk) => element("div", null, element("h1", { title: disk.title }, shortName(disk.title)), element("p", { class: "quiet" }, facts(disk))));
  if (difference) {
    const words = difference.rows.total ? `${exactSize(difference.rows.total)} of the second differ from the first` : "No difference";
    titles.push(element("p", { class: "differ" }, swatch(MODEL.palette.difference), words));
  }
  const switches = choice("Theme", THEMES.map((one) => [one, one[0].toUpperCase() + one.slice(1)]), theme, (chosen) => {
    theme = chosen;
    setTheme(chosen);
    remember();
  });
  byId("head").append(element("div", { class: "titles" }, titles), switches);
  byId("foot").append(`Made by Lamina ${MODEL.version}. This page is complete in itself and connects to nothing.`);
}

function start() {
  const [low, span] = recall();
  setTheme(theme);
  buildHead();
  buildDisk();
  buildFiles();
  buildChain();
  noDetails();
  diskLanes.show(low, span);
  document.documentElement.dataset.ready = "true";
}

start();
