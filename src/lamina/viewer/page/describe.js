// What is known of a range, in words: the panel of details, and one line for the tip.

function place(rows, row) {
  const file = MODEL.files[rows.file[row]];
  return `${shortName(file.name)} at ${hex(rows.offset[row])}`;
}

function statusLine(disk, rows, row) {
  const from = rows.start[row], to = rows.start[row + 1];
  const words = [range(from, to), size(to - from), statusWord(rows, row)];
  if (rows.file[row] >= 0) words.push(place(rows, row));
  if (disk.layers.length > 1) words.push(layerWord(rows, row));
  return words.join("  \u00b7  ");
}

function statusWord(rows, row) {
  const word = CONTENT_WORDS[CONTENT[CLASS_OF_FLAGS[rows.flags[row]]].key];
  return isCoarse(rows, row) ? `Several extents, rounded: ${word.toLowerCase()}` : word;
}

function layerWord(rows, row) {
  return rows.flags[row] & PRESENT ? `layer ${rows.depth[row]}` : "no layer";
}

function showDetails(title, colour, facts, more) {
  const list = element("dl", null);
  for (const [name, value] of facts) list.append(element("dt", null, name), element("dd", null, value));
  byId("details").replaceChildren(
    element("h2", { id: "details-title" }, "Details"),
    element("div", { "aria-live": "polite", class: "chosen" },
      element("h3", null, colour ? swatch(colour) : null, title), list, more || []));
}

function noDetails() {
  byId("details").replaceChildren(
    element("h2", { id: "details-title" }, "Details"),
    element("p", { class: "quiet" }, "Choose a range in a map. With the keyboard: Tab to a map, then the arrow keys, "
      + "+ and \u2212 to zoom, Enter to zoom to the range."));
}

function command(...words) {
  return element("code", { class: "command" }, words.map(quoted).join(" "));
}

// A range of a disk. `rounded`: the bytes of a block, if the row is one of a rounded view.
function describeStatus(disk, rows, row, position, rounded) {
  const from = rows.start[row], to = rows.start[row + 1], kind = CONTENT[CLASS_OF_FLAGS[rows.flags[row]]];
  const facts = [["Disk", `${shortName(disk.title)}${rounded > 1 ? `, rounded to ${size(rounded)}` : ""}`],
    ["Range", range(from, to)], ["Length", exactSize(to - from)]];
  facts.push(["Layer", rows.flags[row] & PRESENT ? layerName(disk, rows.depth[row]) : "none owns these bytes"]);
  if (rows.file[row] >= 0) {
    facts.push(["File", MODEL.files[rows.file[row]].name], ["In the file", range(rows.offset[row], rows.offset[row] + to - from)]);
  }
  const more = [element("p", { class: "quiet" }, CONTENT_TEXT[kind.key])];
  if (isCoarse(rows, row)) {
    facts.push(["Extents", `${whole(rows.begins[row])} begin here, counted in this page`]);
    CONTENT.forEach((one, index) => {
      if (rows.counts[index][row]) facts.push([`\u2003${CONTENT_WORDS[one.key]}`, exactSize(rows.counts[index][row])]);
    });
  } else if (rounded <= 1) {
    if (disk.direct) more.push(...explained(disk, rows, row, from));
    if (disk.words.length) more.push(command("lamina", "explain", "--guest", hex(from), ...disk.words));
  }
  showDetails(statusWord(rows, row), kind.colour, facts, more);
}

function layerName(disk, depth) {
  const layer = disk.layers[depth];
  return layer ? `${depth}: ${shortName(layer.name)} (${layer.format})` : String(depth);
}

// How a reader finds the byte at `position`: through the tables of each layer, down to the one that decides.
function explained(disk, rows, row, position) {
  const steps = [], decides = rows.depth[row], owned = rows.flags[row] & PRESENT;
  disk.layers.forEach((layer, depth) => {
    if (depth > decides) return;
    const words = route(layer, position), last = owned && depth === decides;
    const status = position >= layer.size ? "the disk of this layer ends before it" : last ? statusWord(rows, row).toLowerCase() : "unallocated";
    const end = last && rows.file[row] >= 0 ? `at ${hex(rows.offset[row])} of ${shortName(MODEL.files[rows.file[row]].name)}` : null;
    steps.push(element("li", null, element("b", null, `${shortName(layer.name)} (${layer.format}): ${status}`),
      [...words, end].filter(Boolean).map((one) => element("div", { class: "step" }, one))));
  });
  return steps.length ? [element("h4", null, "How a reader finds it"), element("ol", { class: "steps", start: "0" }, steps)] : [];
}

// The entries of the tables of a layer for the byte at `position`, as `lamina explain --guest` names them.
function route(layer, position) {
  const found = routeOf(layer);
  if (!found || position >= layer.size) return [];
  const entry = Math.floor(position / found.span), at = searched(found.entry, entry);
  const l1 = `L1 table, entry ${entry} at ${hex(found.l1 + 8 * entry)}`;
  if (at < 0) return [`${l1}: no L2 table`];
  const table = found.table[at], number = Math.floor(position % found.span / found.unit);
  return [`${l1}: the L2 table is at ${hex(table)}`, `L2 table, entry ${number} at ${hex(table + number * found.width)}`];
}

const routes = new Map();

function routeOf(layer) {
  if (!layer.route) return null;
  if (!routes.has(layer)) routes.set(layer, readRoute(layer.route));
  return routes.get(layer);
}

function searched(column, value) {
  let low = 0, high = column.length - 1;
  while (low <= high) {
    const middle = low + high >> 1;
    if (column[middle] === value) return middle;
    if (column[middle] < value) low = middle + 1;
    else high = middle - 1;
  }
  return -1;
}

// A part of a file. `guests`: the ranges of disks that it serves.
function describePart(file, map, row, position, guests) {
  const from = map.start[row], to = map.start[row + 1], kind = KINDS[map.kind[row]];
  const facts = [["File", file.name], ["Range", range(from, to)], ["Length", exactSize(to - from)]];
  if (file.cluster) facts.push(["Clusters", `from number ${whole(Math.floor(from / file.cluster))} on, ${size(file.cluster)} each`]);
  if (map.references[row] >= 0) facts.push(["References", `${map.references[row]} to each cluster`]);
  else if (map.grain > 1) facts.push(["References", `not stored in this page: what lies in ${size(map.grain)} is one part`]);
  for (const [words, action] of guests) facts.push(["Disk", action ? button(words, action, { class: "link" }) : words]);
  const more = [element("p", { class: "quiet" }, kind.text)];
  if (kind.name === "header" && file.header.length) {
    const list = element("dl", { class: "fields" }, file.header.map(([offset, length, name, text]) => [
      element("dt", null, element("span", { class: "quiet" }, hex(offset)), name), element("dd", null, text)]));
    more.push(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Fields of the header" }, list));
  }
  if (file.words.length) more.push(command("lamina", "explain", ...file.words, hex(position)));
  showDetails(kind.name[0].toUpperCase() + kind.name.slice(1), kind.colour, facts, more);
}

function describeRange(title, colour, from, to, facts) {
  showDetails(title, colour, [["Range", range(from, to)], ["Length", exactSize(to - from)], ...facts], []);
}
