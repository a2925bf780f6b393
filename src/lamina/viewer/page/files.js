// The maps of the files of the layers: what each part is, and in what order the disk uses them.

const files = MODEL.files.map((told, number) => ({ ...told, number, parts: null, guests: new Map() }));
const fileState = { number: -1, by: "kind" };
let fileLanes = null;

function partsOf(file) {
  if (!file.parts && file.map) file.parts = readMap(file.map, file.size);
  return file.parts;
}

// The places in a file that a disk uses, by their offsets: edges, and the byte of the disk for each row, -1 for none.
function guestIndex(file, disk) {
  if (!file.guests.has(disk)) {
    const { rows } = disk, used = [];
    for (let row = 0; row < rows.count; row++) if (rows.file[row] === file.number) used.push(row);
    let sorted = true;
    for (let at = 1; at < used.length && sorted; at++) sorted = rows.offset[used[at]] >= rows.offset[used[at - 1]];
    if (!sorted) used.sort((one, other) => rows.offset[one] - rows.offset[other]);
    const start = [0], guest = [];
    for (const row of used) {
      const at = Math.max(rows.offset[row], start[start.length - 1]), end = rows.offset[row] + rows.start[row + 1] - rows.start[row];
      if (end <= at) continue;
      if (at > start[start.length - 1]) {
        guest.push(-1);
        start.push(at);
      }
      guest.push(rows.start[row] + at - rows.offset[row]);
      start.push(Math.min(end, file.size));
    }
    if (start[start.length - 1] < file.size) {
      guest.push(-1);
      start.push(file.size);
    }
    file.guests.set(disk, { start: Float64Array.from(start), guest: Float64Array.from(guest), count: guest.length });
  }
  return file.guests.get(disk);
}

function diskOf(file) {
  return disks.find((disk) => disk.layers.some((layer) => layer.file === file.number)) || disks[0];
}

// In how many runs a file stores what the disk uses of it.
function runsOf(file, disk) {
  const { rows } = disk;
  let runs = 0, expected = -1;
  for (let row = 0; row < rows.count; row++) {
    if (rows.file[row] !== file.number) continue;
    if (rows.offset[row] !== expected) runs++;
    expected = rows.offset[row] + rows.start[row + 1] - rows.start[row];
  }
  return runs;
}

function guestsAt(file, position, end) {
  const found = [];
  for (const disk of disks) {
    const index = guestIndex(file, disk);
    for (let row = rowAt(index, position); row < index.count && index.start[row] < end && found.length < 8; row++) {
      if (index.guest[row] < 0) continue;
      const from = index.guest[row] + Math.max(position - index.start[row], 0), length = Math.min(index.start[row + 1], end) - Math.max(index.start[row], position);
      const track = () => diskTracks().findIndex((one) => one.disk === disk && one.round === 1);
      const name = disks.length > 1 ? `${shortName(disk.title)}: ` : "";
      found.push([`${name}${range(from, from + length)}`, () => {
        diskLanes.choose({ track: track(), position: from });
        diskLanes.zoomToChosen();
        diskLanes.canvas.focus();
      }]);
    }
  }
  return found;
}

function buildFiles() {
  const drawn = files.filter((file) => file.map);
  const section = byId("file");
  if (!drawn.length) {
    section.remove();
    return;
  }
  if (!drawn.some((file) => file.number === fileState.number)) fileState.number = drawn[0].number;
  const body = element("div", { id: "file-body", role: drawn.length > 1 ? "tabpanel" : false });
  section.append(element("h2", { id: "file-title" }, drawn.length > 1 ? "The files" : "The file"));
  if (drawn.length > 1) section.append(fileTabs(drawn, () => showFile(body)));
  section.append(body);
  showFile(body);
}

function fileTabs(drawn, changed) {
  const tabs = element("div", { class: "choice tabs", role: "tablist", "aria-label": "Files" });
  const choose = (file) => {
    fileState.number = file.number;
    for (const tab of tabs.children) {
      const chosen = tab.dataset.key === String(file.number);
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    changed();
  };
  for (const file of drawn) {
    const chosen = file.number === fileState.number;
    tabs.append(button(shortName(file.name), () => choose(file), {
      role: "tab", "aria-selected": String(chosen), "aria-controls": "file-body", "data-key": file.number, tabindex: chosen ? "0" : "-1",
    }));
  }
  tabs.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const at = drawn.findIndex((file) => file.number === fileState.number), next = (at + step + drawn.length) % drawn.length;
    choose(drawn[next]);
    tabs.children[next].focus();
  });
  return tabs;
}

function showFile(body) {
  const file = files[fileState.number], map = partsOf(file), disk = diskOf(file);
  const track = () => fileState.by === "kind" ? kindTrack(map) : guestTrack(disk, guestIndex(file, disk), file.size);
  let built = track();
  if (fileLanes) repaints.splice(repaints.indexOf(fileLanes.repaint), 1);
  fileLanes = new Lanes({
    name: `Map of the file ${shortName(file.name)}`, length: file.size, tracks: () => [built], moved: () => {},
    describe: (one, row) => fileState.by === "kind" ? `${range(map.start[row], map.start[row + 1])}  \u00b7  ${size(map.start[row + 1] - map.start[row])}  \u00b7  ${KINDS[map.kind[row]].name}`
      : one.rows.guest[row] < 0 ? "Not data of the disk" : `${range(one.start[row], one.start[row + 1])}  \u00b7  disk from ${hex(one.rows.guest[row])}`,
    select: (one, row, position) => {
      const part = rowAt(map, position);
      describePart(file, map, part, position, guestsAt(file, Math.max(map.start[part], one.start[row]), Math.min(map.start[part + 1], one.start[row + 1])));
    },
  });
  const bytes = KINDS.map(() => 0);
  for (const [kind, total] of file.totals) bytes[kind] = total;
  let key = legend(fileLanes, built, bytes);
  const by = choice("Colours of the file", [["kind", "Kind"], ["disk", "Place on the disk"]], fileState.by, (chosen) => {
    fileState.by = chosen;
    fileLanes.hidden.clear();
    built = track();
    const fresh = legend(fileLanes, built, chosen === "kind" ? bytes : null);
    key.replaceWith(fresh);
    key = fresh;
    fileLanes.draw();
  });
  const runs = runsOf(file, disk), facts = [exactSize(file.size)];
  if (file.allocated !== null) facts.push(`${size(file.allocated)} on disk`);
  if (runs) facts.push(`the disk's data lies in ${counted(runs, "run")}`);
  if (map.grain > 1) facts.push(`what lies in ${size(map.grain)} is drawn as one`);
  const omitted = file.omitted ? [element("p", { class: "quiet" }, `This page has no room for ${whole(file.omitted)} more fields and problems.`)] : [];
  body.replaceChildren(element("div", { class: "controls" }, element("div", { class: "field" }, element("span", null, "Colours"), by)),
    element("p", { class: "quiet" }, facts.join(", ") + "."),
    ...file.problems.map((one) => element("p", { class: "problem" }, one)),
    ...omitted, fileLanes.root, key);
  fileLanes.draw();
}
