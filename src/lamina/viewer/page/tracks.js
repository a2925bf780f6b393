// A track is a line of rows with a class each: what is drawn, and in which colours. Classes that the reader hides are drawn as
// background.

const CONTENT = MODEL.palette.content.map(([key, light, dark]) => ({ key, colour: [light, dark] }));
const CONTENT_WORDS = {
  data: "Stored", compressed: "Compressed", reserved: "Reserved, reads as zero", zero: "Zero", hole: "Hole",
};
const CONTENT_TEXT = {
  data: "Bytes that are stored as they are.",
  compressed: "Bytes that are stored compressed, and so have no place of their own.",
  reserved: "Storage is reserved for these bytes, and the file has a hole there: they read as zero.",
  zero: "A layer says that these bytes are zero; nothing is stored.",
  hole: "No layer owns these bytes: they read as zero.",
};
const HOLE = CONTENT.findIndex((one) => one.key === "hole");
const STEPS = 32;

function contentClass(flags) {
  const key = flags & COMPRESSED ? "compressed" : flags & DATA ? flags & ZERO ? "reserved" : "data" : flags & PRESENT ? "zero" : "hole";
  return CONTENT.findIndex((one) => one.key === key);
}

const CLASS_OF_FLAGS = Array.from({ length: 16 }, (_, flags) => contentClass(flags));

// `strong`: it stays visible where it is less than a pixel wide.
function contentClasses() {
  return CONTENT.map((one) => ({
    key: one.key, label: CONTENT_WORDS[one.key], colour: one.colour, strong: one.key !== "hole" && one.key !== "zero",
  }));
}

function layerClasses(disk) {
  const found = disk.layers.map((layer, depth) => ({
    key: `layer ${depth}`, label: `${depth}: ${shortName(layer.name)}`, colour: MODEL.palette.layers[depth % MODEL.palette.layers.length],
    strong: true,
  }));
  return [...found, { key: "hole", label: "No layer", colour: CONTENT[HOLE].colour, strong: false }];
}

// Colours from the beginning of something to its end, and one for what has no place there.
function placeClasses(rest) {
  const found = Array.from({ length: STEPS }, (_, step) => ({
    key: `place ${step}`, label: "", colour: mixed(MODEL.palette.sequence, step / (STEPS - 1)), strong: true,
  }));
  return [...found, { key: "nowhere", label: rest, colour: CONTENT[HOLE].colour, strong: false }];
}

function mixed(stops, at) {
  const position = at * (stops.length - 1), index = Math.min(Math.floor(position), stops.length - 2), part = position - index;
  const [low, high] = [channels(stops[index]), channels(stops[index + 1])];
  return "#" + low.map((one, channel) => Math.round(one + (high[channel] - one) * part).toString(16).padStart(2, "0")).join("");
}

function shortName(name) {
  return name.split("/").pop() || name;
}

// The track of the status of a disk, coloured by "content", "layer" or "place".
function statusTrack(disk, rows, by) {
  const track = { rows, start: rows.start, count: rows.count, mixture: null };
  if (by === "layer") {
    track.classes = layerClasses(disk);
    const last = track.classes.length - 1;
    track.classOf = (row) => rows.flags[row] & PRESENT ? Math.min(rows.depth[row], last - 1) : last;
  } else if (by === "place") {
    track.classes = placeClasses("Not stored at one place");
    track.classOf = (row) => rows.file[row] < 0 ? STEPS : stepOf(rows.offset[row], MODEL.files[rows.file[row]].size);
  } else {
    track.classes = contentClasses();
    track.classOf = (row) => CLASS_OF_FLAGS[rows.flags[row]];
    if (rows.counts) track.mixture = (row) => isCoarse(rows, row) ? rows.counts.map((column) => column[row]) : null;
  }
  return track;
}

function stepOf(offset, end) {
  return Math.min(Math.floor(offset / Math.max(end, 1) * STEPS), STEPS - 1);
}

function rangesTrack(ranges, label, colour, thin) {
  const faint = CONTENT[HOLE].colour;
  return {
    rows: ranges, start: ranges.start, count: ranges.count, thin, label, mixture: null,
    classes: [{ key: "rest", label: "", colour: faint, strong: false }, { key: label, label, colour, strong: true }],
    classOf: (row) => row % 2,
  };
}

const KINDS = MODEL.kinds.map(([name, key, text]) => ({ name, key, text, colour: MODEL.palette.structure[key] }));

function kindTrack(map) {
  return {
    rows: map, start: map.start, count: map.count, mixture: null,
    classes: KINDS.map((kind) => ({ key: kind.name, label: kind.name, colour: kind.colour, strong: kind.key !== "free" && kind.key !== "unknown" })),
    classOf: (row) => map.kind[row],
  };
}

// The parts of a file, coloured by where on the disk their bytes are.
function guestTrack(disk, index, fileSize) {
  return {
    rows: index, start: index.start, count: index.count, mixture: null, classes: placeClasses("Not data of the disk"),
    classOf: (row) => index.guest[row] < 0 ? STEPS : stepOf(index.guest[row], disk.size),
  };
}
