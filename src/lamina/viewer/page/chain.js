// The chain of images with their snapshots and bitmaps, from the top to the bottom, with sizes.

function bar(parts, whole, label) {
  const made = element("div", { class: "bar", role: "img", "aria-label": label });
  for (const [bytes, colour] of parts) {
    if (!bytes) continue;
    const part = element("span", null);
    part.style.width = `${Math.max(Math.min(bytes / Math.max(whole, 1), 1) * 100, 1)}%`;
    part.colours = colour;
    part.style.backgroundColor = shade(colour);
    made.append(part);
  }
  return made;
}

function layerItem(disk, depth) {
  const layer = disk.layers[depth], file = layer.file === null ? null : files[layer.file];
  const colour = MODEL.palette.layers[depth % MODEL.palette.layers.length];
  const largest = Math.max(...MODEL.files.map((one) => one.size));
  const notes = [layer.encrypted && "encrypted", layer.dirty && "not closed properly"].filter(Boolean);
  const item = element("li", null,
    element("div", { class: "layer" },
      element("div", { class: "name" }, swatch(colour), element("b", { title: layer.name }, shortName(layer.name)), element("span", { class: "badge" }, layer.format)),
      element("div", { class: "quiet" }, `disk ${size(layer.size)}, ${size(layer.owned)} of it stored here`
        + (layer.cluster ? `, clusters of ${size(layer.cluster)}` : "") + notes.map((one) => `, ${one}`).join("")),
      file ? element("div", { class: "quiet" }, `file ${size(file.size)}${file.allocated === null ? "" : `, ${size(file.allocated)} on disk`}`) : null,
      file ? bar([[file.size, colour]], largest, `${size(file.size)} of ${size(largest)}, the largest file`) : null));
  const inner = [
    ...layer.snapshots.map((one) => element("li", null, element("div", { class: "name" }, element("span", { class: "badge" }, "snapshot"), element("b", null, one.name || one.id)),
      element("div", { class: "quiet" }, `id ${one.id}, disk ${size(one.size)}${one.state ? `, state of the machine ${size(one.state)}` : ""}, ${moment(one.date)}`))),
    ...layer.bitmaps.map((name) => element("li", null, element("div", { class: "name" }, element("span", { class: "badge" }, "bitmap"), element("b", null, name)),
      dirtyOf(disk, depth, name))),
  ];
  if (layer.omitted) inner.push(element("li", { class: "quiet" }, `and ${whole(layer.omitted)} more`));
  if (inner.length) item.append(element("ul", { class: "inner" }, inner));
  if (file && file.totals) {
    const only = file.totals.filter(([kind]) => KINDS[kind].name === "guest data of snapshots");
    if (layer.snapshots.length) item.firstChild.append(element("div", { class: "quiet" }, `snapshots alone keep ${size(only.length ? only[0][1] : 0)}`));
  }
  if (depth + 1 < disk.layers.length) item.append(element("ul", { class: "below" }, layerItem(disk, depth + 1)));
  return item;
}

function dirtyOf(disk, depth, name) {
  const found = depth ? null : disk.bitmaps.find((one) => one.name === name);
  return found ? element("div", { class: "quiet" }, `${size(found.ranges.total)} dirty, granularity ${size(found.granularity)}`) : null;
}

function moment(seconds) {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? `${seconds} s since 1970` : date.toISOString().slice(0, 16).replace("T", " ") + " UTC";
}

function buildChain() {
  const section = byId("chain");
  section.append(element("h2", { id: "chain-title" }, disks.length > 1 ? "The chains" : "The chain"));
  for (const disk of disks) {
    if (disks.length > 1) section.append(element("h3", null, shortName(disk.title)));
    if (disk.layers.length) section.append(element("ul", { class: "tree" }, layerItem(disk, 0)));
  }
}
