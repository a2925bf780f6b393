// The map of the disk: one image or two, exact and rounded, with a dirty bitmap and the differences.

const disks = MODEL.disks.map((told) => ({ ...told, rows: readStatus(told.status), rounded: null }));
const difference = MODEL.difference && {
  ...MODEL.difference, rows: readRanges(MODEL.difference.ranges, MODEL.disks[1].size),
};
const diskState = { by: "content", round: 1, bitmap: "" };
const diskLength = Math.max(...disks.map((disk) => disk.size), 1);
let diskLanes = null, diskLegend = null, roundWords = null, roundName = null, builtTracks = null;

// The granularities of the slider: exact first. A page whose rows are rounded already begins there.
const GRAIN = Math.max(...disks.map((disk) => disk.rows.grain));
const ROUNDS = [GRAIN];
for (let unit = Math.max(512, GRAIN * 2); unit <= 2 ** 26 && unit / 2 < diskLength; unit *= 2) ROUNDS.push(unit);

function roundingName(unit) {
  return unit === 1 ? "exact" : size(unit);
}

function roundedRows(disk) {
  if (disk.rounded === null || disk.rounded.unit !== diskState.round) {
    disk.rounded = { unit: diskState.round, rows: align(disk.rows, diskState.round) };
  }
  return disk.rounded.rows;
}

function diskTracks() {
  if (builtTracks) return builtTracks;
  const found = [];
  disks.forEach((disk, index) => {
    found.push({ ...statusTrack(disk, disk.rows, diskState.by), disk, round: 1 });
    if (diskState.round > GRAIN) found.push({ ...statusTrack(disk, roundedRows(disk), diskState.by), disk, round: diskState.round });
    const [number, bitmap] = diskState.bitmap.split(" ").map(Number);
    if (diskState.bitmap && number === index) {
      const told = disk.bitmaps[bitmap];
      told.rows = told.rows || readRanges(told.ranges, disk.size);
      found.push({ ...rangesTrack(told.rows, "Dirty", MODEL.palette.dirty, true), bitmap: told });
    }
  });
  if (difference) found.push(rangesTrack(difference.rows, "Different", MODEL.palette.difference, true));
  builtTracks = found;
  return found;
}

function diskChanged() {
  builtTracks = null;
  const fresh = diskKey();
  diskLegend.replaceWith(fresh);
  diskLegend = fresh;
  roundWords.textContent = roundingSentence();
  diskLanes.draw();
  showRows();
  remember();
}

function diskKey() {
  const tracks = diskTracks(), bytes = diskState.by === "content" && disks.length === 1 ? disks[0].status.totals : null;
  const lines = element("div", { class: "keys" });
  const names = tracks.map((track) => trackName(track));
  if (names.length > 1) lines.append(element("p", { class: "quiet" }, `In each line, from above: ${names.join("; ")}.`));
  lines.append(legend(diskLanes, tracks[0], bytes));
  for (const track of tracks.filter((one) => one.thin)) {
    const told = track.bitmap ? `dirty in ${track.bitmap.name}` : "different";
    lines.lastChild.append(element("span", { class: "entry" }, swatch(track.classes[1].colour), told, element("span", { class: "quiet" }, size(track.rows.total))));
  }
  return lines;
}

function trackName(track) {
  if (track.bitmap) return `the bitmap ${track.bitmap.name}`;
  if (!track.disk) return "differences";
  const name = disks.length > 1 ? shortName(track.disk.title) + ", " : "";
  return name + (track.round > 1 ? `rounded to ${size(track.round)}` : GRAIN > 1 ? `in blocks of ${size(GRAIN)}` : "exact");
}

// What rounding changes, in numbers.
function roundingSentence() {
  if (diskState.round <= GRAIN) {
    return GRAIN > 1 ? `There are too many extents for one page: this one is exact down to ${size(GRAIN)}, and has counts below that.`
      : "Exact, to the byte.";
  }
  return disks.map((disk) => {
    const rounded = roundedRows(disk), before = storedBytes(disk.rows), after = storedBytes(rounded);
    const change = after > before ? `${exactSize(after - before)} more than exactly` : "as exactly";
    return `${disks.length > 1 ? shortName(disk.title) + ": " : ""}${counted(rounded.count, "extent")} in place of ${whole(disk.rows.count)}; `
      + `${exactSize(after)} to read, ${change}.`;
  }).join(" ");
}

// The bytes that a reader of content must read.
function storedBytes(rows) {
  let total = 0;
  for (let row = 0; row < rows.count; row++) {
    if (rows.counts) total += rows.counts[0][row] + rows.counts[1][row];
    else if (!(rows.flags[row] & ZERO)) total += rows.start[row + 1] - rows.start[row];
  }
  return total;
}

function selectOnDisk(track, row, position) {
  const from = track.start[row], to = track.start[row + 1];
  if (track.disk) describeStatus(track.disk, track.rows, row, position, track.round);
  else if (track.bitmap) {
    describeRange(row % 2 ? "Dirty" : "Clean", row % 2 ? MODEL.palette.dirty : null, from, to,
      [["Bitmap", track.bitmap.name], ["Granularity", size(track.bitmap.granularity)]]);
  } else {
    const how = difference.content ? `compared by content in blocks of ${size(difference.granularity)}` : "compared by status alone";
    describeRange(row % 2 ? "Different" : "Equal", row % 2 ? MODEL.palette.difference : null, from, to, [["Compared", how]]);
  }
}

function lineOnDisk(track, row) {
  if (track.disk) return statusLine(track.disk, track.rows, row);
  const word = row % 2 ? track.label : track.bitmap ? "Clean" : "Equal";
  return `${range(track.start[row], track.start[row + 1])}  \u00b7  ${size(track.start[row + 1] - track.start[row])}  \u00b7  ${word}`;
}

function buildDisk() {
  diskLanes = new Lanes({
    name: "Map of the disk", length: diskLength, tracks: diskTracks, describe: lineOnDisk, select: selectOnDisk,
    moved: () => { showRows(); remember(); },
  });
  const by = choice("Colours of the disk", [["content", "Content"], ["layer", "Layer"], ["place", "Place in the file"]], diskState.by,
    (key) => { diskState.by = key; diskLanes.hidden.clear(); diskChanged(); });
  roundName = element("output", { for: "round" }, roundingName(diskState.round));
  const slider = element("input", {
    type: "range", id: "round", min: 0, max: ROUNDS.length - 1, step: 1, value: Math.max(ROUNDS.indexOf(diskState.round), 0),
    "aria-valuetext": roundingName(diskState.round),
    oninput: () => {
      diskState.round = ROUNDS[slider.value];
      roundName.textContent = roundingName(diskState.round);
      slider.setAttribute("aria-valuetext", roundingName(diskState.round));
      diskChanged();
    },
  });
  roundWords = element("p", { class: "quiet", "aria-live": "polite" }, roundingSentence());
  const controls = element("div", { class: "controls" },
    element("div", { class: "field" }, element("span", null, "Colours"), by),
    element("div", { class: "field" }, element("label", { for: "round" }, "Rounding"), slider, roundName), bitmapField());
  diskLegend = diskKey();
  const problems = disks.flatMap((disk) => disk.problems.map((one) => element("p", { class: "problem" }, `${disks.length > 1 ? `${shortName(disk.title)}: ` : ""}${one}`)));
  byId("disk").append(element("h2", { id: "disk-title" }, "The disk"), controls, ...problems, roundWords, diskLanes.root, diskLegend);
}

function bitmapField() {
  const all = disks.flatMap((disk, number) => disk.bitmaps.map((one, index) => [`${number} ${index}`, (disks.length > 1 ? `${shortName(disk.title)}: ` : "") + one.name]));
  if (!all.length) return null;
  const select = element("select", { id: "bitmap", onchange: () => { diskState.bitmap = select.value; diskChanged(); } },
    element("option", { value: "" }, "none"), all.map(([key, name]) => element("option", { value: key, selected: key === diskState.bitmap }, name)));
  return element("div", { class: "field" }, element("label", { for: "bitmap" }, "Dirty bitmap"), select);
}

// The rows in view as text.
const MOST_ROWS = 100;

function showRows() {
  const parts = diskTracks().filter((track) => track.disk || track.thin).map((track) => {
    const first = rowAt(track, diskLanes.low), body = [];
    let row = first;
    for (; row < track.count && track.start[row] < diskLanes.low + diskLanes.span && body.length < MOST_ROWS; row++) {
      if (track.disk || row % 2) body.push(rowOf(track, row));
    }
    const rest = Math.max(rowAt(track, diskLanes.low + diskLanes.span - 1) + 1 - row, 0);
    const heads = track.disk ? ["Start", "Length", "Content", "Layer", "In the file"] : ["Start", "Length"];
    return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": trackName(track) }, element("table", null,
      element("caption", null, trackName(track) + (rest ? `: the first ${MOST_ROWS} of ${counted(row - first + rest, "row")} in view` : "")),
      element("thead", null, element("tr", null, heads.map((one) => element("th", { scope: "col" }, one)))),
      element("tbody", null, body)));
  });
  byId("rows").replaceChildren(element("h2", { id: "rows-title" }, "Extents in view"), element("div", { class: "tables" }, parts));
}

function rowOf(track, row) {
  const rows = track.rows, from = track.start[row], cells = [size(track.start[row + 1] - from)];
  if (track.disk) {
    cells.push(statusWord(rows, row), rows.flags[row] & PRESENT ? String(rows.depth[row]) : "\u2013", rows.file[row] < 0 ? "\u2013" : place(rows, row));
  }
  const number = diskTracks().indexOf(track);
  const open = button(hex(from), () => diskLanes.choose({ track: number, position: from }), { class: "link" });
  return element("tr", null, element("th", { scope: "row", class: "number" }, open), cells.map((one) => element("td", null, one)));
}
